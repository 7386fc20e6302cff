"""What every dataset looks like to the rest of the system."""

import dataclasses
import errno
import functools
import hashlib
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from fidelity_jax import errors, files
from fidelity_jax.data import images
from fidelity_jax.errors import RunError, UsageError

SPLITS = ("train", "validation", "test")
# No image file is larger, in bytes.
_LARGEST = 2**30
# Errors that are about a file, not the machine; `files.read_bytes` raises some without
# a number.
_OF_THE_FILE = (
  None,
  errno.EACCES,
  errno.EISDIR,
  errno.ELOOP,
  errno.ENAMETOOLONG,
  errno.ENOENT,
  errno.ENOTDIR,
  errno.EPERM,
)


def check_of_the_file(error: OSError, what: str) -> None:
  """Raises RunError unless an error is about the file itself.

  With too many files open, for example, a good file cannot be read either.
  """
  if error.errno not in _OF_THE_FILE:
    reason = errors.circumstance(error) or error.strerror
    raise RunError(f"reading {what} failed: {reason}.") from error


def digest(record: bytes) -> str:
  """Returns what stands for a record's content: 32 digits of SHA-256, 8 of CRC-32."""
  return f"{hashlib.sha256(record).hexdigest()[:32]}{zlib.crc32(record):08x}"


class Records(Protocol):
  """Random access to encoded images; picklable, so that processes can share it."""

  def __len__(self) -> int:
    """Returns the number of records."""

  def __getitem__(self, index: int) -> bytes | np.ndarray:
    """Returns the bytes of one image file, or decoded uint8 [H, W, 3].

    Raises:
      BadImageError: the record is not there or cannot be read by this user.
      RunError: reading failed for a reason that is not the record's.
    """

  def versions(self) -> list[str]:
    """Returns per record a cheap text that changes even when it is only replaced.

    "" for a record that is to be checked in every run.
    """

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

  def versions(self) -> list[str]:
    """Returns nothing: reading memory is faster than looking up what is known of it."""
    return [""] * len(self)

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
      return files.read_bytes(Path(self.root) / self.paths[index], _LARGEST)
    except OSError as error:
      check_of_the_file(error, self.paths[index])
      raise images.BadImageError(error.strerror or str(error)) from error
    except ValueError as error:
      raise images.BadImageError(f"no path: {error}") from error

  def versions(self) -> list[str]:
    """Returns size, times and inode of each file."""
    return [files.version(s) if s else "" for s in self._status()]

  def _status(self) -> Iterator[os.stat_result | None]:
    for path in self.paths:
      try:
        yield (Path(self.root) / path).stat()
      except (OSError, ValueError):
        yield None

  def select(self, indices: Sequence[int]) -> "FileRecords":
    """Returns the files at `indices`."""
    return FileRecords(self.root, tuple(self.paths[i] for i in indices))


@dataclasses.dataclass(frozen=True)
class JoinedRecords:
  """Several sources as one."""

  parts: tuple[Records, ...]
  # Pairs of a part's number and a position in it; None: all of them.
  places: tuple[tuple[int, int], ...] | None = None

  def __post_init__(self):
    if self.places is None:
      every = [(n, i) for n, part in enumerate(self.parts) for i in range(len(part))]
      object.__setattr__(self, "places", tuple(every))

  def __len__(self) -> int:
    return len(self.places)

  def __getitem__(self, index: int) -> bytes | np.ndarray:
    part, place = self.places[index]
    return self.parts[part][place]

  def versions(self) -> list[str]:
    """Returns the versions of the parts' records."""
    versions = [part.versions() for part in self.parts]
    return [versions[part][place] for part, place in self.places]

  def select(self, indices: Sequence[int]) -> "JoinedRecords":
    """Returns the records at `indices`."""
    return dataclasses.replace(self, places=tuple(self.places[i] for i in indices))


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
    class_names: the label is the position in this tuple.
    skipped: records that could not be used and are not part of the dataset.
    digests: of the content of each record, see `digest`; () before they are read.
    max_pixels: the largest image that is decoded, in pixels.
  """

  name: str
  split: str
  records: Records
  keys: tuple[str, ...]
  labels: np.ndarray
  class_names: tuple[str, ...]
  skipped: tuple[Skipped, ...] = ()
  digests: tuple[str, ...] = ()
  max_pixels: int = images.DEFAULT_MAX_PIXELS

  def __len__(self) -> int:
    return len(self.keys)

  @property
  def num_classes(self) -> int:
    """The number of classes, those without an example in this split included."""
    return len(self.class_names)

  @functools.cached_property
  def fingerprint(self) -> str:
    """SHA-256 (hex) over class names, keys, labels and the content of all records.

    Two datasets with the same fingerprint train the same; a file that is added,
    removed, renamed, relabelled or changed changes it.
    """
    return self._hash("\n".join(self.class_names), self.labels)

  @functools.cached_property
  def images_fingerprint(self) -> str:
    """The same for what does without labels: over keys and content alone."""
    return self._hash("", [""] * len(self))

  def _hash(self, head: str, labels: Sequence) -> str:
    digests = self.digests or [digest(record) for record in self.records]
    whole = hashlib.sha256(head.encode())
    for key, label, content in zip(self.keys, labels, digests, strict=True):
      line = f"\0{key}\t{label}\t{content}"
      # File names need not be UTF-8.
      whole.update(line.encode("utf-8", "surrogateescape"))
    return whole.hexdigest()

  def picture(self, index: int) -> images.Picture:
    """Returns an image, not yet decoded.

    Raises:
      BadImageError: it cannot be used, or is another than when it was checked.
    """
    record = self.records[index]
    if self.digests and isinstance(record, bytes):
      # Of the digest the part that costs least, at every reading.
      if zlib.crc32(record) != int(self.digests[index][-8:], 16):
        raise images.BadImageError("the file is not what it was when the run began")
    return images.Picture(record, self.max_pixels)

  def select(self, indices: Sequence[int]) -> "Dataset":
    """Returns the dataset of the examples at `indices`, in that order."""
    return dataclasses.replace(
      self,
      records=self.records.select(indices),
      keys=tuple(self.keys[i] for i in indices),
      labels=self.labels[np.asarray(indices, np.int64)],
      digests=tuple(self.digests[i] for i in indices) if self.digests else (),
    )

  def with_skipped(self, skipped: Sequence[Skipped]) -> "Dataset":
    """Returns the dataset with further records noted as left out."""
    return dataclasses.replace(self, skipped=self.skipped + tuple(skipped))


def join(parts: Iterable[Dataset]) -> Dataset:
  """Returns the examples of several splits of one dataset as one."""
  parts = list(parts)
  return dataclasses.replace(
    parts[0],
    split="all",
    records=JoinedRecords(tuple(part.records for part in parts)),
    keys=tuple(key for part in parts for key in part.keys),
    labels=np.concatenate([part.labels for part in parts]),
    skipped=tuple(skipped for part in parts for skipped in part.skipped),
  )


def check_classes(dataset: Dataset, known: Sequence[str]) -> None:
  """Refuses a dataset whose classes are not those that a classifier knows.

  Args:
    dataset: what is to be classified.
    known: names of the classes that the classifier was trained on.

  Raises:
    UsageError: they are others.
  """
  if dataset.class_names == tuple(known):
    return
  first = f"{len(known)} classes ({', '.join(known[:3])}, ...)"
  raise UsageError(
    f"dataset '{dataset.name}' has {dataset.num_classes} classes "
    f"({', '.join(dataset.class_names[:3])}, ...), but the classifier was trained on "
    f"{first}: name one dataset for both, or count the classifier's classes by "
    "dataset.classes"
  )
