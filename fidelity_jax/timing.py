"""Where a run's time goes.

Every moment of the main thread is charged once: to the part of the run under way (a
stage, the evaluation), and there to what it does. Compilation counts as such wherever
it happens, from JAX's own events.
"""

import contextlib
import dataclasses
import json
import pathlib
import threading
import time
from collections.abc import Iterator

import jax

from fidelity_jax import environment, files

COMPILATION = "compilation"
# In the order of the table; OTHER is all that nobody names.
KINDS = (COMPILATION, "steps", "validation", "checkpoints")
OTHER = "other"
# Tracing, lowering, compiling.
_EVENTS = "/jax/core/compile/"


@dataclasses.dataclass
class Clock:
  """Seconds by part and kind.

  Attributes:
    began: when the first part did, as `time.perf_counter` has it; None: now.
    parts: seconds by kind, of each part, in the order in which they began.
  """

  began: dataclasses.InitVar[float | None] = None
  parts: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)

  def __post_init__(self, began: float | None) -> None:
    self._part, self._kind = "start-up", OTHER
    self._since = time.perf_counter() if began is None else began
    self._compiled: list[tuple[float, float]] = []
    self._thread = threading.get_ident()

  def add(self, seconds: float, kind: str | None = None) -> None:
    """Charges seconds to the part under way, and there to what it does or a kind."""
    of_part = self.parts.setdefault(self._part, {})
    kind = kind or self._kind
    of_part[kind] = of_part.get(kind, 0.0) + seconds

  def settle(self) -> None:
    """Charges the time since it was last called."""
    now = time.perf_counter()
    self.add(now - self._since)
    self._since = now

  def note(self, event: str, seconds: float, **_: object) -> None:
    """Takes the duration of one of JAX's events, which has just ended."""
    if not event.startswith(_EVENTS) or threading.get_ident() != self._thread:
      return
    # What is traced within another function has been counted: the outer one ends later.
    start, inner = time.perf_counter() - seconds, 0.0
    while self._compiled and self._compiled[-1][0] >= start:
      inner += self._compiled.pop()[1]
    self._compiled.append((start, seconds))
    self.add(seconds - inner, COMPILATION)
    self.add(inner - seconds)

  @contextlib.contextmanager
  def spending(self, part: str | None, kind: str) -> Iterator[None]:
    """Charges what happens within to a part, or the one under way, and a kind."""
    self.settle()
    before = self._part, self._kind
    self._part, self._kind = part or self._part, kind
    try:
      yield
    finally:
      self.settle()
      self._part, self._kind = before


_clock: Clock | None = None
# When the process's first run began, if that was before it could be timed.
_began: float | None = None
_first = True


def count_from(instant: float) -> None:
  """Has the process's first run begin earlier, with the imports.

  Args:
    instant: when, as `time.perf_counter` has it.
  """
  global _began
  _began = instant if _first else None


@contextlib.contextmanager
def run() -> Iterator[Clock]:
  """Times a run: gives the clock that `part` and `kind` charge meanwhile."""
  global _clock, _began, _first
  before, clock = _clock, Clock(_began)
  _clock, _began, _first = clock, None, False
  jax.monitoring.register_event_duration_secs_listener(clock.note)
  try:
    yield clock
  finally:
    _clock = before
    # Somebody else may have removed all listeners.
    with contextlib.suppress(AssertionError, ValueError):
      jax.monitoring.unregister_event_duration_listener(clock.note)


def part(name: str) -> contextlib.AbstractContextManager[None]:
  """Charges what happens within to a part of the run; nothing where none is timed."""
  return _clock.spending(name, OTHER) if _clock else contextlib.nullcontext()


def kind(name: str) -> contextlib.AbstractContextManager[None]:
  """Charges what happens within, of the part under way, to one of `KINDS`."""
  return _clock.spending(None, name) if _clock else contextlib.nullcontext()


def remember(
  path: pathlib.Path, parts: dict[str, dict[str, float]], command: str
) -> None:
  """Adds where a run's time went to a file of such records, JSON lines.

  Args:
    path: the file; it need not be there.
    parts: a clock's, settled.
    command: the run's, for the record.

  Raises:
    RunError: the file cannot be written.
  """
  record = {
    "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    "command": command,
    "hardware": environment.hardware(),
    "seconds": {
      name: {kind: round(seconds, 3) for kind, seconds in found.items()}
      for name, found in parts.items()
    },
  }
  lines = [json.dumps(line) for line in [*files.read_json_lines(path), record]]
  files.write_bytes(path, ("\n".join(lines) + "\n").encode())


def table(parts: dict[str, dict[str, float]]) -> list[str]:
  """Returns seconds by part and kind as lines of a table, with sums.

  Args:
    parts: a clock's.
  """
  kinds = (*KINDS, OTHER)
  rows = {
    name: [found.get(kind, 0.0) for kind in kinds] for name, found in parts.items()
  }
  rows["in all"] = [sum(column) for column in zip(*rows.values(), strict=True)]
  lines = [("where the time went", "seconds", *kinds)]
  for name, seconds in rows.items():
    lines.append((name, *(f"{s:.1f}" for s in (sum(seconds), *seconds))))
  first = max(len(line[0]) for line in lines)
  rest = lambda line: "".join(cell.rjust(13) for cell in line[1:])
  return [line[0].ljust(first) + rest(line) for line in lines]
