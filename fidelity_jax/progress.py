"""Progress of long work: a live line on a terminal, plain lines elsewhere."""

import time

import tqdm

from fidelity_jax import hosts, streams


def say(message: str) -> None:
  """Prints one line for the user, on standard error; of several processes, once."""
  if hosts.first():
    tqdm.tqdm.write(streams.plain(message), file=streams.user())


class Progress:
  """Progress of one piece of work, counted in steps.

  On a terminal it is one live line; elsewhere a plain line every `interval` seconds
  and at the end. Both tell the rate and the time left.
  """

  def __init__(
    self, title: str, total: int, done: int = 0, unit: str = "step", interval=10.0
  ):
    self._title, self._total, self._unit = title, total, unit
    self._start, self._first, self._done = time.monotonic(), done, done
    self._interval, self._last = interval, time.monotonic()
    self._bar = None
    if hosts.first() and streams.user().isatty():
      self._bar = tqdm.tqdm(
        total=total,
        initial=done,
        desc=title,
        unit=unit,
        dynamic_ncols=True,
        file=streams.user(),
      )

  def due(self) -> bool:
    """True if a new report should be made; only then are numbers worth fetching."""
    interval = 0.5 if self._bar else self._interval
    return hosts.first() and time.monotonic() - self._last >= interval

  def update(self, done: int, **facts: float | int | str) -> None:
    """Reports that `done` steps are done, with some facts such as loss=0.5."""
    text = "  ".join(
      f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in facts.items()
    )
    self._last = time.monotonic()
    if self._bar:
      self._bar.set_postfix_str(text, refresh=False)
      self._bar.update(done - self._done)
    else:
      rate = (done - self._first) / max(self._last - self._start, 1e-9)
      left = (self._total - done) / rate if rate else float("inf")
      say(
        f"{self._title}  {done}/{self._total} {self._unit}s  {rate:.1f} {self._unit}s/s"
        f"  {format_seconds(left)} left  {text}"
      )
    self._done = done

  def close(self) -> None:
    """Ends the live line."""
    if self._bar:
      self._bar.close()


def format_seconds(seconds: float) -> str:
  """Returns e.g. "45s", "3m05s", "2h10m"."""
  if seconds == float("inf"):
    return "?"
  seconds = round(seconds)
  if seconds < 60:
    return f"{seconds}s"
  if seconds < 3600:
    return f"{seconds // 60}m{seconds % 60:02}s"
  return f"{seconds // 3600}h{seconds % 3600 // 60:02}m"
