"""What is read of a dataset before its use, what is remembered, what is cached."""

import errno
import gc
import os
import pathlib
import shutil
import tempfile
import time

import numpy as np
import pytest
from conftest import without_privileges
from PIL import Image
from test_data_images import encoded, photograph
from test_data_sources import config

from fidelity_jax import data, files, platform
from fidelity_jax.data import caches, verify
from fidelity_jax.data import dataset as datasets
from fidelity_jax.errors import RunError, UsageError

pytestmark = pytest.mark.usefixtures("cache_folder")


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
  options = {"image_size": 16, "batch_size": 26, "seed": 0, "purpose": "x", "epochs": 1}
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


def test_unreadable_files_and_folders_are_named(folder, monkeypatch):
  with tempfile.TemporaryDirectory() as place:
    os.chmod(place, 0o755)
    root = pathlib.Path(place) / "pictures"
    shutil.copytree(folder, root)
    (root / "cat" / "image_0001.jpg").chmod(0)
    (root / "dog" / "private").mkdir()
    (root / "dog" / "private").chmod(0)
    # As file systems have it at their root: no class.
    (root / "lost+found").mkdir(mode=0)
    monkeypatch.setenv("FIDELITY_JAX_CACHE", f"{place}/cache")
    with without_privileges():
      train = data.load(config(root, counts=(-1, 0, 0)), "train")
    (root / "dog" / "private").chmod(0o700)
    (root / "dog").chmod(0)
    with without_privileges():
      with pytest.raises(UsageError, match=r"cannot list the folder .*dog"):
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


@pytest.mark.parametrize("kind", ["ram", "disk"])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_decoded_cache_changes_nothing(folder, kind, num_workers):
  plain = data.load(config(folder), "train")
  cached = data.load(config(folder, cache=kind), "train")
  assert cached.fingerprint == plain.fingerprint and cached.keys == plain.keys
  options = {"image_size": 16, "batch_size": 4, "seed": 0, "purpose": "x", "epochs": 2}
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


def test_all_that_is_held_in_memory_counts(folder, monkeypatch):
  # What earlier tests held is counted until it is collected.
  gc.collect()
  settings = config(folder, cache="ram", counts=(5, 5, 0))
  size = {}
  for split in ("train", "validation"):
    part = data.load(config(folder, counts=(5, 5, 0)), split)
    size[split] = sum(part.picture(i).pixels().size for i in range(len(part)))
  # Each fits alone, and both together only to the byte.
  memory = 2 * sum(size.values())
  monkeypatch.setattr(platform, "host_memory", lambda: memory - 2)
  train = data.load(settings, "train")
  with pytest.raises(UsageError, match=r"beside .* of other splits, are more than"):
    data.load(settings, "validation")
  few = train.select([0])
  del train
  with pytest.raises(UsageError, match="beside"):
    data.load(settings, "validation")
  monkeypatch.setattr(platform, "host_memory", lambda: memory)
  data.load(settings, "validation")
  monkeypatch.setattr(platform, "host_memory", lambda: memory - 2)
  assert few.records[0].shape[2] == 3
  del few
  data.load(settings, "validation")
