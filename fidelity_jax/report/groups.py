"""Rows -> groups of comparable rows, by title and condition, seeds put together."""

import collections
import dataclasses
import functools
import math
import statistics
from collections.abc import Iterable

from fidelity_jax import paper, titles
from fidelity_jax.report import text
from fidelity_jax.rows import Condition, Row


@dataclasses.dataclass(frozen=True)
class Measure:
  """Something that rows have a number for.

  Attributes:
    field: its name in a row.
    name: what it is called.
    unit: "%", "dB" or "".
    digits: after the point.
    sign: 1 if more is better, -1 if less is.
    note: what it is, in a sentence.
  """

  field: str
  name: str
  unit: str
  digits: int
  sign: int
  note: str


MEASURES = {
  measure.field: measure
  for measure in (
    Measure("accuracy", "test accuracy", "%", 2, 1, ""),
    Measure(
      *("top5", "top-5 accuracy", "%", 2, 1),
      "Percent of images whose class is among the five most probable.",
    ),
    Measure(
      *("ece", "calibration error", "%", 2, -1),
      "Expected calibration error: how far the largest probability is from the share "
      "of right answers, percentage points. Less is better.",
    ),
    Measure(
      *("psnr", "PSNR", "dB", 2, 1),
      "Of the image that the classifier gets, to the clean one; more is better.",
    ),
    Measure(
      *("ssim", "SSIM", "", 4, 1),
      "Structural similarity to the clean image, at most 1.",
    ),
    Measure(
      *("map_error", "map error", "", 4, -1),
      "Mean absolute error of the estimated map. Less is better.",
    ),
    Measure(
      *("ause", "AUSE", "", 4, -1),
      "Area under the sparsification error: 0 if the map ranks pixels as their true "
      "errors do. Less is better.",
    ),
  )
}


@dataclasses.dataclass(frozen=True)
class Entry:
  """A method under a condition: a row for each seed of training."""

  rows: tuple[Row, ...]

  @property
  def first(self) -> Row:
    """The row of the first seed."""
    return self.rows[0]

  def mean(self, field: str) -> float | None:
    """Returns the mean over seeds of a measure, None where one has none."""
    values = [getattr(row, field) for row in self.rows]
    return None if None in values else statistics.fmean(values)

  @property
  def value(self) -> float:
    """The mean over seeds of what the rows are about."""
    return statistics.fmean(row.value for row in self.rows)

  @property
  def over_rounds(self) -> float | None:
    """Standard deviation over rounds of noise, the mean over seeds; None for one."""
    if all(row.rounds == 1 for row in self.rows):
      return None
    return statistics.fmean(row.std for row in self.rows)

  @property
  def over_seeds(self) -> float | None:
    """Standard deviation over seeds of training; None for one."""
    if len(self.rows) == 1:
      return None
    return statistics.stdev(row.value for row in self.rows)

  @property
  def low(self) -> float:
    """Lower end of the 95 % interval, the mean over seeds."""
    return statistics.fmean(row.low for row in self.rows)

  @property
  def high(self) -> float:
    """Its upper end."""
    return statistics.fmean(row.high for row in self.rows)

  def of_class(self, number: int) -> float | None:
    """Returns the mean over seeds of a class's accuracy, None where it is unknown."""
    classes = [row.per_class or [] for row in self.rows]
    values = [c[number] if number < len(c) else None for c in classes]
    return None if None in values else statistics.fmean(values)

  @property
  def paper(self) -> float | None:
    """The paper's accuracy, percent, None where it gives none."""
    return None if self.first.accuracy is None else paper.accuracy(self.first)


@dataclasses.dataclass(frozen=True)
class Group:
  """Rows that share images, network and degradation, and what they measure.

  Attributes:
    name: see `titles.group`.
    field: what the rows are about: "accuracy", "psnr" or "map_error".
    titles: of the methods, in the order in which they were measured.
    conditions: by level; then those whose level varies, or that have none.
    entries: by title and name of the condition; not every pair need be there.
  """

  name: str
  field: str
  titles: list[str]
  conditions: list[Condition]
  entries: dict[tuple[str, str], Entry]

  @property
  def first(self) -> Row:
    """Any row."""
    return next(iter(self.entries.values())).first

  def get(self, title: str, condition: Condition) -> Entry | None:
    """Returns an entry, None if there is none."""
    return self.entries.get((title, condition.name))

  def of(self, title: str) -> list[Entry]:
    """Returns a method's entries."""
    return [entry for (name, _), entry in self.entries.items() if name == title]

  @functools.cached_property
  def seeds(self) -> list[int]:
    """All seeds of training that are known."""
    rows = [row for entry in self.entries.values() for row in entry.rows]
    return sorted({row.seed for row in rows if row.seed is not None})

  @functools.cached_property
  def uniform(self) -> list[Condition]:
    """Conditions of one level everywhere, from the mildest to the harshest."""
    return [c for c in self.conditions if titles.is_uniform(c)]

  @property
  def others(self) -> list[Condition]:
    """Conditions whose level varies, or that have none."""
    return [c for c in self.conditions if not titles.is_uniform(c)]

  @property
  def harshest(self) -> Condition:
    """The harshest level everywhere; of sequences, the last condition."""
    return self.uniform[-1] if len(self.uniform) > 1 else self.conditions[-1]


def field_of(row: Row) -> str:
  """Returns the name of the measure that a row is about."""
  fields = ("accuracy", "psnr", "map_error")
  return next(field for field in fields if getattr(row, field) is not None)


def make(rows: Iterable[Row]) -> list[Group]:
  """Returns the groups of rows, in the rows' order."""
  found = collections.defaultdict(list)
  for row in rows:
    found[titles.group(row), field_of(row)].append(row)
  return [_group(name, field, members) for (name, field), members in found.items()]


def _group(name: str, field: str, rows: list[Row]) -> Group:
  by_seed = collections.defaultdict(dict)
  for row, title in zip(rows, titles.unique(rows), strict=True):
    # Of two that are the same but for the experiment, the first counts.
    by_seed[title, row.condition.name].setdefault(row.seed, row)
  entries = {key: list(found.values()) for key, found in by_seed.items()}
  conditions = {row.condition.name: row.condition for row in rows}
  return Group(
    name=name,
    field=field,
    titles=list(dict.fromkeys(title for title, _ in entries)),
    conditions=sorted(conditions.values(), key=_by_level),
    entries={
      key: Entry(tuple(sorted(found, key=lambda row: row.seed)))
      for key, found in entries.items()
    },
  )


def _by_level(condition: Condition) -> float:
  return condition.level if titles.is_uniform(condition) else math.inf


def heading(condition: Condition, degradation: str = "") -> str:
  """Returns what heads a column: "clean", "0.3", "2D (0.5 to 0)", "blur + noise".

  Args:
    condition: the condition.
    degradation: the group's; of another kind, the condition's kind is named too.
  """
  if condition.kind == "clean" or condition.name == "clean":
    # Or "as is", of images that are not degraded any further.
    return condition.name.replace("_", " ")
  kind = text.printable(condition.kind).replace("_", " ").replace("+", " + ")
  kind = "" if condition.kind == degradation else f"{kind} "
  if condition.vary in ("1d", "2d"):
    ends = " to ".join(f"{end:g}" for end in condition.level)
    return f"{kind}{condition.vary.upper()} ({ends})"
  if isinstance(condition.level, int | float):
    return f"{kind}{condition.level:g}"
  return kind.strip() or text.printable(condition.name)
