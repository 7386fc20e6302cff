"""Which example belongs to train, validation and test."""

import functools
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from importlib import resources

import numpy as np

from fidelity_jax import files, locations
from fidelity_jax.data.dataset import SPLITS
from fidelity_jax.errors import UsageError

AUTHORS = ("caltech256", "caltech101")
# What people call the splits, in files and as folders.
NAMES = {
  "train": "train",
  "training": "train",
  "validation": "validation",
  "valid": "validation",
  "val": "validation",
  "test": "test",
  "testing": "test",
}
# Split -> sorted example indices.
Chosen = dict[str, list[int]]


def sizes(
  count: int, fractions: Sequence[float], counts: Sequence[int]
) -> tuple[int, int, int]:
  """Returns how many of a class's examples go to train, validation and test.

  Args:
    count: the number of examples of the class.
    fractions: shares of train, validation and test; their sum is at most 1.
    counts: if not empty, numbers of examples that take the place of `fractions`;
      one of them may be -1, "all that remain".
  """
  if counts:
    wanted = list(counts)
    rest = max(count - sum(n for n in wanted if n >= 0), 0)
    wanted = [rest if n < 0 else n for n in wanted]
  else:
    validation, test = round(fractions[1] * count), round(fractions[2] * count)
    whole = sum(fractions) > 1 - 1e-6
    train = count - validation - test if whole else round(fractions[0] * count)
    wanted = [train, validation, test]
  # A class that is too small fills train first, then validation.
  taken = []
  for n in wanted:
    taken.append(min(n, count - sum(taken)))
  return tuple(taken)


def class_generator(seed: int, class_name: str) -> np.random.Generator:
  """Returns the generator of a class's draws under a split seed."""
  key = np.array([seed, zlib.crc32(class_name.encode())], np.uint64)
  return np.random.Generator(np.random.Philox(key=key))


def draw(
  class_names: Sequence[str],
  labels: np.ndarray,
  keys: Sequence[str],
  *,
  seed: int,
  fractions: Sequence[float],
  counts: Sequence[int] = (),
) -> Chosen:
  """Draws the splits of every class by a seed.

  A class's draw depends on the seed, its name and its sorted keys alone, so adding a
  class leaves the splits of all others as they were.

  Args:
    class_names: names by label.
    labels: int32 [N].
    keys: stable keys, N of them.
    seed: the dataset's split seed.
    fractions: see `sizes`.
    counts: see `sizes`.

  Returns:
    {"train" | "validation" | "test": sorted example indices}.
  """
  chosen = {split: [] for split in SPLITS}
  order = sorted(range(len(keys)), key=lambda i: keys[i])
  members = {label: [] for label in range(len(class_names))}
  for i in order:
    members[int(labels[i])].append(i)
  for label, name in enumerate(class_names):
    order = class_generator(seed, name).permutation(len(members[label]))
    shuffled = [members[label][i] for i in order]
    start = 0
    for split, n in zip(SPLITS, sizes(len(shuffled), fractions, counts), strict=True):
      chosen[split] += shuffled[start : start + n]
      start += n
  return {split: sorted(indices) for split, indices in chosen.items()}


def draw_missing(
  own: Chosen,
  missing: str,
  share: float,
  class_names: Sequence[str],
  labels: np.ndarray,
  keys: Sequence[str],
  *,
  seed: int,
) -> Chosen:
  """Draws the one split that a dataset comes without from its training examples.

  Args:
    own: the two others.
    missing: "validation" or "test".
    share: of the training examples of each class, what is taken for it.
    class_names: names by label.
    labels: int32 [N].
    keys: stable keys, N of them.
    seed: the dataset's split seed.

  Returns:
    All three splits.
  """
  train = own["train"]
  shares = {"train": 1 - share, missing: share}
  drawn = draw(
    class_names,
    labels[train],
    [keys[i] for i in train],
    seed=seed,
    fractions=[shares.get(split, 0) for split in SPLITS],
  )
  return own | {split: [train[i] for i in drawn[split]] for split in shares}


# Class name -> (numbers of the training files, numbers of the validation files).
Lists = Mapping[str, tuple[frozenset[int], frozenset[int]]]


@functools.cache
def authors_lists(name: str) -> Lists:
  """Returns the split that the paper's authors used.

  Args:
    name: one of `AUTHORS`.
  """
  text = (resources.files("fidelity_jax.data") / "lists" / f"{name}.txt").read_text()
  lists = {}
  for line in text.splitlines():
    if line.startswith("#"):
      continue
    class_name, numbers = line.rsplit(":", 1)
    lists[class_name] = tuple(
      frozenset(map(int, part.split(","))) for part in numbers.split(";")
    )
  return lists


def from_file(
  path: str,
  class_names: Sequence[str],
  keys: Sequence[str],
  labels: np.ndarray,
) -> Chosen:
  """Reads splits from a JSON file.

  The file holds {"train": ..., "validation": ..., "test": ...}, or other `NAMES` of
  these. Each is either a list of keys, or an object from class names to
  lists of keys, file names or numbers; number 33 is the file of the class whose name
  ends in 33 ("image_0033.jpg"). Without "test", the test set is all that is not named.

  Args:
    path: of the file, or one of `AUTHORS` for the authors' own lists.
    class_names: names by label.
    keys: stable keys, N of them.
    labels: int32 [N].

  Returns:
    {"train" | "validation" | "test": sorted example indices}.

  Raises:
    UsageError: the file cannot be read, names what does not exist, or names an
      example twice.
  """
  try:
    if path in AUTHORS:
      lists = authors_lists(path)
      named = {
        split: {name: sorted(parts[i]) for name, parts in lists.items()}
        for i, split in enumerate(("train", "validation"))
      }
    else:
      named = json.loads(files.read_bytes(locations.expand(path)))
  except (OSError, ValueError, RecursionError) as error:
    raise UsageError(f"dataset.split_file: cannot read {path}: {error}") from error
  parts = {}
  for name in named if isinstance(named, dict) else ():
    split = NAMES.get(name)
    if split is None:
      raise UsageError(f"dataset.split_file: {path} has an unknown split '{name}'")
    if split in parts:
      raise UsageError(f"dataset.split_file: {path} has a {split} split twice")
    parts[split] = named[name]
  if "train" not in parts:
    raise UsageError(
      f"dataset.split_file: {path} is no JSON object with 'train', 'validation' and "
      "(optionally) 'test'"
    )
  finder = _Finder(path, class_names, keys, labels)
  chosen = {split: finder.find(parts.get(split, [])) for split in SPLITS}
  if "test" not in parts:
    taken = {*chosen["train"], *chosen["validation"]}
    chosen["test"] = [i for i in range(len(keys)) if i not in taken]
  everything = [i for indices in chosen.values() for i in indices]
  if len(set(everything)) < len(everything):
    twice = next(i for i in everything if everything.count(i) > 1)
    raise UsageError(f"dataset.split_file: {path} names {keys[twice]} twice")
  return {split: sorted(indices) for split, indices in chosen.items()}


class _Finder:
  """Finds what a split file names."""

  def __init__(
    self, path: str, class_names: Sequence[str], keys: Sequence[str], labels: np.ndarray
  ):
    self._path = path
    self._classes = set(class_names)
    self._by_name = {key: i for i, key in enumerate(keys)}
    self._by_number = {}
    for i, key in enumerate(keys):
      file_name = key.rsplit("/", 1)[-1]
      class_name = class_names[labels[i]]
      self._add(self._by_name, (class_name, file_name), i)
      if digits := re.search(r"(\d+)(\.\w+)?$", file_name):
        self._add(self._by_number, (class_name, int(digits.group(1))), i)

  @staticmethod
  def _add(known: dict, place: object, index: int) -> None:
    # None: more than one.
    known[place] = None if place in known else index

  def find(self, named: list | dict) -> list[int]:
    """Returns the indices of a list of keys or an object of classes."""
    if isinstance(named, list):
      return [self._lookup(self._by_name, self._item(k), str(k)) for k in named]
    if not isinstance(named, dict):
      raise UsageError(
        f"dataset.split_file: {self._path} has a split that is neither a list nor an "
        "object of classes"
      )
    indices = []
    for class_name, items in named.items():
      if class_name not in self._classes:
        raise UsageError(
          f"dataset.split_file: {self._path} names the class '{class_name}', which the "
          "dataset does not have; --config.dataset.split_file= draws the splits"
        )
      if not isinstance(items, list):
        raise UsageError(
          f"dataset.split_file: {self._path} has no list for the class '{class_name}'"
        )
      for item in items:
        place = (class_name, self._item(item))
        known = self._by_number if isinstance(item, int) else self._by_name
        place = item if item in self._by_name else place
        indices.append(self._lookup(known, place, f"{class_name}: {item}"))
    return indices

  def _item(self, item: object) -> str | int:
    if isinstance(item, str | int) and not isinstance(item, bool):
      return item
    raise UsageError(
      f"dataset.split_file: {self._path} names {str(item)[:80]!r}: names and numbers "
      "of images are possible"
    )

  def _lookup(self, known: dict, place: object, text: str) -> int:
    if place not in known:
      raise UsageError(
        f"dataset.split_file: {self._path} names '{text}', which the dataset does not "
        "have"
      )
    if known[place] is None:
      raise UsageError(
        f"dataset.split_file: {self._path} names '{text}', of which the dataset has "
        "several; name the paths below dataset.path"
      )
    return known[place]
