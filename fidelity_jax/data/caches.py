"""What is worth keeping between epochs and runs: decoded images, checked files."""

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
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from fidelity_jax import files, platform
from fidelity_jax.data import images
from fidelity_jax.data.dataset import Dataset
from fidelity_jax.errors import RunError, UsageError

_CHUNK = 32
# Of the machine's memory, what a cache may take.
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
    """Returns nothing known: what is decoded is checked already."""
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
    UsageError: not enough memory or disk space; both numbers are named.
    RunError: the file cannot be written.
  """
  stem = cache_dir / f"decoded-{dataset.fingerprint[:32]}"
  if kind == "disk" and (found := _reopen(stem, len(dataset))):
    return dataclasses.replace(dataset, records=found)
  shapes = _shapes(dataset)
  sizes = shapes.astype(np.int64).prod(axis=1) * 3
  offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]])
  total = int(sizes.sum())
  try:
    if kind == "ram":
      _check_room(
        total, platform.host_memory() * _MEMORY_SHARE, "half of the memory", "disk"
      )
      path, owner = _memory_file(total)
      _fill(dataset, path, offsets, shapes)
    else:
      cache_dir.mkdir(parents=True, exist_ok=True)
      free = shutil.disk_usage(cache_dir).free
      _check_room(total, free, f"what is free in {cache_dir}", "ram")
      path, owner = _write(dataset, stem, offsets, shapes, total), None
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


def _reopen(stem: Path, count: int) -> DecodedRecords | None:
  """Returns the records of an earlier run, None if absent or damaged."""
  pixels = stem.with_suffix(".u8")
  try:
    index = files.read_record(stem.with_suffix(".json"), _Index, "made again")
    if files.version(pixels.stat()) != index.version or len(index.shapes) != count:
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
  """Takes the room for a file, so that a full disk shows here, not under the map."""
  if hasattr(os, "posix_fallocate"):
    try:
      os.posix_fallocate(handle, 0, total)
    except OSError as error:
      # Not every file system can.
      if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
        raise


def _memory_file(total: int) -> tuple[str, object]:
  """Returns the path of a file in memory and the object that keeps it."""
  if hasattr(os, "memfd_create"):
    # Anonymous: however this process ends, nothing is left behind. Its worker
    # processes reach it through this path.
    handle = os.memfd_create("fidelity_jax-decoded")
    os.truncate(handle, total)
    owner = _Owner()
    weakref.finalize(owner, os.close, handle)
    return f"/proc/{os.getpid()}/fd/{handle}", owner
  file = tempfile.NamedTemporaryFile(prefix="fidelity_jax-")
  file.truncate(total)
  return file.name, file


class _Owner:
  """Something whose end can be waited for."""


def _fill(dataset: Dataset, path, offsets: np.ndarray, shapes: np.ndarray) -> None:
  pixels = np.memmap(path, np.uint8, mode="r+")

  def decode(start: int) -> None:
    for i in range(start, min(start + _CHUNK, len(dataset))):
      image = _image(dataset, i)
      if image.shape[:2] != tuple(shapes[i]):
        raise RunError(f"{dataset.keys[i]}: changed while it was read")
      begin = int(offsets[i])
      pixels[begin : begin + image.size] = image.reshape(-1)

  _in_threads(decode, len(dataset))
  pixels.flush()


def _image(dataset: Dataset, index: int) -> np.ndarray:
  try:
    return dataset.picture(index).pixels()
  except images.BadImageError as error:
    raise RunError(f"{dataset.keys[index]}: {error}") from error


def _shapes(dataset: Dataset) -> np.ndarray:
  shapes = np.zeros((len(dataset), 2), np.int32)

  def measure(start: int) -> None:
    for i in range(start, min(start + _CHUNK, len(dataset))):
      try:
        picture = dataset.picture(i)
      except images.BadImageError as error:
        raise RunError(f"{dataset.keys[i]}: {error}") from error
      shapes[i] = picture.height, picture.width

  _in_threads(measure, len(dataset))
  return shapes


def _in_threads(work, count: int) -> None:
  pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1)
  try:
    for future in [pool.submit(work, start) for start in range(0, count, _CHUNK)]:
      future.result()
  finally:
    # Where one fails, or a signal strikes, the others need not be done.
    pool.shutdown(cancel_futures=True)


def _check_room(needed: int, room: float, what: str, other: str) -> None:
  if needed > room:
    raise UsageError(
      f"dataset.cache: {needed / 2**30:.2f} GiB of decoded images are more than "
      f"{what}, {room / 2**30:.2f} GiB; use dataset.cache={other} or None"
    )
