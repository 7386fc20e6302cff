"""Intervals and paired comparisons (docs/method.md, section 10).

Noise and training are kept apart: every interval here is over test images, with the
networks as they are; what several seeds of training differ by is told beside it.
"""

import functools
from collections.abc import Sequence

import msgspec
import numpy as np
from scipy import stats

from fidelity_jax import pairing, titles
from fidelity_jax.pairing import Differences
from fidelity_jax.rows import Scored

# What the others are compared with: the classifier that the method steers, alone.
BASELINES = ("trained on clean, with restoration", "given weights, with restoration")
# Sources of the map, each compared with those after it.
_SOURCES = ("oracle", "end_to_end", "pretrained")
# Bins of the calibration error, as Guo et al. (2017) have it.
_BINS = 15
_ENDS = (2.5, 97.5)


class Comparison(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
  """A method compared with another on the same images and noise.

  Attributes:
    first: title of the one, see `titles.title`.
    second: title of the other.
    group: what both share: dataset, backbone, kind of degradation, in words.
    condition: name of the condition, or "mean of A, B, C" for the mean over several.
      "A against B" is about a change: of one method between two conditions (`first` and
      `second` are the same then), or how much larger the difference is at A than at B.
    difference: the first's accuracy less the second's, percentage points.
    low: lower end of its 95 % interval, over images.
    high: upper end.
    p: two-sided p-value of no difference.
    test: "mcnemar" (exact, for single rounds) or "bootstrap" (over images).
    images: number of images.
    rounds: of noise, at each seed; the most, if conditions differ.
    seeds: how many seeds of training it is a mean over.
    over_seeds: standard deviation over seeds of the difference, None for one.
    parts: how many comparisons are decided together, as parts of one claim.
    corrected_high: upper end of the interval at 1 - 0.05 / parts (Bonferroni), None for
      a comparison that stands alone.
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
  parts: int = 1
  corrected_high: float | None = None


def wilson(successes: int, n: int) -> tuple[float, float]:
  """Returns Wilson's 95 % interval of a proportion, in percent.

  Args:
    successes: how many.
    n: of how many, at least 1.
  """
  found = stats.binomtest(int(successes), int(n)).proportion_ci(method="wilson")
  return 100 * float(found.low), 100 * float(found.high)


class Bootstrap:
  """Draws of test images with replacement, the same for all that is compared.

  Attributes:
    images: number of test images, N.
    replicates: number of draws, B.
    seed: of the draws.
  """

  def __init__(self, images: int, replicates: int = 2000, seed: int = 0):
    """Makes the draws when they are first used; they take N * B bytes.

    Args:
      images: at least 1.
      replicates: at least 1.
      seed: any.
    """
    self.images, self.replicates, self.seed = images, replicates, seed
    self._sized = {images: self}

  def sized(self, images: int) -> "Bootstrap":
    """Returns draws of another number of images, made once."""
    if images not in self._sized:
      self._sized[images] = Bootstrap(images, self.replicates, self.seed)
    return self._sized[images]

  @functools.cached_property
  def _counts(self) -> np.ndarray:
    """How often each draw has each image, uint8 [B, N].

    A byte is enough: that one image is drawn 256 times out of N has a probability of
    about 1 / 256!.
    """
    generator = np.random.default_rng(self.seed)
    counts = np.empty((self.replicates, self.images), np.uint8)
    for row in counts:
      drawn = generator.integers(self.images, size=self.images)
      row[:] = np.bincount(drawn, minlength=self.images)
    return counts

  def means(self, x: np.ndarray) -> np.ndarray:
    """Returns the mean over images of each draw, float64 [M, B].

    Args:
      x: values per image, [M, N].
    """
    x = np.asarray(x, np.float64)
    found = np.empty((len(x), self.replicates))
    step = max(1, 2**22 // self.images)  # 32 MiB of weights at a time.
    for start in range(0, self.replicates, step):
      part = slice(start, start + step)
      found[:, part] = x @ self._counts[part].T.astype(np.float64)
    # Differences that cancel must be 0, whatever the order of the sum was.
    return np.round(found / self.images, 9) + 0.0


def interval(
  values: np.ndarray, bootstrap: Bootstrap, proportion: bool
) -> tuple[float, float]:
  """Returns the 95 % interval of the mean over images.

  Wilson's for one round of a proportion, else percentiles of the bootstrap over images
  with all their rounds. Where all values of a proportion are the same, which leaves the
  bootstrap nothing to draw, it is Wilson's of the images.

  Args:
    values: [R, N]; 0 and 100 for a proportion.
    bootstrap: of N images.
    proportion: whether the values are right or wrong.
  """
  same = values.min() == values.max()
  if proportion and (len(values) == 1 or same):
    return wilson(np.count_nonzero(values[0]), values.shape[1])
  means = bootstrap.means(values.mean(0, dtype=np.float64)[None])
  low, high = np.percentile(means[0], _ENDS)
  return float(low), float(high)


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
  """Returns the expected calibration error, percent (Guo et al. 2017).

  Predictions fall into 15 bins of equal width by their largest probability; the error
  is the mean over predictions of the distance between their bin's accuracy and its mean
  probability.

  Args:
    confidence: largest probability, in [0, 1], any shape.
    right: bool, of the same shape.
  """
  confidence = np.asarray(confidence, np.float64).ravel()
  # Bins are open below and closed above.
  bins = np.clip(np.ceil(confidence * _BINS).astype(int) - 1, 0, _BINS - 1)
  gaps = np.bincount(bins, confidence - right.ravel(), _BINS)
  return 100 * float(np.abs(gaps).sum() / confidence.size)


def summarize(
  values: dict[str, np.ndarray],
  labels: np.ndarray | None,
  num_classes: int,
  bootstrap: Bootstrap,
) -> dict[str, object]:
  """Returns the fields of a `Row` that are measured.

  These are accuracy, top5 (None for up to five classes, where it says nothing), ece and
  per_class; or psnr and ssim; or map_error and ause; and with any of them std, low,
  high, rounds and images.

  Args:
    values: see `rows.Scored.values`, [R, N].
    labels: the images' classes, int [N]; None where nothing is classified.
    num_classes: K.
    bootstrap: of N images.
  """
  facts: dict[str, object] = {}
  mean = lambda name: float(values[name].mean(dtype=np.float64))
  if classified := "rank" in values:
    right = values["rank"] == 0
    main = 100.0 * right
    top5 = 100 * float(np.mean(values["rank"] < 5)) if num_classes > 5 else None
    counts = np.bincount(labels, minlength=num_classes)
    sums = np.bincount(labels, main.mean(0), minlength=num_classes)
    facts = {
      "accuracy": float(main.mean()),
      "top5": top5,
      "ece": calibration_error(values["confidence"], right),
      "per_class": [
        float(s / n) if n else None for s, n in zip(sums, counts, strict=True)
      ],
    }
  elif "psnr" in values:
    main = values["psnr"]
    facts = {"psnr": mean("psnr"), "ssim": mean("ssim")}
  else:
    main = values["error"]
    facts = {"map_error": mean("error"), "ause": mean("ause")}
  rounds, images = main.shape
  low, high = interval(main, bootstrap, classified)
  per_round = main.mean(1, dtype=np.float64)
  std = float(per_round.std(ddof=1)) if rounds > 1 else 0.0
  spread = {"std": std, "low": low, "high": high}
  return facts | spread | {"rounds": rounds, "images": images}


def compare(
  differences: Sequence[Differences],
  bootstrap: Bootstrap,
  parts: Sequence[int] | None = None,
) -> list[dict[str, object]]:
  """Returns the measured fields of a `Comparison` for each of some differences.

  The difference is the mean over images and seeds, its interval the bootstrap's over
  images, given these seeds. The p-value of two single answers is McNemar's, exact; else
  the bootstrap's: twice the share of draws on the lesser side of 0, which counts one
  more draw than there are, so that it is never 0.

  Args:
    differences: M differences of the same N images.
    bootstrap: of N images.
    parts: of each, see `Comparison`; None if each stands alone.
  """
  if not differences:
    return []
  per_image = np.stack([d.values.mean(0) for d in differences])
  draws = bootstrap.means(per_image)
  lows, highs = np.percentile(draws, _ENDS, axis=1)
  sides = np.minimum((draws <= 0).sum(1), (draws >= 0).sum(1))
  found = []
  parts = parts or [1] * len(differences)
  for d, drawn, mean, low, high, side, together in zip(
    *(differences, draws, per_image.mean(1), lows, highs, sides, parts), strict=True
  ):
    seeds, images = d.values.shape
    p = min(1.0, 2 * (1 + int(side)) / (bootstrap.replicates + 1))
    single = d.single and seeds == 1
    facts: dict[str, object] = {
      "difference": float(np.round(mean, 9) + 0.0),
      "low": float(low),
      "high": float(high),
      "p": _mcnemar(d.values[0]) if single else p,
      "test": "mcnemar" if single else "bootstrap",
      "images": images,
      "rounds": d.rounds,
      "seeds": seeds,
    }
    if seeds > 1:
      facts["over_seeds"] = float(d.values.mean(1).std(ddof=1))
    if together > 1:
      facts |= {"parts": together, "corrected_high": _corrected(drawn, together)}
    found.append(facts)
  return found


def _corrected(drawn: np.ndarray, parts: int) -> float:
  """Returns the upper end of the interval at 1 - 0.05 / parts.

  So far out there are few draws, or none: it is the normal distribution's with their
  standard deviation where that is further.
  """
  tail = (100 - _ENDS[1]) / 100 / parts
  normal = drawn.mean() + stats.norm.isf(tail) * drawn.std()
  return float(max(normal, np.percentile(drawn, 100 * (1 - tail))))


def _mcnemar(differences: np.ndarray) -> float:
  """Returns the exact two-sided p-value of as many gains as losses."""
  gains, losses = np.count_nonzero(differences > 0), np.count_nonzero(differences < 0)
  if gains + losses == 0:
    return 1.0
  return float(stats.binomtest(gains, gains + losses).pvalue)


def comparisons(scored: Sequence[Scored], bootstrap: Bootstrap) -> list[Comparison]:
  """Compares methods, condition by condition.

  Every method is compared with restoration alone, that is the classifier which the
  method steers (trained on clean images, or of given weights) that sees restored
  images; what has another map, resize method or fewer modules with the whole method;
  and maps of different sources with each other. Where the other is not measured there
  is nothing to compare with. A last comparison of each pair is over all uniform levels
  above clean. Rows of several seeds go together.

  Args:
    scored: rows of any groups; those that do not classify are left out.
    bootstrap: of as many images as most groups have; others get their own draws.
  """
  found = []
  for group in pairing.groups(scored):
    wanted = [[c] for c in group.conditions]
    wanted += [group.levels] * (len(group.levels) > 1)
    named, differences = [], []
    for first, second in _pairs(group):
      for conditions in wanted:
        difference = group.paired(first, second, conditions)
        if difference is not None:
          named.append((first, second, pairing.mean_of(conditions)))
          differences.append(difference)
    facts = compare(differences, bootstrap.sized(group.images))
    found += [
      Comparison(
        first=first, second=second, group=group.name, condition=condition, **fact
      )
      for (first, second, condition), fact in zip(named, facts, strict=True)
    ]
  return found


def _pairs(group: pairing.Group) -> list[tuple[str, str]]:
  """Returns the titles of the methods that are compared: with the baseline first."""
  rows = {title: row for (title, _), row in reversed(group.rows.items())}
  found = []
  for title in group.titles:
    for baseline in BASELINES:
      if other := group.find(baseline, rows[title]):
        found.append((title, other))
        break
  for title in group.titles:
    row = rows[title]
    if row.method not in _SOURCES:
      continue
    whole = {"map": "l1", "resize": row.resize and "bilinear", "without": []}
    others = [msgspec.structs.replace(row, **whole)]
    for source in _SOURCES[_SOURCES.index(row.method) + 1 :]:
      others.append(msgspec.structs.replace(row, method=source))
    found += [(title, group.find(titles.title(other), row)) for other in others]
  return [(a, b) for a, b in dict.fromkeys(found) if b is not None and a != b]
