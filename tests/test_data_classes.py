"""Images in the classes of a classifier that nobody trained on them."""

import shutil

import numpy as np
import pytest
from test_data_sources import config, load_all

from fidelity_jax import data
from fidelity_jax.data import classes
from fidelity_jax.data import dataset as datasets
from fidelity_jax.errors import UsageError

pytestmark = pytest.mark.usefixtures("cache_folder")


@pytest.fixture
def of_imagenet(folder):
  """Returns a folder of two of ImageNet's classes, by identifier and by name."""
  (folder / "cat").rename(folder / "n02123045")
  (folder / "dog").rename(folder / "Golden_Retriever")
  return folder


def test_imagenets_classes():
  names = classes.imagenet()
  assert len(names) == len(set(names.values())) == 1000
  assert list(names) == sorted(names)
  assert names["n01440764"] == "tench" and names["n15075141"] == "toilet tissue"


def test_labels_count_the_classifiers_classes(of_imagenet):
  parts = load_all(config(of_imagenet, classes="imagenet"))
  plain = load_all(config(of_imagenet))
  for split, part in parts.items():
    assert part.num_classes == 1000 and part.class_names[281] == "tabby"
    # The same images, of which the first are dogs in the order of folders' names.
    assert part.keys == plain[split].keys
    expected = np.array([207, 281])[plain[split].labels]
    np.testing.assert_array_equal(part.labels, expected)
    assert part.class_names[207] == "golden retriever"
    assert part.fingerprint != plain[split].fingerprint


def test_a_file_of_names(folder, tmp_path):
  names = tmp_path / "names.txt"
  names.write_text("bird\nDog\n\ncat\n")
  part = data.load(config(folder, classes=str(names)), "train")
  assert part.class_names == ("bird", "Dog", "cat")
  assert [part.class_names[label].lower() for label in part.labels] == [
    key.split("/")[0] for key in part.keys
  ]


def test_every_class_is_found_by_its_own_name():
  """Also where two differ in letter case alone; then no other spelling will do."""
  names = list(classes.imagenet().values())
  own = _of_names(names)
  np.testing.assert_array_equal(classes.relabelled(own, names, "x").labels, range(1000))
  spelled = _of_names([name.upper().replace(" ", "_") for name in names])
  with pytest.raises(UsageError, match=r"'CARDIGAN' is no class of x; did you mean"):
    classes.relabelled(spelled, names, "x")
  others = [i for i, name in enumerate(names) if name.lower() != "cardigan"]
  found = classes.relabelled(spelled.select(others), names, "x")
  np.testing.assert_array_equal(found.labels, others)
  known = _of_names(list(classes.imagenet()))
  np.testing.assert_array_equal(
    classes.relabelled(known, names, "x").labels, range(1000)
  )


def _of_names(names):
  """Returns a dataset of one image of each class."""
  keys = tuple(map(str, range(len(names))))
  records = datasets.MemoryRecords((b"",) * len(names))
  labels = np.arange(len(names), dtype=np.int32)
  return datasets.Dataset("x", "train", records, keys, labels, tuple(names))


@pytest.mark.parametrize(
  ("names", "words"),
  [
    (None, "cannot read"),
    ("Cat\ncat\nCAT\n", "'dog' is no class"),
    ("dog\n", "two classes or more"),
    ("dog\ndog\ncat\n", "none twice"),
    ("dog\ncats\n", "did you mean 'cats'?"),
  ],
)
def test_classes_that_are_none(folder, tmp_path, names, words):
  path = tmp_path / "names.txt"
  if names is not None:
    path.write_text(names)
  with pytest.raises(UsageError, match="dataset") as error:
    data.load(config(folder, classes=str(path)), "train")
  assert words in str(error.value)


@pytest.mark.parametrize("loose", [True, False])
def test_images_without_labels(folder, loose):
  """Wherever they lie below the folder; all are there, each in one split."""
  if loose:
    for name in ("cat", "dog"):
      for path in (folder / name).iterdir():
        shutil.move(path, folder / f"{name}_{path.name}")
      (folder / name).rmdir()
  parts = load_all(config(folder, classes="imagenet", labels="self"))
  keys = [key for part in parts.values() for key in part.keys]
  assert len(keys) == len(set(keys)) == 20
  assert all(len(part) > 1 and part.num_classes == 1000 for part in parts.values())
  assert not any(part.labels.any() for part in parts.values())


def test_their_splits(folder):
  for name, count in {"train": 5, "val": 3, "test": 2}.items():
    (folder / name).mkdir()
    for path in sorted((folder / "cat").iterdir())[:count]:
      shutil.move(path, folder / name)
  shutil.rmtree(folder / "cat")
  shutil.rmtree(folder / "dog")
  parts = load_all(config(folder, classes="imagenet", labels="self"))
  assert [len(part) for part in parts.values()] == [5, 3, 2]
  assert all(key.startswith("test/") for key in parts["test"].keys)


def test_splits_without_train_are_refused(folder):
  (folder / "cat").rename(folder / "val")
  (folder / "dog").rename(folder / "test")
  with pytest.raises(UsageError, match="'train' is missing"):
    load_all(config(folder, classes="imagenet", labels="self"))


def test_labels_are_dropped_and_the_splits_stay(folder):
  """Of a folder with labels, the classifier's classes being its own."""
  parts = load_all(config(folder, labels="self"))
  plain = load_all(config(folder))
  for split, part in parts.items():
    assert part.keys == plain[split].keys and not part.labels.any()
    assert part.class_names == ("cat", "dog")
