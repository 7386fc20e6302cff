"""Convolution, fast on CPUs too."""

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from jax import lax


def conv2d(
  x: jax.Array,
  kernel: jax.Array,
  strides: tuple[int, int] = (1, 1),
  padding: Any = "SAME",
) -> jax.Array:
  """Returns the cross-correlation of images and a kernel.

  Args:
    x: [N, H, W, in].
    kernel: [kh, kw, in, out], of the same dtype.
    strides: steps of the window, in pixels.
    padding: "SAME", "VALID" or ((top, bottom), (left, right)).

  Returns:
    [N, h, w, out].
  """
  return lax.conv_general_dilated(
    x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


def _conv_general_dilated(x, kernel, strides, padding, **kwargs):
  """What `nn.Conv` calls; only plain two-dimensional convolutions are `conv2d`."""
  plain = (
    x.ndim == 4
    and kwargs["feature_group_count"] == 1
    and all(d == 1 for d in (*kwargs["lhs_dilation"], *kwargs["rhs_dilation"]))
  )
  if plain:
    return conv2d(x, kernel, tuple(strides), padding)
  return lax.conv_general_dilated(x, kernel, strides, padding, **kwargs)


class Conv(nn.Conv):
  """`nn.Conv` whose two-dimensional convolutions are `conv2d`."""

  conv_general_dilated: Callable[..., jax.Array] = _conv_general_dilated
