"""Convolution that is fast on CPUs too.

XLA's CPU convolutions were measured against PyTorch's, with the compiler options that
this package uses (docs/speed.md). Most are as fast. What is not becomes a matrix
product here: 1x1 kernels; 3x3 kernels on images smaller than themselves, which XLA
computes element by element; the input's gradient on small images of many channels.
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
    padding: "SAME", "VALID" or ((top, bottom), (left, right)).

  Returns:
    [N, h, w, out], dtype as given.
  """
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
  return _convolve(x, kernel, strides, pads)


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
  # Not jnp.pad, which cannot crop: pads may be negative.
  border = [(0, 0, 0), *((*pad, 0) for pad in pads), (0, 0, 0)]
  x = lax.pad(x, jnp.zeros((), x.dtype), border)
  rows, columns = x.shape[1] - kh + 1, x.shape[2] - kw + 1
  patches = [
    x[:, i : i + rows : dy, j : j + columns : dx] for i in range(kh) for j in range(kw)
  ]
  patches = jnp.concatenate(patches, axis=-1)
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
  to_input = jax.linear_transpose(
    lambda x: _convolve_for_input(x, kernel, strides, pads), x
  )
  (dx,) = to_input(g)
  return dx, _kernel_gradient(x, g, kernel, strides, pads)


_cpu_conv2d.defvjp(_forward, _backward)


def _kernel_gradient(x, g, kernel, strides, pads) -> jax.Array:
  """Returns the gradient of the kernel by whichever way was measured fastest."""
  if _is_pointwise(kernel, pads):
    return _product(x[:, :: strides[0], :: strides[1]], g)[None, None]
  to_kernel = jax.linear_transpose(lambda k: _convolve(x, k, strides, pads), kernel)
  return to_kernel(g)[0]


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns the sum over pixels of outer products: [..., A], [..., B] to [A, B]."""
  pixels = tuple(range(a.ndim - 1))
  # The left side is the one that gets transposed in memory: let it be the narrower.
  if a.shape[-1] > b.shape[-1]:
    return _product(b, a).T
  return lax.dot_general(a, b, ((pixels, pixels), ((), ())))


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
    padding: as `conv2d`'s.
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
