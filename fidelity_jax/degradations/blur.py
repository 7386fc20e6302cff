"""Blurs: Gaussian and motion, uniform or with a level of its own at every pixel.

Images are worked on as rows of W * C values: a shift by one pixel is a shift by C
values, so all inner loops run over long contiguous rows for any number of channels.
"""

import math

import jax
import jax.numpy as jnp


def gaussian_terms(sigma: jax.Array, kernel_size: int) -> tuple[jax.Array, jax.Array]:
  """Returns (scale, q) of the normalized 1D Gaussian: its weights are scale q^(d^2).

  Args:
    sigma: standard deviation in pixels, any shape; 0 is allowed and gives exactly
      (1, 0), the identity.
    kernel_size: odd, static: distances d run from 0 to kernel_size // 2.

  Returns:
    Two arrays of sigma's shape. The k x k kernel is the product of two such lines.
  """
  # Below 1e-6, q underflows to zero anyway.
  q = jnp.exp(-0.5 * jnp.square(1 / jnp.maximum(sigma, 1e-6)))
  one_side = gaussian_weights(jnp.ones_like(q), q, kernel_size)[1:]
  return 1 / (1 + 2 * sum(one_side)), q


def gaussian_weights(
  scale: jax.Array, q: jax.Array, kernel_size: int
) -> list[jax.Array]:
  """Returns scale q^(d^2) for d = 0 ... kernel_size // 2.

  By multiplication, (d + 1)^2 = d^2 + (2 d + 1): a loop over pixels then reads two
  values a pixel instead of kernel_size // 2 + 1. The product of 36 factors is off by
  2e-6 of a weight at most.
  """
  weights, factor = [scale], q
  for _ in range(kernel_size // 2):
    weights.append(weights[-1] * factor)
    factor = factor * (q * q)
  return weights


def gaussian_blur(
  key: jax.Array,
  image: jax.Array,
  level: jax.Array,
  kernel_size: int = 13,
  one_axis: bool = False,
) -> jax.Array:
  """Blurs with a normalized Gaussian kernel, reflect padding.

  Args:
    key: unused: the blur draws nothing.
    image: float32 [H, W, C] in [0, 1].
    level: sigma in pixels: a scalar, or a field [H, W, 1]; with a field every output
      pixel is the sum under the kernel of its own sigma. Sigma 0 is the identity.
    kernel_size: odd, static.
    one_axis: static; the caller guarantees that a field varies along one axis only
      (either). The result is the same; on a square image two passes of kernel_size
      taps then replace kernel_size^2.

  Returns:
    float32 [H, W, C] in [0, 1].
  """
  del key
  if jnp.ndim(level) == 0:
    weights = gaussian_weights(*gaussian_terms(level, kernel_size), kernel_size)
    blurred = _separable(weights, image)
  elif one_axis and image.shape[0] == image.shape[1]:
    # A level that is constant along each row weights all of a row's vertical sums
    # alike: vertical, then horizontal is exact. Where it is constant along the columns,
    # the image is turned, and turned back.
    along_rows = jnp.all(level == level[:, :1])
    turn = lambda x: jnp.where(along_rows, x, jnp.swapaxes(x, 0, 1))
    terms = gaussian_terms(turn(level)[:, 0], kernel_size)
    weights = gaussian_weights(*terms, kernel_size)
    blurred = turn(_separable(weights, turn(image)))
  else:
    # Kept out of the loop over taps, where broadcasting would hinder vectorization.
    terms = jax.lax.optimization_barrier(
      tuple(_per_value(t, image.shape) for t in gaussian_terms(level, kernel_size))
    )
    weights = gaussian_weights(*terms, kernel_size)
    reach = kernel_size // 2
    padded = _rows(_pad(image, reach, reach))

    def row_sum(down):
      shift = lambda right: _window(padded, image.shape, down, right, (reach, reach))
      return _symmetric_sum(weights, shift)

    blurred = _symmetric_sum(weights, row_sum).reshape(image.shape)
  return jnp.clip(blurred, 0, 1)


def motion_offsets(orientation: float, reach: int) -> tuple[tuple[int, int], ...]:
  """Returns the (down, right) offsets of a motion kernel's taps 0 ... reach.

  The line through the kernel's centre is rasterized with one tap per step along its
  longer axis (the horizontal one at 45 and 135 degrees); the other coordinate is
  rounded to the nearest pixel, halves away from the centre. Tap -k lies opposite to
  tap k. The kernel of length L is made of the taps with |k| <= (L - 1) / 2, 1 / L each:
  L taps that just fit its L x L square.

  Args:
    orientation: degrees, clockwise from the horizontal as seen on the screen: 0 is a
      row, 45 the down-right diagonal, 90 a column, 135 the down-left diagonal.
    reach: (longest L - 1) / 2.
  """
  angle = math.radians(orientation % 180)
  down, right = math.sin(angle), math.cos(angle)
  longest = max(abs(down), abs(right))
  # The small term makes the rounding of exact halves (at 45 and 30 degrees)
  # independent of the last bit of the sine.
  nearest = lambda x: int(math.copysign(math.floor(abs(x) + 0.5 + 1e-9), x))
  return tuple(
    (nearest(k * down / longest), nearest(k * right / longest))
    for k in range(reach + 1)
  )


def motion_blur(
  key: jax.Array,
  image: jax.Array,
  level: jax.Array,
  orientation: float = 45.0,
  max_length: int = 31,
) -> jax.Array:
  """Blurs along a line, reflect padding.

  Args:
    key: unused: the blur draws nothing.
    image: float32 [H, W, C] in [0, 1].
    level: the line's length in pixels: a scalar, or a field [H, W, 1]; with a field
      every output pixel is the mean along the line of its own length. Rounded to the
      nearest odd length, even numbers up: 2 floor(level / 2) + 1. Length 1 is the
      identity, and so is 0.
    orientation: degrees, static; see `motion_offsets`, which defines the kernel.
    max_length: odd, static: the longest line the compiled function can draw; longer
      levels are cut to it.

  Returns:
    float32 [H, W, C] in [0, 1].
  """
  del key
  reach = max_length // 2
  offsets = motion_offsets(orientation, reach)
  pad = tuple(max(abs(offset[axis]) for offset in offsets) for axis in (0, 1))
  padded = _rows(_pad(image, *pad))
  shift = lambda down, right: _window(padded, image.shape, down, right, pad)
  half = jnp.minimum(jnp.floor(level / 2), reach)
  if jnp.ndim(level) > 0:
    half = _per_value(half, image.shape)
  total = shift(0, 0)
  for k, (down, right) in enumerate(offsets[1:], start=1):
    pair = shift(down, right) + shift(-down, -right)
    total = total + jnp.where(k <= half, pair, 0)
  blurred = total / (2 * half + 1)
  return jnp.clip(blurred.reshape(image.shape), 0, 1)


def _pad(image: jax.Array, vertical: int, horizontal: int) -> jax.Array:
  widths = ((vertical, vertical), (horizontal, horizontal), (0, 0))
  return jnp.pad(image, widths, mode="reflect")


def _rows(image: jax.Array) -> jax.Array:
  """[H, W, C] as [H, W * C]."""
  return image.reshape(image.shape[0], -1)


def _per_value(field: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """A field [H, W, 1] as [H, W * C]."""
  return _rows(jnp.broadcast_to(field, shape))


def _window(padded, shape, down, right, pad) -> jax.Array:
  """The image shifted: value (y, x) of the result is value (y + down, x + right)."""
  height, width, channels = shape
  top, left = pad[0] + down, (pad[1] + right) * channels
  return padded[top : top + height, left : left + width * channels]


def _symmetric_sum(weights, shift) -> jax.Array:
  """weights[0] shift(0) + sum over d of weights[d] (shift(d) + shift(-d))."""
  total = weights[0] * shift(0)
  for d, weight in enumerate(weights[1:], start=1):
    total = total + weight * (shift(d) + shift(-d))
  return total


def _separable(weights, image) -> jax.Array:
  """Vertical, then horizontal sums; the weights broadcast with [H, W * C]."""
  reach = len(weights) - 1
  padded = _rows(_pad(image, reach, 0))
  shift = lambda d: _window(padded, image.shape, d, 0, (reach, 0))
  first = _symmetric_sum(weights, shift).reshape(image.shape)
  padded_again = _rows(_pad(first, 0, reach))
  shift = lambda d: _window(padded_again, image.shape, 0, d, (0, reach))
  return _symmetric_sum(weights, shift).reshape(image.shape)
