"""Traces of some training steps, for XProf: docs/observing.md."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax

from fidelity_jax import errors, progress, rules

# Of a stage, first and last step. A trace of many is too large to look at.
_MOST = 1000
STEPS = rules.Rule(
  f"None or the first and the last step to trace, (first, last), 1 <= first <= last, "
  f"at most {_MOST} steps",
  lambda v: v is None or _possible(v),
)


def _possible(value: Any) -> bool:
  pair = rules.several(rules.whole(1, 2**31), 2, 2)
  return pair.holds(value) and 0 <= value[1] - value[0] < _MOST


class Tracer:
  """Traces some steps of one stage's training; on the first host alone."""

  def __init__(
    self,
    title: str,
    directory: pathlib.Path,
    steps: tuple[int, int] | None,
    start: int,
    total: int,
    paused: Callable[[], contextlib.AbstractContextManager[None]],
  ):
    """Prepares.

    Args:
      title: what to call the stage in a message.
      directory: the stage's; the trace goes to plugins/profile/TIME/ below it, which is
        where TensorBoard and XProf look.
      steps: the first and the last step to trace, or None.
      start: steps that are done already.
      total: the stage's.
      paused: stops the clock of the steps while a trace begins and is written.
    """
    self._title, self._directory, self._paused = title, directory, paused
    self._on = False
    self._first, self._last = steps or (0, 0)
    if jax.process_index() != 0:
      self._last = 0
    if self._last and self._first > total > start:
      progress.say(f"{title}: has {total} steps: none of profile.steps={steps}.")
    self._last = min(self._last, total)

  @contextlib.contextmanager
  def step(self, number: int, state: Any) -> Iterator[None]:
    """Names a step in the trace, which begins before the first one.

    Args:
      number: the step's, from 1 on.
      state: what the device has to be done with before.
    """
    if not self._on and self._first <= number <= self._last:
      jax.block_until_ready(state)
      doing = errors.while_doing(f"beginning a trace in {self._directory}")
      with self._paused(), doing:
        # The profiler would only find at the end that it cannot.
        (self._directory / "plugins" / "profile").mkdir(parents=True, exist_ok=True)
        jax.profiler.start_trace(self._directory)
      self._on = True
    if not self._on:
      yield
      return
    with jax.profiler.StepTraceAnnotation("train", step_num=number):
      yield

  def done(self, number: int, state: Any) -> None:
    """Writes the trace after its last step.

    Args:
      number: of the step that was made.
      state: what it gives; the device has to be done with it.

    Raises:
      RunError: the trace cannot be written.
    """
    if not self._on or number < self._last:
      return
    jax.block_until_ready(state)
    self._on = False
    try:
      with self._paused():
        jax.profiler.stop_trace()
    except jax.errors.JaxRuntimeError as error:
      reason = " ".join(str(error).split())[:200]
      raise errors.RunError(
        f"{self._title}: writing a trace to {self._directory} failed: {reason}: the "
        "same command without profile.steps goes on."
      ) from error
    progress.say(f"{self._title}: trace in {self._directory / 'plugins' / 'profile'}.")

  def close(self) -> None:
    """Writes what there is of a trace that is not done, as when a run is stopped."""
    if self._on:
      self._on = False
      # What led here must not be hidden.
      with contextlib.suppress(Exception):
        jax.profiler.stop_trace()
