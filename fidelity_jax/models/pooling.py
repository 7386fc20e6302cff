"""Max pooling with PyTorch's arithmetic."""

import math

import jax
from flax import linen as nn

from fidelity_jax import cpu


def _padding(size: int, window: int, stride: int, pad: int, ceil_mode: bool):
  """Returns (before, after) padding that gives PyTorch's number of windows."""
  if not ceil_mode:
    return pad, pad
  windows = math.ceil((size + 2 * pad - window) / stride) + 1
  # The last window has to start inside the image or its leading padding.
  if (windows - 1) * stride >= size + pad:
    windows -= 1
  return pad, max(pad, (windows - 1) * stride + window - size - pad)


def max_pool(
  x: jax.Array, window: int, stride: int, *, pad: int = 0, ceil_mode: bool = False
) -> jax.Array:
  """Returns PyTorch's `max_pool2d` of [N, H, W, C] with a square window.

  The gradient goes to the first maximum of a window in reading order, as in PyTorch.
  In float32 and float64 it supports reverse-mode differentiation only, and programs for
  CPUs have their own gradient (`fidelity_jax.cpu`).

  Args:
    x: features [N, H, W, C].
    window: side of the window, in pixels.
    stride: step of the window, in pixels; at most `window`.
    pad: padding on every side (with minus infinity).
    ceil_mode: also keep a last window that reaches past the border.
  """
  pads = tuple(_padding(n, window, stride, pad, ceil_mode) for n in x.shape[1:3])
  options = {"window": window, "stride": stride, "pads": pads}
  return cpu.choose(plain_pool, cpu.max_pool, x.dtype, **options)(x)


def plain_pool(x: jax.Array, window: int, stride: int, pads: cpu.Pads) -> jax.Array:
  """Returns `max_pool`, padding in numbers, as platforms other than CPUs have it."""
  return nn.max_pool(x, (window, window), (stride, stride), pads)
