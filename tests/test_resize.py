"""Resizing against torch.nn.functional.interpolate, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from fidelity_jax import errors, resize

# (input size, output size): down and up, odd and even, equal, to and from one pixel.
SIZES_2D = [
  ((7, 5), (3, 9)),
  ((16, 16), (8, 8)),
  ((13, 17), (27, 5)),
  ((9, 11), (9, 4)),
  ((6, 7), (1, 1)),
  ((1, 2), (5, 3)),
  ((5, 4), (5, 4)),
]
# Short axes are matrix products, long ones gathers.
SIZES_1D = [(1024, 512), (3025, 512), (1024, 4608), (225, 1024), (3, 1), (9, 9)]


def torch_resize(x, size, method):
  """[N, C, H, W] float64 resized by PyTorch."""
  corners = {} if method == "nearest" else {"align_corners": False}
  return torch.nn.functional.interpolate(x, size=size, mode=method, **corners)


@pytest.mark.parametrize("method", resize.METHODS)
@pytest.mark.parametrize("size_in,size_out", SIZES_2D)
def test_resize2d_matches_torch(size_in, size_out, method):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, *size_in, 3)).astype(np.float32)
  cotangent = rng.normal(size=(2, *size_out, 3)).astype(np.float32)

  out, pullback = jax.vjp(lambda x: resize.resize2d(x, size_out, method), x)
  (gradient,) = pullback(jnp.asarray(cotangent))

  x_torch = torch.tensor(x, dtype=torch.float64).permute(0, 3, 1, 2).requires_grad_()
  expected = torch_resize(x_torch, size_out, method)
  expected.backward(torch.tensor(cotangent, dtype=torch.float64).permute(0, 3, 1, 2))
  assert out.dtype == jnp.float32
  np.testing.assert_allclose(
    out, expected.detach().permute(0, 2, 3, 1), rtol=1e-6, atol=2e-6
  )
  np.testing.assert_allclose(
    gradient, x_torch.grad.permute(0, 2, 3, 1), rtol=1e-6, atol=5e-6
  )


@pytest.mark.parametrize("method", resize.METHODS)
@pytest.mark.parametrize("length_in,length_out", SIZES_1D)
def test_resize1d_matches_torch(length_in, length_out, method):
  rng = np.random.default_rng(1)
  x = rng.normal(size=(2, length_in)).astype(np.float32)
  cotangent = rng.normal(size=(2, length_out)).astype(np.float32)

  out, pullback = jax.vjp(lambda x: resize.resize1d(x, length_out, method), x)
  (gradient,) = pullback(jnp.asarray(cotangent))

  x_torch = torch.tensor(x, dtype=torch.float64, requires_grad=True)
  expected = torch_resize(x_torch[:, None, None], (1, length_out), method)[:, 0, 0]
  expected.backward(torch.tensor(cotangent, dtype=torch.float64))
  np.testing.assert_allclose(out, expected.detach(), rtol=1e-6, atol=2e-6)
  np.testing.assert_allclose(gradient, x_torch.grad, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("method", resize.METHODS)
def test_long_axes_match_torch_and_stay_sparse(method):
  # A 224 x 224 map read row by row, to ResNet-50's and to VGG-16's half feature.
  x = np.random.default_rng(2).normal(size=(1, 224 * 224)).astype(np.float32)
  for length in (1024, 12544):
    expected = torch_resize(
      torch.tensor(x, dtype=torch.float64)[:, None, None], (1, length), method
    )[:, 0, 0]
    lowered = jax.jit(lambda x, n=length: resize.resize1d(x, n, method)).lower(x)
    np.testing.assert_allclose(lowered.compile()(x), expected, rtol=1e-6, atol=2e-6)
    assert len(lowered.as_text()) < 2_000_000  # no 50176 x length constant


def test_nearest_index_is_exact():
  # Wherever i * n_in / n_out is a whole number, PyTorch's floating-point floor may
  # land one below; everywhere else, and at the sizes networks have, they agree.
  for n_in in range(1, 80):
    source = torch.arange(n_in, dtype=torch.float64)[None, None, None]
    for n_out in range(1, 130, 3):
      i = np.arange(n_out)
      ours = resize._taps(n_in, n_out, "nearest")[0][:, 0]
      np.testing.assert_array_equal(ours, i * n_in // n_out)
      theirs = torch_resize(source, (1, n_out), "nearest")[0, 0, 0].numpy()
      differs = ours != theirs
      assert np.all(i[differs] * n_in % n_out == 0)
      assert np.all(ours[differs] - theirs[differs] == 1)
  # The first of these sizes, quoted in the module's docstring.
  two = torch.arange(2.0)[None, None, None]
  assert torch_resize(two, (1, 82), "nearest")[0, 0, 0, 41] == 0
  assert resize.resize1d(jnp.arange(2.0)[None], 82, "nearest")[0, 41] == 1


@pytest.mark.parametrize(
  "n_in,n_out",
  [(224, 112), (112, 56), (112, 7), (56, 28), (28, 14), (14, 7)]
  + [(224, 55), (55, 27), (27, 13), (13, 6)]
  + [(224**2, n) for n in (256, 512, 1024, 4608, 12544)],
)
def test_nearest_agrees_at_the_networks_sizes(n_in, n_out):
  ours = resize._taps(n_in, n_out, "nearest")[0][:, 0]
  for dtype in (torch.float32, torch.float64):
    source = torch.arange(n_in, dtype=dtype)[None, None, None]
    theirs = torch_resize(source, (1, n_out), "nearest")[0, 0, 0]
    np.testing.assert_array_equal(ours, theirs)


def test_bfloat16_keeps_its_dtype():
  x = jnp.ones((1, 6, 6, 2), jnp.bfloat16)
  for method in resize.METHODS:
    out = resize.resize2d(x, (3, 4), method)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(out), 1, atol=1e-2)


@pytest.mark.parametrize("limit", [resize._MATRIX_LIMIT, 0], ids=["matrix", "gather"])
@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
def test_bfloat16_keeps_constants(method, limit, monkeypatch):
  # In bfloat16 itself the weights of an output pixel would not add up to 1.
  monkeypatch.setattr(resize, "_MATRIX_LIMIT", limit)
  values = np.asarray([0.7109375, -1.0859375, 3.015625], jnp.bfloat16)
  for size_in, size_out in (
    ((13, 9), (5, 7)),
    ((5, 7), (13, 9)),
    ((27, 55), (13, 27)),
    ((17, 3), (33, 11)),
    ((8, 6), (16, 3)),
  ):
    x = np.broadcast_to(values, (1, *size_in, 3))
    out = resize.resize2d(jnp.asarray(x), size_out, method)
    assert out.dtype == jnp.bfloat16
    expected = np.broadcast_to(values, (1, *size_out, 3))
    np.testing.assert_array_equal(np.float32(out), np.float32(expected))
    out = resize.resize1d(jnp.asarray(x[0, 0].T), size_out[1], method)
    np.testing.assert_array_equal(np.float32(out), np.float32(expected[0, 0].T))


def test_bad_arguments():
  x = jnp.ones((1, 4, 4, 1))
  with pytest.raises(errors.UsageError, match="did you mean 'bicubic'"):
    resize.resize2d(x, (2, 2), "cubic")
  with pytest.raises(errors.UsageError, match="at least 1"):
    resize.resize2d(x, (0, 2))
  with pytest.raises(errors.UsageError, match="at least 1"):
    resize.resize1d(jnp.ones((1, 0)), 3)
