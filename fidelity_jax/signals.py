"""SIGTERM and SIGINT: finish the step, save, leave.

Three phases. While a command starts, that is while it imports, a signal ends the
process at once. While it prepares, a signal raises `Stopped` at once, so that
unfinished files are removed. While it works, a signal is only noted, and looked at
where the work is saved. Imports nothing heavy: `listen` is called before all imports.
"""

import os
import signal
from collections.abc import Callable


class Stopped(BaseException):
  """A stop was asked for; the command exits with 128 + signal.

  Not an `Exception`, so that handlers of failures do not catch it.
  """

  def __init__(self, number: int, where: str, kept: str):
    super().__init__(
      f"stopped by {signal.Signals(number).name} {where}: {kept}, run the same command "
      "again to go on."
    )
    self.number = number


_STARTING, _PREPARING, _WORKING = range(3)
_phase = _STARTING
_received: int | None = None
_user = 2
_where, _kept = "", ""
# Of several processes: what they agree on.
_agreed = None


def _receive(number, frame) -> None:
  del frame
  global _received
  _received = number
  # A second signal of the same kind ends the process at once.
  signal.signal(number, signal.SIG_DFL)
  if _phase == _PREPARING:
    stop(_where, _kept)
  if _phase == _STARTING:
    line = f"fidelity_jax: stopped by {signal.Signals(number).name} while it started.\n"
    try:
      os.write(_user, line.encode())
    except OSError:
      pass
    os._exit(128 + number)


def listen(user: int = 2) -> None:
  """Starts listening for SIGTERM and SIGINT.

  Args:
    user: descriptor for the line that says so.
  """
  global _user
  _user = user
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, _receive)


def interrupt(where: str, kept: str) -> None:
  """From here on a signal raises `Stopped` with these; arguments as for `stop`."""
  global _phase, _where, _kept
  _phase, _where, _kept = _PREPARING, where, kept


def work_begins() -> None:
  """From here on a signal is only noted, and looked at where work can be stopped."""
  global _phase
  _phase = _WORKING


def agree_by(agreed: Callable[[int | None], int | None]) -> None:
  """Makes `received` an agreement of several processes.

  Args:
    agreed: takes the signal that this process received and returns the one that stops
      all of them, at the same call in each.
  """
  global _agreed
  _agreed = agreed


def received() -> int | None:
  """Returns the number of the signal received, or None.

  Of several processes all call it equally often.
  """
  global _received
  if _agreed is not None:
    # One may come in while the others are asked.
    number, _received = _received, None
    number = _agreed(number)
    _received = _received if number is None else number
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
  if received() is not None:
    stop(where, kept)
