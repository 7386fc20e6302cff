"""Statistics of the noise, and what random draws depend on.

Seeds are fixed, so results do not vary; the bounds are 4.5 standard errors, which a
correct generator exceeds once in 147,000 statistics.
"""

import os
import subprocess
import sys
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fidelity_jax import degradations, randomness
from fidelity_jax.degradations import random_words

# One run of every kind and of every variation, in one compilation.
EVERYTHING = (
  {"kind": "gaussian_blur", "level": (2, 0), "vary": "1d"},
  {"kind": "motion_blur", "level": [1, 5, 9]},
  {"kind": "awgn", "level": (0.5, 0), "vary": "2d"},
  {"kind": "salt_and_pepper", "level": (0, 0.2)},
  {"kind": "rectangular_crop", "level": 0.3},
)


def test_threefry_known_answers():
  """The three test vectors published with the generator (Random123)."""
  for key, counter, wanted in (
    ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
    (
      (0xFFFFFFFF, 0xFFFFFFFF),
      (0xFFFFFFFF, 0xFFFFFFFF),
      (0x1CB996FC, 0xBB002BE7),
    ),
    (
      (0x13198A2E, 0x03707344),
      (0x243F6A88, 0x85A308D3),
      (0xC4923A9C, 0x483DF7A0),
    ),
  ):
    as_words = lambda pair: tuple(jnp.uint32(value) for value in pair)
    words = random_words.threefry(as_words(key), as_words(counter))
    assert tuple(int(word) for word in words) == wanted


@pytest.fixture(scope="module")
def noise():
  """Standardized AWGN [16, 64, 64, 3]: 196,608 values, none near the clip."""
  keys = jax.random.split(jax.random.key(0), 16)
  images = jnp.full((16, 64, 64, 3), 0.5)
  degradation = degradations.from_config({"kind": "awgn", "level": 0.05})
  noise = (np.asarray(jax.jit(degradation)(keys, images), np.float64) - 0.5) / 0.05
  assert np.abs(noise).max() < 8
  return noise


def test_noise_moments(noise):
  n = noise.size
  assert abs(noise.mean()) < 4.5 / np.sqrt(n)
  assert abs(noise.var() - 1) < 4.5 * np.sqrt(2 / n)
  assert abs((noise**3).mean()) < 4.5 * np.sqrt(15 / n)
  assert abs((noise**4).mean() - 3) < 4.5 * np.sqrt(96 / n)


def test_noise_histogram(noise):
  bins = 50
  edges = [NormalDist().inv_cdf(i / bins) for i in range(1, bins)]
  counts = np.bincount(np.searchsorted(edges, noise.ravel()), minlength=bins)
  expected = noise.size / bins
  # Chi-squared with 49 degrees of freedom: above 99 once in 33,000 seeds.
  assert ((counts - expected) ** 2 / expected).sum() < 99
  for threshold in (3.0, 4.0):
    tail = 2 * NormalDist().cdf(-threshold)
    count = (np.abs(noise) > threshold).sum()
    expected = noise.size * tail
    assert abs(count - expected) < 4.5 * np.sqrt(expected) + 1


def test_noise_is_independent(noise):
  pairs = {
    "red, green": (noise[..., 0], noise[..., 1]),
    "green, blue": (noise[..., 1], noise[..., 2]),
    "red, blue": (noise[..., 0], noise[..., 2]),
    "rows": (noise[:, 1:], noise[:, :-1]),
    "columns": (noise[:, :, 1:], noise[:, :, :-1]),
    "halves": (noise[:, :32], noise[:, 32:]),
    "examples": (noise[1:], noise[:-1]),
  }
  for name, (a, b) in pairs.items():
    for f in (lambda x: x, lambda x: x**2):
      r = np.corrcoef(f(a).ravel(), f(b).ravel())[0, 1]
      assert abs(r) < 4.5 / np.sqrt(a.size), name
  # No value occurs in two examples at one place.
  assert len(np.unique(noise[:, 7, 9, 1])) == 16


def test_noise_is_as_strong_as_its_field():
  keys = jax.random.split(jax.random.key(1), 8)
  field = jnp.linspace(0, 0.08, 5)[None, :, None]
  images = jnp.full((8, 2000, 5, 3), 0.5)
  level = jnp.broadcast_to(field, (2000, 5, 1))
  degrade = jax.vmap(lambda key, image: degradations.awgn(key, image, level))
  noise = np.asarray(jax.jit(degrade)(keys, images), np.float64) - 0.5
  deviation = noise.std((0, 1, 3))
  error = 4.5 / np.sqrt(2 * 48_000)
  np.testing.assert_allclose(deviation, field[0, :, 0], rtol=error, atol=0)


def test_noise_is_clipped():
  images = jnp.asarray([0.0, 1.0]).reshape(1, 1, 2, 1) * jnp.ones((2, 64, 2, 3))
  keys = jax.random.split(jax.random.key(2), 2)
  degradation = degradations.from_config({"kind": "awgn", "level": 0.5})
  degraded = np.asarray(degradation(keys, images))
  assert degraded.min() == 0 and degraded.max() == 1
  # Half of the noise on black and on white is clipped away: 384 values each.
  for column, value in ((0, 0), (1, 1)):
    clipped = (degraded[:, :, column] == value).sum()
    assert abs(clipped - 192) < 4.5 * np.sqrt(384 / 4)


def test_salt_and_pepper_statistics():
  keys = jax.random.split(jax.random.key(3), 8)
  images = jnp.full((8, 64, 64, 3), 0.5)
  for p in (0.1, 0.5, 1.0):
    degradation = degradations.from_config({"kind": "salt_and_pepper", "level": p})
    degraded = np.asarray(degradation(keys, images))
    assert set(np.unique(degraded)) <= {0.0, 0.5, 1.0}
    n = degraded.size
    for value in (0, 1):
      share = (degraded == value).mean()
      assert abs(share - p / 2) < 4.5 * np.sqrt(p / 2 * (1 - p / 2) / n)
    if p == 1.0:
      # A value survives only if it is drawn between two floats: never here.
      assert (degraded != 0.5).all()
    for a, b in (
      (degraded[..., 0], degraded[..., 1]),
      (degraded[:, 1:], degraded[:, :-1]),
      (degraded[:, :, 1:], degraded[:, :, :-1]),
      (degraded[1:], degraded[:-1]),
    ):
      r = np.corrcoef(a.ravel(), b.ravel())[0, 1]
      assert abs(r) < 4.5 / np.sqrt(a.size)


def test_salt_and_pepper_is_as_frequent_as_its_field():
  level = jnp.broadcast_to(jnp.linspace(0, 1, 5)[None, :, None], (9000, 5, 1))
  image = jnp.full((9000, 5, 3), 0.5)
  degraded = degradations.salt_and_pepper(jax.random.key(4), image, level)
  replaced = (np.asarray(degraded) != 0.5).mean((0, 2))
  p = np.linspace(0, 1, 5)
  assert (np.abs(replaced - p) <= 4.5 * np.sqrt(p * (1 - p) / 27_000)).all()


def test_levels_are_drawn_evenly():
  keys = jax.random.split(jax.random.key(5), 6000)
  draw = lambda spec: np.asarray(
    jax.vmap(
      lambda key: degradations.from_config(spec).steps[0].draw_level(key, (1, 1))
    )(keys)
  )
  levels = draw("awgn")
  values, counts = np.unique(levels, return_counts=True)
  np.testing.assert_allclose(values, [0, 0.1, 0.2, 0.3, 0.4, 0.5], rtol=1e-6)
  # Chi-squared with 5 degrees of freedom: above 30.9 once in 100,000 seeds.
  assert ((counts - 1000) ** 2 / 1000).sum() < 30.9
  levels = draw({"kind": "awgn", "level": (0.1, 0.4)})
  assert levels.min() >= np.float32(0.1) and levels.max() <= np.float32(0.4)
  counts = np.histogram(levels, 6, (0.1, 0.4))[0]
  assert ((counts - 1000) ** 2 / 1000).sum() < 30.9


def addressed(epoch=2, index=(5, 9, 11, 4, 3, 1, 8, 7)):
  """Keys and images of the examples `index` of a dataset in one epoch."""
  key = randomness.purpose_key(7, "degrade")
  index = jnp.asarray(index)
  keys = randomness.example_keys(key, epoch, index)
  images = jax.vmap(lambda i: jax.random.uniform(jax.random.key(i), (24, 20, 3)))(index)
  return keys, images


@pytest.fixture(scope="module")
def everything():
  return jax.jit(degradations.from_config(EVERYTHING))


def test_position_and_batch_size_change_nothing(everything):
  whole = np.asarray(everything(*addressed()))
  turned = everything(*addressed(index=(7, 8, 1, 3, 4, 11, 9, 5)))
  np.testing.assert_array_equal(whole[::-1], turned)
  part = everything(*addressed(index=(4, 11, 9)))
  np.testing.assert_array_equal(whole[[3, 2, 1]], part)


def test_every_epoch_and_example_draws_anew(everything):
  first, second = everything(*addressed(2)), everything(*addressed(3))
  assert (np.asarray(first) != np.asarray(second)).any((1, 2, 3)).all()
  np.testing.assert_array_equal(first, everything(*addressed(2)))
  keys, images = addressed()
  same = np.asarray(everything(keys, jnp.broadcast_to(images[:1], images.shape)))
  assert len(np.unique(same.reshape(8, -1), axis=0)) == 8


_SHARDED = """
import sys
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

sys.path.insert(0, sys.argv[1])
from test_degradations_random import EVERYTHING, addressed
from fidelity_jax import degradations

assert len(jax.devices()) == 8
degradation = degradations.from_config(EVERYTHING)
results = {}
for count in (2, 8):
  mesh = Mesh(np.asarray(jax.devices()[:count]), ("data",))
  sharding = NamedSharding(mesh, PartitionSpec("data"))
  keys, images = jax.device_put(addressed(), sharding)
  degraded = jax.jit(degradation, out_shardings=sharding)(keys, images)
  assert len(degraded.addressable_shards) == count
  results[str(count)] = np.asarray(degraded)
np.savez(sys.argv[2], **results)
"""


def test_the_number_of_devices_changes_nothing(everything, tmp_path):
  here = np.asarray(everything(*addressed()))
  path = tmp_path / "sharded.npz"
  flags = "--xla_force_host_platform_device_count=8"
  environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
  command = [sys.executable, "-c", _SHARDED, os.path.dirname(__file__), str(path)]
  subprocess.run(command, check=True, env=environment, timeout=300)
  with np.load(path) as results:
    for count in ("2", "8"):
      np.testing.assert_array_equal(results[count], here, err_msg=count)
