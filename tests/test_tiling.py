"""An image in windows equals the whole image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fidelity_jax import models, tiling


def _network(depth: int, channels: int = 1, **fields):
  """Returns a DnCNN in whose output every pixel of its receptive field shows."""
  network = models.DnCNN(depth=depth, width=6, channels=channels, **fields)
  rng = np.random.default_rng(depth)
  variables = network.init(jax.random.key(0), jnp.zeros((1, 8, 8, channels)))

  def draw(leaf):
    if leaf.ndim == 1:
      # A bias that survives the ReLU: zeros beyond the border make a difference.
      return rng.uniform(0.1, 0.3, leaf.shape).astype(np.float32)
    values = rng.uniform(0.2, 1, leaf.shape)
    return (values / values.sum((0, 1, 2))).astype(np.float32)

  return network, jax.tree.map(draw, variables)


def _image(height: int, width: int, channels: int = 1) -> np.ndarray:
  return np.random.default_rng(height).random((height, width, channels), np.float32)


def _tiled(network, variables, image, method=None, **options):
  apply = jax.jit(lambda x, mask: network.apply(variables, x, mask=mask, method=method))
  return tiling.apply(apply, image, network.radius, **options)


@pytest.mark.parametrize(
  ("size", "method"),
  [
    # Below the receptive field; a multiple of 64 and around it; one axis cut; both.
    ((1, 1), None),
    ((3, 70), None),
    ((63, 65), None),
    ((64, 128), None),
    ((50, 300), None),
    ((129, 40), None),
    ((200, 333), None),
    ((90, 129), "estimate"),
    ((90, 129), "restore"),
  ],
)
def test_tiled_equals_whole(size, method):
  network, variables = _network(7)
  image = _image(*size)
  whole = network.apply(variables, image[None], method=method)[0]
  tiled = _tiled(network, variables, image, method, tile=128)
  assert tiled.dtype == np.float32
  np.testing.assert_allclose(tiled, whole, atol=1e-5)


def test_a_smaller_radius_would_show():
  network, variables = _network(7)
  image = _image(200, 200)
  whole = network.apply(variables, image[None])[0]
  apply = lambda x, mask: network.apply(variables, x, mask=mask)
  tiled = tiling.apply(apply, image, network.radius - 1, tile=128)
  assert np.abs(tiled - whole).max() > 1e-4


def test_padding_without_a_mask_would_show():
  network, variables = _network(7)
  image = _image(60, 60)
  whole = network.apply(variables, image[None])[0]
  apply = lambda x, mask: network.apply(variables, x)
  assert np.abs(tiling.apply(apply, image, network.radius) - whole).max() > 1e-2


def test_colour_and_another_number_of_channels():
  network, variables = _network(4, channels=3, out_channels=1)
  image = _image(70, 150, 3)
  tiled = _tiled(network, variables, image, tile=64)
  assert tiled.shape == (70, 150, 1)
  whole = network.apply(variables, image[None])[0]
  np.testing.assert_allclose(tiled, whole, atol=1e-5)


def test_batch_norm_and_default_tile():
  network, variables = _network(5, batch_norm=True)
  stats = jax.tree.map(lambda leaf: leaf + 1, variables["batch_stats"])
  variables = variables | {"batch_stats": stats}
  image = _image(40, 600)
  whole = network.apply(variables, image[None])[0]
  np.testing.assert_allclose(_tiled(network, variables, image), whole, atol=1e-5)


def test_networks_one_after_the_other():
  """Their radii add: the map of the restored image, without a restored image."""
  restorer, of_restorer = _network(4)
  estimator, of_estimator = _network(3)

  def both(x, mask):
    restored = restorer.apply(of_restorer, x, mask=mask, method="restore")
    if mask is not None:
      restored = restored * mask
    return estimator.apply(of_estimator, restored, mask=mask)

  image = _image(100, 270)
  whole = both(image[None], None)[0]
  tiled = tiling.apply(both, image, restorer.radius + estimator.radius, tile=128)
  np.testing.assert_allclose(tiled, whole, atol=1e-5)


def test_few_programs_for_many_sizes():
  network, variables = _network(2)
  traced = []

  @jax.jit
  def apply(x, mask):
    traced.append((x.shape, mask is None))
    return network.apply(variables, x, mask=mask)

  rng = np.random.default_rng(0)
  for height, width in rng.integers(1, 500, (60, 2)):
    tiling.apply(apply, _image(height, width), network.radius, tile=128)
  assert len(traced) == len(set(traced)) <= 2 * (128 // 64) ** 2
  assert all(shape[1] <= 128 and shape[2] <= 128 for shape, _ in traced)


def test_an_image_takes_few_windows():
  seen = []

  def apply(x, mask):
    seen.append(x.shape)
    return x

  image = _image(1000, 1024)
  np.testing.assert_array_equal(tiling.apply(apply, image, 20), image)
  # 3 by 3, of 384 pixels: a square of 512 would be seen 9 times, too.
  assert seen == [(1, 384, 384, 1)] * 9


@pytest.mark.parametrize("tile", [100, 64, 32])
def test_a_tile_that_does_not_suit(tile):
  with pytest.raises(ValueError, match=f"tile {tile} is no multiple of 64 above 64"):
    tiling.apply(lambda x, mask: x, _image(8, 8), radius=32, tile=tile)


def _fixed(radius, size, **fields):
  """Returns what windows of 32 pixels give, and the whole."""
  network, variables = _network(4, channels=3, **fields)
  program = jax.jit(lambda windows: network.apply(variables, windows))
  image = _image(*size, 3)
  whole = network.apply(variables, image[None])[0]
  return tiling.apply_fixed(program, image, radius, 32), whole


@pytest.mark.parametrize("size", [(32, 32), (32, 57), (75, 130)])
def test_windows_of_one_size_need_no_mask(size):
  """Of the size itself, and no multiple of what is used of each."""
  found, whole = _fixed(4, size, out_channels=2)
  assert found.shape == (*size, 2) and found.dtype == np.float32
  np.testing.assert_allclose(found, whole, atol=1e-5)


def test_of_these_a_smaller_radius_would_show_too():
  apart = np.abs(np.subtract(*_fixed(3, (75, 130)))).max(-1)
  # Where windows meet, and not in the corner of the image, which is one's own.
  assert apart.max() > 1e-4 and apart[:20, :20].max() < 1e-5


def test_they_come_in_few_and_bounded_batches():
  def shapes(size, side):
    seen = []

    def program(windows):
      seen.append(windows.shape)
      return windows

    image = _image(*size)
    np.testing.assert_array_equal(tiling.apply_fixed(program, image, 4, side), image)
    return seen

  # 3 by 6 windows, filled up.
  assert shapes((75, 130), 32) == [(32, 32, 32, 1)]
  # As many as have the pixels of the largest window: 4 by 3 in all.
  assert shapes((600, 400), 200) == [(4, 200, 200, 1)] * 3
  assert shapes((600, 200), 200) == [(4, 200, 200, 1)]
  assert shapes((520, 520), 513) == [(1, 513, 513, 1)] * 4


@pytest.mark.parametrize(
  ("size", "side"), [((31, 40), 32), ((40, 31), 32), ((9, 9), 8)]
)
def test_windows_that_do_not_cover_an_image(size, side):
  with pytest.raises(ValueError, match="do not cover"):
    tiling.apply_fixed(lambda windows: windows, _image(*size), 4, side)


def test_without_a_mask_nothing_changes():
  network, variables = _network(3)
  image = _image(16, 16)[None]
  lower = lambda f: jax.jit(f).lower(image).as_text()
  plain = lower(lambda x: network.apply(variables, x))
  assert plain == lower(lambda x: network.apply(variables, x, mask=None))
  ones = np.ones_like(image)
  assert plain != lower(lambda x: network.apply(variables, x, mask=ones))
