"""Around every command: whatever goes wrong ends in one line and an exit status.

0: done. 1: something failed. 2: the command, a config or an input is wrong. 128 + n:
stopped by signal n. A traceback goes to a log file, which the line names.
"""

import argparse
import os
import resource
import sys
from collections.abc import Callable
from typing import NoReturn

from fidelity_jax import errors, hosts, signals, streams

# Files that JAX, Orbax and the worker threads may have open at the same time.
_OPEN_FILES = 256


class Parser(argparse.ArgumentParser):
  """Raises UsageError where argparse would print and leave."""

  def error(self, message: str) -> NoReturn:
    """Raises UsageError."""
    raise errors.UsageError(f"{message}; {self.format_usage()}")


def run(command: Callable[[], None]) -> int:
  """Runs a command; returns the exit status, after one line if it is not 0."""
  streams.log_to(None)
  try:
    command()
    # A signal from here on is ignored.
    signals.work_begins()
    hosts.leave(0, None)
  except SystemExit as end:  # --help
    return end.code if isinstance(end.code, int) else 0
  except BaseException as error:  # Any failure.
    signals.work_begins()
    hosts.lost(error)
    status, line = explain(error)
    line = streams.plain(" ".join(line.split()))
    together = isinstance(error, signals.Stopped) and hosts.stopped()
    if not together:
      line = hosts.leave(status, line)
    elif not hosts.first():
      line = None
    if line is not None:
      print(f"fidelity_jax: {line}", file=streams.user())
    if together:
      hosts.leave(status, None)
    return status
  return 0


def explain(error: BaseException) -> tuple[int, str]:
  """Returns the exit status and the line that an error ends in.

  The traceback of a failure is kept in a log file, which the line names.
  """
  if isinstance(error, errors.UsageError):
    return 2, str(error)
  if isinstance(error, signals.Stopped):
    return 128 + error.number, str(error)
  if isinstance(error, KeyboardInterrupt):
    return 130, "stopped by SIGINT: run the same command again."
  if isinstance(error, errors.RunError):
    return 1, f"{error}{_kept(error) if error.__cause__ else ''}"
  if reason := errors.circumstance(error):
    return 1, f"{reason}.{_kept(error)}"
  place = ""
  if error.__traceback__ is not None:
    frame = error.__traceback__
    while frame.tb_next is not None:
      frame = frame.tb_next
    file = os.path.basename(frame.tb_frame.f_code.co_filename)
    place = f" at {file}:{frame.tb_lineno}"
  text = f"{type(error).__name__}: {error}"[:400]
  if isinstance(error, OSError):
    return 1, (
      f"failed{place}: {text}: run the same command again, and report it if that does "
      f"not help.{_kept(error)}"
    )
  return 1, f"this is a defect of fidelity_jax{place}: {text}. Report it.{_kept(error)}"


def _kept(error: BaseException) -> str:
  """Keeps an error's traceback; returns what to say of it."""
  path = streams.keep_traceback(error)
  return f" The traceback is in {path}." if path else ""


def start() -> None:
  """Prepares a process of our own: its streams, its signals, its limits.

  Called before anything heavy is imported.
  """
  signals.listen(streams.take_over())
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  unlimited = hard == resource.RLIM_INFINITY
  if soft != resource.RLIM_INFINITY and soft < 4096:
    resource.setrlimit(
      resource.RLIMIT_NOFILE, (4096 if unlimited else min(4096, hard), hard)
    )
  if not unlimited and hard < _OPEN_FILES:
    line = (
      f"fidelity_jax: only {hard} files may be open, which is too few: allow more "
      "(ulimit -n 4096)."
    )
    print(line, file=streams.user())
    leave(1)


def leave(status: int) -> NoReturn:
  """Ends the process without waiting for worker threads of libraries."""
  streams.tidy()
  for stream in (sys.stdout, sys.stderr):
    try:
      stream.flush()
    except (AttributeError, OSError, ValueError):
      pass
  os._exit(status)
