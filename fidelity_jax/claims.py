"""What the paper claims, and what becomes of it here.

`paper_claims` has what the paper says; here it is decided, group by group, from the
paired intervals of `statistics`.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import msgspec
from scipy import stats

from fidelity_jax import pairing, paper, statistics
from fidelity_jax.pairing import Differences, Group, Term
from fidelity_jax.paper_claims import CLAIMS, Claim, Part
from fidelity_jax.rows import Scored
from fidelity_jax.statistics import Comparison

HOLDS, FAILS = "holds", "does not hold"
UNTOLD, UNMEASURED = "cannot be told", "not measured"
# The bootstrap of fewer images says too little.
_FEWEST = 20
_LEVEL = 0.05


class Verdict(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
  """What becomes of one of the paper's claims.

  Attributes:
    claim: in words.
    where: the paper's section or table.
    verdict: "holds", "does not hold", "cannot be told" or "not measured".
    why: in a line, the numbers behind it, or what is not measured.
    paper: the paper's own difference, percentage points, None where it gives none; of
      the worst comparison, if there are several.
    comparisons: what it is based on: it holds if all of them are as claimed.
    group: what it is about, see `titles.group`.
  """

  claim: str
  where: str
  verdict: str
  why: str
  paper: float | None
  comparisons: list[Comparison]
  group: str = ""


def verdicts(
  scored: Sequence[Scored], bootstrap: statistics.Bootstrap
) -> list[Verdict]:
  """Decides the paper's claims in each group of rows.

  A claim holds if the 95 % interval of every part of it, paired over images, is on the
  side that is claimed; it does not if that of any part is on the other side, corrected
  for the number of parts (Bonferroni); else it cannot be told. With several seeds of
  training a t interval over the seeds' differences must be on that side too; of single
  rounds McNemar's p-value must be below 0.05. Nothing can be told of fewer than 20
  images. Claims that are not measured are told where rows are there that are about them
  in particular.

  Args:
    scored: rows of any groups; those that do not classify are left out.
    bootstrap: of as many images as most groups have; others get their own draws.

  Returns:
    By group, in the order of `CLAIMS`.
  """
  found = []
  for group in pairing.groups(scored):
    claimed = {claim: _claimed(claim, group) for claim in CLAIMS}
    everything = [m.differences for measured in claimed.values() for m in measured]
    parts = [len(measured) for measured in claimed.values() for _ in measured]
    sized = bootstrap.sized(group.images)
    numbers = iter(statistics.compare(everything, sized, parts))
    for claim, measured in claimed.items():
      if measured:
        found.append(_verdict(claim, group, measured, numbers))
      elif {_called(title, group) for title in claim.about} & set(group.titles):
        found.append(_unmeasured(claim, group))
  return found


@dataclasses.dataclass(frozen=True)
class _Measured:
  """A comparison that a part of a claim asks for."""

  part: Part
  condition: str
  terms: list[Term]
  differences: Differences


def _verdict(
  claim: Claim,
  group: Group,
  measured: Sequence[_Measured],
  numbers: Iterator[dict[str, object]],
) -> Verdict:
  """Returns a claim's verdict, from the next numbers, one for each comparison."""
  comparisons = [
    Comparison(
      first=m.part.first,
      second=m.part.second,
      group=group.name,
      condition=m.condition,
      **next(numbers),
    )
    for m in measured
  ]
  decided = [
    _decide(c, m.part.margin) for c, m in zip(comparisons, measured, strict=True)
  ]
  return Verdict(
    claim=claim.words,
    where=claim.where,
    verdict=_together(decided),
    why=_why(comparisons, decided),
    paper=_papers(measured[worst(comparisons)].terms, group),
    comparisons=comparisons,
    group=group.name,
  )


def _unmeasured(claim: Claim, group: Group) -> Verdict:
  return Verdict(
    claim=claim.words,
    where=claim.where,
    verdict=UNMEASURED,
    why=_missing(claim, group),
    paper=None,
    comparisons=[],
    group=group.name,
  )


def _claimed(claim: Claim, group: Group) -> list[_Measured]:
  """Returns what a claim compares, by its first variant that is measured."""
  variants = (_measure(parts, group) for parts in claim.variants)
  return next((found for found in variants if found), [])


def _measure(parts: Sequence[Part], group: Group) -> list[_Measured]:
  """Returns what parts compare, nothing if one that must be there is not measured."""
  found = []
  for part in parts:
    first, second = (_called(title, group) for title in (part.first, part.second))
    part = dataclasses.replace(part, first=first, second=second)
    wanted = _wanted(part, group)
    measured = [
      _Measured(part, condition, terms, differences)
      for condition, terms in wanted
      if (differences := group.differences(terms)) is not None
    ]
    if len(measured) == len(wanted) > 0:
      found += measured
    elif not part.optional:
      return []
  return found


def _called(title: str, group: Group) -> str:
  """Returns what a claim's method is called in a group.

  Given weights stand for those trained on clean images where there are no such: theirs
  are the frozen classifier then.
  """
  clean, given = "trained on clean, ", "given weights, "
  starts = {known.startswith(clean) - known.startswith(given) for known in group.titles}
  return title.replace(clean, given) if -1 in starts and 1 not in starts else title


def _wanted(part: Part, group: Group) -> list[tuple[str, list[Term]]]:
  """Returns the comparisons that a part asks for: the condition, and the terms."""
  if part.at == "each":
    levels = [group.clean] * (group.clean is not None) + group.levels
    return [
      (f"{a} against {b}", [Term(1, part.first, a), Term(-1, part.second, b)])
      for a, b in itertools.pairwise(levels)
    ]
  places = _places(part.at, group)
  condition = pairing.mean_of(places) if places else ""
  terms = pairing.mean_difference(part.first, part.second, places) if places else []
  if part.less is not None and places:
    others = _places(part.less, group)
    if not others:
      return []
    terms = terms + pairing.mean_difference(part.second, part.first, others)
    condition = f"{condition} against {pairing.mean_of(others)}"
  return [(condition, terms)] if terms else []


def _places(at: str, group: Group) -> list[str]:
  """Returns the names of the conditions that `Part.at` means, none if there are none.

  A single level is neither mild nor one of several.
  """
  levels = group.levels
  match at:
    case "clean":
      return [group.clean] if group.clean is not None else []
    case "degraded":
      return levels
    case "mildest":
      return levels[:1] if len(levels) > 1 else []
    case "harshest":
      return levels[-1:]
    case "severe":
      return levels[-2:] if len(levels) > 2 else levels[-1:]
  raise ValueError(at)


def _decide(comparison: Comparison, margin: float) -> str:
  """Returns what becomes of a part of a claim."""
  c = comparison
  if c.images < _FEWEST:
    return UNTOLD
  low, high = c.low, c.high if c.corrected_high is None else c.corrected_high
  if c.seeds > 1:
    low = min(low, c.difference - _over_seeds(c, 1))
    high = max(high, c.difference + _over_seeds(c, c.parts))
  # The interval of few answers that differ is too narrow. McNemar's test is about no
  # difference at all, so that a margin has no use for it.
  clear = lambda parts: c.test != "mcnemar" or margin > 0 or c.p < _LEVEL / parts
  if low > -margin and clear(1):
    return HOLDS
  return FAILS if high < -margin and clear(c.parts) else UNTOLD


def _over_seeds(comparison: Comparison, parts: int) -> float:
  """Returns half the width of the t interval over seeds at 1 - 0.05 / parts."""
  seeds = comparison.seeds
  quantile = stats.t.ppf(1 - _LEVEL / parts / 2, seeds - 1)
  return float(quantile * comparison.over_seeds / seeds**0.5)


def worst(comparisons: Sequence[Comparison]) -> int:
  """Returns which comparison is the furthest from what is claimed."""
  return min(range(len(comparisons)), key=lambda i: comparisons[i].high)


def _together(decided: Sequence[str]) -> str:
  if FAILS in decided:
    return FAILS
  return UNTOLD if UNTOLD in decided else HOLDS


def _why(comparisons: Sequence[Comparison], decided: Sequence[str]) -> str:
  """Returns the numbers behind a verdict; of many, how many, and the worst."""
  if comparisons[0].images < _FEWEST:
    return f"only {comparisons[0].images} images"
  if len(comparisons) <= 3:
    return "; ".join(map(_numbers, comparisons))
  return (
    f"{decided.count(HOLDS)} of {len(decided)} comparisons are as claimed, "
    f"{decided.count(FAILS)} the other way round; the worst: "
    f"{_numbers(comparisons[worst(comparisons)])}"
  )


def _numbers(c: Comparison) -> str:
  methods = c.first if c.first == c.second else f"{c.first}, against {c.second}"
  low, high, difference = (
    f"{value:+.2f}".replace("-", "−") for value in (c.low, c.high, c.difference)
  )
  facts = ""
  if c.over_seeds is not None:
    facts = f", standard deviation over {c.seeds} seeds {c.over_seeds:.2f}"
  if c.test == "mcnemar":
    facts += f", p {c.p:.2g} (McNemar)"
  return f"{methods}; {c.condition}: {difference} points [{low}, {high}]{facts}"


def _missing(claim: Claim, group: Group) -> str:
  """Returns what it would take to decide a claim."""
  absent: list[list[str]] = []
  for parts in claim.variants:
    needed = [
      _called(t, group) for p in parts if not p.optional for t in (p.first, p.second)
    ]
    absent.append([t for t in dict.fromkeys(needed) if t not in group.titles])
  nearest = min(absent, key=len)
  if nearest:
    return "not there: " + "; ".join(nearest)
  return "its rows have no levels to compare, or no seed in common"


def _papers(terms: Sequence[Term], group: Group) -> float | None:
  """Returns the paper's number for a difference, None if it lacks a part of it."""
  total = 0.0
  for term in terms:
    known = paper.accuracy(group.rows[term.title, term.condition])
    if known is None:
      return None
    total += term.weight * known
  return round(total, 4)
