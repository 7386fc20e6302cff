"""Max pooling with PyTorch's arithmetic, whose gradient is fast on CPUs too.

XLA's CPU gradient of a max pool visits every window one element at a time. Here it is
a handful of comparisons and sums of whole, strided arrays (docs/speed.md has both
times). Accelerators get XLA's own gradient.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

Pads = tuple[tuple[int, int], tuple[int, int]]


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
  In float32 and float64 on CPUs it supports reverse-mode differentiation only; which
  gradient is used is decided when a function is traced.

  Args:
    x: features [N, H, W, C].
    window: side of the window, in pixels.
    stride: step of the window, in pixels; at most `window`.
    pad: padding on every side (with minus infinity).
    ceil_mode: also keep a last window that reaches past the border.
  """
  pads = tuple(_padding(n, window, stride, pad, ceil_mode) for n in x.shape[1:3])
  on_cpu = jax.default_backend() == "cpu"
  if on_cpu and x.dtype in (jnp.float32, jnp.float64):
    return _cpu_max_pool(x, window, stride, pads)
  return _pool(x, window, stride, pads)


def _pool(x: jax.Array, window: int, stride: int, pads: Pads) -> jax.Array:
  return nn.max_pool(x, (window, window), (stride, stride), pads)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _cpu_max_pool(x: jax.Array, window: int, stride: int, pads: Pads) -> jax.Array:
  return _pool(x, window, stride, pads)


def _forward(x, window, stride, pads):
  return _pool(x, window, stride, pads), x


def _backward(window, stride, pads, x, g):
  """Returns the gradient of the input, given that of the output, g [N, h, w, C]."""
  (top, _), (left, _) = pads
  (count, height, width, channels), (rows, columns) = g.shape, x.shape[1:3]
  winner = _argmax(x, (height, width), window, stride, pads)
  # In blocks of stride x stride pixels, a window starts at its own block's first pixel
  # and reaches so many blocks further; windows outside the image win nowhere.
  reach = (window - 1) // stride
  height, width = height + reach, width + reach
  border = [(0, 0), (reach, reach), (reach, reach), (0, 0)]
  winner = jnp.pad(winner, border, constant_values=window**2)
  g = jnp.pad(g, border)

  def gradient_at(row, column):
    """Returns the gradient of the pixels at (row, column) of all blocks."""
    total = jnp.zeros((count, height, width, channels), g.dtype)
    # Backwards, so that windows add up in reading order.
    for i in reversed(range(row, window, stride)):
      for j in reversed(range(column, window, stride)):
        # The window whose pixel (i, j) this is starts so many blocks earlier.
        y, x = reach - (i - row) // stride, reach - (j - column) // stride
        there = (slice(None), slice(y, y + height), slice(x, x + width))
        total += jnp.where(winner[there] == i * window + j, g[there], 0)
    return total

  # A row of pixels of one block after the other is contiguous memory.
  steps = range(stride)
  dx = [jnp.concatenate([gradient_at(i, j) for j in steps], 3) for i in steps]
  dx = jnp.stack(dx, 2).reshape(count, height * stride, width * stride, channels)
  # Cut off the padding, and add pixels that no window reaches.
  edges = [
    (-low, low + size - reached, 0)
    for low, size, reached in ((top, rows, dx.shape[1]), (left, columns, dx.shape[2]))
  ]
  return (lax.pad(dx, jnp.zeros((), dx.dtype), [(0, 0, 0), *edges, (0, 0, 0)]),)


_cpu_max_pool.defvjp(_forward, _backward)


def _argmax(x, size, window, stride, pads) -> jax.Array:
  """Returns each window's first maximum as row * window + column, uint8 [N, h, w, C].

  It is found anew and not by comparing x with the pooled maximum: a value that XLA
  computes twice, in two fusions, may differ in the last bit.
  """
  low = jnp.asarray(-jnp.inf, x.dtype)
  x = lax.pad(x, low, [(0, 0, 0), *((*pad, 0) for pad in pads), (0, 0, 0)])
  rows, columns = ((n - 1) * stride + 1 for n in size)
  best, winner = None, None
  for i, j in itertools.product(range(window), repeat=2):
    seen = x[:, i : i + rows : stride, j : j + columns : stride]
    if best is None:
      best, winner = seen, jnp.zeros(seen.shape, jnp.uint8)
    else:
      higher = seen > best
      best = jnp.where(higher, seen, best)
      winner = jnp.where(higher, jnp.uint8(i * window + j), winner)
  return winner
