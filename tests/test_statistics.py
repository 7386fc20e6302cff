"""Intervals that cover, tests that can be worked out by hand, and what is paired."""

import math

import msgspec
import numpy as np
import pytest
import scored_rows

from fidelity_jax import pairing, statistics
from fidelity_jax.pairing import Differences
from fidelity_jax.rows import Scored

_CLEAN, *_NOISES = scored_rows.conditions()[:6]
_LEVELS = [c.name for c in _NOISES]


@pytest.mark.parametrize(
  "successes, n, low, high",
  # Newcombe, Statistics in Medicine 17 (1998), Table I, method 3.
  [
    (81, 263, 0.2553, 0.3662),
    (15, 148, 0.0624, 0.1605),
    (0, 20, 0.0000, 0.1611),
    (1, 29, 0.0061, 0.1718),
  ],
)
def test_wilson(successes, n, low, high):
  found = statistics.wilson(successes, n)
  assert found == pytest.approx((100 * low, 100 * high), abs=0.005)


def test_draws_are_means_over_images_drawn_again():
  bootstrap = statistics.Bootstrap(5000, replicates=1200, seed=1)  # Several chunks.
  draws = np.random.default_rng(0)
  x = np.stack([np.ones(5000), np.arange(5000.0), draws.normal(size=5000)])
  means = bootstrap.means(x)
  assert means.shape == (3, 1200)
  np.testing.assert_allclose(means[0], 1)
  # Sums over images drawn with replacement vary by sigma / sqrt(N).
  for values, found in zip(x[1:], means[1:], strict=True):
    sigma = values.std() / math.sqrt(5000)
    assert abs(found.mean() - values.mean()) < 4 * sigma / math.sqrt(1200)
    assert 0.92 < found.std() / sigma < 1.08
  # The same for all that is compared, and for another call.
  np.testing.assert_array_equal(bootstrap.means(x[1:2])[0], means[1])
  again = statistics.Bootstrap(5000, replicates=1200, seed=1).means(x)
  np.testing.assert_array_equal(again, means)
  assert np.any(statistics.Bootstrap(5000, 1200, seed=2).means(x)[1] != means[1])


def _rounds(draws, images: int, rounds: int, shift: float = 0.0) -> np.ndarray:
  """Images that are mostly right or mostly wrong: rounds tell little new."""
  chance = draws.beta(0.3, 0.3, size=images)
  right = draws.uniform(size=(rounds, images)) < chance + shift
  return 100.0 * right


def test_intervals_cover_though_rounds_of_an_image_are_alike():
  draws = np.random.default_rng(0)
  images, rounds, trials = 150, 8, 300
  covered = naive = 0
  for trial in range(trials):
    values = _rounds(draws, images, rounds)
    bootstrap = statistics.Bootstrap(images, 400, seed=trial)
    low, high = statistics.interval(values, bootstrap, proportion=True)
    covered += low <= 50 <= high
    low, high = statistics.wilson(np.count_nonzero(values), values.size)
    naive += low <= 50 <= high
  assert 0.91 < covered / trials < 0.985
  assert naive / trials < 0.75


def test_paired_intervals_cover_and_p_values_are_uniform_where_nothing_differs():
  draws = np.random.default_rng(1)
  images, trials = 200, 400
  shift = 4.0
  differences = []
  for _ in range(trials):
    hard = draws.beta(0.5, 0.5, size=images)
    first, second = (100.0 * (draws.uniform(size=(5, images)) < hard) for _ in "ab")
    differences.append(Differences((first - second).mean(0)[None], 5))
  bootstrap = statistics.Bootstrap(images, 1000)
  found = statistics.compare(differences, bootstrap)
  assert 0.92 < np.mean([f["low"] <= 0 <= f["high"] for f in found]) < 0.98
  p = np.array([f["p"] for f in found])
  assert 0.02 < np.mean(p < 0.05) < 0.08 and 0.42 < np.mean(p < 0.5) < 0.58
  # The p-value and the interval are of the same draws.
  clear = [not f["low"] <= 0 <= f["high"] for f in found]
  assert np.mean(clear == (p < 0.05)) > 0.98
  moved = [Differences(d.values + shift, 5) for d in differences]
  for before, after in zip(found, statistics.compare(moved, bootstrap), strict=True):
    assert after["low"] == pytest.approx(before["low"] + shift, abs=1e-6)


def test_a_clear_difference_has_the_least_p_value_there_is():
  values = np.random.default_rng(2).normal(10, 1, size=(1, 50))
  for sign in (1, -1):
    bootstrap = statistics.Bootstrap(50, 999)
    (found,) = statistics.compare([Differences(sign * values, 3)], bootstrap)
    assert found["p"] == 2 / 1000 and found["test"] == "bootstrap"


@pytest.mark.parametrize(
  "gains, losses, p",
  # By hand: 2 (1 + 10 + 45) / 2^10, 2 / 2^6, no evidence, at most 1.
  [(8, 2, 112 / 1024), (0, 6, 2 / 64), (0, 0, 1.0), (3, 3, 1.0)],
)
def test_mcnemar(gains, losses, p):
  values = np.zeros((1, 40))
  values[0, :gains] = 100
  values[0, gains : gains + losses] = -100
  bootstrap = statistics.Bootstrap(40)
  (found,) = statistics.compare([Differences(values, 1, single=True)], bootstrap)
  assert found["test"] == "mcnemar"
  assert found["p"] == pytest.approx(p)
  assert found["difference"] == pytest.approx(100 * (gains - losses) / 40)
  assert found["low"] <= found["difference"] <= found["high"]


def test_the_interval_of_one_round_is_wilsons():
  values = 100.0 * (np.arange(148) < 15)[None]
  bootstrap = statistics.Bootstrap(148)
  found = statistics.interval(values, bootstrap, proportion=True)
  assert found == statistics.wilson(15, 148)
  # Other values, and several rounds, are drawn.
  drawn = statistics.interval(values, bootstrap, proportion=False)
  assert drawn != found and drawn == pytest.approx(found, abs=1.5)
  assert statistics.interval(values.repeat(3, 0), bootstrap, True) == drawn


def test_always_right_is_not_certain():
  bootstrap = statistics.Bootstrap(20)
  found = statistics.interval(np.full((10, 20), 100.0), bootstrap, True)
  assert found == statistics.wilson(20, 20) and found[0] < 90


def test_calibration_error_by_hand():
  confidence = np.array([0.94, 0.98, 0.92])
  right = np.array([True, False, True])
  # Bins of 1/15: 0.94 and 0.98 share the last one, 0.92 is in the one before.
  expected = 2 / 3 * abs(0.5 - 0.96) + 1 / 3 * abs(1 - 0.92)
  found = statistics.calibration_error(confidence, right)
  assert found == pytest.approx(100 * expected)
  assert statistics.calibration_error(np.array([[1.0], [0.0]]), np.eye(2)[:1].T) == 0
  # A bin has its upper end: 9 / 15 is with 0.58.
  found = statistics.calibration_error(np.array([0.6, 0.58]), np.array([True, False]))
  assert found == pytest.approx(100 * abs(0.5 - 0.59))


def test_calibrated_predictions_have_no_calibration_error():
  draws = np.random.default_rng(3)
  confidence = draws.uniform(0.2, 1, size=(4, 20_000))
  right = draws.uniform(size=confidence.shape) < confidence
  assert statistics.calibration_error(confidence, right) < 0.7
  assert statistics.calibration_error(confidence**2, right) > 10


def test_summary_of_classified_images():
  values = {
    "prediction": np.array([[0, 1, 2, 2], [0, 0, 2, 0]], np.int32),
    "rank": np.array([[0, 0, 0, 4], [0, 3, 0, 5]], np.int32),
    "confidence": np.array([[0.5, 0.5, 0.5, 0.5], [0.5] * 4], np.float32),
  }
  labels = np.array([0, 1, 2, 4])
  found = statistics.summarize(values, labels, 6, statistics.Bootstrap(4))
  assert found["accuracy"] == 62.5
  assert found["top5"] == 87.5
  assert found["ece"] == pytest.approx(12.5)
  assert found["per_class"] == [100, 50, 100, None, 0, None]
  assert found["std"] == pytest.approx(np.std([75, 50], ddof=1))
  assert found["rounds"] == 2 and found["images"] == 4
  assert found["low"] < 62.5 < found["high"]
  few = statistics.summarize(values, labels, 5, statistics.Bootstrap(4))
  assert few["top5"] is None
  single = {name: v[:1] for name, v in values.items()}
  one = statistics.summarize(single, labels, 6, statistics.Bootstrap(4))
  assert one["std"] == 0 and (one["low"], one["high"]) == statistics.wilson(3, 4)


@pytest.mark.parametrize(
  "names, fields", [(("psnr", "ssim"),) * 2, (("error", "ause"), ("map_error", "ause"))]
)
def test_summary_of_images_and_maps(names, fields):
  draws = np.random.default_rng(4)
  values = {n: draws.normal(20, 3, size=(3, 400)).astype(np.float32) for n in names}
  found = statistics.summarize(values, None, 0, statistics.Bootstrap(400))
  measured = {"std", "low", "high", "rounds", "images", *fields}
  assert set(found) == measured
  for name, field in zip(names, fields, strict=True):
    assert found[field] == pytest.approx(values[name].mean(), rel=1e-5)
  sigma = values[names[0]].mean(0).std() / 20
  assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * sigma, rel=0.15)
  # It makes up a row.
  changes = {"accuracy": None} | found
  scored_rows.row(_CLEAN, **changes)


def _study(seeds=(0,), images=300, rounds=3, **changes) -> list[Scored]:
  """Restoration alone, a method that is ahead by seed and level, and no restoration."""
  found = []
  for seed in seeds:
    for k, condition in enumerate((_CLEAN, *_NOISES)):
      draws = np.random.default_rng([7, k])
      ease = draws.uniform(size=(1 if k == 0 else rounds, images))
      share = 0.9 - 0.1 * k
      gain = 0.01 * k * (1 + seed)
      for facts, right in (
        ({}, ease < share),
        ({"method": "oracle"}, ease < share + gain),
        ({"restorer": None}, ease < share - 0.2),
      ):
        row = scored_rows.row(condition, seed=seed, **facts | changes)
        found.append(scored_rows.scored(row, right))
  return found


def _only(found, condition, first="proposed, oracle map, without ensemble"):
  (one,) = [c for c in found if (c.first, c.condition) == (first, condition)]
  return one


def _gain(study, condition, seed=0):
  """What the method is ahead by, from the rows alone."""
  means = {
    s.row.method: s.main.mean()
    for s in study
    if s.row.condition.name == condition and s.row.seed == seed and s.row.restorer
  }
  return means["oracle"] - means["classifier"]


def test_every_method_is_compared_with_restoration_alone():
  study = _study()
  found = statistics.comparisons(study, statistics.Bootstrap(300, 500))
  mean = f"mean of {', '.join(_LEVELS)}"
  # Two methods under six conditions, and the mean of five.
  assert len(found) == 2 * 7
  assert {c.second for c in found} == {"trained on clean, with restoration"}
  assert {c.condition for c in found} == {"clean", *_LEVELS, mean}
  assert {c.group for c in found} == {"caltech256, 224 px, resnet50, awgn"}
  for level in _LEVELS:
    one = _only(found, level)
    assert one.difference == pytest.approx(_gain(study, level))
    assert (one.rounds, one.seeds, one.over_seeds) == (3, 1, None)
    assert one.test == "bootstrap" and one.low <= one.difference <= one.high
  everything = _only(found, mean)
  gains = [_gain(study, level) for level in _LEVELS]
  assert everything.difference == pytest.approx(np.mean(gains))
  clean = _only(found, "clean")
  assert (clean.test, clean.rounds, clean.p, clean.difference) == ("mcnemar", 1, 1, 0)
  # On the same images and noise, a small gain is certain that is none unpaired.
  last = _only(found, "awgn-0.5")
  assert last.low > 0 and last.p < 0.01
  assert _only(found, "clean", "trained on clean, without restoration").high < -10


def test_rounds_of_a_condition_count_as_one():
  """The mean is over conditions, however often the noise of each was drawn."""
  study = [
    s if s.row.condition.name != "awgn-0.1" else _first_round(s) for s in _study()
  ]
  found = statistics.comparisons(study, statistics.Bootstrap(300, 100))
  mean = _only(found, f"mean of {', '.join(_LEVELS)}")
  gains = [_gain(study, level) for level in _LEVELS]
  assert mean.difference == pytest.approx(np.mean(gains))
  assert mean.rounds == 3


def _first_round(s: Scored) -> Scored:
  return Scored(s.row, {name: v[:1] for name, v in s.values.items()})


def test_only_rounds_that_both_have_are_compared():
  whole = _study()
  cut = [_first_round(s) if s.row.method == "oracle" else s for s in whole]
  both = [_first_round(s) for s in whole]
  bootstrap = statistics.Bootstrap(300, 100)
  one = _only(statistics.comparisons(cut, bootstrap), "awgn-0.3")
  assert one == _only(statistics.comparisons(both, bootstrap), "awgn-0.3")
  assert one.test == "mcnemar" and one.rounds == 1


def test_seeds_of_training_are_kept_apart_from_noise():
  study = _study(seeds=(0, 1, 2))
  bootstrap = statistics.Bootstrap(300, 500)
  one = _only(statistics.comparisons(study, bootstrap), "awgn-0.5")
  gains = [_gain(study, "awgn-0.5", seed) for seed in (0, 1, 2)]
  assert one.difference == pytest.approx(np.mean(gains))
  assert one.over_seeds == pytest.approx(np.std(gains, ddof=1)) and one.over_seeds > 2
  assert (one.seeds, one.rounds) == (3, 3)
  # The interval is that of the mean gain of each image, with these three networks.
  single = _only(statistics.comparisons(_study(seeds=(1,)), bootstrap), "awgn-0.5")
  assert one.high - one.low == pytest.approx(single.high - single.low, rel=0.3)
  # Single answers of several seeds are no pairs for McNemar.
  assert _only(statistics.comparisons(study, bootstrap), "clean").test == "bootstrap"


def test_seeds_that_one_lacks_are_left_out():
  study = [s for s in _study((0, 1)) if s.row.method != "oracle" or s.row.seed == 1]
  one = _only(statistics.comparisons(study, statistics.Bootstrap(300, 50)), "awgn-0.5")
  assert one.seeds == 1
  assert one.difference == pytest.approx(_gain(study, "awgn-0.5", seed=1))


@pytest.mark.parametrize(
  "changes, images",
  [({"backbone": "vgg16"}, 300), ({"fingerprint": "fedcba9876543210"}, 200)],
  ids=str,
)
def test_groups_and_other_images_are_apart(changes, images):
  one, other = _study(), _study(seeds=(1,), images=images, **changes)
  bootstrap = statistics.Bootstrap(300, 50)
  apart = [statistics.comparisons(study, bootstrap) for study in (one, other)]
  assert statistics.comparisons(one + other, bootstrap) == apart[0] + apart[1]
  assert {c.images for c in apart[1]} == {images}


def test_given_weights_are_a_baseline_too():
  study = _study(trained_on="given")
  found = statistics.comparisons(study, statistics.Bootstrap(300, 50))
  assert len(found) == 2 * 7
  assert {c.second for c in found} == {"given weights, with restoration"}
  assert {c.first for c in found} == {
    "given weights, without restoration",
    "proposed, oracle map, without ensemble",
  }


def test_ablations_and_sources_are_compared_with_each_other():
  images = 100
  methods = [
    {},
    *({"method": s} for s in ("pretrained", "end_to_end", "oracle")),
    *({"method": "oracle", "map": "l2"}, {"method": "oracle", "resize": "nearest"}),
    {"method": "oracle", "without": ["residual"]},
    # Of another ensemble: there is no whole method to compare it with.
    {"method": "pretrained", "ensemble": True, "without": ["residual"]},
  ]
  study = [
    scored_rows.scored(scored_rows.row(c, **facts), np.arange(images) < 50 + number)
    for number, facts in enumerate(methods)
    for c in (_CLEAN, *_NOISES)
  ]
  found = statistics.comparisons(study, statistics.Bootstrap(images, 50))
  for c in found:
    assert (c.condition == "clean") + (c.condition in _LEVELS) <= 1
  pairs = {(c.first, c.second) for c in found}
  # Each under six conditions, and the mean of five.
  assert len(found) == 7 * len(pairs)
  baseline = "trained on clean, with restoration"
  oracle, end_to_end, pretrained = (
    f"proposed, {name}, without ensemble"
    for name in ("oracle map", "end-to-end estimator", "pretrained estimator")
  )
  among = {pair for pair in pairs if pair[1] != baseline}
  assert among == {
    *((f"{oracle}, {e}", oracle) for e in ("l2 map", "nearest resizing")),
    (f"{oracle}, without residual", oracle),
    *((oracle, end_to_end), (oracle, pretrained), (end_to_end, pretrained)),
  }
  assert len(pairs) == len(among) + 7
  (mean,) = (
    c
    for c in found
    if (c.first, c.second) == (oracle, pretrained) and c.condition.startswith("mean")
  )
  assert mean.difference == pytest.approx(2)


def test_one_title_of_other_stages_is_another_method():
  """Each experiment's method is compared with its own baseline."""
  study = []
  for name in ("short", "long"):
    for s in _study():
      changes = {"experiment": name, "stages": {"classifier": name}}
      study.append(Scored(msgspec.structs.replace(s.row, **changes), s.values))
  found = statistics.comparisons(study, statistics.Bootstrap(300, 50))
  assert {(c.first, c.second) for c in found} == {
    (f"{first} ({name})", f"trained on clean, with restoration ({name})")
    for name in ("short", "long")
    for first in (
      "proposed, oracle map, without ensemble",
      "trained on clean, without restoration",
    )
  }
  # Of the same stages they are the same.
  same = [
    Scored(msgspec.structs.replace(s.row, stages={"classifier": "a"}), s.values)
    for s in study
  ]
  bootstrap = statistics.Bootstrap(300, 50)
  assert statistics.comparisons(same, bootstrap) == statistics.comparisons(
    _study(), bootstrap
  )


def test_sequences_are_levels_where_there_are_no_others():
  spec = [{"kind": "awgn", "level": 0.1}, {"kind": "motion_blur", "level": 5}]
  conditions = scored_rows.conditions(spec)
  facts = ({}, {"method": "oracle"})
  rows = [scored_rows.row(c, **fact) for c in conditions for fact in facts]
  scored = [scored_rows.scored(row, np.arange(40) < 20) for row in rows]
  (group,) = pairing.groups(scored)
  assert group.levels == [c.name for c in conditions if c.kind != "clean"] != []


def test_nothing_to_compare_with():
  study = [s for s in _study() if s.row.method == "oracle"]
  assert statistics.comparisons(study, statistics.Bootstrap(300, 50)) == []
  psnr = {"psnr": np.ones((2, 300)), "ssim": np.ones((2, 300))}
  changes = {"method": "restoration", "accuracy": None, "psnr": 1.0, "backbone": None}
  images = Scored(msgspec.structs.replace(_study()[0].row, **changes), psnr)
  assert statistics.comparisons([images], statistics.Bootstrap(300, 50)) == []
