"""Restores image files into a directory, which can be stopped and continued."""

import contextlib
import csv
import dataclasses
import hashlib
import io
import math
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from fidelity_jax import denoising, errors, files, overlap, photos, progress
from fidelity_jax.data.images import BadImageError
from fidelity_jax.errors import RunError, UsageError

# What says with what a directory's images were restored.
_RECORD, _TABLE = "restored.json", "restored.csv"
_AGAIN = "move the directory away, or name another with --out"


class Options(msgspec.Struct, frozen=True, kw_only=True):
  """What the restored images of a directory have in common.

  Attributes:
    weights: the denoiser's digest.
    add_noise: standard deviation of the noise that is added, in units of 1/255, or
      None.
    seed: its seed; None without noise.
  """

  weights: str
  add_noise: float | None = None
  seed: int | None = None


class Row(NamedTuple):
  """What is known of a restored image, a row of restored.csv.

  Attributes:
    image: its name, see `photos.Found`.
    output: the restored image's, relative to its directory.
    sha256: of the content that was restored, and of its reference's where there is one.
    output_sha256: of what was written.
    psnr_noisy: of what the denoiser saw, dB; NaN without a reference.
    psnr: of what it gave, not yet rounded to 8 or 16 bits.
    ssim_noisy: likewise.
    ssim: likewise.
  """

  image: str
  output: str
  sha256: str
  output_sha256: str
  psnr_noisy: float
  psnr: float
  ssim_noisy: float
  ssim: float


class _Work(NamedTuple):
  """An image on its way.

  Attributes:
    found: its file.
    sha256: see `Row`.
    photo: the file's content.
    degraded: float32 [H, W, C].
    reference: likewise, or None.
    restored: likewise; None before it is computed.
  """

  found: photos.Found
  sha256: str
  photo: photos.Photo
  degraded: np.ndarray
  reference: np.ndarray | None
  restored: np.ndarray | None = None


class Failure(NamedTuple):
  """An image that was passed over, and why."""

  found: photos.Found
  reason: str


class _Job:
  """Restores images into a directory, which this process has for itself."""

  def __init__(
    self,
    denoiser: denoising.Denoiser,
    options: Options,
    reference: Path | None,
    out: Path,
  ):
    """Reads what a directory that `_opened` has checked holds."""
    self._denoiser, self._options = denoiser, options
    self._reference, self._out = reference, out
    self._table = out / _TABLE
    self._rows = {row.image: row for row in _read_rows(self._table)}
    self._lock = threading.Lock()
    # Without the last line of a process that was killed.
    self._write_table()

  def __call__(self, found: Sequence[photos.Found]) -> Iterator[Row | Failure]:
    """Yields what became of each image, in order.

    Reading, computing and writing overlap; memory does not grow with their number.
    """
    read = overlap.mapped(self._read, found)
    written = overlap.mapped(self._write, map(self._restore, read))
    with contextlib.closing(read), contextlib.closing(written):
      for result in written:
        if isinstance(result, Failure):
          self._forget(result.found.name)
        yield result
    self._write_table()

  def _read(self, found: photos.Found) -> _Work | Row | Failure:
    try:
      encoded, clean = files.read_bytes(found.path), None
      if self._reference is not None:
        clean = self._read_reference(found.name)
      digest = hashlib.sha256(encoded + (clean or b"")).hexdigest()
      row = self._rows.get(found.name)
      if row and row.sha256 == digest and self._is_there(row):
        return row
      photo = photos.decode(encoded)
      degraded, reference = _floats(photo), None
      if self._options.add_noise is not None:
        reference, options = degraded, self._options
        degraded = denoising.add_noise(
          degraded, options.add_noise, options.seed, found.name
        )
      elif clean is not None:
        reference = _decode_reference(clean, degraded.shape)
    except (BadImageError, OSError) as error:
      return Failure(found, str(error))
    if photo.frames > 1:
      progress.say(f"{found.path}: the first of {photo.frames} images in it")
    return _Work(found, digest, photo, degraded, reference)

  def _restore(self, work: _Work | Row | Failure) -> _Work | Row | Failure:
    if not isinstance(work, _Work):
      return work
    try:
      return work._replace(restored=denoising.restore(self._denoiser, work.degraded))
    except UsageError as error:
      return Failure(work.found, str(error))

  def _is_there(self, row: Row) -> bool:
    """Returns whether an output is what was written."""
    path = self._out / row.output
    try:
      return path.is_file() and files.sha256(path) == row.output_sha256
    except OSError:
      return False

  def _forget(self, name: str) -> None:
    """Removes the output of an image that is passed over: it is of other content."""
    path = self._out / output_name(name)
    if path.is_file():
      with errors.while_doing(f"removing {path}"):
        path.unlink()
    with self._lock:
      self._rows.pop(name, None)

  def _read_reference(self, name: str) -> bytes:
    try:
      return files.read_bytes(self._reference / name)
    except OSError as error:
      raise BadImageError(f"its reference cannot be read: {error}") from error

  def _write(self, work: _Work | Row | Failure) -> Row | Failure:
    if not isinstance(work, _Work):
      return work
    name = output_name(work.found.name)
    quality = (math.nan,) * 4
    if work.reference is not None:
      pairs = [(work.reference, seen) for seen in (work.degraded, work.restored)]
      quality = [
        measure(*pair) for measure in (denoising.psnr, denoising.ssim) for pair in pairs
      ]
    pixels = work.photo.pixels
    largest = np.iinfo(pixels.dtype).max
    pixels = np.rint(work.restored * largest).astype(pixels.dtype)
    path = self._out / name
    try:
      content = photos.encode(
        dataclasses.replace(work.photo, pixels=pixels), path.suffix
      )
    except BadImageError as error:
      return Failure(work.found, str(error))
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_bytes(path, content)
    written = hashlib.sha256(content).hexdigest()
    row = Row(work.found.name, name, work.sha256, written, *quality)
    with self._lock, open(self._table, "a", newline="") as file:
      self._rows[row.image] = row
      csv.writer(file, lineterminator="\n").writerow(_cells(row))
    return row

  def _write_table(self) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    rows = (self._rows[name] for name in sorted(self._rows))
    writer.writerows([Row._fields, *map(_cells, rows)])
    files.write_bytes(self._table, text.getvalue().encode())


def restore_files(
  denoiser: denoising.Denoiser,
  found: Sequence[photos.Found],
  out: Path,
  *,
  add_noise: float | None = None,
  seed: int = 0,
  reference: Path | None = None,
) -> Iterator[Row | Failure]:
  """Restores image files that are not yet restored; yields what became of each.

  Reading, computing and writing overlap; memory does not grow with their number.

  Args:
    denoiser: the denoiser.
    found: the images.
    out: directory to write: the restored images, restored.csv, a `Row` each, and a
      record of denoiser and noise, with which alone it can be continued.
    add_noise: standard deviation of the noise to add, in units of 1/255; the images
      themselves are then the references.
    seed: of that noise.
    reference: folder of clean images of the same names.

  Raises:
    UsageError: outputs would replace each other or an image; `out` holds something
      else.
    RunError: `out` cannot be written, or another process holds it.
  """
  _check_outputs(found, out)
  options = Options(
    weights=denoiser.digest,
    add_noise=add_noise,
    seed=None if add_noise is None else seed,
  )

  def results():
    with _opened(out, options):
      yield from _Job(denoiser, options, reference, out)(found)

  return results()


def output_name(name: str) -> str:
  """Returns the name of what an image of this name is written to."""
  suffix = Path(name).suffix
  return name.removesuffix(suffix) + photos.written_suffix(suffix)


def _floats(photo: photos.Photo) -> np.ndarray:
  return photo.pixels.astype(np.float32) / np.iinfo(photo.pixels.dtype).max


def _decode_reference(encoded: bytes, shape: tuple[int, ...]) -> np.ndarray:
  try:
    reference = _floats(photos.decode(encoded))
  except BadImageError as error:
    raise BadImageError(f"its reference cannot be used: {error}") from error
  if reference.shape != shape:
    raise BadImageError(f"its reference has shape {reference.shape}, not {shape}")
  return reference


def _cells(row: Row) -> list[str]:
  # NaN, where there is no reference, is an empty cell.
  return ["" if cell != cell else str(cell) for cell in row]


def _read_rows(table: Path) -> list[Row]:
  """Returns the rows of a table; the last one may be cut off."""
  if not table.exists():
    return []
  rows = []
  try:
    with errors.while_doing(f"reading {table}"):
      lines = files.read_bytes(table).decode().splitlines(keepends=True)
  except UnicodeDecodeError as error:
    raise RunError(f"{table} is damaged ({error}): {_AGAIN}") from error
  for cells in csv.reader(line for line in lines[1:] if line.endswith("\n")):
    try:
      rows.append(Row(*cells[:4], *(float(cell or "nan") for cell in cells[4:])))
    except (TypeError, ValueError) as error:
      raise RunError(f"{table} is damaged ({','.join(cells)}): {_AGAIN}") from error
  return rows


def _check_outputs(found: Sequence[photos.Found], out: Path) -> None:
  """Refuses images whose outputs would replace each other, or an image.

  Raises:
    UsageError: there are such.
  """
  named = {}
  for one in found:
    name = output_name(one.name)
    if name in named:
      raise UsageError(
        f"{named[name]} and {one.path} would both be written to {out / name}: name the "
        "folder that both are in, or restore them into two directories"
      )
    named[name] = one.path
  given = {one.path.resolve() for one in found}
  for name, path in named.items():
    if (out / name).resolve() in given:
      raise UsageError(f"{path} would be written over {out / name}: name another --out")


@contextlib.contextmanager
def _opened(out: Path, options: Options) -> Iterator[None]:
  """Holds a directory whose images are restored with these options.

  Raises:
    UsageError: it holds something else.
    RunError: another process holds it, or it cannot be written.
  """
  files.check_directory(out, write=True)
  with files.holding(out / ".lock") as held:
    if not held:
      raise RunError(f"another run restores into {out}: wait for it, or name another")
    record = out / _RECORD
    if record.exists():
      there = files.read_record(record, Options, _AGAIN)
      others = [
        name
        for name in options.__struct_fields__
        if getattr(there, name) != getattr(options, name)
      ]
      if others:
        raise UsageError(
          f"{out} holds images restored with other {' and '.join(others)}: name "
          "another --out"
        )
    elif any(not path.name.startswith(".") for path in out.iterdir()):
      raise UsageError(f"{out} holds other files: name a new directory with --out")
    else:
      files.write_record(record, options)
    yield
