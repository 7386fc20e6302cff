"""Images in the classes of a classifier that nobody trained on them."""

import shutil

import numpy as np
import pytest
from test_data_sources import config, load_all

from fidelity_jax import data
from fidelity_jax.data import classes
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


@pytest.mark.parametrize(
  ("names", "words"),
  [
    (None, "cannot read"),
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


def test_labels_are_dropped_and_the_splits_stay(folder):
  """Of a folder with labels, the classifier's classes being its own."""
  parts = load_all(config(folder, labels="self"))
  plain = load_all(config(folder))
  for split, part in parts.items():
    assert part.keys == plain[split].keys and not part.labels.any()
    assert part.class_names == ("cat", "dog")
