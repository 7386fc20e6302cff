"""A folder of class folders, or of splits of them, or a CSV file, as a dataset."""

import csv
import functools
import io
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np

from fidelity_jax import buckets, files, locations, progress
from fidelity_jax.data import images, splits
from fidelity_jax.data.dataset import Dataset, FileRecords, Skipped, check_of_the_file
from fidelity_jax.errors import UsageError

# What file systems put beside their users' folders.
_OF_THE_DISK = ("lost+found", "$RECYCLE.BIN", "System Volume Information")
_STRAY = "an image in no class folder"


def build(path: str, labelled: bool = True) -> tuple[Dataset, splits.Chosen]:
  """Lists the images below a folder, or those that a CSV file names.

  Folder: every sub-folder is a class; its images are searched recursively. If the
  sub-folders are named as splits are (see `splits.NAMES`), those below them are the
  classes. CSV: the columns are path (relative to the CSV file) and label, with or
  without a header line that names them. Class names are sorted; hidden files and files
  without an image's suffix are ignored.

  Args:
    path: a folder or a .csv file.
    labelled: False: all images below the folder are of one class, "", also those that
      lie in it beside its sub-folders.

  Returns:
    All images, not yet split and not yet opened, and the splits that the folder comes
    with: at least train and another one, or {}. Keys are the paths relative to the
    folder, with forward slashes.

  Raises:
    UsageError: the path does not exist, holds no images, has splits that cannot be
      used, or two class folders have names that differ in letter case or Unicode form
      alone.
  """
  root = locations.expand(path)
  if not os.path.exists(root):
    raise UsageError(f"dataset.path: {root} does not exist")
  if root.is_file():
    if buckets.is_copy(root):
      raise UsageError(
        f"dataset.path: {root} is one object; give the folder that has the images in it"
      )
    if root.suffix.lower() != ".csv":
      raise UsageError(
        f"dataset.path: {root} is a file; give a folder with one sub-folder per "
        "class, or a .csv file of paths and labels"
      )
    return _from_csv(root), {}
  return _from_folder(root) if labelled else _from_any_folder(root)


def _from_folder(root: Path) -> tuple[Dataset, splits.Chosen]:
  skipped, found = [], {}
  parts = _split_folders(root, skipped)
  for part in parts or ("",):
    in_part = _class_images(root, part, skipped)
    if not any(in_part.values()):
      hint = "; images without labels need --config.labels=self and dataset.classes"
      if part:
        hint = (
          f"; sort its images into class folders, or move '{part}' away: a missing val "
          f"or test is drawn from train; if '{part}' is a class, use a .csv file"
        )
      raise UsageError(
        f"dataset.path: {root / part} has no sub-folder with images (one per class is "
        f"needed){hint}"
      )
    for name, keys in in_part.items():
      found.setdefault(name, []).extend(keys)
  _refuse_collisions(root, sorted(found))
  class_names = tuple(name for name in sorted(found) if found[name])
  keys = [key for name in class_names for key in sorted(found[name])]
  labels = [label for label, name in enumerate(class_names) for _ in found[name]]
  own = {split: [] for split in parts.values()}
  for i, key in enumerate(keys if own else ()):
    own[parts[key.partition("/")[0]]].append(i)
  # Names are shown, and need not be UTF-8.
  shown = tuple(os.fsencode(n).decode("utf-8", "backslashreplace") for n in class_names)
  return _dataset(root, keys, labels, shown, skipped), own


def _from_any_folder(root: Path) -> tuple[Dataset, splits.Chosen]:
  folders, loose = _listed(root)
  skipped: list[Skipped] = []
  below = {name: sorted(_walk(root, name, skipped)) for name in folders}
  below = {name: keys for name, keys in below.items() if keys}
  keys = loose + [key for name in below for key in below[name]]
  if not keys:
    raise UsageError(f"dataset.path: {root} has no images")
  parts = [splits.NAMES.get(name.casefold()) for name in below]
  own = {}
  divided = not loose and None not in parts
  if divided and "train" not in parts:
    raise UsageError(
      f"dataset.path: {root} is divided into splits ({' and '.join(below)}), but "
      "'train' is missing; add it, or give one of these"
    )
  if divided and len(parts) > 1:
    if len(set(parts)) < len(parts):
      raise UsageError(
        f"dataset.path: of {' and '.join(below)} in {root}, two mean the same split; "
        "move one away"
      )
    ends = np.cumsum([0, *map(len, below.values())])
    own = {part: list(range(*ends[i : i + 2])) for i, part in enumerate(parts)}
  return _dataset(root, keys, [0] * len(keys), ("",), skipped), own


def _split_folders(root: Path, skipped: list[Skipped]) -> dict[str, str]:
  """Returns the splits by sub-folder if a folder is divided into splits, else {}.

  It is if no sub-folder with images has another name: a class may be called "train".
  A test without class folders, as it is published without labels, counts as missing.

  Raises:
    UsageError: train is missing, or alone; a split is there twice, or is the same
      folder as another; or one more sub-folder seems to be a split, too.
  """
  folders, strays = _listed(root)
  found = {n: splits.NAMES.get(n.casefold()) for n in folders}
  parts = {name: split for name, split in found.items() if split}
  if not parts:
    return {}
  classes = {name: _class_names(root, name) for name in folders}
  unlabelled = [n for n, split in parts.items() if split == "test" and not classes[n]]
  labelled = [name for name in parts if name not in unlabelled]
  others = [n for n in folders if n not in parts and any(_walk(root, n, []))]
  if others:
    if _looks_divided(root, labelled, others, classes) or len(parts) > 1:
      are = "are taken for classes" if len(parts) > 1 else "is taken for a class"
      say_once(
        f"{root}: {' and '.join(parts)} {are}, because '{others[0]}' is no split"
      )
    return {}
  if labelled and all(classes[name] for name in labelled):
    skipped += [Skipped(f"{n}/", "a split without class folders") for n in unlabelled]
    parts = {name: parts[name] for name in labelled}
  names = " and ".join(parts)
  if len({_identity(root / name) for name in parts}) < len(parts):
    raise UsageError(
      f"dataset.path: of {names} in {root}, two are the same folder, by a symbolic "
      "link; remove one: a missing val or test is drawn from train"
    )
  if len(set(parts.values())) < len(parts):
    raise UsageError(
      f"dataset.path: of {names} in {root}, two mean the same split; move one away"
    )
  if list(parts.values()) == ["train"]:
    raise UsageError(
      f"dataset.path: {names} is the only split in {root} that has class folders; give "
      f"{root / names}, which is then divided into splits, or put a folder 'val' or "
      "'test' of class folders beside it"
    )
  if "train" not in parts.values():
    raise UsageError(
      f"dataset.path: {root} is divided into splits ({names}), but 'train' is missing; "
      "add it, or give a folder of class folders"
    )
  skipped += [Skipped(name, _STRAY) for name in strays]
  return parts


def _class_names(root: Path, part: str) -> list[str]:
  """Returns the names of the folders with images in `root / part`."""
  return [n for n in _listed(root / part)[0] if any(_walk(root, f"{part}/{n}", []))]


def _looks_divided(
  root: Path, parts: list[str], others: list[str], classes: dict[str, list[str]]
) -> bool:
  """Returns whether folders named as splits, beside others, hold class folders only.

  Args:
    root: the folder of all of them.
    parts: the folders named as splits.
    others: further folders with images.
    classes: names of the folders with images in each.

  Raises:
    UsageError: they do, and a class folder's name is in two of all these folders.
  """
  if not all(classes[part] and not _listed(root / part)[1] for part in parts):
    return False
  for part in parts:
    for other in (*others, *parts):
      shared = sorted(set(classes[part]) & set(classes[other]))
      if other == part or not shared:
        continue
      third = other if other in others else others[0]
      raise UsageError(
        f"dataset.path: {root} looks divided into splits ('{shared[0]}' is in {part} "
        f"and in {other}), but '{third}' is no split's name: move it away, rename it "
        "to val or test, or give a .csv file of paths and labels"
      )
  return bool(parts)


def _class_images(
  root: Path, part: str, skipped: list[Skipped]
) -> dict[str, list[str]]:
  """Returns the sorted keys of the images of each class folder in `root / part`."""
  folders, strays = _listed(root / part)
  place = f"{part}/" if part else ""
  skipped += [Skipped(place + name, _STRAY) for name in strays]
  found = {}
  for name in folders:
    found[name] = sorted(_walk(root, place + name, skipped))
    if not found[name]:
      skipped.append(Skipped(f"{place}{name}/", "a class folder without images"))
  return found


def _listed(folder: Path) -> tuple[list[str], list[str]]:
  """Returns the names of the sub-folders and of the images in a folder.

  Raises:
    UsageError: it, or one of them, cannot be listed.
  """
  try:
    entries = [
      entry
      for entry in os.scandir(folder)
      if not entry.name.startswith(".") and entry.name not in _OF_THE_DISK
    ]
  except OSError as error:
    raise UsageError(f"dataset.path: cannot list {folder}: {error.strerror}") from error
  folders = sorted(entry.name for entry in entries if _is_dir(entry))
  for name in folders:
    try:
      os.scandir(folder / name).close()
    except PermissionError as error:
      raise UsageError(
        f"dataset.path: cannot list the folder {folder / name}: {error.strerror}: "
        "change its permissions, or move it away"
      ) from error
  return folders, sorted(entry.name for entry in entries if _is_image(entry))


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
  above = frozenset(_identity(root / p) for p in PurePosixPath(folder).parents)
  waiting = [(folder, above)]
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
      if _is_image(entry):
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
    # A link to itself.
    return False


def _is_image(entry: os.DirEntry) -> bool:
  return Path(entry.name).suffix.lower() in images.SUFFIXES and not _is_dir(entry)


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
          say_once(f"{path}: line 1, {','.join(cells)}, is taken for a header")
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
def say_once(message: str) -> None:
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
