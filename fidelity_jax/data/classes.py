"""Classes that a dataset's images are told apart by, where these are not its own.

A classifier that nobody trained further knows the classes that it was trained on, in
an order of theirs, whatever images it is shown.
"""

import collections
import dataclasses
import functools
from collections.abc import Sequence
from importlib import resources

import numpy as np

from fidelity_jax import errors, files, locations
from fidelity_jax.data.dataset import Dataset

# What `dataset.classes` may say besides a file's path.
IMAGENET = "imagenet"


@functools.cache
def imagenet() -> dict[str, str]:
  """Returns the names of ImageNet's 1000 classes by WordNet identifier.

  In the order of the logits of all networks that were trained on them. Names are
  torchvision's, of which two differ in letter case alone: cardigan and Cardigan.
  """
  place = resources.files("fidelity_jax.data") / "lists" / "imagenet.txt"
  lines = place.read_text("utf-8").splitlines()
  return dict(line.split(" ", 1) for line in lines)


def names(given: str) -> tuple[str, ...]:
  """Returns class names in the order of the logits.

  Args:
    given: "imagenet", or the path of a text file with a name on each line.

  Raises:
    UsageError: there is no such file, or it holds no two names, or one twice.
  """
  if given == IMAGENET:
    return tuple(imagenet().values())
  path = locations.expand(given)
  try:
    lines = files.read_bytes(path).decode("utf-8-sig").splitlines()
  except (OSError, UnicodeDecodeError) as error:
    reason = getattr(error, "strerror", None) or error
    raise errors.UsageError(
      f"dataset.classes: cannot read {path} ({reason}): write '{IMAGENET}', or the "
      "path of a text file with a class name on each line"
    ) from error
  found = tuple(line.strip() for line in lines if line.strip())
  if len(found) < 2 or len(set(found)) < len(found):
    raise errors.UsageError(
      f"dataset.classes: {path} must name two classes or more, each on a line, and "
      "none twice"
    )
  return found


def relabelled(dataset: Dataset, known: Sequence[str], of: str) -> Dataset:
  """Returns a dataset whose labels count given classes.

  Args:
    dataset: its own classes are named as some of the given ones are; where that is
      unique, letter case and underscores aside; ImageNet's by WordNet identifier, too.
    known: names in the order of the logits.
    of: whose classes these are, for messages.

  Raises:
    UsageError: it has others.
  """
  count = collections.Counter(map(_plain, known))
  alike = {_plain(n): i for i, n in enumerate(known) if count[_plain(n)] == 1}
  exact = {name: i for i, name in enumerate(known)}
  if tuple(known) == names(IMAGENET):
    exact |= {identifier: i for i, identifier in enumerate(imagenet())}
  find = lambda name: exact.get(name, alike.get(_plain(name)))
  own = [find(name) for name in dataset.class_names]
  for label in np.unique(dataset.labels):
    if own[label] is None:
      name = dataset.class_names[label]
      near = errors.near(name, known)
      if not near.startswith("did"):
        near = f"these are {', '.join(known[:8])}{', ...' * (len(known) > 8)}"
      raise errors.UsageError(f"{name!r} is no class of {of}; {near}")
  labels = np.asarray([number or 0 for number in own], np.int32)[dataset.labels]
  return dataclasses.replace(dataset, labels=labels, class_names=tuple(known))


def unlabelled(dataset: Dataset, known: Sequence[str]) -> Dataset:
  """Returns a dataset without its labels, which a classifier of these classes gives.

  Its labels are all 0, until somebody asks the classifier.
  """
  labels = np.zeros(len(dataset), np.int32)
  return dataclasses.replace(dataset, labels=labels, class_names=tuple(known))


def _plain(name: str) -> str:
  return " ".join(name.replace("_", " ").casefold().split())
