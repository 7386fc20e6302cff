"""Datasets by name: demo, folder, CSV, splits. What is refused is in test_refusals."""

import json
import pathlib
import shutil
import time
import unicodedata

import numpy as np
import pytest
from test_data_images import encoded, photograph

from fidelity_jax import data
from fidelity_jax.data import dataset as datasets
from fidelity_jax.data import demo, splits
from fidelity_jax.errors import UsageError

pytestmark = pytest.mark.usefixtures("cache_folder")
CALTECH101 = pathlib.Path(__file__).parents[2] / "shared" / "caltech101"


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


@pytest.mark.parametrize("kind", ["folder", "csv"])
def test_the_fingerprint_does_not_depend_on_the_place(
  folder, tmp_path, monkeypatch, kind
):
  root, name = folder, ""
  if kind == "csv":
    name = "table.csv"
    paths = [f"{path.parent.name}/{path.name}" for path in folder.glob("*/*.jpg")]
    (root / name).write_text("".join(f"{p},{p[:3]}\n" for p in paths))
  elsewhere = tmp_path / "far" / "away"
  shutil.copytree(root, elsewhere)
  (tmp_path / "link").symlink_to(elsewhere)
  monkeypatch.chdir(tmp_path / "far")
  places = (root, elsewhere, tmp_path / "link", pathlib.Path("away"))
  prints = [
    {s: part.fingerprint for s, part in load_all(config(place / name)).items()}
    for place in places
  ]
  assert prints[1:] == prints[:1] * 3 and len(set(prints[0].values())) == 3


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
    parts["train"], image_size=224, batch_size=64, seed=0, purpose="x", epochs=1
  ) as batches:
    assert next(batches)["image"].shape == (64, 224, 224, 3)
