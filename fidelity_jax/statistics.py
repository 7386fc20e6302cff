"""Intervals and paired comparisons (docs/method.md, section 10)."""

import msgspec


class Comparison(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
  """A method compared with another on the same images and noise.

  Attributes:
    first: title of the one, see `titles.title`.
    second: title of the other.
    group: what both share: dataset, backbone, kind of degradation, in words.
    condition: name of the condition, or "mean of A, B, C" for the mean over several.
    difference: the first's accuracy less the second's, percentage points.
    low: lower end of its 95 % interval.
    high: upper end.
    p: two-sided p-value of no difference.
    test: "mcnemar" (exact, for single rounds) or "bootstrap" (over images).
    images: number of images.
    rounds: of noise, at each seed.
    seeds: how many seeds of training it is a mean over.
    over_seeds: standard deviation over seeds of the difference, None for one.
  """

  first: str
  second: str
  group: str
  condition: str
  difference: float
  low: float
  high: float
  p: float
  test: str
  images: int
  rounds: int
  seeds: int = 1
  over_seeds: float | None = None
