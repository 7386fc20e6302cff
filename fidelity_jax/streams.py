"""The user's output, kept apart from what libraries write.

Libraries (XLA, TensorStore, Orbax's threads) write messages for developers to standard
error, hundreds of lines if a disk is full. In a command's process those go to a log
file, and the user sees this package's lines only.
"""

import contextlib
import io
import os
import pathlib
import sys
import tempfile
import traceback
from typing import TextIO


class _Forgiving(io.TextIOBase):
  """Text to a descriptor; a closed reader or a full disk is not an error."""

  encoding = "utf-8"

  def __init__(self, descriptor: int):
    self.descriptor = descriptor

  def write(self, text: str) -> int:
    with contextlib.suppress(OSError):
      data = text.encode("utf-8", "backslashreplace")
      while data:
        data = data[os.write(self.descriptor, data) :]
    return len(text)

  def isatty(self) -> bool:
    with contextlib.suppress(OSError):
      return os.isatty(self.descriptor)
    return False

  def fileno(self) -> int:
    return self.descriptor


_user: _Forgiving | None = None
_log: pathlib.Path | None = None
# What users call places that are copies, by these.
_names: dict[str, str] = {}


def user() -> TextIO:
  """Returns the stream of what the user reads: standard error, if it is still ours."""
  if _user is not None:
    return _user
  return sys.stderr or _Forgiving(2)


def rename(place: pathlib.Path, name: str) -> None:
  """Has a place called what its user calls it, in lines for the user."""
  _names[str(place)] = name


def named(text: str) -> str:
  """Returns text in which places are called what their users call them."""
  for place in sorted(_names, key=len, reverse=True):
    text = text.replace(place, _names[place])
  return text


def plain(text: str) -> str:
  """Returns such text without characters that end a line or control a terminal."""
  text = named(text)
  shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
  return "".join(shown)


def take_over() -> int:
  """Separates the user's stream from the libraries'; called once per process.

  Until `log_to` names a file, what libraries write goes to an unnamed one.

  Returns:
    The descriptor of the user's stream.
  """
  global _user
  for descriptor in (0, 1, 2):
    # The number of a closed one would be reused by the next file opened.
    try:
      os.fstat(descriptor)
    except OSError:
      os.open(os.devnull, os.O_RDWR)
  _user = _Forgiving(os.dup(2))
  sys.stderr = _Forgiving(2)
  try:
    with tempfile.TemporaryFile() as file:
      os.dup2(file.fileno(), 2)
  except OSError:
    with open(os.devnull, "r+b", buffering=0) as file:
      os.dup2(file.fileno(), 2)
  return _user.descriptor


def log_to(path: pathlib.Path | None) -> None:
  """Names the file that libraries write to, and tracebacks go to, from now on.

  Args:
    path: the file; None: there is none yet.
  """
  global _log
  _log = path
  if _user is None or path is None:
    return
  with contextlib.suppress(OSError), open(path, "ab", buffering=0) as file:
    with contextlib.suppress(OSError):
      os.lseek(2, 0, os.SEEK_SET)
      while block := os.read(2, 1 << 16):
        file.write(block)
    os.dup2(file.fileno(), 2)


def keep_traceback(error: BaseException) -> pathlib.Path | None:
  """Appends an error's traceback to the log file, or to a temporary one before that.

  Returns:
    The file, or None if it could not be written.
  """
  text = "".join(traceback.format_exception(error))
  path = _log
  if path is None or not _append(path, text):
    try:
      handle, name = tempfile.mkstemp(prefix="fidelity_jax-", suffix=".log")
      os.close(handle)
    except OSError:
      return None
    path = pathlib.Path(name)
    if not _append(path, text):
      return None
  return path


def _append(path: pathlib.Path, text: str) -> bool:
  try:
    with open(path, "ab") as file:
      file.write(text.encode("utf-8", "backslashreplace"))
  except OSError:
    return False
  return True


def tidy() -> None:
  """Removes a log file in which nothing was written."""
  if _log is not None:
    with contextlib.suppress(OSError):
      if not _log.stat().st_size:
        _log.unlink()
