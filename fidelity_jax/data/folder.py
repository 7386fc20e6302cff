"""A folder of class folders, or a CSV file of paths and labels, as a dataset."""

import csv
import functools
import io
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fidelity_jax import files, progress
from fidelity_jax.data import images
from fidelity_jax.data.dataset import Dataset, FileRecords, Skipped, check_of_the_file
from fidelity_jax.errors import UsageError

# What file systems put beside the folders of their users.
_OF_THE_DISK = ("lost+found", "$RECYCLE.BIN", "System Volume Information")


def build(path: str) -> Dataset:
  """Lists the images below a folder, or those that a CSV file names.

  Folder: every sub-folder is a class; its images are searched recursively. CSV: the
  columns are path (relative to the CSV file) and label, with or without a header line
  that names them. Class names are sorted; hidden files and files without an
  image's suffix are ignored.

  Args:
    path: a folder or a .csv file.

  Returns:
    All images, not yet split and not yet opened. Keys are the paths relative to the
    folder, with forward slashes.

  Raises:
    UsageError: the path does not exist, holds no images, or two class folders have
      names that differ in letter case or Unicode form alone.
  """
  root = files.expand(path)
  if not os.path.exists(root):
    raise UsageError(f"dataset.path: {root} does not exist")
  if root.is_file():
    if root.suffix.lower() != ".csv":
      raise UsageError(
        f"dataset.path: {root} is a file; give a folder with one sub-folder per "
        "class, or a .csv file of paths and labels"
      )
    return _from_csv(root)
  return _from_folder(root)


def _from_folder(root: Path) -> Dataset:
  try:
    folders = sorted(
      entry.name
      for entry in os.scandir(root)
      if entry.is_dir() and not entry.name.startswith(".")
    )
  except OSError as error:
    raise UsageError(f"dataset.path: cannot list {root}: {error.strerror}") from error
  _refuse_collisions(root, folders)
  skipped, found = [], {}
  for folder in folders:
    try:
      os.scandir(root / folder).close()
    except PermissionError as error:
      if folder in _OF_THE_DISK:
        skipped.append(Skipped(folder + "/", error.strerror))
        found[folder] = []
        continue
      raise UsageError(
        f"dataset.path: cannot list the class folder {root / folder}: "
        f"{error.strerror}: change its permissions, or move it away"
      ) from error
    found[folder] = sorted(_walk(root, folder, skipped))
    if not found[folder]:
      skipped.append(Skipped(folder + "/", "a class folder without images"))
  class_names = tuple(name for name in folders if found[name])
  if not class_names:
    raise UsageError(
      f"dataset.path: {root} has no sub-folder with images (one per class is needed)"
    )
  keys = [key for name in class_names for key in found[name]]
  labels = [label for label, name in enumerate(class_names) for _ in found[name]]
  # Names are shown, and need not be UTF-8.
  shown = tuple(os.fsencode(n).decode("utf-8", "backslashreplace") for n in class_names)
  return _dataset(root, keys, labels, shown, skipped)


def _refuse_collisions(root: Path, names: list[str]) -> None:
  seen = {}
  for name in names:
    plain = unicodedata.normalize("NFC", name).casefold().strip()
    if plain in seen:
      raise UsageError(
        f"dataset.path: the class folders {seen[plain]!r} and {name!r} in {root} have "
        "the same name but for letter case, spaces or Unicode form; merge or rename "
        "one"
      )
    seen[plain] = name


def _walk(root: Path, folder: str, skipped: list[Skipped]) -> Iterator[str]:
  """Yields the keys of the images in a class folder, symbolic links followed once."""
  # A class folder may itself be a link to the folder of classes.
  waiting = [(folder, frozenset({_identity(root)}))]
  while waiting:
    current, ancestors = waiting.pop()
    try:
      identity = _identity(root / current)
      entries = list(os.scandir(root / current))
    except OSError as error:
      check_of_the_file(error, current)
      skipped.append(Skipped(current + "/", error.strerror or str(error)))
      continue
    if identity in ancestors:
      skipped.append(Skipped(current + "/", "a symbolic link back to its own parent"))
      continue
    for entry in entries:
      key = f"{current}/{entry.name}"
      if entry.name.startswith("."):
        continue
      if Path(entry.name).suffix.lower() in images.SUFFIXES and not _is_dir(entry):
        yield key
      elif _is_dir(entry):
        waiting.append((key, ancestors | {identity}))
      elif entry.is_symlink() and not (root / key).exists():
        skipped.append(Skipped(key, "a symbolic link that leads nowhere"))


def _identity(path: Path) -> tuple[int, int]:
  """Returns what two paths to the same folder have in common."""
  status = path.stat()
  return status.st_dev, status.st_ino


def _is_dir(entry: os.DirEntry) -> bool:
  try:
    return entry.is_dir()
  except OSError:
    # A link that leads to itself.
    return False


def _from_csv(path: Path) -> Dataset:
  rows = {}
  try:
    text = files.read_bytes(path).decode("utf-8-sig")
    for number, row in enumerate(csv.reader(io.StringIO(text, newline="")), start=1):
      cells = [cell.strip() for cell in row]
      if not any(cells):
        continue
      if number == 1 and _is_header(path, cells):
        if cells != ["path", "label"]:
          _say(f"{path}: line 1, {','.join(cells)}, is taken for a header")
        continue
      if len(cells) != 2 or not all(cells) or "\0" in "".join(cells):
        raise UsageError(
          f"dataset.path: line {number} of {path} is not 'path,label': {row}"
        )
      key = Path(cells[0]).as_posix()
      if rows.setdefault(key, cells[1]) != cells[1]:
        raise UsageError(
          f"dataset.path: line {number} of {path} gives {key} a second label"
        )
  except (OSError, UnicodeDecodeError, csv.Error) as error:
    raise UsageError(f"dataset.path: cannot read {path}: {error}") from error
  if not rows:
    raise UsageError(f"dataset.path: {path} names no images")
  class_names = tuple(sorted(set(rows.values())))
  numbers = {name: label for label, name in enumerate(class_names)}
  keys = sorted(rows)
  labels = [numbers[rows[key]] for key in keys]
  return _dataset(path.parent, keys, labels, class_names, [])


@functools.cache
def _say(message: str) -> None:
  """Says something once, however many splits it is found for."""
  progress.say(message)


def _is_header(path: Path, cells: list[str]) -> bool:
  """Returns whether a CSV file's first line names the columns: no image, no file."""
  first = cells[0]
  if Path(first).suffix.lower() in images.SUFFIXES or "\0" in first:
    return False
  return not os.path.exists(path.parent / first)


def _dataset(
  root: Path,
  keys: list[str],
  labels: list[int],
  class_names: tuple[str, ...],
  skipped: list[Skipped],
) -> Dataset:
  return Dataset(
    name="folder",
    split="all",
    records=FileRecords(str(root.resolve()), tuple(keys)),
    keys=tuple(keys),
    labels=np.asarray(labels, np.int32),
    class_names=class_names,
    skipped=tuple(skipped),
  )
