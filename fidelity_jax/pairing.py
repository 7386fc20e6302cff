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
    levels: names of the others whose level is the same everywhere, mildest first;
      where there are none, of sequences.
    conditions: names of all: clean, by level, and the others.
    rows: by title and condition, of the first seed.
  """

  def __init__(self, name: str, scored: Sequence[Scored], called: Sequence[str]):
    """Indexes rows.

    Args:
      name: the group's.
      scored: its rows, at least one; of two that are the same but for the experiment,
        the first counts.
      called: what its rows are called, see `titles.unique`.
    """
    self.name, self.images = name, scored[0].values["rank"].shape[1]
    self.rows: dict[tuple[str, str], Row] = {}
    self._scored: dict[tuple[str, str], dict[int, Scored]] = {}
    known: dict[str, Condition] = {}
    for s, title in zip(scored, called, strict=True):
      key = (title, s.row.condition.name)
      self.rows.setdefault(key, s.row)
      self._scored.setdefault(key, {}).setdefault(s.row.seed, s)
      known.setdefault(s.row.condition.name, s.row.condition)
    self.titles = list(dict.fromkeys(title for title, _ in self.rows))
    self.clean = next((c.name for c in known.values() if c.kind == "clean"), None)
    degraded = [c for c in known.values() if c.kind != "clean"]
    uniform = [c for c in degraded if titles.is_uniform(c)]
    self.levels = [c.name for c in sorted(uniform, key=lambda c: c.level)]
    if not uniform:
      self.levels = [c.name for c in degraded if c.level is None]
    others = [c.name for c in degraded if c.name not in self.levels]
    self.conditions = [self.clean] * (self.clean is not None) + self.levels + others

  def find(self, title: str, row: Row) -> str | None:
    """Returns what the method of a plain title is called, None if it is not there.

    Args:
      title: see `titles.title`.
      row: of the experiment whose own it is, if there are several of that title.
    """
    names = (title, titles.of_experiment(title, row))
    return next((name for name in names if name in self.titles), None)

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


def groups(scored: Sequence[Scored]) -> list[Group]:
  """Returns the groups of the rows that classify, in the order of the rows."""
  named: dict[str, list[Scored]] = {}
  for s in scored:
    if "rank" in s.values:
      named.setdefault(titles.group(s.row), []).append(s)
  found = []
  for name, members in named.items():
    parts: dict[tuple[str, int], list[tuple[Scored, str]]] = {}
    for s, title in zip(members, titles.unique([s.row for s in members]), strict=True):
      key = (s.row.fingerprint, s.values["rank"].shape[1])
      parts.setdefault(key, []).append((s, title))
    found += [Group(name, *zip(*part, strict=True)) for part in parts.values()]
  return found


def mean_of(conditions: Sequence[str]) -> str:
  """Returns what the mean over conditions is called."""
  return conditions[0] if len(conditions) == 1 else f"mean of {', '.join(conditions)}"
