"""Rows that are compared with each other, and what they differ by, image by image."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from fidelity_jax import titles
from fidelity_jax.rows import Condition, Row, Scored


@dataclasses.dataclass(frozen=True)
class Differences:
  """What two methods differ by, image by image.

  Attributes:
    values: mean over rounds and conditions, percentage points, float64 [S, N]; a row
      for each seed of training.
    rounds: of noise, the most of all conditions.
    single: whether they are between two single answers, right or wrong.
  """

  values: np.ndarray
  rounds: int
  single: bool = False


@dataclasses.dataclass(frozen=True)
class Term:
  """A part of a difference: a weight, and the method and condition that it is of."""

  weight: float
  title: str
  condition: str


class Group:
  """Classified rows that are compared with each other: one group, the same images.

  Attributes:
    name: see `titles.group`.
    images: number of images.
    titles: of its methods, in the order of its rows.
    clean: name of the condition without degradation, None if there is none.
    levels: names of the others whose level is the same everywhere, mildest first.
    conditions: names of all: clean, by level, and those that vary.
    rows: by title and condition, of the first seed.
  """

  def __init__(self, name: str, scored: Sequence[Scored]):
    """Indexes rows.

    Args:
      name: the group's.
      scored: its rows, at least one; of two that are the same but for the experiment,
        the first counts.
    """
    self.name, self.images = name, scored[0].values["rank"].shape[1]
    self.rows: dict[tuple[str, str], Row] = {}
    self._scored: dict[tuple[str, str], dict[int, Scored]] = {}
    known: dict[str, Condition] = {}
    for s in scored:
      key = (titles.title(s.row), s.row.condition.name)
      self.rows.setdefault(key, s.row)
      self._scored.setdefault(key, {}).setdefault(s.row.seed, s)
      known.setdefault(s.row.condition.name, s.row.condition)
    self.titles = list(dict.fromkeys(title for title, _ in self.rows))
    self.clean = next((c.name for c in known.values() if c.kind == "clean"), None)
    degraded = [c for c in known.values() if c.kind != "clean"]
    uniform = [c for c in degraded if c.vary not in ("1d", "2d")]
    self.levels = [c.name for c in sorted(uniform, key=_harshness)]
    varying = [c.name for c in degraded if c.vary in ("1d", "2d")]
    self.conditions = [self.clean] * (self.clean is not None) + self.levels + varying

  def differences(self, terms: Sequence[Term]) -> Differences | None:
    """Returns a weighted sum of methods' values, None if some are not measured.

    It is over the seeds and, in each condition, the rounds that all its methods have,
    as these are what they saw the same noise in.

    Args:
      terms: what to sum.
    """
    found = [self._scored.get((t.title, t.condition), {}) for t in terms]
    seeds = sorted(set.intersection(*map(set, found)))
    if not seeds:
      return None
    total = np.zeros((len(seeds), self.images))
    most = 1
    for row, seed in zip(total, seeds, strict=True):
      rounds: dict[str, int] = {}
      values = [scored[seed].main for scored in found]
      for term, v in zip(terms, values, strict=True):
        rounds[term.condition] = min(len(v), rounds.get(term.condition, len(v)))
      for term, v in zip(terms, values, strict=True):
        row += term.weight * v[: rounds[term.condition]].mean(0)
      most = max(most, *rounds.values())
    return Differences(total, most, len(terms) == 2 and most == 1)

  def paired(
    self, first: str, second: str, conditions: Sequence[str]
  ) -> Differences | None:
    """Returns what two methods differ by, None if one is not measured.

    Args:
      first: title of the one.
      second: title of the other.
      conditions: names of those to take the mean over.
    """
    return self.differences(mean_difference(first, second, conditions))


def mean_difference(first: str, second: str, conditions: Sequence[str]) -> list[Term]:
  """Returns the terms of a mean difference over conditions; see `Group.paired`."""
  share = 1 / len(conditions)
  sides = ((first, share), (second, -share))
  return [Term(weight, title, c) for c in conditions for title, weight in sides]


def _harshness(condition: Condition) -> float:
  level = condition.level
  if level is None:  # A sequence, which is the only one there is.
    return 0.0
  return float(max(level) if isinstance(level, list) else level)


def groups(scored: Sequence[Scored]) -> list[Group]:
  """Returns the groups of the rows that classify, in the order of the rows."""
  parts: dict[tuple[str, str, int], list[Scored]] = {}
  for s in scored:
    if "rank" in s.values:
      key = (titles.group(s.row), s.row.fingerprint, s.values["rank"].shape[1])
      parts.setdefault(key, []).append(s)
  return [Group(name, members) for (name, *_), members in parts.items()]


def mean_of(conditions: Sequence[str]) -> str:
  """Returns what the mean over conditions is called."""
  return conditions[0] if len(conditions) == 1 else f"mean of {', '.join(conditions)}"
