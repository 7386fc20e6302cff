"""Max pooling and its gradient against PyTorch, ties included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fidelity_jax.models import pooling

# Every (window, stride, pad, ceil_mode) of the five networks, and one of none.
CASES = {
  "resnet": (3, 2, 1, False),
  "alexnet": (3, 2, 0, False),
  "vgg": (2, 2, 0, False),
  "googlenet": (3, 2, 0, True),
  "googlenet_last": (2, 2, 0, True),
  "inception": (3, 1, 1, True),
  "wide": (5, 2, 2, True),
}


def with_gradient(x, g, case):
  window, stride, pad, ceil_mode = CASES[case]
  pool = lambda x: pooling.max_pool(x, window, stride, pad=pad, ceil_mode=ceil_mode)
  y, vjp = jax.vjp(pool, x)
  return y, vjp(g(y) if callable(g) else g)[0]


@pytest.mark.parametrize("size", [(5, 6), (7, 8), (9, 5)])
@pytest.mark.parametrize("case", CASES)
def test_pool_and_gradient_are_those_of_pytorch(case, size):
  """Bit for bit; half of the values are zeros, as after a ReLU, the rest integers."""
  import torch

  window, stride, pad, ceil_mode = CASES[case]
  rng = np.random.default_rng(0)
  x = np.maximum(np.round(2 * rng.normal(size=(2, *size, 3))), 0).astype(np.float32)
  input_torch = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous().requires_grad_()
  y_torch = torch.nn.functional.max_pool2d(
    input_torch, window, stride, pad, ceil_mode=ceil_mode
  )
  g_torch = torch.from_numpy(rng.normal(size=y_torch.shape).astype(np.float32))
  y_torch.backward(g_torch)
  g = g_torch.permute(0, 2, 3, 1).numpy()
  y, dx = jax.jit(with_gradient, static_argnums=2)(x, g, case)
  np.testing.assert_array_equal(y, y_torch.detach().permute(0, 2, 3, 1))
  np.testing.assert_array_equal(dx, input_torch.grad.permute(0, 2, 3, 1))


def test_a_nan_shows_and_loses_no_gradient():
  x = np.zeros((1, 4, 4, 1), np.float32)
  x[0, 1, 1, 0] = np.nan
  y, dx = jax.jit(with_gradient, static_argnums=(1, 2))(x, jnp.ones_like, "vgg")
  np.testing.assert_array_equal(np.isnan(y[0, :, :, 0]), [[True, False], [False] * 2])
  assert dx.sum() == y.size


def test_where_the_own_gradient_is_used():
  def is_own(dtype, platform):
    x = jax.ShapeDtypeStruct((1, 6, 6, 2), dtype)
    gradient = jax.grad(lambda x: pooling.max_pool(x, 3, 2).sum())
    text = jax.export.export(jax.jit(gradient), platforms=[platform])(x).mlir_module()
    return "select_and_scatter" not in text

  assert is_own(jnp.float32, "cpu")
  assert not is_own(jnp.float32, "cuda")
  assert not is_own(jnp.float32, "tpu")
  assert not is_own(jnp.bfloat16, "cpu")
