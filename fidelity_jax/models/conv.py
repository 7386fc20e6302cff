"""Convolutions, and the precision of products.

Accelerators round float32 operands before they multiply them unless told otherwise.
Here float32 means float32 products on every platform.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from fidelity_jax import cpu


def product_precision(dtype: Any) -> lax.Precision | None:
  """Returns the `precision` for products of operands of a floating-point dtype.

  HIGHEST for float32 and longer, which keeps accelerators from rounding the operands
  first; None for shorter ones, of which there is nothing to round.
  """
  return lax.Precision.HIGHEST if jnp.finfo(dtype).bits >= 32 else None


def conv2d(
  x: jax.Array,
  kernel: jax.Array,
  strides: tuple[int, int] = (1, 1),
  padding: str | Sequence[tuple[int, int]] = "SAME",
) -> jax.Array:
  """Returns the cross-correlation of images and a kernel.

  In float32 and float64 it supports reverse-mode differentiation only, and programs for
  CPUs compute it in their own way (`fidelity_jax.cpu`), the same to rounding.

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
    _check_reflected(x, kernel, strides)
    convolve = cpu.choose(plain_reflected, cpu.conv2d_reflected, x.dtype)
  else:
    pads = _pads(x, kernel, strides, padding)
    options = {"strides": tuple(strides), "pads": pads}
    convolve = cpu.choose(plain_convolve, cpu.conv2d, x.dtype, **options)
  return convolve(x, kernel)


def _pads(
  x: jax.Array,
  kernel: jax.Array,
  strides: tuple[int, int],
  padding: str | Sequence[tuple[int, int]],
) -> cpu.Pads:
  """Returns padding in numbers."""
  if isinstance(padding, str):
    padding = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
  return tuple((int(low), int(high)) for low, high in padding)


def plain_convolve(
  x: jax.Array,
  kernel: jax.Array,
  strides: tuple[int, int],
  pads: cpu.Pads,
  groups: int = 1,
) -> jax.Array:
  """Returns `conv2d`, padding in numbers, as platforms other than CPUs have it."""
  return lax.conv_general_dilated(
    x,
    kernel,
    strides,
    pads,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=groups,
    precision=product_precision(x.dtype),
  )


def plain_reflected(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Returns `conv2d` with "REFLECT", likewise."""
  x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
  return plain_convolve(x, kernel, (1, 1), ((0, 0), (0, 0)))


def _check_reflected(x: jax.Array, kernel: jax.Array, strides: tuple[int, int]) -> None:
  if kernel.shape[:2] != (3, 3) or tuple(strides) != (1, 1) or min(x.shape[1:3]) < 2:
    raise ValueError(
      "padding by reflection is for 3x3 kernels with strides of 1 on images of at "
      f"least 2x2 pixels; these are kernel {kernel.shape}, strides {strides}, images "
      f"{x.shape}"
    )


def depthwise(
  x: jax.Array,
  kernel: jax.Array,
  strides: tuple[int, int] = (1, 1),
  padding: str | Sequence[tuple[int, int]] = "SAME",
) -> jax.Array:
  """Returns the cross-correlation of each channel with its own kernel.

  As `conv2d`, but for "REFLECT", which it has not.

  Args:
    x: [N, H, W, C].
    kernel: [kh, kw, 1, C], of the same dtype.
    strides: steps of the window, in pixels.
    padding: "SAME", "VALID" or ((top, bottom), (left, right)), all with zeros.

  Returns:
    [N, h, w, C], dtype as given.
  """
  pads = _pads(x, kernel, strides, padding)
  options = {"strides": tuple(strides), "pads": pads}
  return cpu.choose(plain_depthwise, cpu.depthwise, x.dtype, **options)(x, kernel)


def plain_depthwise(
  x: jax.Array, kernel: jax.Array, strides: tuple[int, int], pads: cpu.Pads
) -> jax.Array:
  """Returns `depthwise`, padding in numbers, as other platforms than CPUs have it."""
  return plain_convolve(x, kernel, strides, pads, x.shape[3])


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
  """Returns features [..., C] plus a bias [C].

  In float32 and float64 programs for CPUs have their own gradient of the bias; it
  supports reverse-mode differentiation only.
  """
  spread = cpu.choose(jnp.broadcast_to, cpu.spread, x.dtype, shape=x.shape)
  return x + spread(bias)


class Conv(nn.Module):
  """`nn.Conv` of images through `conv2d` and `add_bias`: [N, H, W, in] in and out.

  The fields below, parameters ("kernel" [kh, kw, in, out], "bias" [out], both
  float32) and results are those of `nn.Conv`. A depthwise one has a kernel
  [kh, kw, 1, out].

  Attributes:
    features: output channels.
    kernel_size: height and width.
    strides: steps of the window, in pixels.
    padding: as `conv2d`'s; `nn.Conv` has no "REFLECT".
    use_bias: add a bias.
    depthwise: a kernel for each channel of the input, of which there are `features`.
    kernel_init: of the kernel.
    bias_init: of the bias.
    dtype: compute dtype.
  """

  features: int
  kernel_size: tuple[int, int]
  strides: tuple[int, int] = (1, 1)
  padding: str | Sequence[tuple[int, int]] = "SAME"
  use_bias: bool = True
  depthwise: bool = False
  kernel_init: Callable[..., jax.Array] = nn.initializers.lecun_normal()
  bias_init: Callable[..., jax.Array] = nn.initializers.zeros
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns [N, h, w, features]."""
    seen = 1 if self.depthwise else x.shape[-1]
    shape = (*self.kernel_size, seen, self.features)
    kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
    x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
    convolve = depthwise if self.depthwise else conv2d
    x = convolve(x, kernel, self.strides, self.padding)
    if self.use_bias:
      bias = self.param("bias", self.bias_init, shape[-1:], jnp.float32)
      x = add_bias(x, bias.astype(self.dtype))
    return x
