"""What is worth keeping between epochs and runs: decoded images, checked files."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import logging

from fidelity_jax.data import images
from fidelity_jax.data.dataset import Dataset
from fidelity_jax.errors import RunError, UsageError

_CHUNK = 32
# Of the machine's memory, what a cache may take.
_MEMORY_SHARE = 0.5


@dataclasses.dataclass(frozen=True)
class DecodedRecords:
  """Decoded images in one memory-mapped file.

  Attributes:
    path: of the file, uint8 pixels of all images one after the other.
    offsets: int64 [N], an image's first byte.
    shapes: int32 [N, 2], height and width in pixels.
    content: per record the stamp of the encoded image.
    owner: keeps a file in memory alive; never sent to another process.
  """

  path: str
  offsets: np.ndarray
  shapes: np.ndarray
  content: tuple[str, ...]
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

  def stamps(self) -> list[str]:
    """Returns the stamps of the encoded images."""
    return list(self.content)

  def versions(self) -> list[str]:
    """Returns the stamps."""
    return self.stamps()

  def select(self, indices: Sequence[int]) -> "DecodedRecords":
    """Returns the images at `indices`."""
    chosen = np.asarray(indices, np.int64)
    return dataclasses.replace(
      self,
      offsets=self.offsets[chosen],
      shapes=self.shapes[chosen],
      content=tuple(self.content[i] for i in indices),
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
  stamps = tuple(dataset.records.stamps())
  stem = cache_dir / f"decoded-{dataset.fingerprint[:32]}"
  if kind == "disk" and (found := _reopen(stem, len(dataset), stamps)):
    return dataclasses.replace(dataset, records=found)
  shapes = _shapes(dataset)
  sizes = shapes.astype(np.int64).prod(axis=1) * 3
  offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]])
  total = int(sizes.sum())
  try:
    if kind == "ram":
      _check_room(total, _memory() * _MEMORY_SHARE, "half of the memory", "disk")
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
  logging.info(
    "dataset '%s', split '%s': %.0f MiB of decoded images in %s",
    dataset.name,
    dataset.split,
    total / 2**20,
    kind,
  )
  records = DecodedRecords(str(path), offsets, shapes, stamps, owner)
  return dataclasses.replace(dataset, records=records)


def _reopen(stem: Path, count: int, stamps: tuple[str, ...]) -> DecodedRecords | None:
  """Returns the records of an earlier run, None if absent or damaged."""
  try:
    index = json.loads(stem.with_suffix(".json").read_text())
    shapes = np.asarray(index["shapes"], np.int32).reshape(count, 2)
    offsets = np.asarray(index["offsets"], np.int64).reshape(count)
    pixels = stem.with_suffix(".u8")
    if pixels.stat().st_size != index["bytes"]:
      return None
  except (OSError, ValueError, KeyError, TypeError):
    return None
  return DecodedRecords(str(pixels), offsets, shapes, stamps)


def _write(
  dataset: Dataset, stem: Path, offsets: np.ndarray, shapes: np.ndarray, total: int
) -> Path:
  """Writes pixels, then the index that makes them valid."""
  handle, temporary = tempfile.mkstemp(dir=stem.parent, prefix=".decoded-")
  try:
    os.truncate(handle, total)
    os.close(handle)
    _fill(dataset, temporary, offsets, shapes)
    pixels = stem.with_suffix(".u8")
    os.replace(temporary, pixels)
  except BaseException:
    with contextlib.suppress(OSError):
      os.unlink(temporary)
    raise
  index = {"bytes": total, "offsets": offsets.tolist(), "shapes": shapes.tolist()}
  temporary = stem.with_suffix(f".{os.getpid()}")
  temporary.write_text(json.dumps(index))
  os.replace(temporary, stem.with_suffix(".json"))
  return pixels


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
    return images.decode(dataset.records[index], dataset.max_pixels)
  except images.BadImageError as error:
    raise RunError(f"{dataset.keys[index]}: {error}") from error


def _shapes(dataset: Dataset) -> np.ndarray:
  shapes = np.zeros((len(dataset), 2), np.int32)

  def measure(start: int) -> None:
    for i in range(start, min(start + _CHUNK, len(dataset))):
      try:
        picture = images.Picture(dataset.records[i], dataset.max_pixels)
      except images.BadImageError as error:
        raise RunError(f"{dataset.keys[i]}: {error}") from error
      shapes[i] = picture.height, picture.width

  _in_threads(measure, len(dataset))
  return shapes


def _in_threads(work, count: int) -> None:
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
    for future in [pool.submit(work, start) for start in range(0, count, _CHUNK)]:
      future.result()


def _memory() -> int:
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _check_room(needed: int, room: float, what: str, other: str) -> None:
  if needed > room:
    raise UsageError(
      f"dataset.cache: {needed / 2**30:.2f} GiB of decoded images are more than "
      f"{what}, {room / 2**30:.2f} GiB; use dataset.cache={other} or None"
    )
