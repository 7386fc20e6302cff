"""The conditions of an evaluation (docs/method.md, section 7)."""

import dataclasses
from typing import Any

from fidelity_jax.degradations import spec as spec_lib
from fidelity_jax.degradations.degradation import Degradation, Step
from fidelity_jax.degradations.kinds import KINDS


@dataclasses.dataclass(frozen=True)
class Condition:
  """One column of an accuracy table.

  Attributes:
    name: "clean", "awgn-0.1", ..., "awgn-1d", "awgn-2d".
    degradation: what is done to the images.
  """

  name: str
  degradation: Degradation

  @property
  def random(self) -> bool:
    """Whether rounds with different keys differ at all."""
    return self.degradation.random

  @property
  def kind(self) -> str:
    """Name of the kind of degradation; those of a sequence are joined by "+"."""
    return "+".join(step.kind for step in self.degradation.steps)

  @property
  def level(self) -> float | list[float] | None:
    """The level, the two ends of one that varies, or None for a sequence."""
    if len(self.degradation.steps) > 1:
      return None
    (step,) = self.degradation.steps
    return step.levels[0] if self.vary is None else list(step.levels)

  @property
  def vary(self) -> str | None:
    """How the level varies: "1d", "2d", "mixture" (a sequence's own), or None."""
    if len(self.degradation.steps) > 1:
      return "mixture"
    (step,) = self.degradation.steps
    return None if step.variation == "uniform" else step.variation

  @property
  def steps(self) -> list[dict[str, Any]]:
    """The degradation in full, JSON-able."""
    return [step.record() for step in self.degradation.steps]

  def rounds_needed(self, rounds: int) -> int:
    """Returns `rounds`, or 1 where every round would be the same."""
    return rounds if self.random else 1


def conditions(spec: spec_lib.Spec) -> tuple[Condition, ...]:
  """Returns a kind's evaluation conditions: clean, each level, 1D and 2D.

  Args:
    spec: as for `from_config`; a kind's name will do. A list of levels, or one level,
      gives these levels; a range gives the kind's default levels inside it; else the
      kind's default levels. 1D and 2D run from the harshest of these levels to none, or
      between the spec's own ends if it has `vary`. AWGN by name: clean, 0.1 ... 0.5,
      and 1D and 2D with (0.5, 0). A sequence gives clean and the sequence itself.

  Returns:
    The conditions, clean first. Conditions that differ in the level only are pytrees
    of one structure: passed as jit arguments they share one compilation.

  Raises:
    UsageError: as `from_config`.
  """
  clean = Condition("clean", spec_lib.from_config("clean"))
  degradation = spec_lib.from_config(spec)
  if len(degradation.steps) > 1:
    return (clean, Condition(degradation.name, degradation))
  (step,) = degradation.steps
  if step.kind == "clean":
    return (clean,)

  (fields,) = spec_lib.members(spec)
  defaults = KINDS[step.kind].levels
  none = defaults[0]
  match step.variation:
    case "uniform" | "discrete":
      levels = step.levels
    case "continuous":
      levels = tuple(v for v in defaults if step.levels[0] <= v <= step.levels[1])
      levels = levels or step.levels
    case _:
      levels = defaults
  levels = tuple(sorted({v for v in levels if v > none}))
  ends = (max(levels, default=defaults[-1]), none)
  if step.variation in ("1d", "2d"):
    ends = step.levels

  def condition(**changes: Any) -> Condition:
    made = spec_lib.from_config({**_plain(fields), **changes})
    longest = int(max(*levels, *ends))
    made = Degradation(tuple(_reaching(step, longest) for step in made.steps))
    return Condition(made.name, made)

  return (
    clean,
    *(condition(level=level) for level in levels),
    condition(level=ends, vary="1d"),
    condition(level=ends, vary="2d"),
  )


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
  """The fields that do not say how the level varies."""
  varying = ("level", "vary", "mixture")
  return {name: value for name, value in fields.items() if name not in varying}


def _reaching(step: Step, longest: int) -> Step:
  """The step with room for lines of the longest level, so that all levels share it."""
  room = {"max_length": longest}
  options = tuple((name, room.get(name, value)) for name, value in step.options)
  return dataclasses.replace(step, options=options)
