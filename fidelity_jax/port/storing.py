"""Ported checkpoints on disk: one safetensors file a part, and port.json."""

import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import msgspec
import safetensors
import safetensors.numpy
from flax import traverse_util

from fidelity_jax import errors, files
from fidelity_jax.port.parts import Part

INDEX = "port.json"
_AGAIN = "port its checkpoint again."


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
  """A part: its file, the file's SHA-256, and what describes the network."""

  file: str
  sha256: str
  config: dict[str, Any]


class _Index(msgspec.Struct, forbid_unknown_fields=True):
  """What port.json holds: the checkpoint that the parts came from, and the parts."""

  checkpoint: str
  parts: dict[str, _Entry]


def save(
  parts: Mapping[str, Part],
  directory: pathlib.Path,
  checkpoint: str,
  texts: Mapping[str, str] | None = None,
) -> None:
  """Writes parts to a new directory, which appears when it is complete.

  Args:
    parts: what `load` returned.
    directory: must not exist, or be one that this function wrote and that has nothing
      else in it, which is then replaced.
    checkpoint: what the parts came from, for the record.
    texts: further files, by name.

  Raises:
    errors.UsageError: the directory exists and is something else, or cannot be written.
    errors.RunError: the disk is full, or a permission is missing.
  """
  # The temporary directory stands beside it: "." has no name to call that after.
  directory = pathlib.Path(os.path.abspath(directory))
  for path in foreign(directory):
    raise errors.UsageError(
      f"{directory} exists and is no ported checkpoint, or has more in it ({path}): "
      "name another directory"
    )
  temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
  try:
    with errors.while_doing(f"writing {directory}"):
      _write(parts, directory, temporary, checkpoint, texts or {})
  except (OSError, safetensors.SafetensorError) as error:
    raise errors.UsageError(f"cannot write {directory}: {error}") from error
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def _write(
  parts: Mapping[str, Part],
  directory: pathlib.Path,
  temporary: pathlib.Path,
  checkpoint: str,
  texts: Mapping[str, str],
) -> None:
  temporary.mkdir(parents=True)
  for name, text in texts.items():
    files.write_bytes(temporary / name, text.encode())
  index = _Index(checkpoint, {})
  for name, part in parts.items():
    file_name = f"{name}.safetensors"
    flat = traverse_util.flatten_dict(part.variables, sep="/")
    safetensors.numpy.save_file(flat, temporary / file_name)
    digest = files.sha256(temporary / file_name)
    index.parts[name] = _Entry(file_name, digest, part.config)
  files.write_record(temporary / INDEX, index)
  # At each moment one of the two exists or is restored.
  aside = temporary.with_suffix(".old")
  if directory.exists():
    os.replace(directory, aside)
  try:
    os.replace(temporary, directory)
  except BaseException:
    if aside.exists():
      os.replace(aside, directory)
    raise
  shutil.rmtree(aside, ignore_errors=True)


def is_ported(directory: pathlib.Path) -> bool:
  """Returns whether a directory is one that `save` wrote."""
  return (directory / INDEX).is_file()


def contents(directory: pathlib.Path) -> list[pathlib.Path]:
  """Returns what is there of the files that `save` writes into a directory.

  These are its index, the files of its parts and README.md.

  Raises:
    errors.RunError: the index is damaged or cannot be read.
  """
  parts = [entry.file for entry in _read_index(directory).parts.values()]
  paths = [directory / name for name in (INDEX, *parts, "README.md")]
  return [path for path in paths if path.is_file()]


def absent(directory: pathlib.Path) -> list[str]:
  """Returns the names of the files of parts that are not there.

  Raises:
    errors.RunError: the index is damaged or cannot be read.
  """
  entries = _read_index(directory).parts.values()
  return [entry.file for entry in entries if not (directory / entry.file).is_file()]


def foreign(directory: pathlib.Path) -> list[pathlib.Path]:
  """Returns what would be lost, and not by `save`, if it replaced a directory."""
  if not os.path.lexists(directory):
    return []
  try:
    ours = contents(directory)
  except errors.RunError:
    return [directory]
  return sorted(set(directory.iterdir()) - set(ours))


def _read_index(directory: pathlib.Path) -> _Index:
  path = directory / INDEX
  index = files.read_record(path, _Index, _AGAIN)
  for entry in index.parts.values():
    # It may come from anywhere, and is not to name files of others.
    if pathlib.PurePath(entry.file).name != entry.file:
      raise errors.RunError(f"{path} is damaged ({entry.file!r} is no name): {_AGAIN}")
  return index


def content_digest(directory: pathlib.Path) -> str:
  """Returns a SHA-256 of what a directory that `save` wrote says of its parts.

  Where the directory is and what it was made from have no part in it.

  Raises:
    errors.RunError: the index is damaged or cannot be read.
  """
  entries = _read_index(directory).parts
  content = {name: (entry.sha256, entry.config) for name, entry in entries.items()}
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read(directory: pathlib.Path) -> dict[str, Part]:
  """Returns the parts in a directory that `save` wrote.

  Raises:
    errors.RunError: a file is damaged or cannot be read.
  """
  parts = {}
  for name, entry in _read_index(directory).parts.items():
    path = directory / entry.file
    try:
      with errors.while_doing(f"reading {path}"):
        whole = files.sha256(path) == entry.sha256
        flat = safetensors.numpy.load_file(path) if whole else {}
    except (OSError, safetensors.SafetensorError) as error:
      raise errors.RunError(f"{path} is damaged ({error}): {_AGAIN}") from error
    if not whole:
      raise errors.RunError(
        f"{path} is damaged (its content is not what its checksum says): {_AGAIN}"
      )
    parts[name] = Part(traverse_util.unflatten_dict(flat, sep="/"), entry.config)
  return parts
