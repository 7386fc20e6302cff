"""Convolution that is fast on CPUs too.

XLA's CPU convolutions were measured against PyTorch's, with the compiler options that
this package uses (docs/speed.md). Most are as fast. What is not becomes matrix products
or sums of shifted images here: 1x1 kernels; kernels with one channel in or out; 3x3
kernels on images smaller than themselves, which XLA computes element by element; the
input's gradient on small images of many channels; the kernel's with few channels out.
Padding by reflection adds the border's part to a convolution with zeros around.
Accelerators get XLA's own.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

# Up to this many pixels, from this many channels on, with kernels of up to 9 weights,
# the gradient with respect to the input is faster by patches; so it is when strided.
_FEW_PIXELS, _MANY_CHANNELS = 14 * 14, 96
# From up to this many channels to one, shifted products are faster.
_TO_ONE = 32
# With up to this many channels out, from this many in on, so is the kernel's gradient.
_FEW_OUT, _ENOUGH_IN = 4, 16

Pads = tuple[tuple[int, int], tuple[int, int]]


def _convolve(x: jax.Array, kernel: jax.Array, strides: Any, padding: Any) -> jax.Array:
  return lax.conv_general_dilated(
    x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


def _is_ours(x: jax.Array) -> bool:
  """Says whether this module computes, rather than XLA as it comes."""
  return jax.default_backend() == "cpu" and x.dtype in (jnp.float32, jnp.float64)


def conv2d(
  x: jax.Array,
  kernel: jax.Array,
  strides: tuple[int, int] = (1, 1),
  padding: str | Sequence[tuple[int, int]] = "SAME",
) -> jax.Array:
  """Returns the cross-correlation of images and a kernel.

  In float32 and float64 on CPUs it has its own backward pass, which supports
  reverse-mode differentiation only; the results agree with XLA's to rounding. Which one
  runs is decided when a function is traced.

  Args:
    x: [N, H, W, in].
    kernel: [kh, kw, in, out], of the same dtype.
    strides: steps of the window, in pixels.
    padding: "SAME", "VALID", ((top, bottom), (left, right)), all with zeros, or
      "REFLECT": mirrors at the outermost pixels, so that a 3x3 kernel with strides of
      1 keeps the size, which must be at least 2x2.

  Returns:
    [N, h, w, out], dtype as given.

  Raises:
    ValueError: "REFLECT" with another kernel size, with strides, or a smaller image.
  """
  if padding == "REFLECT":
    return _convolve_reflected(x, kernel, strides)
  if not _is_ours(x):
    return _convolve(x, kernel, strides, padding)
  if isinstance(padding, str):
    padding = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
  pads = tuple((int(low), int(high)) for low, high in padding)
  return _cpu_conv2d(x, kernel, tuple(strides), pads)


def _is_pointwise(kernel: jax.Array, pads: Pads) -> bool:
  return kernel.shape[:2] == (1, 1) and pads == ((0, 0), (0, 0))


def _fast_convolve(x, kernel, strides, pads) -> jax.Array:
  """Returns the convolution by whichever way was measured fastest."""
  if _is_pointwise(kernel, pads):
    # XLA does not recognize the matrix product in this one.
    visited = x[:, :: strides[0], :: strides[1]]
    return lax.dot_general(visited, kernel[0, 0], (((3,), (0,)), ((), ())))
  if math.prod(x.shape[1:3]) < math.prod(kernel.shape[:2]) <= 9:
    return _convolve_patches(x, kernel, strides, pads)
  if _is_small(kernel, strides):
    if kernel.shape[2] == 1:
      return _convolve_from_one(x, kernel, pads)
    if kernel.shape[3] == 1 and kernel.shape[2] <= _TO_ONE:
      return _convolve_to_one(x, kernel, pads)
  return _convolve(x, kernel, strides, pads)


def _is_small(kernel: jax.Array, strides: tuple[int, int]) -> bool:
  return math.prod(kernel.shape[:2]) <= 9 and strides == (1, 1)


def _windows(x: jax.Array, size: tuple[int, int], pads: Pads) -> list[jax.Array]:
  """Returns the pixels [N, h, w, ...] that each weight of a kernel sees, in order."""
  # Not jnp.pad, which cannot crop: pads may be negative.
  border = [(0, 0, 0), *((*pad, 0) for pad in pads), *[(0, 0, 0)] * (x.ndim - 3)]
  x = lax.pad(x, jnp.zeros((), x.dtype), border)
  rows, columns = x.shape[1] - size[0] + 1, x.shape[2] - size[1] + 1
  return [
    x[:, i : i + rows, j : j + columns] for i in range(size[0]) for j in range(size[1])
  ]


def _convolve_from_one(x, kernel, pads) -> jax.Array:
  """Returns the convolution of one channel: a sum of shifted images times weights."""
  weights = kernel.reshape(-1, kernel.shape[3])
  windows = _windows(x, kernel.shape[:2], pads)
  return sum(map(jnp.multiply, windows, weights))


def _convolve_to_one(x, kernel, pads) -> jax.Array:
  """Returns the convolution to one channel: pixels times weights, shifted, added up."""
  weights = kernel.reshape(-1, kernel.shape[2])
  windows = _windows(x @ weights.T, kernel.shape[:2], pads)
  # A weight's own product, where that weight sees it.
  return sum(window[..., i : i + 1] for i, window in enumerate(windows))


def _convolve_for_input(x, kernel, strides, pads) -> jax.Array:
  """Returns the same, by the way whose transpose to x is fastest."""
  many = kernel.shape[2] >= _MANY_CHANNELS and math.prod(x.shape[1:3]) <= _FEW_PIXELS
  small_kernel = 1 < math.prod(kernel.shape[:2]) <= 9
  if small_kernel and (many or strides != (1, 1)):
    return _convolve_patches(x, kernel, strides, pads)
  return _fast_convolve(x, kernel, strides, pads)


def _convolve_patches(x, kernel, strides, pads) -> jax.Array:
  """Returns the convolution as one product of all patches with the kernel."""
  (kh, kw, channels, out), (dy, dx) = kernel.shape, strides
  windows = _windows(x, (kh, kw), pads)
  patches = jnp.concatenate([window[:, ::dy, ::dx] for window in windows], axis=-1)
  return patches @ kernel.reshape(kh * kw * channels, out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _cpu_conv2d(
  x: jax.Array, kernel: jax.Array, strides: tuple[int, int], pads: Pads
) -> jax.Array:
  return _fast_convolve(x, kernel, strides, pads)


def _forward(x, kernel, strides, pads):
  return _fast_convolve(x, kernel, strides, pads), (x, kernel)


def _backward(strides, pads, residuals, g):
  x, kernel = residuals
  return (
    _input_gradient(x, g, kernel, strides, pads),
    _kernel_gradient(x, g, kernel, strides, pads),
  )


_cpu_conv2d.defvjp(_forward, _backward)


def _mirrored(kernel: jax.Array, pads: Pads) -> tuple[jax.Array, Pads]:
  """Returns the kernel and pads of the transposed convolution, strides being 1."""
  sizes = kernel.shape[:2]
  pads = tuple(
    (k - 1 - low, k - 1 - high) for k, (low, high) in zip(sizes, pads, strict=True)
  )
  return kernel[::-1, ::-1].swapaxes(2, 3), pads


def _input_gradient(x, g, kernel, strides, pads) -> jax.Array:
  """Returns the gradient of the input by whichever way was measured fastest."""
  if _is_small(kernel, strides) and 1 in kernel.shape[2:]:
    kernel, pads = _mirrored(kernel, pads)
    return _fast_convolve(g, kernel, strides, pads)
  to_input = jax.linear_transpose(
    lambda x: _convolve_for_input(x, kernel, strides, pads), x
  )
  return to_input(g)[0]


def _kernel_gradient(x, g, kernel, strides, pads) -> jax.Array:
  """Returns the gradient of the kernel by whichever way was measured fastest."""
  if _is_pointwise(kernel, pads):
    return _product(x[:, :: strides[0], :: strides[1]], g)[None, None]
  few = kernel.shape[3] <= _FEW_OUT and kernel.shape[2] >= _ENOUGH_IN
  if few and _is_small(kernel, strides):
    return _kernel_gradient_of_few(x, g, kernel, pads)
  to_kernel = jax.linear_transpose(lambda k: _convolve(x, k, strides, pads), kernel)
  return to_kernel(g)[0]


def _kernel_gradient_of_few(x, g, kernel, pads) -> jax.Array:
  """Returns the gradient of the kernel as products of the shifted g with x."""
  (kh, kw, channels, out), (_, pads) = kernel.shape, _mirrored(kernel, pads)
  g = jnp.moveaxis(jnp.stack(_windows(g, (kh, kw), pads), axis=1), 4, 2)
  # [N, kh kw out, H, W]: a product per image, which XLA spreads over threads.
  g = g.reshape(len(x), kh * kw * out, *x.shape[1:3])
  products = lax.dot_general(g, x, (((2, 3), (1, 2)), ((0,), (0,))))
  gradient = jnp.sum(products, axis=0).reshape(kh, kw, out, channels)
  return gradient[::-1, ::-1].swapaxes(2, 3)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns the sum over pixels of outer products: [..., A], [..., B] to [A, B]."""
  pixels = tuple(range(a.ndim - 1))
  # The left side is the one that gets transposed in memory: let it be the narrower.
  if a.shape[-1] > b.shape[-1]:
    return _product(b, a).T
  return lax.dot_general(a, b, ((pixels, pixels), ((), ())))


def _convolve_reflected(
  x: jax.Array, kernel: jax.Array, strides: tuple[int, int]
) -> jax.Array:
  """Returns the convolution by a 3x3 kernel with reflected borders."""
  if kernel.shape[:2] != (3, 3) or tuple(strides) != (1, 1) or min(x.shape[1:3]) < 2:
    raise ValueError(
      "padding by reflection is for 3x3 kernels with strides of 1 on images of at "
      f"least 2x2 pixels; these are kernel {kernel.shape}, strides {strides}, images "
      f"{x.shape}"
    )
  if not _is_ours(x) or x.shape[3] == 1:
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    return conv2d(x, kernel, strides, "VALID")
  # Copying images to pad them costs as much as to convolve them, and more in the
  # backward pass. What lies outside reaches the outermost rows and columns only.
  y = conv2d(x, kernel, padding=((1, 1), (1, 1)))
  for edge, outside in ((0, 1), (-1, -2)):
    row, column = x[:, outside], x[:, :, outside]
    row = jnp.pad(row, ((0, 0), (1, 1), (0, 0)), mode="reflect")
    # The row has brought what lies outside of the corners.
    column = jnp.pad(column, ((0, 0), (1, 1), (0, 0)))
    y = y.at[:, edge].add(_convolve_line(row, kernel[edge]))
    y = y.at[:, :, edge].add(_convolve_line(column, kernel[:, edge]))
  return y


def _convolve_line(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Returns the convolution [N, L, out] of [N, L + 2, in] and [3, in, out]."""
  length = x.shape[1] - 2
  patches = jnp.concatenate([x[:, i : i + length] for i in range(3)], axis=-1)
  return patches @ kernel.reshape(-1, kernel.shape[2])


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
  """Returns features [..., C] plus a bias [C].

  On CPUs the bias's gradient, a sum over all pixels, is a product with a vector of
  ones, which reads memory several times as fast as XLA's sum (docs/speed.md).
  """
  if not _is_ours(x):
    return x + bias
  return _cpu_add_bias(x, bias)


@jax.custom_vjp
def _cpu_add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
  return x + bias


def _sum_pixels(_, g: jax.Array) -> tuple[jax.Array, jax.Array]:
  pixels = g.reshape(-1, g.shape[-1])
  return g, jnp.ones(len(pixels), g.dtype) @ pixels


_cpu_add_bias.defvjp(lambda x, bias: (x + bias, None), _sum_pixels)


class Conv(nn.Module):
  """`nn.Conv` of images through `conv2d` and `add_bias`: [N, H, W, in] in and out.

  Fields (those there are), parameters ("kernel" [kh, kw, in, out], "bias" [out], both
  float32) and results are those of `nn.Conv`.

  Attributes:
    features: output channels.
    kernel_size: height and width.
    strides: steps of the window, in pixels.
    padding: as `conv2d`'s; `nn.Conv` has no "REFLECT".
    use_bias: add a bias.
    kernel_init: of the kernel.
    bias_init: of the bias.
    dtype: compute dtype.
  """

  features: int
  kernel_size: tuple[int, int]
  strides: tuple[int, int] = (1, 1)
  padding: str | Sequence[tuple[int, int]] = "SAME"
  use_bias: bool = True
  kernel_init: Callable[..., jax.Array] = nn.initializers.lecun_normal()
  bias_init: Callable[..., jax.Array] = nn.initializers.zeros
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns [N, h, w, features]."""
    shape = (*self.kernel_size, x.shape[-1], self.features)
    kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
    x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
    x = conv2d(x, kernel, self.strides, self.padding)
    if self.use_bias:
      bias = self.param("bias", self.bias_init, shape[-1:], jnp.float32)
      x = add_bias(x, bias.astype(self.dtype))
    return x
