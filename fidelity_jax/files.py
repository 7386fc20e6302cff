"""Files that are either whole or absent, and checked when they are read back."""

import contextlib
import errno
import fcntl
import functools
import hashlib
import io
import json
import os
import pathlib
import platform
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import msgspec
import numpy as np

from fidelity_jax import errors, hosts

T = TypeVar("T")

_SEAL = "sha256"
# What the record beside arrays is called.
_RECORD = "record"
# Seconds until another host's writing is seen on a shared disk, at most.
_LAG = 90.0
# The directory that the processes of a job hold together.
_held: pathlib.Path | None = None


def expand(path: str | pathlib.Path) -> pathlib.Path:
  """Returns a path with "~" and "~user" replaced.

  Raises:
    UsageError: there is no such user, or it cannot be a path.
  """
  if "\0" in str(path):
    raise errors.UsageError(f"{str(path)!r} is no path: it has a NUL character in it.")
  try:
    return pathlib.Path(path).expanduser()
  except RuntimeError as error:
    raise errors.UsageError(
      f"{str(path)!r}: there is no such user: write the path without '~'."
    ) from error


def cache_folder() -> pathlib.Path:
  """Returns the user's folder for what is worth keeping between runs.

  $FIDELITY_JAX_CACHE, or ~/.cache/fidelity_jax; it need not exist.
  """
  return expand(os.environ.get("FIDELITY_JAX_CACHE") or "~/.cache/fidelity_jax")


def read_bytes(path: pathlib.Path, limit: int | None = None) -> bytes:
  """Returns the content of a regular file.

  Args:
    path: the file. Anything else is refused, such as a pipe, which may never end.
    limit: the largest size that makes sense, in bytes.

  Raises:
    OSError: it cannot be read, is no regular file, or is larger.
  """
  # Opening a pipe would block until another process opens it for writing.
  try:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
  except OSError as error:
    if error.errno in (errno.ENXIO, errno.ENODEV):  # a socket, a device
      raise OSError("not a regular file") from error
    raise
  try:
    status = os.fstat(descriptor)
    if stat.S_ISDIR(status.st_mode):
      raise IsADirectoryError("a directory, not a file")
    if not stat.S_ISREG(status.st_mode):
      raise OSError("not a regular file")
    if limit is not None and status.st_size > limit:
      raise OSError(f"{status.st_size} bytes are too many")
  except BaseException:
    os.close(descriptor)
    raise
  with open(descriptor, "rb", buffering=0) as file:
    return file.readall()


def write_bytes(path: pathlib.Path, content: bytes) -> None:
  """Writes `content` under a temporary name, then renames it to `path`.

  A reader, or a run after a crash, sees the old file or the new one, never a part.
  Below a directory that several processes hold (`locked`), the first writes for all.

  Raises:
    RunError: it cannot be written.
  """
  if _held is not None and not hosts.first() and path.is_relative_to(_held):
    return
  # Processes on several machines may share a directory.
  owner = f"{platform.node()}.{os.getpid()}"
  temporary = path.with_name(f".{path.name}.{owner}.tmp")
  with errors.while_doing(f"writing {path}"):
    try:
      with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
      os.replace(temporary, path)
    except BaseException:
      with contextlib.suppress(OSError):
        temporary.unlink()
      raise


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes `value` as indented JSON, whole or not at all."""
  write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def write_record(path: pathlib.Path, record: msgspec.Struct) -> None:
  """Writes a record as JSON with a checksum, for `read_record`."""
  write_json(path, seal(record))


def read_record(path: pathlib.Path, kind: type[T], again: str) -> T:
  """Returns a record that `write_record` wrote.

  Args:
    path: the file.
    kind: the record's type.
    again: what to do if it is damaged, for the message.

  Raises:
    RunError: if it cannot be read, is damaged, or of another version.
  """
  return unseal(read_json(path, again), kind, path, again)


def read_json(path: pathlib.Path, again: str) -> Any:
  """Returns the content of a JSON file that this package wrote.

  Args:
    path: the file.
    again: what to do if it is damaged, for the message.

  Raises:
    RunError: if it cannot be read or parsed.
  """
  try:
    with errors.while_doing(f"reading {path}"):
      return json.loads(read_bytes(path))
  except FileNotFoundError as error:
    raise errors.RunError(f"{path} is missing: {again}") from error
  except (OSError, ValueError, RecursionError) as error:
    raise errors.RunError(f"{path} is damaged ({error}): {again}") from error


def read_json_lines(path: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the objects in a file that has one in a line, such as metrics.jsonl.

  Lines that cannot be read are left out, such as one that a killed run did not finish,
  and so is a file that cannot be.

  Args:
    path: the file.
  """
  found = []
  with contextlib.suppress(OSError):
    for line in read_bytes(path).splitlines():
      with contextlib.suppress(ValueError, RecursionError):
        if isinstance(record := json.loads(line), dict):
          found.append(record)
  return found


def write_arrays(
  path: pathlib.Path, arrays: dict[str, np.ndarray], record: Any
) -> None:
  """Writes arrays by name, and a JSON-able record of what they are, as one .npz file.

  Raises:
    RunError: it cannot be written.
  """
  buffer = io.BytesIO()
  text = np.frombuffer(json.dumps(record).encode(), np.uint8)
  np.savez(buffer, **arrays, **{_RECORD: text})
  write_bytes(path, buffer.getvalue())


def read_arrays(path: pathlib.Path, again: str) -> tuple[dict[str, np.ndarray], Any]:
  """Returns (arrays by name, the record) of a file that `write_arrays` wrote.

  Args:
    path: the file.
    again: what to do if it is damaged, for the message.

  Raises:
    RunError: it cannot be read or is damaged.
  """
  try:
    # The zip form has checksums, which NumPy compares.
    with errors.while_doing(f"reading {path}"), np.load(path) as file:
      arrays = dict(file)
    return arrays, json.loads(arrays.pop(_RECORD).tobytes())
  except errors.RunError:
    raise
  except Exception as error:  # zipfile, zlib and NumPy raise many types.
    raise errors.RunError(f"{path} is damaged ({error}): {again}") from error


def seal(record: Any) -> dict[str, Any]:
  """Returns a record, or a dictionary, as JSON-able values with a checksum."""
  content = msgspec.to_builtins(record)
  return content | {_SEAL: digest(content)}


def unseal(value: Any, kind: type[T], where: object, again: str) -> T:
  """Returns the record that `seal` made `value` of.

  Args:
    value: as read back.
    kind: the record's type.
    where: where it came from, for the message.
    again: what to do if it is damaged, for the message.

  Raises:
    RunError: if it differs from what was sealed.
  """
  if not isinstance(value, dict) or _SEAL not in value:
    # Earlier versions had no checksums.
    raise errors.RunError(
      f"{where} is damaged, or was written by an earlier version of fidelity_jax: "
      f"{again}"
    )
  content = {name: item for name, item in value.items() if name != _SEAL}
  if value[_SEAL] != digest(content):
    raise errors.RunError(
      f"{where} is damaged (its content is not what its checksum says): {again}"
    )
  try:
    return msgspec.convert(content, kind)
  except msgspec.ValidationError as error:
    raise errors.RunError(
      f"{where} is damaged, or of another version of fidelity_jax ({error}): {again}"
    ) from error


def digest(value: Any, digits: int = 64) -> str:
  """Returns the first hexadecimal digits of the SHA-256 of a JSON-able value."""
  text = json.dumps(value, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:digits]


def sha256(path: pathlib.Path) -> str:
  """Returns the SHA-256 of a file, computed once a run while the file stays as it is.

  Raises:
    OSError: it cannot be read.
  """
  return _sha256(str(path), version(os.stat(path)))


@functools.lru_cache(maxsize=4096)
def _sha256(path: str, version: str) -> str:
  del version
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def version(status: os.stat_result) -> str:
  """Returns what changes whenever a file is written, replaced or touched."""
  return f"{status.st_size}-{status.st_mtime_ns}-{status.st_ctime_ns}-{status.st_ino}"


def digest_tree(directory: pathlib.Path) -> dict[str, str]:
  """Returns the SHA-256 of every file below `directory`, by relative path.

  Raises:
    RunError: if one cannot be read.
  """
  digests = {}
  with errors.while_doing(f"reading {directory}"):
    for path in sorted(directory.rglob("*")):
      if path.is_file():
        digests[str(path.relative_to(directory))] = sha256(path)
  return digests


def unreadable(path: pathlib.Path) -> str | None:
  """Returns why the files at or below `path` cannot be read, None if they can.

  Missing or malformed files do not count.
  """
  try:
    for folder, _, names in os.walk(path, onerror=_raise):
      for name in names:
        with open(os.path.join(folder, name), "rb") as file:
          file.read(1)
  except FileNotFoundError:
    return None
  except OSError as error:
    return errors.circumstance(error) or str(error)
  return None


def _raise(error: OSError) -> None:
  raise error


def check_directory(directory: pathlib.Path, write: bool = False) -> None:
  """Checks that a path is a directory that can be read, or is absent.

  Args:
    directory: the path.
    write: whether it is to be written to, too.

  Raises:
    RunError: it is something else, or cannot be read or written.
  """
  with errors.while_doing(f"opening the directory {directory}"):
    if not directory.exists():
      return
    if not directory.is_dir():
      raise errors.RunError(
        f"{directory} is a file, where a directory belongs: move it away."
      )
    mode = os.R_OK | os.X_OK | (os.W_OK if write else 0)
    effective = os.access in os.supports_effective_ids
    if not os.access(directory, mode, effective_ids=effective):
      raise errors.RunError(
        f"{directory} cannot be {'written' if write else 'read'}: change its "
        "permissions and run the same command again."
      )


def check_file(path: pathlib.Path) -> None:
  """Checks that a path is a regular file or absent.

  Raises:
    RunError: it is something else.
  """
  if os.path.lexists(path) and not path.is_file():
    raise errors.RunError(
      f"{path} is no regular file, where one is to be written: move it away."
    )


@contextlib.contextmanager
def locked(
  directory: pathlib.Path, shared: bool = False, copies: bool = False
) -> Iterator[None]:
  """Holds `directory` for this process, creating it where absent.

  The lock goes with the process, however it ends. Of several processes of a job the
  first holds it for all, and writes what is written there.

  Args:
    directory: the directory.
    shared: hold it together with other jobs that do so, too.
    copies: each process of a job has one of its own.

  Raises:
    UsageError: if the directory cannot be written.
    RunError: if another process holds it.
  """
  try:
    str(directory.absolute()).encode()
  except UnicodeEncodeError as error:
    raise errors.UsageError(
      f"workdir {str(directory.absolute())!r} is not UTF-8 (if it is, set "
      "PYTHONUTF8=1): name another with --workdir."
    ) from error
  global _held
  if not hosts.first():
    if not copies:
      _meet(directory)
    _held = directory
    yield
    return
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
      kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
      fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise errors.RunError(
        f"another run is working in {str(directory)!r}: wait for it, name another "
        "directory with --workdir, or let all processes of a study share it by "
        "--config.shard=i/n."
      ) from error
    except OSError as error:
      raise errors.RunError(
        f"workdir {str(directory)!r} cannot be locked ({error.strerror}): name one on "
        "a disk that can, with --workdir."
      ) from error
    if not copies:
      _meet(directory)
    yield


def _meet(directory: pathlib.Path) -> None:
  """Checks that all processes of a job see the same directory.

  Raises:
    UsageError: this one does not see what the first writes.
  """
  if not hosts.several():
    return
  token = directory / hosts.agree(f".{secrets.token_hex(8)}.tmp")
  if hosts.first():
    write_bytes(token, b"")
  hosts.wait("workdir")
  if not _in_time(token.exists):
    raise errors.UsageError(
      f"workdir {str(directory)!r} of process {hosts.index()} is not that of process "
      "0: name one on a disk that all hosts share, with --workdir."
    )
  hosts.wait("workdir seen")
  if hosts.first():
    token.unlink()


def _in_time(look: Callable[[], T]) -> T:
  """Returns what a look gives: the first thing that is true, or the last look's."""
  until = time.monotonic() + _LAG
  while not (found := look()) and time.monotonic() < until:
    time.sleep(0.2)
  return found


def seen(look: Callable[[], T | None], what: str, where: pathlib.Path) -> T:
  """Returns what the first process sees on the disk, once this one does, too.

  Args:
    look: returns it, None where it is not seen yet.
    what: that it is there, for the message.
    where: the directory that it is in.

  Raises:
    RunError: it is not seen for long.
  """
  if (found := _in_time(look)) is None:
    raise errors.RunError(
      f"{what}, but process {hosts.index()} does not see it: {where} must be on a disk "
      "that all hosts share, see --workdir."
    )
  return found


@contextlib.contextmanager
def holding(path: pathlib.Path) -> Iterator[bool]:
  """Tries to hold a lock of this name; yields whether this process does.

  The lock goes with the process, however it ends. Of several processes of a job the
  first holds it for all.

  Args:
    path: the lock's file, whose directory is made where absent.
  """
  if not hosts.first():
    yield hosts.agree(False)
    return
  with errors.while_doing(f"making the lock {path}"):
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "w")
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      held = True
    except BlockingIOError:
      held = False
    except OSError as error:
      raise errors.RunError(
        f"{path} cannot be locked ({error.strerror}): processes can share a study on a "
        "disk that can lock alone."
      ) from error
    yield hosts.agree(held)
