"""Files that are either whole or absent."""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from fidelity_jax import errors


def cache_folder() -> pathlib.Path:
  """Returns the user's folder for what is worth keeping between runs.

  $FIDELITY_JAX_CACHE, or ~/.cache/fidelity_jax; it need not exist.
  """
  path = os.environ.get("FIDELITY_JAX_CACHE")
  return pathlib.Path(path or "~/.cache/fidelity_jax").expanduser()


def write_bytes(path: pathlib.Path, content: bytes) -> None:
  """Writes `content` under a temporary name, then renames it to `path`.

  A reader, or a run after a crash, sees the old file or the new one, never a part.
  """
  temporary = path.with_name(f".{path.name}.tmp")
  with open(temporary, "wb") as file:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes `value` as indented JSON, whole or not at all."""
  write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: pathlib.Path) -> Any:
  """Reads a JSON file.

  Raises:
    RunError: if it cannot be read or parsed.
  """
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise errors.RunError(
      f"{path} is damaged ({error}): delete the directory {path.parent} to make it "
      "again."
    ) from error


def digest_tree(directory: pathlib.Path) -> dict[str, str]:
  """Returns the SHA-256 of every file below `directory`, by relative path."""
  digests = {}
  for path in sorted(directory.rglob("*")):
    if path.is_file():
      with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
      digests[str(path.relative_to(directory))] = digest
  return digests


@contextlib.contextmanager
def locked(directory: pathlib.Path) -> Iterator[None]:
  """Holds `directory` for this process, creating it where absent.

  The lock goes with the process, however it ends.

  Raises:
    UsageError: if the directory cannot be written.
    RunError: if another process holds it.
  """
  try:
    directory.mkdir(parents=True, exist_ok=True)
    file = open(directory / ".lock", "w")
  except OSError as error:
    raise errors.UsageError(
      f"workdir {str(directory)!r} cannot be written ({error.strerror}): name another "
      "with --workdir."
    ) from error
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      raise errors.RunError(
        f"another run is working in {str(directory)!r}: wait for it, or name another "
        "directory with --workdir."
      ) from error
    yield
