"""What every dataset looks like to the rest of the system."""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from fidelity_jax.data import images
from fidelity_jax.errors import UsageError

SPLITS = ("train", "validation", "test")


class Records(Protocol):
  """Random access to encoded images; picklable, so that processes can share it."""

  def __len__(self) -> int:
    """Returns the number of records."""

  def __getitem__(self, index: int) -> bytes:
    """Returns the bytes of one image file.

    Raises:
      BadImageError: the record cannot be read.
    """

  def stamps(self) -> list[str]:
    """Returns per record a cheap text that changes when its content does."""

  def select(self, indices: Sequence[int]) -> "Records":
    """Returns the records at `indices`, in that order."""


@dataclasses.dataclass(frozen=True)
class MemoryRecords:
  """Encoded images in memory."""

  encoded: tuple[bytes, ...]

  def __len__(self) -> int:
    return len(self.encoded)

  def __getitem__(self, index: int) -> bytes:
    return self.encoded[index]

  def stamps(self) -> list[str]:
    """Returns a digest of each record."""
    return [hashlib.sha256(encoded).hexdigest()[:16] for encoded in self.encoded]

  def select(self, indices: Sequence[int]) -> "MemoryRecords":
    """Returns the records at `indices`."""
    return MemoryRecords(tuple(self.encoded[i] for i in indices))


@dataclasses.dataclass(frozen=True)
class FileRecords:
  """Image files under a folder."""

  root: str
  paths: tuple[str, ...]

  def __len__(self) -> int:
    return len(self.paths)

  def __getitem__(self, index: int) -> bytes:
    try:
      return (Path(self.root) / self.paths[index]).read_bytes()
    except OSError as error:
      raise images.BadImageError(error.strerror or str(error)) from error

  def stamps(self) -> list[str]:
    """Returns the size in bytes of each file, "absent" where there is none."""
    return [self._size(path) for path in self.paths]

  def _size(self, path: str) -> str:
    try:
      return str((Path(self.root) / path).stat().st_size)
    except OSError:
      return "absent"

  def select(self, indices: Sequence[int]) -> "FileRecords":
    """Returns the files at `indices`."""
    return FileRecords(self.root, tuple(self.paths[i] for i in indices))


@dataclasses.dataclass(frozen=True)
class Skipped:
  """A record that was left out, and why."""

  key: str
  reason: str


@dataclasses.dataclass(frozen=True)
class Dataset:
  """One split of a dataset: encoded images with stable keys and labels.

  Attributes:
    name: "demo", "folder", "caltech256", ...
    split: "train", "validation" or "test".
    records: the encoded images.
    keys: a stable, unique name per record, e.g. "demo/astronaut/r03c05".
    labels: int32 [len], class numbers in [0, num_classes).
    class_names: sorted names; the label is the position in this tuple.
    skipped: records that could not be used and are not part of the dataset.
    max_pixels: the largest image that is decoded, in pixels.
  """

  name: str
  split: str
  records: Records
  keys: tuple[str, ...]
  labels: np.ndarray
  class_names: tuple[str, ...]
  skipped: tuple[Skipped, ...] = ()
  max_pixels: int = images.DEFAULT_MAX_PIXELS

  def __len__(self) -> int:
    return len(self.keys)

  @property
  def num_classes(self) -> int:
    """The number of classes, those without an example in this split included."""
    return len(self.class_names)

  @functools.cached_property
  def fingerprint(self) -> str:
    """SHA-256 (hex) over class names, keys, labels and record sizes.

    Two datasets with the same fingerprint train the same; a file that is added,
    removed, renamed, relabelled or of another size changes it.
    """
    digest = hashlib.sha256("\n".join(self.class_names).encode())
    for key, label, stamp in zip(
      self.keys, self.labels, self.records.stamps(), strict=True
    ):
      digest.update(f"\0{key}\t{label}\t{stamp}".encode())
    return digest.hexdigest()

  def select(self, indices: Sequence[int]) -> "Dataset":
    """Returns the dataset of the examples at `indices`, in that order."""
    return dataclasses.replace(
      self,
      records=self.records.select(indices),
      keys=tuple(self.keys[i] for i in indices),
      labels=self.labels[np.asarray(indices, np.int64)],
    )

  def part(self, split: str, indices: Sequence[int], max_pixels: int) -> "Dataset":
    """Returns the examples at `indices` as a named split."""
    return dataclasses.replace(
      self.select(indices), split=split, max_pixels=max_pixels
    )

  def with_skipped(self, skipped: Sequence[Skipped]) -> "Dataset":
    """Returns the dataset with further records noted as left out."""
    return dataclasses.replace(self, skipped=self.skipped + tuple(skipped))


def check_num_classes(dataset: Dataset, num_classes: int) -> None:
  """Refuses a dataset that does not fit a classifier's head.

  Args:
    dataset: what is to be classified.
    num_classes: the number of outputs of the classifier.

  Raises:
    UsageError: the two numbers of classes differ.
  """
  if dataset.num_classes != num_classes:
    raise UsageError(
      f"dataset '{dataset.name}' has {dataset.num_classes} classes but the "
      f"classifier's head has {num_classes}; train the classifier on this dataset "
      "or name the dataset that it was trained on"
    )
