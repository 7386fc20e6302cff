"""SIGTERM and SIGINT: finish the step, save, leave.

Imports nothing heavy: `listen` is called before anything else is imported, so that
a signal in the first seconds ends in one line too.
"""

import os
import signal


class Stopped(Exception):
  """A stop was asked for; the command exits with 128 + signal."""

  def __init__(self, number: int, where: str, kept: str):
    super().__init__(
      f"stopped by {signal.Signals(number).name} {where}: {kept}, run the same command "
      "again to resume."
    )
    self.number = number


_received: int | None = None
_working = False
_user = 2


def _receive(number, frame) -> None:
  del frame
  global _received
  _received = number
  # A second signal of the same kind ends the process at once.
  signal.signal(number, signal.SIG_DFL)
  if not _working:
    line = f"fidelity_jax: stopped by {signal.Signals(number).name} before it began.\n"
    try:
      os.write(_user, line.encode())
    except OSError:
      pass
    os._exit(128 + number)


def listen(user: int = 2) -> None:
  """Starts listening for SIGTERM and SIGINT, which end the process while it starts.

  Args:
    user: descriptor for the line that says so.
  """
  global _user
  _user = user
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, _receive)


def work_begins() -> None:
  """From here on a signal is only noted, and looked at where work can be stopped."""
  global _working
  _working = True


def received() -> int | None:
  """Returns the number of the signal received, or None."""
  return _received


def stop(where: str, kept: str = "everything is saved") -> None:
  """Raises `Stopped`.

  Args:
    where: what was under way.
    kept: what is saved of it.
  """
  raise Stopped(_received, where, kept)


def stop_if_received(where: str, kept: str = "everything is saved") -> None:
  """Raises `Stopped` if a signal came; arguments as for `stop`."""
  if _received is not None:
    stop(where, kept)
