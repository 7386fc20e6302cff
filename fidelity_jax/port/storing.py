"""Ported checkpoints on disk: one safetensors file a part, and port.json."""

import os
import pathlib
import shutil
from collections.abc import Mapping

import safetensors
import safetensors.numpy
from flax import traverse_util

from fidelity_jax import errors, files
from fidelity_jax.port.networks import Part

_INDEX = "port.json"


def save(parts: Mapping[str, Part], directory: pathlib.Path, source: str) -> None:
  """Writes parts to a new directory, which appears when it is complete.

  Args:
    parts: what `load` returned.
    directory: must not exist, or be a ported directory, which is then replaced.
    source: where the parts came from, for the record.

  Raises:
    errors.UsageError: the directory exists and is something else, or cannot be written.
  """
  if directory.exists() and not is_ported(directory):
    raise errors.UsageError(
      f"{directory} exists and is no ported checkpoint: name another directory"
    )
  temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
  try:
    temporary.mkdir(parents=True)
    index = {"source": source, "parts": {}}
    for name, part in parts.items():
      file_name = f"{name}.safetensors"
      flat = traverse_util.flatten_dict(part.variables, sep="/")
      safetensors.numpy.save_file(flat, temporary / file_name)
      index["parts"][name] = {"file": file_name, **part.config}
    files.write_json(temporary / _INDEX, index)
    if directory.exists():
      shutil.rmtree(directory)
    os.replace(temporary, directory)
  except OSError as error:
    raise errors.UsageError(f"cannot write {directory}: {error}") from error
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def is_ported(directory: pathlib.Path) -> bool:
  """Returns whether a directory is one that `save` wrote."""
  return (directory / _INDEX).is_file()


def read(directory: pathlib.Path) -> dict[str, Part]:
  """Returns the parts in a directory that `save` wrote.

  Raises:
    errors.RunError: a file is damaged.
  """
  index = files.read_json(directory / _INDEX)
  parts = {}
  for name, entry in index["parts"].items():
    path = directory / entry["file"]
    try:
      flat = safetensors.numpy.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
      raise errors.RunError(f"{path} is damaged: port its source again") from error
    variables = traverse_util.unflatten_dict(flat, sep="/")
    config = {k: v for k, v in entry.items() if k != "file"}
    parts[name] = Part(variables, config)
  return parts
