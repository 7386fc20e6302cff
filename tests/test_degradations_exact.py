"""Blurs, crops and level fields against references written as plain NumPy loops."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fidelity_jax import degradations
from fidelity_jax.degradations import fields

KEY = jax.random.key(0)
SIGMAS = (0.0, 0.05, 0.3, 0.5, 1.0, 1.7, 2.0, 3.0, 4.0, 5.0, 50.0)
ORIENTATIONS = (0.0, 30.0, 45.0, 90.0, 135.0)


def gaussian_kernel(sigma, size=13):
  kernel = np.zeros((size, size))
  middle = size // 2
  if sigma == 0:
    kernel[middle, middle] = 1
    return kernel
  for row in range(size):
    for column in range(size):
      distance = (row - middle) ** 2 + (column - middle) ** 2
      kernel[row, column] = math.exp(-distance / (2 * sigma**2))
  return kernel / kernel.sum()


def motion_kernel(length, orientation):
  """The definition, drawn tap by tap from the tangent instead of sine and cosine."""
  kernel = np.zeros((length, length))
  middle = length // 2
  slope = {0.0: 0.0, 30.0: 1 / math.sqrt(3), 45.0: 1.0, 90.0: None, 135.0: -1.0}
  tangent = slope[orientation]
  for k in range(-middle, middle + 1):
    if tangent is None:
      down, right = k, 0
    else:
      down, right = round(k * tangent), k
    kernel[middle + down, middle + right] += 1
  return kernel / length


def reflect(index, n):
  """The index that reflect padding (edge not repeated) reads."""
  period = 2 * (n - 1)
  index = abs(index) % period
  return min(index, period - index)


def blur_pixel(image, kernel, row, column):
  height, width, channels = image.shape
  middle = kernel.shape[0] // 2
  total = np.zeros(channels)
  for i in range(kernel.shape[0]):
    for j in range(kernel.shape[1]):
      if kernel[i, j]:
        y = reflect(row + i - middle, height)
        x = reflect(column + j - middle, width)
        total += kernel[i, j] * image[y, x]
  return total


def blur(image, kernel_at):
  output = np.zeros(image.shape)
  for row in range(image.shape[0]):
    for column in range(image.shape[1]):
      output[row, column] = blur_pixel(image, kernel_at(row, column), row, column)
  return output


@pytest.fixture(scope="module")
def image():
  return np.random.default_rng(5).random((15, 18, 3)).astype(np.float32)


def impulse(size):
  image = np.zeros((size, size, 1), np.float32)
  image[size // 2, size // 2] = 1
  return image


def test_gaussian_kernels():
  apply = jax.jit(degradations.gaussian_blur)
  for sigma in SIGMAS:
    # The response to an impulse is the kernel turned by 180 degrees.
    response = apply(KEY, impulse(27), sigma)[7:20, 7:20, 0]
    np.testing.assert_allclose(
      response[::-1, ::-1], gaussian_kernel(sigma), atol=2e-7, err_msg=str(sigma)
    )


@pytest.mark.parametrize("kernel_size", [1, 5])
def test_gaussian_kernel_size(image, kernel_size):
  result = degradations.gaussian_blur(KEY, image, 1.3, kernel_size=kernel_size)
  kernel = gaussian_kernel(1.3, kernel_size)
  np.testing.assert_allclose(result, blur(image, lambda *_: kernel), atol=1e-6)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_motion_kernels(orientation):
  apply = jax.jit(
    lambda level: degradations.motion_blur(
      KEY, impulse(43), level, orientation, max_length=21
    )
  )
  for length in range(1, 22, 2):
    half = length // 2
    response = apply(length)[21 - half : 22 + half, 21 - half : 22 + half, 0]
    np.testing.assert_allclose(
      response[::-1, ::-1],
      motion_kernel(length, orientation),
      atol=1e-7,
      err_msg=str(length),
    )


def test_motion_directions():
  """0 is a row, 45 the down-right diagonal, 90 a column, 135 the down-left one."""
  for orientation, wanted in {
    0.0: [[0, 0, 0], [1, 1, 1], [0, 0, 0]],
    45.0: [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    90.0: [[0, 1, 0], [0, 1, 0], [0, 1, 0]],
    135.0: [[0, 0, 1], [0, 1, 0], [1, 0, 0]],
  }.items():
    response = degradations.motion_blur(KEY, impulse(7), 3.0, orientation, 3)
    np.testing.assert_array_equal(response[2:5, 2:5, 0] > 0, np.array(wanted))


def test_motion_lengths_round_to_the_nearest_odd_number(image):
  apply = jax.jit(lambda level: degradations.motion_blur(KEY, image, level))
  for level, length in {0: 1, 1.9: 1, 2: 3, 3.99: 3, 4: 5, 6.5: 7}.items():
    np.testing.assert_array_equal(apply(level), apply(length))


@pytest.mark.parametrize("sigma", [0.4, 2.0])
def test_gaussian_blur_with_its_borders(image, sigma):
  result = degradations.gaussian_blur(KEY, image, sigma)
  kernel = gaussian_kernel(sigma)
  np.testing.assert_allclose(result, blur(image, lambda *_: kernel), atol=1e-6)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_motion_blur_with_its_borders(image, orientation):
  result = degradations.motion_blur(KEY, image, 9.0, orientation)
  kernel = motion_kernel(9, orientation)
  np.testing.assert_allclose(result, blur(image, lambda *_: kernel), atol=1e-6)


def test_padding_wider_than_the_image():
  image = np.random.default_rng(0).random((5, 4, 3)).astype(np.float32)
  result = degradations.gaussian_blur(KEY, image, 3.0)
  kernel = gaussian_kernel(3.0)
  np.testing.assert_allclose(result, blur(image, lambda *_: kernel), atol=1e-6)


def test_spatially_varying_gaussian_blur_is_exact_per_pixel(image):
  field = np.random.default_rng(1).uniform(0, 4, (15, 18, 1)).astype(np.float32)
  field[3:5] = 0
  result = np.asarray(jax.jit(degradations.gaussian_blur)(KEY, image, field))
  wanted = blur(image, lambda row, column: gaussian_kernel(field[row, column, 0]))
  np.testing.assert_allclose(result, wanted, atol=1e-6)
  np.testing.assert_array_equal(result[3:5], image[3:5])


@pytest.mark.parametrize("orientation", [30.0, 135.0])
def test_spatially_varying_motion_blur_is_exact_per_pixel(image, orientation):
  field = np.random.default_rng(2).uniform(0, 15, (15, 18, 1)).astype(np.float32)
  field[3:5] = 1

  def kernel_at(row, column):
    return motion_kernel(2 * int(field[row, column, 0] // 2) + 1, orientation)

  result = degradations.motion_blur(KEY, image, field, orientation, max_length=15)
  np.testing.assert_allclose(result, blur(image, kernel_at), atol=1e-6)
  np.testing.assert_array_equal(result[3:5], image[3:5])


@pytest.mark.parametrize("vary", ["1d", "2d"])
@pytest.mark.parametrize("size", [(14, 14), (12, 17)])
def test_varying_blur_from_a_spec_uses_the_drawn_field(vary, size):
  """The whole path, both axes and directions: the field drawn, then each pixel."""
  images = np.random.default_rng(3).random((4, *size, 3)).astype(np.float32)
  keys = jax.random.split(jax.random.key(11), 4)
  degradation = degradations.from_config(
    {"kind": "gaussian_blur", "level": (3, 0), "vary": vary}
  )
  step = degradation.steps[0]
  results = jax.jit(degradation)(keys, images)
  for key, image, result in zip(keys, images, results, strict=True):
    level_key, _ = jax.random.split(jax.random.fold_in(key, 0))
    field = np.asarray(step.draw_level(level_key, size))
    wanted = blur(image, lambda r, c, f=field: gaussian_kernel(f[r, c, 0]))
    np.testing.assert_allclose(result, wanted, atol=2e-6)


def crop_reference(image, u, v, level):
  """`level` a field [H, W]: each pixel by the square of its own level."""
  height, width, _ = image.shape
  output = image.copy()
  for row in range(height):
    for column in range(width):
      side = math.floor(np.float32(level[row, column]) * min(image.shape[:2]) + 0.5)
      top = min(int(u * (height - side + 1)), height - side)
      left = min(int(v * (width - side + 1)), width - side)
      if top <= row < top + side and left <= column < left + side:
        output[row, column] = 0
  return output


@pytest.mark.parametrize("level", [0.0, 0.24, 0.25, 0.5, 1.0, "field"])
def test_crop_against_a_loop(level):
  image = np.random.default_rng(0).random((10, 14, 3)).astype(np.float32) + 0.01
  key = jax.random.key(8)
  u, v = np.asarray(jax.random.uniform(key, (2,)))
  if level == "field":
    field = np.tile(np.linspace(0, 0.9, 14, dtype=np.float32), (10, 1))
    result = degradations.rectangular_crop(key, image, field[..., None])
  else:
    field = np.full((10, 14), level, np.float32)
    result = degradations.rectangular_crop(key, image, level)
  np.testing.assert_array_equal(result, crop_reference(image, u, v, field))


def test_crop_size_and_uniform_position():
  size, side, draws = 8, 3, 6000
  keys = jax.random.split(jax.random.key(21), draws)
  image = jnp.ones((size, size, 1))
  crop = jax.vmap(lambda key: degradations.rectangular_crop(key, image, 0.4))
  lost = np.asarray(jax.jit(crop)(keys))[..., 0] == 0
  # 0.4 * 8 = 3.2 rounds to 3: a 3 x 3 square in every draw.
  assert (lost.sum((1, 2)) == side * side).all()
  rows, columns = lost.any(2), lost.any(1)
  assert (rows.sum(1) == side).all() and (columns.sum(1) == side).all()
  top, left = rows.argmax(1), columns.argmax(1)
  positions = size - side + 1
  counts = np.zeros((positions, positions))
  np.add.at(counts, (top, left), 1)
  expected = draws / positions**2
  # Chi-squared with 35 degrees of freedom: above 77.1 once in 10,000 seeds.
  assert ((counts - expected) ** 2 / expected).sum() < 77.1


FIELD_KEYS = jax.random.split(jax.random.key(77), 2000)


def test_1d_fields():
  size = (6, 9)
  ends = jnp.asarray([0.5, 0.1])
  draw = jax.jit(jax.vmap(lambda key: fields.linear(key, size, ends)))
  drawn = np.asarray(draw(FIELD_KEYS))[..., 0]
  by_rows = (drawn == drawn[:, :, :1]).all((1, 2))
  by_columns = (drawn == drawn[:, :1, :]).all((1, 2))
  assert (by_rows ^ by_columns).all()
  first = drawn[:, 0, 0]
  rising = first == np.float32(0.1)
  for rows, n in ((True, 6), (False, 9)):
    profile = drawn[by_rows][:, :, 0] if rows else drawn[by_columns][:, 0, :]
    up = rising[by_rows] if rows else rising[by_columns]
    wanted = np.linspace(0.1, 0.5, n)
    np.testing.assert_allclose(profile[up], np.tile(wanted, (up.sum(), 1)), atol=1e-6)
    np.testing.assert_allclose(
      profile[~up], np.tile(wanted[::-1], ((~up).sum(), 1)), atol=1e-6
    )
  # The two ends to the bit, at opposite borders.
  assert set(np.unique(first)) == {np.float32(0.1), np.float32(0.5)}
  assert set(np.unique(drawn[:, -1, -1])) == {np.float32(0.1), np.float32(0.5)}
  # Fair, independent coins: 2000 draws, four cells of 500 with deviation 19.4; 4.5 of
  # them is exceeded once in 36,000 seeds.
  for rows in (by_rows, by_columns):
    for direction in (rising, ~rising):
      assert abs((rows & direction).sum() - 500) < 88


def radial_reference(size, row0, column0, a, b):
  height, width = size
  corners = [(0, 0), (0, width - 1), (height - 1, 0), (height - 1, width - 1)]
  farthest = max(math.hypot(r - row0, c - column0) for r, c in corners)
  field = np.zeros(size)
  for row in range(height):
    for column in range(width):
      distance = math.hypot(row - row0, column - column0)
      field[row, column] = b + (a - b) * distance / farthest
  return field


def test_2d_fields():
  size = (5, 8)
  ends = jnp.asarray([0.5, 0.1])
  draw = jax.jit(jax.vmap(lambda key: fields.radial(key, size, ends)))
  drawn = np.asarray(draw(FIELD_KEYS))[..., 0]
  counts = np.zeros((2, *size))
  references = {}
  for field in drawn:
    # The point is a pixel whose level is an end, and whose reference fits.
    fits = []
    for swapped in (0, 1):
      end = np.float32(0.5 if swapped else 0.1)
      for row0, column0 in zip(*np.nonzero(field == end), strict=True):
        key = (row0, column0, swapped)
        if key not in references:
          a, b = (0.1, 0.5) if swapped else (0.5, 0.1)
          references[key] = radial_reference(size, row0, column0, a, b)
        if np.allclose(field, references[key], atol=1e-6):
          fits.append(key)
    assert len(fits) == 1
    row0, column0, swapped = fits[0]
    counts[swapped, row0, column0] += 1
    # Both ends are met, to the bit: at the point and at its farthest corner.
    assert field.min() == np.float32(0.1) and field.max() == np.float32(0.5)
  expected = counts.sum() / counts.size
  # Chi-squared with 79 degrees of freedom: above 137 once in 17,000 seeds.
  assert ((counts - expected) ** 2 / expected).sum() < 137
  # The coin alone: 1000 with deviation 22.4.
  assert abs(counts[0].sum() - 1000) < 101


def test_fields_of_a_single_pixel():
  for draw in (fields.linear, fields.radial):
    field = draw(KEY, (1, 1), jnp.asarray([0.5, 0.1]))
    assert float(field[0, 0, 0]) in (pytest.approx(0.5), pytest.approx(0.1))
