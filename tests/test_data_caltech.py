"""The Caltech builders on small archives of the real ones' form; other TFDS names."""

import dataclasses
import hashlib
import io
import pathlib
import socket
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from file_server import serving
from test_data_images import encoded, photograph

from fidelity_jax import data
from fidelity_jax.data import archives, caltech, images, splits
from fidelity_jax.errors import RunError, UsageError

CALTECH101 = pathlib.Path(__file__).parents[2] / "shared" / "caltech101"
CLASSES = ("001.ak47", "002.american-flag", "257.clutter")
TINY = {name: (frozenset({1, 3}), frozenset({2})) for name in CLASSES}
TINY101 = {name: (frozenset({1, 3}), frozenset({2})) for name in ("Faces", "yin_yang")}


def jpeg(seed, grey=False):
  """Returns a small JPEG."""
  picture = photograph(20 + seed, 30, seed)
  return encoded(picture[..., 0] if grey else picture, format="JPEG")


def caltech256_files():
  """Returns names and bytes as the real archive has them, odd ones included."""
  files = {}
  for number in range(1, 6):
    files[f"001.ak47/001_{number:04d}.jpg"] = jpeg(number)
    # A class folder whose name is not quite the list's.
    files[f"002.american flag/002_{number:04d}.jpg"] = jpeg(10 + number)
    files[f"257.clutter/257_{number:04d}.jpg"] = jpeg(20 + number, grey=number == 4)
  files["001.ak47/RENAME2"] = b"#!/bin/sh\nmv a b\n"
  files["001.ak47/greg/vision309/001_0009.jpg"] = jpeg(40)
  files["001.ak47/002_0007.jpg"] = jpeg(41)
  files["readme.txt"] = b"hello"
  return {f"256_ObjectCategories/{name}": content for name, content in files.items()}


def caltech101_files():
  """Returns the same for Caltech-101."""
  files = {}
  for name in ("Faces", "yin_yang", "BACKGROUND_Google"):
    for number in range(1, 5):
      files[f"{name}/image_{number:04d}.jpg"] = jpeg(number)
  files["BACKGROUND_Google/tmp"] = b""
  return {f"101_ObjectCategories/{name}": content for name, content in files.items()}


def tar(files, mode="w"):
  """Returns the bytes of a tar archive."""
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode=mode) as archive:
    for name, content in files.items():
      member = tarfile.TarInfo(name)
      member.size = len(content)
      archive.addfile(member, io.BytesIO(content))
  return buffer.getvalue()


def zipped(files):
  """Returns the bytes of a zip archive."""
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, "w") as archive:
    for name, content in files.items():
      archive.writestr(name, content)
  return buffer.getvalue()


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
  """Replaces the lists by small ones; keeps out of the user's cache."""
  monkeypatch.setenv("FIDELITY_JAX_CACHE", str(tmp_path / "cache"))
  lists = {"caltech256": TINY, "caltech101": TINY101}
  monkeypatch.setattr(splits, "authors_lists", lists.__getitem__)


def config(path, name="caltech256", **fields):
  """Returns a dataset's config."""
  result = data.default_config(name)
  result.path = str(path)
  for field, value in fields.items():
    result[field] = value
  return result


def put_archive(monkeypatch, folder, content, builder=caltech.Caltech256):
  """Writes an archive and makes its checksum the expected one."""
  folder.mkdir(exist_ok=True)
  md5 = hashlib.md5(content).hexdigest()
  monkeypatch.setattr(builder, "SOURCE", dataclasses.replace(builder.SOURCE, md5=md5))
  path = folder / builder.SOURCE.url.rsplit("/", 1)[-1]
  path.write_bytes(content)
  return path


def check_256(load):
  """Asserts what the small Caltech-256 must look like."""
  files = caltech256_files()
  parts = {split: load(split) for split in ("train", "validation", "test")}
  assert [len(part) for part in parts.values()] == [6, 3, 6]
  for part in parts.values():
    assert part.class_names == CLASSES
  assert sorted(parts["validation"].keys) == [
    f"caltech256/{name}/0002" for name in CLASSES
  ]
  test = parts["test"]
  assert sorted(test.keys) == [
    f"caltech256/{name}/{n:04d}" for name in CLASSES for n in (4, 5)
  ]
  place = test.keys.index("caltech256/002.american-flag/0005")
  assert test.labels[place] == 1
  # The encoded bytes are passed through.
  expected = files["256_ObjectCategories/002.american flag/002_0005.jpg"]
  assert test.records[place] == expected
  grey = images.decode(test.records[test.keys.index("caltech256/257.clutter/0004")])
  np.testing.assert_array_equal(grey[..., 0], grey[..., 2])
  batch = next(data.eval_iterator(test, image_size=16, batch_size=6))
  np.testing.assert_array_equal(batch["label"], test.labels)


def test_caltech256_from_its_archive(tmp_path, monkeypatch, capsys):
  folder = tmp_path / "datasets"
  path = put_archive(monkeypatch, folder, tar(caltech256_files()))
  check_256(lambda split: data.load(config(folder), split))
  lines = capsys.readouterr().err.splitlines()
  for stray in ("RENAME2", "greg/vision309/001_0009.jpg", "002_0007.jpg", "readme.txt"):
    assert any(stray in line and "no image of a class" in line for line in lines)
  prepared = folder / "caltech256" / "1.0.0"
  assert len(list(prepared.glob("caltech256-train.array_record*"))) == 1
  # Prepared once: the archive is not needed again.
  path.unlink()
  check_256(lambda split: data.load(config(folder), split))
  assert "tensorflow" not in sys.modules


def test_caltech256_redrawn_by_seed(tmp_path, monkeypatch):
  folder = tmp_path / "datasets"
  put_archive(monkeypatch, folder, tar(caltech256_files()))
  drawn = config(folder, split_file="", counts=(2, 1, -1))
  parts = [data.load(drawn, split) for split in ("train", "validation", "test")]
  assert [len(part) for part in parts] == [6, 3, 6]
  keys = [key for part in parts for key in part.keys]
  assert len(set(keys)) == 15
  drawn.split_seed = 5
  assert data.load(drawn, "train").keys != parts[0].keys
  # As many per class as the paper has, unless told otherwise: all of these.
  assert len(data.load(config(folder, split_file=""), "train")) == 15
  fractions = config(folder, split_file="", counts=())
  assert len(data.load(fractions, "train")) == 9
  options = {"image_size": 16, "batch_size": 3, "seed": 0, "purpose": "x", "epochs": 1}
  with data.train_iterator(parts[0], num_workers=1, **options) as batches:
    assert sum(len(batch["label"]) for batch in batches) == 6


def test_caltech256_from_an_extracted_folder(tmp_path, monkeypatch):
  for name, content in caltech256_files().items():
    path = tmp_path / "mine" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
  before = sorted((tmp_path / "mine" / "256_ObjectCategories").iterdir())
  check_256(lambda split: data.load(config(tmp_path / "mine"), split))
  # The folder of class folders itself may be named; nothing is written into it.
  inner = tmp_path / "mine" / "256_ObjectCategories"
  check_256(lambda split: data.load(config(inner), split))
  assert sorted(inner.iterdir()) == before
  # The same images, wherever they are and whatever they come from.
  archived = tmp_path / "archived"
  put_archive(monkeypatch, archived, tar(caltech256_files()))
  prints = {
    data.load(config(path), "train").fingerprint
    for path in (inner, inner.parent, archived)
  }
  assert len(prints) == 1


def test_caltech101_from_a_zip_of_a_tar(tmp_path, monkeypatch):
  inner = tar(caltech101_files(), "w:gz")
  content = zipped(
    {
      "caltech-101/101_ObjectCategories.tar.gz": inner,
      "__MACOSX/caltech-101/._show.m": b"x",
      "caltech-101/show_annotation.m": b"disp",
    }
  )
  folder = tmp_path / "datasets"
  put_archive(monkeypatch, folder, content, caltech.Caltech101)
  parts = [
    data.load(config(folder, "caltech101"), split)
    for split in ("train", "validation", "test")
  ]
  assert [len(part) for part in parts] == [4, 2, 2]
  assert parts[0].class_names == ("Faces", "yin_yang")
  assert sorted(parts[2].keys) == ["caltech101/Faces/0004", "caltech101/yin_yang/0004"]


def home(monkeypatch, server, content):
  """Makes a server the home of Caltech-256."""
  source = dataclasses.replace(
    caltech.Caltech256.SOURCE,
    url=f"{server.url}256_ObjectCategories.tar",
    md5=hashlib.md5(content).hexdigest(),
  )
  monkeypatch.setattr(caltech.Caltech256, "SOURCE", source)


def test_download_goes_on_where_it_broke_off(tmp_path, monkeypatch):
  content = tar(caltech256_files())
  folder = tmp_path / "new" / "folder"
  with serving(content) as server:
    home(monkeypatch, server, content)
    server.break_after = 10_000
    with pytest.raises(RunError, match=r"broke off at 10000 of .* run again to resume"):
      data.load(config(folder), "train")
    server.break_after = None
    check_256(lambda split: data.load(config(folder), split))
    assert server.ranges == [None, "bytes=10000-"]


def test_without_network_one_line_says_what_to_do(tmp_path, monkeypatch):
  with serving(b"") as server:
    home(monkeypatch, server, b"")  # The port is closed afterwards.
  with pytest.raises(RunError) as caught:
    data.load(config(tmp_path / "datasets"), "train")
  message = str(caught.value)
  assert "\n" not in message
  for part in (
    f"cannot download {server.url}256_ObjectCategories.tar",
    f"MD5 starts {hashlib.md5(b'').hexdigest()}",
    f"into {tmp_path / 'datasets'} (1.2 GB), or its extracted folder 256_Object",
  ):
    assert part in message


def test_a_wrong_checksum_is_refused(tmp_path):
  folder = tmp_path / "datasets"
  folder.mkdir()
  (folder / "256_ObjectCategories.tar").write_bytes(tar(caltech256_files()))
  with pytest.raises(RunError, match=r"is damaged: its MD5 starts .* not 67b4f42c"):
    data.load(config(folder), "train")
  assert not list(folder.glob("caltech256/*"))


def test_a_truncated_archive_is_refused(tmp_path, monkeypatch):
  folder = tmp_path / "datasets"
  content = tar(caltech256_files())
  with tarfile.open(fileobj=io.BytesIO(content)) as archive:
    cut = archive.getmembers()[9].offset_data + 50
  put_archive(monkeypatch, folder, content[:cut])
  with pytest.raises(RunError, match=r"256_ObjectCategories.tar is damaged .*delete"):
    data.load(config(folder), "train")


@pytest.mark.parametrize("file", ["*-train.array_record-*", "dataset_info.json"])
@pytest.mark.parametrize("damage", ["empty", "cut", "garbage", "absent", "directory"])
def test_damaged_prepared_files_are_named(tmp_path, monkeypatch, file, damage):
  put_archive(monkeypatch, tmp_path / "data", tar(caltech256_files()))
  data.load(config(tmp_path / "data"), "train")
  (path,) = (tmp_path / "data" / "caltech256").rglob(file)
  content = path.read_bytes()
  path.unlink()
  if damage == "directory":
    path.mkdir()
  elif damage != "absent":
    changed = {"empty": b"", "cut": content[: len(content) // 2]}
    path.write_bytes(changed.get(damage, b"\xff" * len(content)))
  with pytest.raises(RunError, match=r"'caltech256'.*(anew|Is a directory)") as caught:
    data.load(config(tmp_path / "data"), "train")
  assert "\n" not in str(caught.value)


def test_missing_images_are_counted(tmp_path, monkeypatch):
  files = caltech256_files()
  files = {k: v for k, v in files.items() if "257.clutter" not in k}
  folder = tmp_path / "datasets"
  put_archive(monkeypatch, folder, tar(files))
  with pytest.raises(RunError, match=r"lacks 3 of the images .* class 257.clutter"):
    data.load(config(folder), "train")


@pytest.mark.parametrize("name", ["../evil.jpg", "/etc/evil.jpg", "a/../../evil.jpg"])
@pytest.mark.parametrize("make", [tar, zipped])
def test_path_traversal_is_refused(tmp_path, make, name):
  path = tmp_path / ("a.zip" if make is zipped else "a.tar")
  path.write_bytes(make({"good/001_0001.jpg": jpeg(1), name: jpeg(2)}))
  with pytest.raises(RunError, match="leads out of the archive"):
    list(archives.members(path))
  inside = tmp_path / "outer.zip"
  inside.write_bytes(zipped({path.name: path.read_bytes()}))
  with pytest.raises(RunError, match="leads out of the archive"):
    list(archives.members(inside))
  assert not (tmp_path.parent / "evil.jpg").exists()


def test_a_dataset_with_a_path_traversal_is_refused(tmp_path, monkeypatch):
  folder = tmp_path / "datasets"
  files = caltech256_files() | {"../001.ak47/001_0006.jpg": jpeg(2)}
  put_archive(monkeypatch, folder, tar(files))
  with pytest.raises(RunError, match=r"holds '../001.ak47/001_0006.jpg'"):
    data.load(config(folder), "train")
  assert not list(folder.glob("caltech256/*/*.array_record*"))


def test_links_in_archives_are_passed_over(tmp_path):
  path = tmp_path / "a.tar"
  with tarfile.open(path, "w") as archive:
    link = tarfile.TarInfo("x/passwd.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    archive.addfile(link)
  assert list(archives.members(path)) == []


def test_the_real_lists(monkeypatch):
  monkeypatch.undo()
  lists = splits.authors_lists("caltech256")
  assert len(lists) == 257 and sorted(lists)[0] == "001.ak47"
  assert {tuple(map(len, parts)) for parts in lists.values()} == {(48, 12)}
  lists = splits.authors_lists("caltech101")
  assert len(lists) == 101
  assert {tuple(map(len, parts)) for parts in lists.values()} == {(24, 6)}
  assert not any(train & validation for train, validation in lists.values())


@pytest.mark.skipif(not CALTECH101.exists(), reason="needs ../shared/caltech101")
def test_the_real_lists_are_those_of_the_released_code(monkeypatch):
  import json

  monkeypatch.undo()
  for name in ("caltech256", "caltech101"):
    path = CALTECH101.parent / "splits" / f"{name}_split.json"
    theirs = json.loads(path.read_text())
    ours = splits.authors_lists(name)
    for i, split in enumerate(("train", "valid")):
      mine = {cls: parts[i] for cls, parts in ours.items()}
      assert mine == {cls: set(n) for cls, n in theirs[split].items()}


@pytest.mark.skipif(not CALTECH101.exists(), reason="needs ../shared/caltech101")
def test_the_real_caltech101_images(tmp_path, monkeypatch):
  monkeypatch.undo()
  monkeypatch.setenv("FIDELITY_JAX_CACHE", str(tmp_path / "cache"))
  sizes = [
    len(data.load(config(CALTECH101, "caltech101"), split))
    for split in ("train", "validation", "test")
  ]
  assert sizes == [2424, 606, 939]


class Flowers(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A dataset as TFDS has many, without keys."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    label = tfds.features.ClassLabel(names=["rose", "tulip"])
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {"image": tfds.features.Image(encoding_format="jpeg"), "label": label}
      ),
    )

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples(10), "test": self._generate_examples(4)}

  def _generate_examples(self, count):
    for i in range(count):
      yield i, {"image": jpeg(i), "label": i % 2}


@pytest.fixture
def flowers(tmp_path, monkeypatch):
  """Prepares the flowers under the name of a TFDS dataset."""
  builder = Flowers(data_dir=tmp_path, file_format="array_record")
  builder.download_and_prepare()
  monkeypatch.setattr(tfds, "builder", lambda *unused, **options: builder)
  return config(tmp_path, "tf_flowers")


def test_any_tfds_dataset_by_split_expressions(flowers):
  parts = [data.load(flowers, split) for split in ("train", "validation", "test")]
  assert [len(part) for part in parts] == [8, 2, 4]
  assert parts[0].class_names == ("rose", "tulip")
  assert parts[0].keys[0] == "tf_flowers/train[:80%]/0000000"
  flowers.tfds_splits = ("train[:5]", "train[5:]", "all")
  assert [len(data.load(flowers, s)) for s in ("train", "validation")] == [5, 5]
  flowers.tfds_splits = ("training", "test", "test")
  with pytest.raises(UsageError, match=r"'training' is no split .*train, test"):
    data.load(flowers, "train")


class CaltechBirds2011(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Some birds in the files that TFDS's builder of this name would write."""

  VERSION = tfds.core.Version("0.2.0")

  def _info(self):
    image, text = tfds.features.Image(), tfds.features.Text()
    features = {
      "image": image,
      "image/filename": text,
      "label": tfds.features.ClassLabel(num_classes=200),
      "label_name": text,
      "bbox": tfds.features.BBoxFeature(),
      "segmentation_mask": tfds.features.Image(shape=(None, None, 1)),
    }
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict(features)
    )

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples(10), "test": self._generate_examples(4)}

  def _generate_examples(self, count):
    for i in range(count):
      yield i, self.bird(i)

  @staticmethod
  def bird(number):
    """Returns one example."""
    return {
      "image": jpeg(number),
      "image/filename": f"{number}.jpg",
      "label": 50 * (number % 4),
      "label_name": "albatross",
      "bbox": tfds.features.BBox(0.0, 0.0, 1.0, 1.0),
      # Decoding it shows that it is no picture.
      "segmentation_mask": b"mask",
    }


def test_cub200_is_tfds_caltech_birds2011(tmp_path):
  CaltechBirds2011(data_dir=tmp_path, file_format="array_record").download_and_prepare()
  settings = config(tmp_path, "cub200")
  parts = [data.load(settings, split) for split in ("train", "validation", "test")]
  assert [len(part) for part in parts] == [8, 2, 4]
  assert {part.num_classes for part in parts} == {200}
  assert parts[2].keys[0] == "cub200/test/0000000"
  assert sorted(parts[2].labels) == [0, 50, 100, 150]
  records = {parts[2].records[i] for i in range(4)}
  assert records == {jpeg(number) for number in range(4)}
  settings.name = "caltech_birds2011"
  assert len(data.load(settings, "test")) == 4
  assert "tensorflow" not in sys.modules


def test_a_dataset_without_a_network_is_refused_at_once(tmp_path, monkeypatch):
  def unresolved(*unused):
    raise socket.gaierror("Temporary failure in name resolution")

  monkeypatch.setattr(socket, "getaddrinfo", unresolved)
  with pytest.raises(UsageError) as caught:
    data.load(config(tmp_path, "cub200"), "train")
  message = str(caught.value)
  assert message.startswith(f"dataset 'cub200' is not prepared in {tmp_path}")
  assert "Temporary failure in name resolution" in message
  assert "tfds.builder('caltech_birds2011', " in message


@pytest.mark.parametrize("name", ["mnist", "cub200"])
def test_a_dataset_that_cannot_be_prepared_here(tmp_path, monkeypatch, name):
  def refuse(*unused, **options):
    raise ImportError("TensorFlow is needed\nmany\nlines")

  monkeypatch.setattr(tfds, "builder", refuse)
  with pytest.raises(UsageError) as caught:
    data.load(config(tmp_path, name), "train")
  message = str(caught.value)
  assert "\n" not in message and "TensorFlow is needed" in message
  assert "download_and_prepare()" in message and str(tmp_path) in message
