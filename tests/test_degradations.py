"""Degradations as data: specs, their errors, evaluation conditions, compilation."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from fidelity_jax import degradations
from fidelity_jax.errors import UsageError

KINDS = [kind for kind in degradations.KINDS if kind != "clean"]


def spec_config(**fields):
  """A spec as experiments have it: a ConfigDict with every field present."""
  names = ("kind", "level", "vary", "mixture", "orientation", "kernel_size")
  return ml_collections.ConfigDict({**dict.fromkeys(names), **fields})


@pytest.fixture(scope="module")
def batch():
  images = jax.random.uniform(jax.random.key(3), (5, 24, 20, 3))
  # Exact black and white are where clipping and identities go wrong.
  images = images.at[:, :4].set(0).at[:, 4:8].set(1)
  return jax.random.split(jax.random.key(2), 5), images


@pytest.fixture(scope="module")
def degrade():
  return jax.jit(lambda degradation, keys, images: degradation(keys, images))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_exists_in_every_variation(kind, batch, degrade):
  top = degradations.KINDS[kind].levels[-1]
  keys, images = batch
  variations = {
    "uniform": {"level": top},
    "discrete": {"level": [0, top]},
    "continuous": {"level": (0, top)},
    "1d": {"level": (top, 0), "vary": "1d"},
    "2d": {"level": (top, 0), "vary": "2d"},
  }
  for variation, fields in variations.items():
    degradation = degradations.from_config(spec_config(kind=kind, **fields))
    assert degradation.steps[0].variation == variation
    degraded = degrade(degradation, keys, images)
    assert degraded.shape == images.shape and degraded.dtype == jnp.float32
    assert float(degraded.min()) >= 0 and float(degraded.max()) <= 1
    changed = (degraded != images).any((1, 2, 3))
    if variation == "discrete":
      # Level 0 is the identity to the bit beside examples of another level.
      drawn = [step_level(degradation, key, images.shape[1:3]) for key in keys]
      np.testing.assert_array_equal(changed, np.asarray(drawn) > 0)
      assert 0 < changed.sum() < len(images)
    else:
      # All but a crop of what is black already, or a draw that rounds to length 1.
      assert changed.any()
    # And everywhere, however it is reached (same compilation: levels are leaves).
    zero = jax.tree.map(lambda _: 0.0, degradation)
    np.testing.assert_array_equal(degrade(zero, keys, images), images)


def step_level(degradation, key, size):
  """The level that an example's key draws."""
  level_key, _ = jax.random.split(jax.random.fold_in(key, 0))
  return degradation.steps[0].draw_level(level_key, size)


@pytest.mark.parametrize("kind", degradations.KINDS)
def test_a_spec_of_level_zero_is_the_identity(kind, batch):
  keys, images = batch
  degradation = degradations.from_config(spec_config(kind=kind, level=0))
  np.testing.assert_array_equal(degradation(keys, images), images)


def test_motion_length_one_is_the_identity(batch, degrade):
  keys, images = batch
  degradation = degradations.from_config({"kind": "motion_blur", "level": 1})
  np.testing.assert_array_equal(degrade(degradation, keys, images), images)


def test_a_sequence_is_applied_in_order_with_independent_keys(batch, degrade):
  keys, images = batch
  blur = {"kind": "gaussian_blur", "level": 2}
  noise = {"kind": "awgn", "level": 0.1}
  both = degradations.from_config([blur, noise])
  assert both.name == "gaussian_blur-2+awgn-0.1"
  difference = degrade(both, keys, images) - degrade(
    degradations.from_config(blur), keys, images
  )
  inside = difference[:, 10:]
  assert 0.08 < float(inside.std()) < 0.12
  # Blur last leaves little of the noise.
  swapped = degrade(degradations.from_config((noise, blur)), keys, images)
  blurred = degrade(degradations.from_config(blur), keys, images)
  assert float((swapped - blurred)[:, 14:].std()) < 0.04
  # Twice the same noise: the draws of the two members are independent.
  half_grey = jnp.full_like(images, 0.5)
  twice = degrade(degradations.from_config([noise, noise]), keys, half_grey)
  once = degrade(degradations.from_config(noise), keys, half_grey)
  second = (twice - once).ravel()
  assert abs(np.corrcoef(second, (once - half_grey).ravel())[0, 1]) < 0.06
  # A sequence of one is that one.
  single = degrade(degradations.from_config([noise]), keys, half_grey)
  np.testing.assert_array_equal(single, once)


def test_specs_mean_what_they_say():
  make = degradations.from_config
  discrete = make({"kind": "awgn", "level": [0.1, 0.3]})
  assert discrete == make(spec_config(kind="awgn", level=[0.1, 0.3]))
  assert hash(discrete) == hash(make(spec_config(kind="awgn", level=[0.1, 0.3])))
  assert discrete.steps[0].variation == "discrete"
  assert discrete == make({"kind": "awgn", "level": (0.1, 0.3), "mixture": "discrete"})
  continuous = make({"kind": "awgn", "level": (0.1, 0.3)})
  assert continuous.steps[0].variation == "continuous"
  assert continuous == make(
    {"kind": "awgn", "level": [0.1, 0.3], "mixture": "continuous"}
  )
  ends = make({"kind": "awgn", "level": [0.5, 0.0], "vary": "2d"})
  assert ends == make({"kind": "awgn", "level": (0.5, 0.0), "vary": "2d"})
  assert ends == make({"kind": "awgn", "vary": "2d"})
  default = make("awgn")
  assert default.steps[0].levels == (0, 0.1, 0.2, 0.3, 0.4, 0.5)
  assert default.steps[0].variation == "discrete"
  whole = make({"kind": "awgn", "mixture": "continuous"})
  assert whole.steps[0].levels == (0, 0.5)
  # A default mixture in a config does no harm where there is no mixture.
  for fields in ({"level": 0.1}, {"vary": "1d"}, {"level": [0.5, 0], "vary": "2d"}):
    spec = {"kind": "awgn", **fields}
    assert make({**spec, "mixture": "continuous"}) == make(spec)
  assert make({"kind": "clean", "mixture": "discrete"}) == make("clean")
  config = ml_collections.ConfigDict({"d": [{"kind": "awgn", "level": 0.1}]})
  assert make(config.d) == make({"kind": "awgn", "level": 0.1})
  assert make(ml_collections.FrozenConfigDict({"kind": "awgn", "level": 0.2})) == make(
    {"kind": "awgn", "level": 0.2}
  )


@pytest.mark.parametrize(
  ("spec", "message"),
  [
    ({"kind": "gausian_blur"}, "unknown kind 'gausian_blur'; did you mean"),
    ({"kind": "gaussian-blur"}, "did you mean 'gaussian_blur'"),
    ({"kind": "jpeg"}, "known: clean, awgn"),
    ({"kind": 3}, "unknown kind 3"),
    ({"level": 1}, "no kind given"),
    ({"kind": "awgn", "levels": 1}, "did you mean 'level'"),
    ({"kind": "awgn", "level": -0.1}, "negative"),
    ({"kind": "awgn", "level": float("nan")}, "not finite"),
    ({"kind": "awgn", "level": "0.1"}, "is no level"),
    ({"kind": "awgn", "level": True}, "is no level"),
    ({"kind": "awgn", "level": []}, "is no level"),
    ({"kind": "awgn", "level": [0.1, "a"]}, "not a number"),
    ({"kind": "awgn", "level": (0.5, 0)}, "wrong way round"),
    ({"kind": "awgn", "level": (0, 0.1, 0.2)}, "takes two levels, not 3"),
    ({"kind": "awgn", "level": [0, 0.1, 0.2], "vary": "1d"}, "takes two levels"),
    ({"kind": "awgn", "level": 0.1, "vary": "2d"}, "give two ends"),
    ({"kind": "awgn", "level": (0, 1), "vary": "3d"}, "write '1d' or '2d'"),
    ({"kind": "awgn", "mixture": "even"}, "write 'discrete' or 'continuous'"),
    ({"kind": "awgn", "orientation": 45}, "belongs to motion_blur"),
    ({"kind": "motion_blur", "kernel_size": 13}, "belongs to gaussian_blur"),
    ({"kind": "motion_blur", "level": 4}, "is not odd"),
    ({"kind": "motion_blur", "level": 2.5}, "is not odd"),
    ({"kind": "motion_blur", "level": (1, 8)}, "is not odd"),
    ({"kind": "motion_blur", "orientation": "up"}, "no angle"),
    ({"kind": "gaussian_blur", "kernel_size": 12}, "not odd"),
    ({"kind": "salt_and_pepper", "level": 1.5}, "above 1"),
    ({"kind": "rectangular_crop", "level": [0.5, 1.01]}, "above 1"),
    ({"kind": "clean", "level": 0.1}, "above 0"),
    ({"kind": "clean", "vary": "1d"}, "nothing can vary"),
    ([], "empty sequence"),
    ([[{"kind": "awgn"}]], "is not a degradation"),
    (7, "is not a degradation"),
  ],
)
def test_impossible_specs_are_refused_in_one_line(spec, message):
  with pytest.raises(UsageError) as caught:
    degradations.from_config(spec)
  assert message in str(caught.value)
  assert "\n" not in str(caught.value)


def test_awgn_conditions_are_the_papers():
  conditions = degradations.conditions("awgn")
  names = [condition.name for condition in conditions]
  levels = ["0.1", "0.2", "0.3", "0.4", "0.5", "1d", "2d"]
  assert names == ["clean"] + [f"awgn-{level}" for level in levels]
  assert [c.random for c in conditions] == [False] + [True] * 7
  assert [c.rounds_needed(10) for c in conditions] == [1] + [10] * 7
  for condition, vary in zip(conditions[-2:], ("1d", "2d"), strict=True):
    assert condition.degradation == degradations.from_config(
      {"kind": "awgn", "level": (0.5, 0.0), "vary": vary}
    )


@pytest.mark.parametrize("kind", degradations.KINDS)
def test_conditions_of_one_structure_share_a_compilation(kind):
  traces = []

  @jax.jit
  def degrade(degradation, keys, images):
    traces.append(None)
    return degradation(keys, images)

  keys = jax.random.split(jax.random.key(0), 2)
  images = jnp.zeros((2, 16, 16, 3))
  conditions = degradations.conditions(kind)
  for condition in conditions:
    jax.eval_shape(degrade, condition.degradation, keys, images)
  # clean, all uniform levels, 1d, 2d.
  assert len(traces) == (1 if kind == "clean" else 4)


@pytest.mark.parametrize("kind", KINDS)
def test_levels_are_traced(kind):
  traces = []
  function = degradations.KINDS[kind].function

  @jax.jit
  def degrade(key, image, level):
    traces.append(None)
    return function(key, image, level)

  for level in degradations.KINDS[kind].levels:
    jax.eval_shape(degrade, jax.random.key(0), jnp.zeros((8, 8, 3)), level)
  assert len(traces) == 1


def test_conditions_follow_the_spec():
  names = lambda spec: [c.name for c in degradations.conditions(spec)]
  blur = {"kind": "gaussian_blur", "level": [0, 1, 2, 3]}
  wanted = [f"gaussian_blur-{level}" for level in (1, 2, 3, "1d", "2d")]
  assert names(blur) == ["clean", *wanted]
  ends = degradations.conditions(blur)[-1].degradation.steps[0].levels
  assert ends == (3, 0)
  assert names({"kind": "awgn", "level": (0, 0.25)}) == [
    "clean",
    "awgn-0.1",
    "awgn-0.2",
    "awgn-1d",
    "awgn-2d",
  ]
  varying = degradations.conditions({"kind": "awgn", "level": (0.4, 0.2), "vary": "1d"})
  assert varying[-2].degradation.steps[0].levels == (0.4, 0.2)
  assert len(varying) == 8
  assert names("clean") == ["clean"]
  sequence = [{"kind": "gaussian_blur", "level": 2}, {"kind": "awgn", "level": 0.1}]
  assert names(sequence) == ["clean", "gaussian_blur-2+awgn-0.1"]
  # An option of the spec reaches every condition.
  motion = {"kind": "motion_blur", "level": [3, 7], "orientation": 30}
  for condition in degradations.conditions(motion)[1:]:
    options = dict(condition.degradation.steps[0].options)
    assert options == {"orientation": 30.0, "max_length": 7}


def test_blurs_are_random_only_where_their_level_is():
  random = {c.name: c.random for c in degradations.conditions("gaussian_blur")}
  assert not random["gaussian_blur-2"]
  assert random["gaussian_blur-1d"] and random["gaussian_blur-2d"]
  mixture = degradations.from_config("gaussian_blur")
  assert mixture.random and mixture.name == "gaussian_blur-mixture"


def test_a_joined_kind_is_a_sequence_with_default_levels():
  joined = degradations.from_config({"kind": "gaussian_blur+awgn", "level": None})
  assert joined == degradations.from_config(["gaussian_blur", "awgn"])
  continuous = {"kind": "gaussian_blur+awgn", "mixture": "continuous"}
  variations = {step.variation for step in degradations.from_config(continuous).steps}
  assert variations == {"continuous"}
  names = [c.name for c in degradations.conditions("gaussian_blur+awgn")]
  assert names == ["clean", "gaussian_blur-mixture+awgn-mixture"]
  with pytest.raises(UsageError, match="level cannot be set for the sequence"):
    degradations.from_config({"kind": "gaussian_blur+awgn", "level": 0.5})
  with pytest.raises(UsageError, match="did you mean 'awgn'"):
    degradations.from_config("gaussian_blur+awng")
