"""Datasets by name: demo, folder, CSV, splits, verification, the decoded cache."""

import contextlib
import errno
import json
import os
import pathlib
import shutil
import tempfile
import time
import unicodedata

import numpy as np
import pytest
from PIL import Image
from test_data_images import encoded, photograph

from fidelity_jax import data, files, platform
from fidelity_jax.data import caches, demo, splits, verify
from fidelity_jax.data import dataset as datasets
from fidelity_jax.errors import RunError, UsageError

CALTECH101 = pathlib.Path(__file__).parents[2] / "shared" / "caltech101"


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
  """Keeps the tests out of the user's cache."""
  monkeypatch.setenv("FIDELITY_JAX_CACHE", str(tmp_path / "cache"))
  return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
  """Returns a folder of two classes of ten small JPEGs each."""
  root = tmp_path / "pictures"
  for name in ("cat", "dog"):
    (root / name).mkdir(parents=True)
    for i in range(10):
      picture = photograph(16 + i, 20, seed=i)
      record = encoded(picture, format="JPEG")
      (root / name / f"image_{i:04d}.jpg").write_bytes(record)
  return root


def config(path, **fields):
  """Returns a folder's config."""
  result = data.default_config("folder")
  result.path = str(path)
  for name, value in fields.items():
    result[name] = value
  return result


def load_all(settings):
  """Returns the three splits."""
  return {split: data.load(settings, split) for split in datasets.SPLITS}


def test_demo_has_sixteen_balanced_classes_of_disjoint_tiles():
  begin = time.perf_counter()
  parts = load_all(data.default_config("demo"))
  assert time.perf_counter() - begin < 20  # Under 3 s on an idle machine.
  keys = [key for part in parts.values() for key in part.keys]
  assert len(keys) == len(set(keys)) == 894
  assert "demo/astronaut/r03c05" in keys
  for part in parts.values():
    assert part.num_classes == 16 and part.class_names[0] == "astronaut"
    assert set(part.labels.tolist()) == set(range(16))
  per_class = sum(np.bincount(part.labels) for part in parts.values())
  names = parts["train"].class_names
  small = {"clock_motion": 24, "coins": 24, "chelsea": 28, "coffee": 54, "rocket": 60}
  assert dict(zip(names, per_class.tolist(), strict=True)) == {
    name: small.get(name, 64) for name in names
  }
  assert [len(part) for part in parts.values()] == [447, 139, 308]
  batch = next(data.eval_iterator(parts["test"], image_size=64, batch_size=8))
  assert batch["image"].shape == (8, 64, 64, 3)


def test_demo_tiles_are_the_photographs_pixels():
  whole = demo.build(0, 0)
  assert len(whole) > 1300
  place = whole.keys.index("demo/coffee/r02c03")
  import skimage.data

  expected = skimage.data.coffee()[128:192, 192:256]
  from fidelity_jax.data import images

  np.testing.assert_array_equal(images.decode(whole.records[place]), expected)
  # The empty corner of the retina is left out, its middle is not.
  assert "demo/retina/r00c00" not in whole.keys
  assert "demo/retina/r10c10" in whole.keys


def test_demo_depends_on_the_split_seed_alone():
  settings = data.default_config("demo")
  first = data.load(settings, "test")
  assert first.keys == data.load(settings, "test").keys
  settings.split_seed = 1
  assert first.keys != data.load(settings, "test").keys
  settings.per_class = 10
  assert len(data.load(settings, "train")) == 16 * 4


def test_folder_classes_and_splits(folder):
  (folder / "cat" / ".hidden.jpg").write_bytes(b"")
  (folder / ".git").mkdir()
  (folder / "cat" / "notes.txt").write_text("no image")
  (folder / "readme.md").write_text("no class")
  parts = load_all(config(folder))
  assert [len(part) for part in parts.values()] == [12, 4, 4]
  train = parts["train"]
  assert train.class_names == ("cat", "dog") and train.num_classes == 2
  assert np.bincount(train.labels).tolist() == [6, 6]
  assert all(key.startswith("cat/") for key in train.keys[:6])
  every = [key for part in parts.values() for key in part.keys]
  assert len(set(every)) == 20 and not train.skipped
  assert data.load(config(folder, split_seed=1), "train").keys != train.keys
  # A new class leaves the others' splits as they are.
  shutil.copytree(folder / "cat", folder / "bird")
  again = data.load(config(folder), "train")
  assert [key for key in again.keys if key[:4] != "bird"] == list(train.keys)


def test_fingerprint_follows_the_content(folder):
  one = data.load(config(folder), "train")
  assert one.fingerprint == data.load(config(folder), "train").fingerprint
  assert len(one.fingerprint) == 64
  path = folder / one.keys[0]
  path.write_bytes(encoded(photograph(40, 40), format="JPEG"))
  other = data.load(config(folder), "train")
  assert other.keys == one.keys and other.fingerprint != one.fingerprint
  path.rename(path.with_name("renamed.jpg"))
  assert data.load(config(folder), "train").fingerprint != other.fingerprint


def test_numbers_instead_of_fractions(folder):
  parts = load_all(config(folder, counts=(3, 2, -1)))
  assert [len(part) for part in parts.values()] == [6, 4, 10]
  parts = load_all(config(folder, counts=(3, 2, 1)))
  assert [len(part) for part in parts.values()] == [6, 4, 2]
  assert splits.sizes(5, (0.6, 0.15, 0.25), ()) == (3, 1, 1)
  assert splits.sizes(4, (), (3, 2, -1)) == (3, 1, 0)
  assert splits.sizes(100, (0.1, 0.1, 0.1), ()) == (10, 10, 10)


def test_csv_of_paths_and_labels(folder):
  table = folder / "table.csv"
  lines = [f"cat/image_{i:04d}.jpg,tabby" for i in range(10)]
  lines += [f"dog/image_{i:04d}.jpg,poodle" for i in range(10)]
  table.write_text("path,label\n" + "\n".join(lines) + "\n")
  train = data.load(config(table), "train")
  assert train.class_names == ("poodle", "tabby") and len(train) == 12
  assert train.keys[0].startswith("cat/") and train.labels[0] == 1
  table.write_text("\n".join([*lines, "cat/image_0000.jpg,poodle"]))
  with pytest.raises(UsageError, match=r"line 21 .* a second label"):
    data.load(config(table), "train")
  table.write_text("cat/image_0000.jpg\n")
  with pytest.raises(UsageError, match=r"line 1 .* is not 'path,label'"):
    data.load(config(table), "train")
  table.write_text("\n".join([*lines, "cat/absent.jpg,tabby"]))
  with pytest.raises(UsageError, match=r"cat/absent.jpg: No such file"):
    data.load(config(table, strict=True, counts=(-1, 0, 0)), "train")


def test_split_files(folder, tmp_path):
  file = tmp_path / "split.json"
  settings = config(folder, split_file=str(file))
  named = {"train": {"cat": [0, 3], "dog": ["image_0001.jpg"]}, "valid": {"cat": [9]}}
  file.write_text(json.dumps(named))
  parts = load_all(settings)
  assert parts["train"].keys == (
    "cat/image_0000.jpg",
    "cat/image_0003.jpg",
    "dog/image_0001.jpg",
  )
  assert parts["validation"].keys == ("cat/image_0009.jpg",)
  assert len(parts["test"]) == 16
  named = {"train": ["dog/image_0002.jpg"], "validation": ["cat/image_0002.jpg"]}
  file.write_text(json.dumps(named | {"test": {"dog": [5]}}))
  parts = load_all(settings)
  assert [len(part) for part in parts.values()] == [1, 1, 1]


@pytest.mark.parametrize(
  "text,words",
  [
    ("{", "cannot read"),
    ("[1]", "no JSON object with 'train'"),
    ('{"train": {"cow": [1]}}', "class 'cow'"),
    ('{"train": {"cat": [77]}}', "'cat: 77'"),
    ('{"train": ["cat/x.jpg"]}', "'cat/x.jpg'"),
    ('{"train": {"cat": [1]}, "val": {"cat": [1]}}', "image_0001.jpg twice"),
    ('{"train": {"cat": [1]}, "tset": {}}', "unknown split 'tset'"),
    ('{"train": 3}', "neither a list"),
  ],
)
def test_bad_split_files_are_refused(folder, tmp_path, text, words):
  file = tmp_path / "split.json"
  file.write_text(text)
  with pytest.raises(UsageError, match=words) as caught:
    data.load(config(folder, split_file=str(file)), "train")
  assert str(file) in str(caught.value)


def test_unusable_images_are_left_out_and_named(folder, capsys):
  good = (folder / "cat" / "image_0000.jpg").read_bytes()
  (folder / "cat" / "truncated.jpg").write_bytes(good[:300])
  (folder / "cat" / "empty.png").write_bytes(b"")
  (folder / "dog" / "letter.jpg").write_text("Dear all, this is not an image.")
  (folder / "dog" / "bomb.png").write_bytes(encoded(Image.new("1", (9000, 9000))))
  train = data.load(config(folder, counts=(-1, 0, 0)), "train")
  assert len(train) == 20
  reasons = {one.key: one.reason for one in train.skipped}
  assert sorted(reasons) == [
    "cat/empty.png",
    "cat/truncated.jpg",
    "dog/bomb.png",
    "dog/letter.jpg",
  ]
  assert "empty" in reasons["cat/empty.png"]
  assert "9000x9000 pixels are more than" in reasons["dog/bomb.png"]
  lines = capsys.readouterr().err.splitlines()
  assert sum("left out:" in line for line in lines) == 4
  assert any("4 left out, 20 images remain" in line for line in lines)
  with pytest.raises(UsageError, match=r"^cat/empty.png: the file is empty .*strict"):
    data.load(config(folder, counts=(-1, 0, 0), strict=True), "train")


@pytest.mark.parametrize(
  "name,content,words",
  [
    ("truncated.jpg", encoded(photograph(), format="JPEG")[:2000], "truncated"),
    ("empty.png", b"", "the file is empty"),
    ("letter.jpg", b"Dear all, this is no image.", "no image in a known format"),
    ("bomb.png", encoded(Image.new("1", (9000, 9000))), "9000x9000 pixels are more"),
  ],
)
def test_a_strict_run_stops_at_the_first(folder, name, content, words):
  (folder / "cat" / name).write_bytes(content)
  (folder / "dog" / "zebra.jpg").write_bytes(b"")
  settings = config(folder, counts=(-1, 0, 0), strict=True)
  with pytest.raises(UsageError, match=f"^cat/{name}: .*{words}") as caught:
    data.load(settings, "train")
  assert "zebra" not in str(caught.value) and "\n" not in str(caught.value)


def test_usable_odd_images_are_used(folder):
  picture = Image.fromarray(photograph(30, 40))
  (folder / "cat" / "cmyk.jpg").write_bytes(
    encoded(picture.convert("CMYK"), format="JPEG")
  )
  (folder / "cat" / "deep.png").write_bytes(
    encoded((photograph()[..., 0].astype(np.uint16)) << 8)
  )
  (folder / "dog" / "palette.gif").write_bytes(
    encoded(picture.quantize(16), format="GIF")
  )
  (folder / "dog" / "alpha.png").write_bytes(encoded(picture.convert("RGBA")))
  # A name that says another format than the content, and the smallest of images.
  (folder / "dog" / "png.jpg").write_bytes(encoded(picture))
  (folder / "dog" / "pixel.png").write_bytes(encoded(Image.new("RGB", (1, 1))))
  train = data.load(config(folder, counts=(-1, 0, 0)), "train")
  assert len(train) == 26 and not train.skipped
  for batch in data.eval_iterator(train, image_size=16, batch_size=8):
    assert batch["image"].dtype == np.uint8
  options = {"image_size": 16, "batch_size": 26, "seed": 0, "epochs": 1}
  with data.train_iterator(train, **options) as batches:
    assert next(batches)["image"].shape == (26, 16, 16, 3)


def test_only_the_first_ten_are_named(folder, capsys):
  for i in range(15):
    (folder / "cat" / f"bad{i}.jpg").write_bytes(b"")
  train = data.load(config(folder, counts=(-1, 0, 0)), "train")
  lines = capsys.readouterr().err.splitlines()
  assert sum("left out:" in line for line in lines) == 10
  assert any("15 left out" in line and "first 10" in line for line in lines)
  assert len(train.skipped) == 15


def test_nothing_usable_is_an_error(tmp_path):
  (tmp_path / "x" / "cat").mkdir(parents=True)
  (tmp_path / "x" / "cat" / "a.jpg").write_bytes(b"")
  with pytest.raises(UsageError, match=r"no usable image .* cat/a.jpg: the file"):
    data.load(config(tmp_path / "x", counts=(-1, 0, 0)), "train")


def test_empty_class_folders_are_named_and_no_class(folder):
  (folder / "ghost").mkdir()
  train = data.load(config(folder), "train")
  assert train.num_classes == 2
  assert [one.key for one in train.skipped] == ["ghost/"]
  with pytest.raises(UsageError, match="ghost/: a class folder without images"):
    data.load(config(folder, strict=True), "train")


@pytest.mark.parametrize(
  "one,other",
  [
    ("Cat", "cat"),
    (unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é")),
    ("straße", "STRASSE"),
  ],
)
def test_class_folders_that_collide_are_refused(folder, one, other):
  for name in (one, other):
    if not (folder / name).exists():
      shutil.copytree(folder / "dog", folder / name)
  with pytest.raises(UsageError, match="have the same name but for") as caught:
    data.load(config(folder), "train")
  assert repr(one) in str(caught.value) and repr(other) in str(caught.value)


def test_symbolic_links(folder, tmp_path):
  (folder / "cat" / "loop").symlink_to(folder / "cat")
  (folder / "cat" / "self.jpg").symlink_to(folder / "cat" / "self.jpg")
  (folder / "dog" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
  (tmp_path / "elsewhere").mkdir()
  shutil.copy(folder / "dog" / "image_0000.jpg", tmp_path / "elsewhere" / "more.jpg")
  (folder / "dog" / "linked").symlink_to(tmp_path / "elsewhere")
  train = data.load(config(folder, counts=(-1, 0, 0)), "train")
  assert len(train) == 21 and "dog/linked/more.jpg" in train.keys
  skipped = {one.key: one.reason for one in train.skipped}
  assert set(skipped) == {"cat/loop/", "cat/self.jpg", "dog/gone.jpg"}
  assert "back to its own parent" in skipped["cat/loop/"]


def test_links_to_the_folder_of_classes_are_no_class(folder):
  (folder / "all").symlink_to(folder)
  (folder / "dog" / "up").symlink_to(folder)
  train = data.load(config(folder, counts=(-1, 0, 0)), "train")
  assert train.class_names == ("cat", "dog") and len(train) == 20
  reasons = {one.reason for one in train.skipped if one.key in ("all/", "dog/up/")}
  assert "a symbolic link back to its own parent" in reasons


@contextlib.contextmanager
def without_privileges():
  """Runs as an ordinary user: permissions do not bind root."""
  root = os.geteuid() == 0
  if root:
    os.seteuid(65534)
  try:
    yield
  finally:
    if root:
      os.seteuid(0)


def test_unreadable_files_and_folders_are_named(folder, monkeypatch):
  with tempfile.TemporaryDirectory() as place:
    os.chmod(place, 0o755)
    root = pathlib.Path(place) / "pictures"
    shutil.copytree(folder, root)
    (root / "cat" / "image_0001.jpg").chmod(0)
    (root / "dog" / "private").mkdir()
    (root / "dog" / "private").chmod(0)
    monkeypatch.setenv("FIDELITY_JAX_CACHE", f"{place}/cache")
    with without_privileges():
      train = data.load(config(root, counts=(-1, 0, 0)), "train")
    (root / "dog" / "private").chmod(0o700)
    (root / "dog").chmod(0)
    with without_privileges():
      with pytest.raises(UsageError, match=r"cannot list the class folder .*dog"):
        data.load(config(root), "train")
    (root / "dog").chmod(0o700)
    root.chmod(0)
    with without_privileges():
      with pytest.raises(UsageError, match=r"cannot list .*: Permission denied"):
        data.load(config(root), "train")
    root.chmod(0o700)
    skipped = {one.key: one.reason for one in train.skipped}
    assert skipped == {
      "cat/image_0001.jpg": "Permission denied",
      "dog/private/": "Permission denied",
    }
    assert len(train) == 19


def test_a_passing_trouble_is_not_held_against_an_image(folder, monkeypatch):
  """Too many open files, or no memory, say nothing of the image."""
  settings = config(folder, counts=(-1, 0, 0))
  read = files.read_bytes
  for error in (OSError(errno.EMFILE, "Too many open files"), MemoryError()):

    def fail(path, limit=None, error=error):
      if path.name == "image_0003.jpg":
        raise error
      return read(path, limit)

    with monkeypatch.context() as patch:
      patch.setattr(files, "read_bytes", fail)
      with pytest.raises((RunError, MemoryError)) as caught:
        data.load(settings, "train")
    assert "open files" in str(caught.value) or isinstance(caught.value, MemoryError)
  assert len(data.load(settings, "train")) == 20


def test_what_decodes_stops_at_the_first_failure():
  """Or at a signal, which strikes in the same place."""
  begun = []

  def work(start):
    begun.append(start)
    time.sleep(0.01)
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    caches._in_threads(work, 1000 * caches._CHUNK)
  assert len(begun) < 100


def test_an_image_that_changes_during_a_run_stops_it(folder):
  train = data.load(config(folder), "train")
  path = folder / train.keys[2]
  path.write_bytes(encoded(photograph(seed=77), format="JPEG"))
  batches = data.eval_iterator(train, image_size=16, batch_size=len(train))
  with pytest.raises(RunError, match=f"{train.keys[2]}: .*not what it was"):
    next(batches)


def test_an_empty_split_of_several_parts_is_empty(folder):
  part = data.load(config(folder), "train")
  whole = datasets.join([part, part])
  assert len(whole.select([]).records) == 0 == len(whole.select([]))


def test_verification_is_remembered(folder, cache_folder, monkeypatch):
  (folder / "cat" / "empty.png").write_bytes(b"")
  settings = config(folder, counts=(-1, 0, 0))
  first = data.load(settings, "train")
  checked = []
  check = verify._check
  monkeypatch.setattr(
    verify, "_check", lambda d, i, s: checked.extend(i) or check(d, i, s)
  )
  again = data.load(settings, "train")
  assert not checked and again.skipped == first.skipped and again.keys == first.keys
  (folder / "cat" / "empty.png").write_bytes(encoded(photograph(20, 20)))
  assert len(data.load(settings, "train")) == 21 and len(checked) == 1
  (file,) = cache_folder.glob("verified-*.json")
  file.write_text('{"dog/image_0000.jpg": 3')
  assert len(data.load(settings, "train")) == 21


@pytest.mark.parametrize(
  "fields,words",
  [
    ({"name": "demoo"}, r"unknown dataset.name 'demoo'; did you mean demo"),
    ({"name": "caltech257"}, "did you mean caltech256"),
    ({"path": None}, "needs dataset.path"),
    ({"path": "/no/such/folder"}, "/no/such/folder does not exist"),
    ({"path": __file__}, "is a file"),
    ({"image_size": 0}, "image_size = 0 must be a whole number from 1"),
    ({"workers": -1}, "workers = -1 must be a whole number from 0"),
    ({"max_pixels": 0}, "max_pixels"),
    ({"cache": "tape"}, "must be None or one of 'ram', 'disk'"),
    ({"crop_area": (0.0, 1.0)}, "crop_area"),
    ({"crop_area": (0.5,)}, "crop_area"),
    ({"crop_aspect": (2.0, 1.0)}, "crop_aspect"),
    ({"fractions": (0.6, 0.6, 0.1)}, "fractions"),
    ({"fractions": (0.6, -0.1, 0.1)}, "fractions"),
    ({"counts": (3, -1, -1)}, "counts"),
    ({"tfds_splits": ("train",)}, "tfds_splits"),
    ({"split_file": "/no/file.json"}, "cannot read /no/file.json"),
  ],
)
def test_impossible_fields_are_refused(folder, fields, words):
  settings = data.default_config("folder")
  settings.path = str(folder)
  for name, value in fields.items():
    if isinstance(value, tuple):
      settings[name] = value
    else:
      settings.update({name: value})
  with pytest.raises(UsageError, match=words) as caught:
    data.load(settings, "train")
  assert "\n" not in str(caught.value)


def test_lists_of_another_dataset_are_refused(folder):
  with pytest.raises(UsageError, match=r"class '001.ak47'.*split_file= draws"):
    data.load(config(folder, split_file="caltech256"), "train")
  assert len(data.load(config(folder, split_file=""), "train")) == 12


def test_a_folder_in_the_place_of_caltech256_needs_its_path_alone(folder):
  settings = data.default_config("caltech256")
  settings.update({"name": "folder", "path": str(folder)})
  parts = load_all(settings)
  assert [len(part) for part in parts.values()] == [12, 4, 4]
  settings.counts = (3, 2, -1)
  assert len(data.load(settings, "train")) == 6


def test_unknown_split(folder):
  with pytest.raises(UsageError, match="no split 'training'; there are train"):
    data.load(config(folder), "training")


@pytest.mark.parametrize("kind", ["ram", "disk"])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_decoded_cache_changes_nothing(folder, kind, num_workers):
  plain = data.load(config(folder), "train")
  cached = data.load(config(folder, cache=kind), "train")
  assert cached.fingerprint == plain.fingerprint and cached.keys == plain.keys
  options = {"image_size": 16, "batch_size": 4, "seed": 0, "epochs": 2}
  with data.train_iterator(plain, **options) as expected:
    with data.train_iterator(cached, num_workers=num_workers, **options) as actual:
      for one, other in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(one["image"], other["image"])
        np.testing.assert_array_equal(one["label"], other["label"])


def test_the_disk_cache_is_keyed_by_content(folder, cache_folder):
  settings = config(folder, cache="disk")
  first = data.load(settings, "train")
  (file,) = cache_folder.glob("decoded-*.u8")
  written = file.stat().st_mtime_ns
  data.load(settings, "train")
  assert file.stat().st_mtime_ns == written
  # Damaged: made again.
  os.truncate(file, 10)
  again = data.load(settings, "train")
  np.testing.assert_array_equal(again.records[3], first.records[3])
  (folder / first.keys[0]).write_bytes(encoded(photograph(50, 50), format="JPEG"))
  data.load(settings, "train")
  assert len(list(cache_folder.glob("decoded-*.u8"))) == 2
  assert not list(cache_folder.glob(".decoded-*"))


def test_a_cache_that_does_not_fit_is_refused(folder, monkeypatch):
  monkeypatch.setattr(platform, "host_memory", lambda: 1000)
  with pytest.raises(UsageError, match=r"more than half of the memory.*cache=disk"):
    data.load(config(folder, cache="ram"), "train")


@pytest.mark.skipif(not CALTECH101.exists(), reason="needs ../shared/caltech101")
def test_caltech101_with_the_authors_split():
  settings = config(CALTECH101, split_file="caltech101")
  parts = load_all(settings)
  assert [len(part) for part in parts.values()] == [2424, 606, 939]
  assert parts["train"].num_classes == 101
  assert set(np.bincount(parts["train"].labels)) == {24}
  assert set(np.bincount(parts["validation"].labels)) == {6}
  assert not any(part.skipped for part in parts.values())
  with data.train_iterator(
    parts["train"], image_size=224, batch_size=64, seed=0, epochs=1
  ) as batches:
    assert next(batches)["image"].shape == (64, 224, 224, 3)
