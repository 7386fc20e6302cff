"""Maps and confidence against PyTorch, their formulas and what these claim."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from fidelity_jax import errors, fidelity


def images(seed=0, shape=(2, 6, 5, 3)):
  rng = np.random.default_rng(seed)
  return tuple(rng.uniform(size=shape).astype(np.float32) for _ in range(2))


def test_distances():
  restored, clean = images()
  np.testing.assert_array_equal(
    fidelity.oracle_map(restored, clean, "l1"), np.abs(restored - clean)
  )
  np.testing.assert_allclose(
    fidelity.oracle_map(restored, clean, "l2"), (restored - clean) ** 2, rtol=1e-6
  )


def test_cosine_matches_torch():
  restored, clean = images()
  # Black pixels, pixels below the floor of the norm, and equal pixels.
  restored[0, 0, 0] = 0
  clean[0, 0, 1] = 0
  restored[0, 0, 2] = clean[0, 0, 2] = 0
  restored[0, 0, 3] = clean[0, 0, 3] = [1e-7, 0, 0]
  restored[0, 0, 4] = clean[0, 0, 4]
  similarity = torch.nn.CosineSimilarity(dim=3, eps=1e-6)
  expected = similarity(*(torch.tensor(x).double() for x in (restored, clean)))
  ours = fidelity.oracle_map(restored, clean, "cosine")
  assert ours.shape == (2, 6, 5, 1)
  np.testing.assert_allclose(ours[..., 0], expected, rtol=1e-6, atol=1e-7)
  # f is the similarity itself.
  np.testing.assert_array_equal(fidelity.confidence(ours, "cosine"), ours)


@pytest.mark.parametrize("kind", fidelity.MAPS)
def test_gradients_are_finite_at_equal_and_black_pixels(kind):
  clean = jnp.zeros((1, 2, 2, 3)).at[0, 0].set(0.5)
  gradient = jax.grad(lambda r: jnp.sum(fidelity.oracle_map(r, clean, kind)))(clean)
  assert np.all(np.isfinite(gradient))


def test_normalization_is_the_formula():
  # The paper's appendix B, in numbers.
  variance = 0.55 / 72
  assert fidelity.VARIANCE == pytest.approx(variance, rel=1e-12)
  sigma = variance**0.5
  mean, std = fidelity.NORMALIZATION["l1"]
  assert mean == pytest.approx(sigma * np.sqrt(2 / np.pi), rel=1e-12)
  assert std == pytest.approx(sigma * np.sqrt(1 - 2 / np.pi), rel=1e-12)
  mean, std = fidelity.NORMALIZATION["l2"]
  assert mean == pytest.approx(variance, rel=1e-12)
  assert std == pytest.approx(np.sqrt(2) * variance, rel=1e-12)


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_normalization_is_what_it_claims(kind):
  # |e| of e ~ N(0, s0^2) is half-normal. e^2 has mean s0^2 and standard deviation
  # sqrt(2) s0^2: what the paper calls its variance is its standard deviation, and is
  # used as one. The sample moments of 10^6 draws are within 1 %.
  rng = np.random.default_rng(0)
  error = np.sqrt(fidelity.VARIANCE) * rng.normal(size=1_000_000)
  sample = np.abs(error) if kind == "l1" else error**2
  mean, std = fidelity.NORMALIZATION[kind]
  assert sample.mean() == pytest.approx(mean, rel=0.01)
  assert sample.std() == pytest.approx(std, rel=0.01)
  # So 1 - (m - mu) / s has mean 1 and, per channel, standard deviation 1.
  f = np.asarray(
    fidelity.confidence(np.float32(sample).reshape(1, 1000, 1000, 1), kind)
  )
  assert f.mean() == pytest.approx(1, abs=0.01)
  assert f.std() == pytest.approx(1, abs=0.01)


def test_variance_is_that_of_the_mixture_halved_and_divided_again():
  # A mixture of six equally likely levels has the variance sum(sigma^2) / 6; the
  # paper divides by 6^2, which is kept: halved by the restorer, then a sixth.
  rng = np.random.default_rng(0)
  sigma = rng.choice([0, 0.1, 0.2, 0.3, 0.4, 0.5], size=1_000_000)
  mixture = (sigma * rng.normal(size=sigma.size)).var()
  assert fidelity.VARIANCE == pytest.approx(mixture / 12, rel=0.02)


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_confidence_is_the_formula(kind):
  m, _ = images()
  mean, std = fidelity.NORMALIZATION[kind]
  expected = np.mean(1 - (m.astype(np.float64) - mean) / std, axis=-1, keepdims=True)
  ours = fidelity.confidence(m, kind)
  assert ours.shape == (2, 6, 5, 1)
  np.testing.assert_allclose(ours, expected, rtol=2e-6, atol=1e-4)


def test_channels_and_unknown_kinds():
  assert [fidelity.map_channels(kind) for kind in fidelity.MAPS] == [3, 3, 1]
  assert fidelity.map_channels("l1", 1) == 1
  with pytest.raises(errors.UsageError, match="did you mean 'cosine'"):
    fidelity.map_channels("cosin")
  x = jnp.zeros((1, 2, 2, 3))
  with pytest.raises(errors.UsageError, match="unknown fidelity map 'l3'"):
    fidelity.oracle_map(x, x, "l3")
  with pytest.raises(errors.UsageError, match="unknown fidelity map"):
    fidelity.confidence(x, "l0.5")
