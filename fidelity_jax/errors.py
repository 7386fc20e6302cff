"""What the command line turns into one clear line and an exit status."""

import difflib
from collections.abc import Iterable
from typing import Any


class UsageError(Exception):
  """The user asked for something impossible; `main` exits with status 2.

  The message is one line: what is wrong, where, and what to do about it.
  """


class RunError(Exception):
  """A well-formed request failed while it ran; `main` exits with status 1.

  The message is one line: what is wrong, where, and what to do about it.
  """


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
