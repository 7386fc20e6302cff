"""How good images and maps are, measured on the device, image by image.

Pure functions of arrays that can be jitted; PSNR is in `tasks.base`.
"""

import jax
import jax.numpy as jnp
import numpy as np

# As Wang et al. (2004) have it; 5 pixels are 3.5 sigma, as in scikit-image.
_SIGMA, _RADIUS = 1.5, 5
_C1, _C2 = 0.01**2, 0.03**2


def ssim(a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns the structural similarity of each pair of images, float32 [N], at most 1.

  Wang et al., Image quality assessment: from error visibility to structural similarity,
  IEEE TIP 2004: Gaussian window of 11 pixels and sigma 1.5, K1 = 0.01, K2 = 0.03, with
  population (co)variances; the mean over channels and over the pixels whose window is
  inside the image. Of images that are smaller than the window it is cut to the largest
  odd size that fits.

  Args:
    a: float32 [N, H, W, C] in [0, 1].
    b: likewise.
  """
  radius = min(_RADIUS, (min(a.shape[1:3]) - 1) // 2)
  rows, columns = (_windows(size, radius) for size in a.shape[1:3])
  # Two matrix products: XLA is slow at convolving single channels.
  blur = lambda x: jnp.einsum(
    "ih,nhwc,jw->nijc", rows, x, columns, precision=jax.lax.Precision.HIGHEST
  )
  # Variances do not change with the origin, and lose fewer digits near it.
  origin = jnp.mean(a.astype(jnp.float32), axis=(1, 2), keepdims=True)
  a, b = a.astype(jnp.float32) - origin, b.astype(jnp.float32) - origin
  mean_a, mean_b = blur(a), blur(b)
  var_a = blur(a * a) - mean_a**2
  var_b = blur(b * b) - mean_b**2
  covariance = blur(a * b) - mean_a * mean_b
  mean_a, mean_b = mean_a + origin, mean_b + origin
  luminance = (2 * mean_a * mean_b + _C1) / (mean_a**2 + mean_b**2 + _C1)
  structure = (2 * covariance + _C2) / (var_a + var_b + _C2)
  return jnp.mean(luminance * structure, axis=(1, 2, 3))


def _windows(size: int, radius: int) -> np.ndarray:
  """Returns the windows along one axis, a row each, float32 [size - 2 radius, size]."""
  window = np.exp(-0.5 * (np.arange(-radius, radius + 1) / _SIGMA) ** 2)
  windows = np.zeros((size - 2 * radius, size), np.float32)
  for start, row in enumerate(windows):
    row[start : start + len(window)] = window / window.sum()
  return windows


def ause(estimated: jax.Array, error: jax.Array) -> jax.Array:
  """Returns the area under each image's sparsification error, float32 [N].

  Ilg et al., Uncertainty estimates and multi-hypotheses networks for optical flow, ECCV
  2018. Pixels are removed one by one, those with the largest estimated error first. The
  mean true error of what remains, as a share of the mean over all, is a curve over the
  share of pixels removed, in steps of one pixel. Returned is the area between it and
  the curve of the best order, that by the true error: 0 for a map that ranks pixels as
  their errors do, about 1/2 for one that tells nothing of errors that are uniform
  between 0 and a largest. Where the estimate is the same, the later pixel goes first.
  Where there is no error at all it is 0.

  Args:
    estimated: estimated error of each pixel, the larger the worse, float [N, H, W, C];
      channels are averaged. A similarity has to be turned round before.
    error: true error, not negative, likewise.
  """
  pixels = error.shape[1] * error.shape[2]
  flat = lambda x: jnp.mean(x.astype(jnp.float32), -1).reshape(len(x), pixels)
  estimated, error = flat(estimated), flat(error)
  order = lambda key: jax.lax.sort((key, error), num_keys=1, is_stable=True)[1]
  # A curve's area is the mean over m = 1 ... P of the mean of the m pixels with the
  # least estimate: pixel j of these counts by the sum of 1 / m over m >= j.
  harmonic = np.cumsum(1 / np.arange(pixels, 0, -1.0))[::-1]
  weights = jnp.asarray(harmonic / pixels, jnp.float32)
  area = jnp.sum((order(estimated) - jnp.sort(error, axis=1)) * weights, axis=1)
  mean = jnp.mean(error, axis=1)
  return jnp.where(mean > 0, area / jnp.where(mean > 0, mean, 1), 0)
