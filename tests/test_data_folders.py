"""Folders that are divided into splits: train/CLASS, val/CLASS, test/CLASS."""

import json
import shutil

import numpy as np
import pytest
from test_data_sources import config, load_all

from fidelity_jax import data
from fidelity_jax.errors import UsageError

pytestmark = pytest.mark.usefixtures("cache_folder")


def divide(folder, **parts):
  """Returns a folder of splits, each with as many images per class as is said."""
  root = folder.parent / "divided"
  for name in ("cat", "dog"):
    files = iter(sorted((folder / name).iterdir()))
    for part, count in parts.items():
      (root / part / name).mkdir(parents=True, exist_ok=True)
      for _ in range(count):
        path = next(files)
        shutil.copy(path, root / part / name / path.name)
  return root


@pytest.mark.parametrize("names", [("val", "test"), ("validation", "Test")])
def test_a_folder_of_splits(folder, capsys, names):
  root = divide(folder, **{"train": 5, names[0]: 3, names[1]: 2})
  parts = load_all(config(root))
  assert [len(part) for part in parts.values()] == [10, 6, 4]
  for part, name in zip(parts.values(), ("train", *names), strict=True):
    assert part.class_names == ("cat", "dog")
    assert [key.split("/")[:2] for key in part.keys] == [
      [name, part.class_names[label]] for label in part.labels
    ]
  said = capsys.readouterr().err.splitlines()
  line = f"{root}: train and validation and test are its sub-folders"
  assert said.count(line) == 1


@pytest.mark.parametrize(
  ("name", "missing", "share", "count"),
  [("valid", "test", "25%", 2), ("test", "validation", "15%", 1)],
)
def test_a_missing_split_is_drawn_from_train(
  folder, capsys, name, missing, share, count
):
  root = divide(folder, train=8, **{name: 2})
  parts = load_all(config(root))
  (other,) = {"validation", "test"} - {missing}
  assert {key.split("/")[0] for key in parts[other].keys} == {name}
  assert np.bincount(parts[missing].labels).tolist() == [count, count]
  assert np.bincount(parts["train"].labels).tolist() == [8 - count, 8 - count]
  drawn = {*parts["train"].keys, *parts[missing].keys}
  assert len(drawn) == 16 and {key.split("/")[0] for key in drawn} == {"train"}
  line = f"; {missing} is drawn from train, {share} of each class"
  assert sum(line in said for said in capsys.readouterr().err.splitlines()) == 1
  # By the seed, by the shares, and whatever other classes there are.
  again = load_all(config(root, split_seed=1))
  assert again[missing].keys != parts[missing].keys
  assert again[other].keys == parts[other].keys
  halves = load_all(config(root, fractions=(0.0, 0.5, 0.5)))
  assert [len(halves[split]) for split in ("train", missing, other)] == [8, 8, 4]
  for part in ("train", name):
    shutil.copytree(root / part / "cat", root / part / "bird")
  more = data.load(config(root), missing)
  assert [k for k in more.keys if "bird" not in k] == list(parts[missing].keys)


def test_split_file_goes_before_the_folders_own_splits(folder, tmp_path):
  root = divide(folder, train=6, val=4)
  parts = load_all(config(root, split_file=""))
  assert [len(part) for part in parts.values()] == [12, 4, 4]
  assert parts["train"].class_names == ("cat", "dog")
  parts = load_all(config(root, split_file="", counts=(1, 2, -1)))
  assert [len(part) for part in parts.values()] == [2, 4, 14]
  file = tmp_path / "split.json"
  named = {"train": ["val/cat/image_0006.jpg"], "val": {"dog": [0, "image_0009.jpg"]}}
  file.write_text(json.dumps(named))
  parts = load_all(config(root, split_file=str(file)))
  assert parts["train"].keys == ("val/cat/image_0006.jpg",)
  assert parts["validation"].keys == (
    "train/dog/image_0000.jpg",
    "val/dog/image_0009.jpg",
  )
  shutil.copy(root / "val/dog/image_0009.jpg", root / "train/dog/image_0009.jpg")
  with pytest.raises(UsageError, match=r"'dog: image_0009.jpg', of which .* several"):
    load_all(config(root, split_file=str(file)))
  with pytest.raises(UsageError, match=r"counts = \(1, 2, -1\) draws .*split_file=\."):
    data.load(config(root, counts=(1, 2, -1)), "train")


def test_a_class_may_be_called_train(folder, capsys):
  (folder / "cat").rename(folder / "train")
  train = data.load(config(folder), "train")
  assert train.class_names == ("dog", "train") and len(train) == 12
  assert "taken for classes" not in capsys.readouterr().err
  shutil.copytree(folder / "dog", folder / "test")
  assert data.load(config(folder), "train").class_names == ("dog", "test", "train")
  assert "'dog' is no split" in capsys.readouterr().err


def test_what_is_beside_splits_and_classes(folder):
  root = divide(folder, train=5, test=3)
  (root / ".git").mkdir()
  (root / "lost+found").mkdir()
  (root / "annotations").mkdir()
  (root / "annotations" / "cat.xml").write_text("<no image/>")
  (root / "train" / "empty").mkdir()
  shutil.copy(root / "train/cat/image_0000.jpg", root / "test" / "sheet.jpg")
  shutil.copy(root / "train/cat/image_0000.jpg", root / "whole.jpg")
  (root / "test" / "dog" / "up").symlink_to(root / "test")
  train = data.load(config(root), "train")
  assert train.class_names == ("cat", "dog")
  assert {one.key: one.reason for one in train.skipped} == {
    "train/empty/": "a class folder without images",
    "test/sheet.jpg": "an image in no class folder",
    "test/dog/up/": "a symbolic link back to its own parent",
    "whole.jpg": "an image in no class folder",
  }


@pytest.mark.parametrize("flat", [0, 3])
def test_a_test_without_class_folders_is_drawn_from_train(folder, capsys, flat):
  root = divide(folder, train=6, val=2)
  (root / "test").mkdir()
  for i in range(flat):
    shutil.copy(folder / f"cat/image_000{i}.jpg", root / "test" / f"{i}.jpg")
  parts = load_all(config(root))
  assert [len(part) for part in parts.values()] == [8, 4, 4]
  assert {key.split("/")[0] for key in parts["test"].keys} == {"train"}
  said = capsys.readouterr().err
  assert "test is drawn from train, 25% of each class" in said
  assert "test/: left out: a split without class folders" in said
  with pytest.raises(UsageError, match="test/: a split without class folders"):
    data.load(config(root, strict=True), "train")


@pytest.mark.parametrize(
  ("parts", "third"),
  [
    ({"train": 5, "dev": 3}, "dev"),
    ({"train": 5, "val": 3, "extra": 2}, "extra"),
    ({"train": 5, "test": 3}, "unlabeled"),
  ],
)
def test_one_more_folder_beside_splits_is_refused(folder, parts, third):
  root = divide(folder, **parts)
  if third not in parts:
    shutil.copytree(folder / "cat", root / third)
  words = rf"'cat' is in \w+ and in \w+\), but '{third}' is no split's name: move it"
  with pytest.raises(UsageError, match=words):
    data.load(config(root), "train")
  shutil.rmtree(root / third)
  shutil.copytree(folder, root / ("val" if "val" not in parts else "test"))
  assert data.load(config(root), "train").class_names == ("cat", "dog")


def test_class_folders_in_a_class_called_train_are_doubtful(folder, capsys):
  root = divide(folder, train=5)
  (folder / "cat").rename(root / "unlabeled")
  train = data.load(config(root), "train")
  assert train.class_names == ("train", "unlabeled")
  line = "train is taken for a class, because 'unlabeled' is no split"
  assert line in capsys.readouterr().err


def test_splits_that_are_the_same_folder_are_refused(folder):
  root = divide(folder, train=5)
  (root / "test").symlink_to(root / "train")
  with pytest.raises(UsageError, match=r"of test and train in .* are the same folder"):
    data.load(config(root), "test")


@pytest.mark.parametrize(
  ("parts", "change", "words"),
  [
    ({"train": 5}, None, r"train is the only split in .*; give .*/divided/train, "),
    ({"val": 3, "test": 3}, None, r"splits \(test and val\), but 'train' is missing"),
    ({"train": 4, "val": 3, "valid": 3}, None, "two mean the same split"),
    (
      {"train": 5, "val": 3},
      lambda root: [
        shutil.move(path, root / "val" / f"{path.parent.name}{path.name}")
        for path in (root / "val").glob("*/*")
      ],
      r"divided/val has no sub-folder with images .*; sort .*, or move 'val' away",
    ),
    # Both val and test would be missing.
    (
      {"train": 5, "test": 3},
      lambda root: [path.unlink() for path in (root / "test").glob("*/*")],
      r"train is the only split in .* that has class folders; give .*/divided/train, ",
    ),
    (
      {"train": 5, "val": 3},
      lambda root: [path.unlink() for path in root.glob("*/*/*")],
      "divided/train has no sub-folder with images",
    ),
    (
      {"train": 5, "val": 3},
      lambda root: (root / "val" / "dog").rename(root / "val" / "wolf"),
      r"3 images of classes that are not in train, the first is val/wolf/image_0005",
    ),
    (
      {"train": 5, "val": 3},
      lambda root: (root / "val" / "dog").rename(root / "val" / "Dog"),
      "'Dog' and 'dog' in .* have the same name",
    ),
  ],
)
def test_splits_that_cannot_be_used_are_refused(folder, parts, change, words):
  root = divide(folder, **parts)
  if change:
    change(root)
  with pytest.raises(UsageError, match=words) as caught:
    data.load(config(root), "train")
  assert str(root) in str(caught.value) and "\n" not in str(caught.value)
