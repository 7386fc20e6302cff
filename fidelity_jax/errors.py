"""Errors that the command line shows as one line, and exit statuses."""

import contextlib
import difflib
import errno
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any


class UsageError(Exception):
  """The user asked for something impossible; the command exits with status 2.

  The message is one line: what is wrong, where, and what to do about it.
  """


class RunError(Exception):
  """A well-formed request failed while it ran; the command exits with status 1.

  The message is one line: what is wrong, where, and what to do about it.
  """


class Missing(RunError):
  """A dataset or weights are not here and could not be fetched."""


def near(name: Any, known: Iterable[str]) -> str:
  """Returns what an error says of the names that could have been meant."""
  known = list(known)
  written = str(name).lower().replace("-", "_")
  if close := difflib.get_close_matches(written, known, cutoff=0.5):
    return f"did you mean {' or '.join(map(repr, close))}?"
  return f"known: {', '.join(known)}"


def check_choice(what: str, name: str, known: Iterable[str]) -> str:
  """Returns `name` if it is known.

  Raises:
    UsageError: it is not; tells which `what` could have been meant.
  """
  if name not in known:
    raise UsageError(f"unknown {what} {name!r}; {near(name, known)}")
  return name


_ROOM = "make room and run the same command again"
_RIGHTS = "change its permissions and run the same command again"
_FILES = "allow more open files (ulimit -n 4096) and run the same command again"
_MEMORY = (
  "not enough memory: use smaller batches, images or networks, or a larger machine"
)
_ADVICE = {
  errno.EACCES: _RIGHTS,
  errno.EDQUOT: _ROOM,
  errno.EEXIST: "move it away",
  errno.EIO: "the disk or its connection fails",
  errno.EISDIR: "a file belongs there: move the directory away",
  errno.ELOOP: "replace the link",
  errno.EMFILE: _FILES,
  errno.ENAMETOOLONG: "use a shorter path",
  errno.ENFILE: _FILES,
  errno.ENOSPC: _ROOM,
  errno.ENOTDIR: "a directory belongs there: move the file away",
  errno.EPERM: _RIGHTS,
  errno.EROFS: "name a place that can be written",
  errno.ESTALE: "the network disk has lost it: run the same command again",
}
# The same in the words of TensorStore and XLA, whose errors are texts.
_OS_ERROR = re.compile(
  r"(?:os_error_code='|\[OS error |\(os error |\[Errno )(\d+)['\]): ]", re.IGNORECASE
)
_OUT_OF_MEMORY = re.compile(
  r"out of memory|not enough memory|(cannot|can't|unable to|failed to) allocate|"
  r"RESOURCE_EXHAUSTED.*(alloc|memory)",
  re.IGNORECASE,
)


def _causes(error: BaseException, context: bool) -> Iterator[BaseException]:
  """Yields an error, the members of a group, and what each was raised from.

  Args:
    error: the error.
    context: whether what was being handled when it was raised counts, too. Libraries
      leave "from" out; it is not set for defects of this package.
  """
  waiting, seen = [error], set()
  while waiting:
    one = waiting.pop(0)
    if one is None or id(one) in seen:
      continue
    seen.add(id(one))
    yield one
    handled = one.__context__ if context and not one.__suppress_context__ else None
    waiting += [*getattr(one, "exceptions", ()), one.__cause__ or handled]


def circumstance(error: BaseException, context: bool = False) -> str | None:
  """Returns what circumstance led to an error, and what to do about it.

  Circumstances are those of the machine: a full disk, too little memory, a missing
  permission. They say nothing of whether a file's content is right.

  Args:
    error: the error.
    context: for errors that libraries raise: count what they were handling.

  Returns:
    E.g. "DIR/x: No space left on device: make room ...", or None if it is none.
  """
  for one in _causes(error, context):
    if isinstance(one, MemoryError) or _OUT_OF_MEMORY.search(str(one)):
      return _MEMORY
    where = ""
    if isinstance(one, OSError):
      code = one.errno
      # The number of a descriptor is no help to the user.
      named = isinstance(one.filename, str | bytes | os.PathLike)
      where = f"{os.fsdecode(one.filename)}: " if named else ""
    else:
      match = _OS_ERROR.search(str(one))
      code = int(match[1]) if match else None
    if code == errno.ENOMEM:
      return _MEMORY
    if code in _ADVICE:
      return f"{where}{os.strerror(code)}: {_ADVICE[code]}"
  return None


@contextlib.contextmanager
def while_doing(what: str) -> Iterator[None]:
  """Turns an error that circumstances explain into one line.

  Args:
    what: what is under way, such as "writing DIR/x".

  Raises:
    RunError: an error of a known circumstance; others pass as they are.
  """
  try:
    yield
  except (UsageError, RunError):
    raise
  except Exception as error:
    if reason := circumstance(error):
      raise RunError(f"{what} failed: {reason}.") from error
    raise
