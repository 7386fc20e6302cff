"""SIGTERM and SIGINT: finish the step, save, leave."""

import signal


class Stopped(Exception):
  """A stop was asked for and everything is saved; `main` exits with 128 + signal."""

  def __init__(self, number: int, where: str):
    super().__init__(
      f"stopped by {signal.Signals(number).name} {where}: everything is saved, run the "
      "same command again to resume."
    )
    self.number = number


_received: int | None = None


def _receive(number, frame) -> None:
  global _received
  _received = number
  # A second signal of the same kind ends the process at once.
  signal.signal(number, signal.SIG_DFL)


def install() -> None:
  """Starts listening for SIGTERM and SIGINT."""
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, _receive)


def received() -> int | None:
  """Returns the number of the signal received, or None."""
  return _received


def stop_if_received(where: str) -> None:
  """Raises `Stopped` if a signal came; call it where everything is saved."""
  if _received is not None:
    raise Stopped(_received, where)
