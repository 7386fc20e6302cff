"""Decoded images, kept in memory for this run or on disk for later ones."""

import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np

from fidelity_jax import files, platform
from fidelity_jax.data import images
from fidelity_jax.data.dataset import Dataset
from fidelity_jax.errors import RunError, UsageError

_CHUNK = 32
# Of the machine's memory, what all caches of this process together may take.
_MEMORY_SHARE = 0.5
# After how many seconds an unfinished file is one that a killed run left behind.
_STALE = 86_400


@dataclasses.dataclass(frozen=True)
class DecodedRecords:
  """Decoded images in one memory-mapped file.

  Attributes:
    path: of the file, uint8 pixels of all images one after the other.
    offsets: int64 [N], an image's first byte.
    shapes: int32 [N, 2], height and width in pixels.
    owner: keeps a file in memory alive; never sent to another process.
  """

  path: str
  offsets: np.ndarray
  shapes: np.ndarray
  owner: object = None

  def __len__(self) -> int:
    return len(self.offsets)

  def __getitem__(self, index: int) -> np.ndarray:
    """Returns uint8 [H, W, 3], read-only."""
    height, width = self.shapes[index].tolist()
    start = int(self.offsets[index])
    return self._pixels[start : start + 3 * height * width].reshape(height, width, 3)

  @functools.cached_property
  def _pixels(self) -> np.ndarray:
    # A plain array: slicing a memmap object costs more than the copy it saves.
    return np.asarray(np.memmap(self.path, np.uint8, mode="r"))

  def __getstate__(self) -> dict[str, object]:
    # Another process maps the file itself.
    return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)} | {
      "owner": None
    }

  def versions(self) -> list[str]:
    """Returns nothing: decoded images have been checked."""
    return [""] * len(self)

  def select(self, indices: Sequence[int]) -> "DecodedRecords":
    """Returns the images at `indices`."""
    chosen = np.asarray(indices, np.int64)
    return dataclasses.replace(
      self,
      offsets=self.offsets[chosen],
      shapes=self.shapes[chosen],
    )


def decoded(dataset: Dataset, kind: str, cache_dir: Path) -> Dataset:
  """Decodes all images of a dataset once.

  Args:
    dataset: verified, so that every record can be decoded.
    kind: "ram" keeps the pixels in memory, shared by worker processes and gone with
      this process; "disk" in a file of `cache_dir` that later runs map again. The
      file's name carries the dataset's fingerprint: other content, another file.
    cache_dir: created if absent.

  Returns:
    The dataset with decoded records, fingerprint and batches unchanged.

  Raises:
    UsageError: not enough disk space, or all that this process holds in memory
      would be more than half of the machine's; the numbers are named.
    RunError: the file cannot be written.
  """
  stem = cache_dir / f"decoded-{dataset.fingerprint[:32]}"
  if kind == "disk" and (found := _reopen(stem)):
    return dataclasses.replace(dataset, records=found)
  shapes = _shapes(dataset)
  sizes = shapes.astype(np.int64).prod(axis=1) * 3
  offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]])
  total = int(sizes.sum())
  owner = None
  try:
    if kind == "ram":
      _check_memory(total)
      owner = _MemoryFile(total)
      path = owner.path
      _fill(dataset, path, offsets, shapes)
    else:
      cache_dir.mkdir(parents=True, exist_ok=True)
      _check_disk(total, cache_dir)
      path = _write(dataset, stem, offsets, shapes, total)
  except OSError as error:
    raise RunError(
      f"cannot cache {total / 2**20:.0f} MiB of decoded images (dataset.cache={kind}): "
      f"{error}"
    ) from error
  records = DecodedRecords(str(path), offsets, shapes, owner)
  return dataclasses.replace(dataset, records=records)


class _Index(msgspec.Struct, forbid_unknown_fields=True):
  """What the file beside the pixels holds; `version` is that of the pixels' file."""

  version: str
  offsets: list[int]
  shapes: list[tuple[int, int]]


def _reopen(stem: Path) -> DecodedRecords | None:
  """Returns the records of an earlier run, None if absent or damaged."""
  pixels = stem.with_suffix(".u8")
  try:
    index = files.read_record(stem.with_suffix(".json"), _Index, "made again")
    if files.version(pixels.stat()) != index.version:
      return None
  except (OSError, RunError):
    return None
  offsets, shapes = np.asarray(index.offsets), np.asarray(index.shapes, np.int32)
  return DecodedRecords(str(pixels), offsets, shapes)


def _write(
  dataset: Dataset, stem: Path, offsets: np.ndarray, shapes: np.ndarray, total: int
) -> Path:
  """Writes pixels, then the index that makes them valid."""
  for stale in stem.parent.glob(".decoded-*"):
    with contextlib.suppress(OSError):
      if time.time() - stale.stat().st_mtime > _STALE:
        stale.unlink()
  handle, temporary = tempfile.mkstemp(dir=stem.parent, prefix=".decoded-")
  try:
    try:
      os.truncate(handle, total)
      _allocate(handle, total)
    finally:
      os.close(handle)
    _fill(dataset, temporary, offsets, shapes)
    pixels = stem.with_suffix(".u8")
    os.replace(temporary, pixels)
  except BaseException:
    with contextlib.suppress(OSError):
      os.unlink(temporary)
    raise
  version = files.version(pixels.stat())
  index = _Index(version, offsets.tolist(), [tuple(s) for s in shapes.tolist()])
  files.write_record(stem.with_suffix(".json"), index)
  return pixels


def _allocate(handle: int, total: int) -> None:
  """Allocates a file, so that a full disk is an error here and not in the map."""
  if hasattr(os, "posix_fallocate"):
    try:
      os.posix_fallocate(handle, 0, total)
    except OSError as error:
      # Not supported by every file system.
      if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
        raise


class _MemoryFile:
  """A file in memory that goes with this object.

  Attributes:
    path: of the file, for this process and its worker processes.
    size: in bytes.
  """

  # Those that there are in this process.
  alive: "weakref.WeakSet[_MemoryFile]" = weakref.WeakSet()

  def __init__(self, size: int):
    self.size = size
    if hasattr(os, "memfd_create"):
      # Anonymous: however this process ends, nothing is left behind.
      handle = os.memfd_create("fidelity_jax-decoded")
      weakref.finalize(self, os.close, handle)
      self.path = f"/proc/{os.getpid()}/fd/{handle}"
    else:
      self._file = tempfile.NamedTemporaryFile(prefix="fidelity_jax-")
      self.path = self._file.name
    os.truncate(self.path, size)
    self.alive.add(self)


def _fill(dataset: Dataset, path, offsets: np.ndarray, shapes: np.ndarray) -> None:
  pixels = np.memmap(path, np.uint8, mode="r+")

  def decode(i: int) -> None:
    image = dataset.picture(i).pixels()
    begin = int(offsets[i])
    pixels[begin : begin + image.size] = image.reshape(-1)

  _for_each(dataset, decode)
  pixels.flush()


def _shapes(dataset: Dataset) -> np.ndarray:
  shapes = np.zeros((len(dataset), 2), np.int32)

  def measure(i: int) -> None:
    picture = dataset.picture(i)
    shapes[i] = picture.height, picture.width

  _for_each(dataset, measure)
  return shapes


def _for_each(dataset: Dataset, work: Callable[[int], None]) -> None:
  """Does something with every image, in threads."""

  def chunk(start: int) -> None:
    for i in range(start, min(start + _CHUNK, len(dataset))):
      try:
        work(i)
      except images.BadImageError as error:
        raise RunError(f"{dataset.keys[i]}: {error}") from error

  _in_threads(chunk, len(dataset))


def _in_threads(work, count: int) -> None:
  pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1)
  try:
    for future in [pool.submit(work, start) for start in range(0, count, _CHUNK)]:
      future.result()
  finally:
    # After a failure or a signal, what has not started is not needed any more.
    pool.shutdown(cancel_futures=True)


def _check_memory(needed: int) -> None:
  room = platform.host_memory() * _MEMORY_SHARE
  held = sum(file.size for file in _MemoryFile.alive)
  if needed + held > room:
    beside = f", beside {_gib(held)} of other splits," if held else ""
    raise UsageError(
      f"dataset.cache: {_gib(needed)} of decoded images{beside} are more than half of "
      f"the memory, {_gib(room)}; use dataset.cache=disk or None"
    )


def _check_disk(needed: int, folder: Path) -> None:
  free = shutil.disk_usage(folder).free
  if needed > free:
    raise UsageError(
      f"dataset.cache: {_gib(needed)} of decoded images are more than what is free in "
      f"{folder}, {_gib(free)}; use dataset.cache=ram or None"
    )


def _gib(size: float) -> str:
  return f"{size / 2**30:.2f} GiB"
