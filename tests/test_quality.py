"""SSIM against scikit-image, the sparsification error against its definition."""

import jax
import numpy as np
import pytest
import scipy.ndimage
import skimage.data
from skimage.metrics import structural_similarity

from fidelity_jax import quality


def _photographs() -> np.ndarray:
  """Some crops of 96 pixels, float32 [N, 96, 96, 3] in [0, 1]."""
  sources = (skimage.data.astronaut(), skimage.data.coffee(), skimage.data.cat())
  crops = [image[k : k + 96, 2 * k : 2 * k + 96] for image in sources for k in (0, 90)]
  # Flat bright areas are where few digits are left of a variance.
  crops.append(np.full((96, 96, 3), 250, np.uint8))
  return (np.stack(crops) / 255).astype(np.float32)


def _reference(a, b, **options):
  return structural_similarity(
    a.astype(np.float64),
    b.astype(np.float64),
    gaussian_weights=True,
    sigma=1.5,
    use_sample_covariance=False,
    data_range=1,
    channel_axis=-1,
    **options,
  )


@pytest.mark.parametrize("sigma", [0.0, 0.02, 0.1, 0.5])
def test_ssim_is_scikit_images(sigma):
  a = _photographs()
  noise = np.random.default_rng(0).normal(size=a.shape).astype(np.float32)
  b = np.clip(a + sigma * noise, 0, 1)
  expected = [_reference(x, y) for x, y in zip(a, b, strict=True)]
  found = jax.jit(quality.ssim)(a, b)
  assert found.shape == (len(a),) and found.dtype == np.float32
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_ssim_of_oblong_images():
  a = _photographs()[:2, :40]
  b = a[:, ::-1]
  expected = [_reference(x, y) for x, y in zip(a, b, strict=True)]
  np.testing.assert_allclose(quality.ssim(a, b), expected, atol=1e-5)


def test_ssim_of_images_smaller_than_the_window():
  a = _photographs()[:2, :8, :60]
  b = np.clip(a + 0.1, 0, 1)[:, :, ::-1]
  # 7 pixels, the largest odd size up to 8, and where they are all inside.
  blur = lambda x: scipy.ndimage.gaussian_filter(
    np.float64(x), 1.5, radius=3, axes=(1, 2)
  )[:, 3:-3, 3:-3]
  mean_a, mean_b = blur(a), blur(b)
  variances = blur(a**2) - mean_a**2 + blur(b**2) - mean_b**2
  covariance = blur(a * b) - mean_a * mean_b
  similar = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
  similar = similar * (2 * covariance + 9e-4) / (variances + 9e-4)
  np.testing.assert_allclose(quality.ssim(a, b), similar.mean((1, 2, 3)), atol=1e-5)
  one = quality.ssim(a[:, :1, :1], a[:, :1, :1])
  np.testing.assert_allclose(one, 1, atol=1e-6)


def _sparsification(estimated, error) -> float:
  """The definition, one image: pixels go one by one."""
  estimated, error = estimated.mean(-1).ravel(), error.mean(-1).ravel()

  def curve(key):
    # Falling, and of equals the last first.
    order = sorted(range(len(key)), key=lambda i: (key[i], i), reverse=True)
    remaining = error[order]
    return np.array([remaining[k:].mean() for k in range(len(order))])

  return float(np.mean(curve(estimated) - curve(error)) / error.mean())


def test_ause_is_its_definition():
  draws = np.random.default_rng(1)
  error = draws.gamma(1.0, size=(3, 17, 12, 3)).astype(np.float32)
  estimated = (error + draws.gamma(1.0, size=error.shape)).astype(np.float32)
  estimated[1] = np.round(estimated[1])  # Ties.
  estimated[2] = 0.5  # Nothing but ties.
  expected = [_sparsification(*pair) for pair in zip(estimated, error, strict=True)]
  found = jax.jit(quality.ause)(estimated, error)
  assert found.shape == (3,) and found.dtype == np.float32
  np.testing.assert_allclose(found, expected, rtol=2e-4)


def test_known_sparsification_errors():
  draws = np.random.default_rng(2)
  error = draws.uniform(size=(1, 200, 200, 1)).astype(np.float32)
  same_order = quality.ause(3 * error**2, error)
  unrelated = quality.ause(draws.uniform(size=error.shape), error)
  reversed_ = quality.ause(-error, error)
  np.testing.assert_allclose(same_order, 0, atol=1e-6)
  # With errors uniform in (0, 1) the best curve falls linearly from 1 to 0, an
  # unrelated one stays at 1, the worst one rises linearly to 2.
  np.testing.assert_allclose(unrelated, 0.5, atol=0.02)
  np.testing.assert_allclose(reversed_, 1.0, atol=0.01)


def test_no_error_at_all():
  error = np.zeros((2, 4, 4, 3), np.float32)
  error[1, 2, 3] = 1
  found = quality.ause(np.random.default_rng(3).uniform(size=error.shape), error)
  assert found[0] == 0 and found[1] > 0
