"""Building blocks shared by every network, with PyTorch's arithmetic.

All features are NHWC. Parameters and batch statistics are float32; convolutions and
dense layers compute in the module's `dtype`; statistics and means are accumulated in
float32.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from fidelity_jax import cpu, errors
from fidelity_jax.models.conv import Conv, product_precision

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# A tap sees (its number, the feature [N, h, w, C]) and returns the feature to go on
# with, of the same shape.
Tap = Callable[[int, jax.Array], jax.Array]

# torchvision's initial values of ResNet's and VGG's convolutions; DnCNN uses fan-in.
he_normal_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
he_normal_fan_in = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
# nn.Linear's and nn.Conv2d's own default: uniform within 1 / sqrt(fan in).
torch_default = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def apply_tap(tap: Tap | None, index: int, feature: jax.Array) -> jax.Array:
  """Returns `tap(index, feature)` in the feature's own dtype (no tap: unchanged).

  Raises:
    ValueError: the tap changed the feature's shape.
  """
  if tap is None:
    return feature
  tapped = tap(index, feature)
  if tapped.shape != feature.shape:
    raise ValueError(f"tap {index} turned shape {feature.shape} into {tapped.shape}")
  return tapped.astype(feature.dtype)


def check_image(x: jax.Array, network: str, minimum: int) -> None:
  """Checks that a network accepts images of this size.

  Raises:
    errors.UsageError: a side is below `minimum`.
  """
  height, width = x.shape[1:3]
  if min(height, width) < minimum:
    raise errors.UsageError(
      f"{network} takes images of at least {minimum} pixels a side, not "
      f"{height}x{width}: choose a larger image_size"
    )


def _averaging_matrix(size: int, cells: int) -> np.ndarray:
  """Returns [cells, size]; row i averages size * i/cells to size * (i+1)/cells."""
  matrix = np.zeros((cells, size), np.float32)
  for i in range(cells):
    start, stop = i * size // cells, -((-(i + 1) * size) // cells)
    matrix[i, start:stop] = 1 / (stop - start)
  return matrix


def adaptive_average_pool(x: jax.Array, cells: int) -> jax.Array:
  """Returns PyTorch's `adaptive_avg_pool2d` of [N, H, W, C]: [N, cells, cells, C].

  Sizes that do not divide give overlapping windows, as in PyTorch; sizes below `cells`
  repeat pixels. Accumulates in float32 and returns the input's dtype.
  """
  height, width = x.shape[1:3]
  y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  if (height, width) == (cells, cells):
    return x
  if cells == 1:
    y = y.mean((1, 2), keepdims=True)
  else:
    rows = jnp.asarray(_averaging_matrix(height, cells), y.dtype)
    columns = jnp.asarray(_averaging_matrix(width, cells), y.dtype)
    y = jnp.einsum("nhwc,ih,jw->nijc", y, rows, columns, precision="highest")
  return y.astype(x.dtype)


def flatten_chw(x: jax.Array) -> jax.Array:
  """Returns [N, H, W, C] as [N, C * H * W], channels outermost as in PyTorch."""
  return x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)


@jax.custom_jvp
def relu6(x: jax.Array) -> jax.Array:
  """Returns x within 0 and 6; PyTorch's gradient, which is 0 at both."""
  return jnp.clip(x, 0, 6)


@relu6.defjvp
def _relu6_jvp(primals, tangents):
  (x,), (tangent,) = primals, tangents
  return relu6(x), jnp.where((x > 0) & (x < 6), tangent, 0)


def _pixel_sums(*features: jax.Array) -> tuple[jax.Array, ...]:
  return tuple(x.sum((0, 1, 2)) for x in features)


def pixel_sums(*features: jax.Array) -> tuple[jax.Array, ...]:
  """Returns the sums [C] over all pixels of features [N, H, W, C] of one shape."""
  return cpu.choose(_pixel_sums, cpu.pixel_sums, features[0].dtype)(*features)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalize(
  x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Normalizes each channel by the batch's own mean and variance.

  Its gradient is written out (Ioffe and Szegedy, 2015, section 3), with two sums over
  pixels, which are the gradients of `scale` and `bias` too; derived, it takes four. It
  supports reverse-mode differentiation only.

  Args:
    x: features [N, H, W, C].
    scale: [C], float32.
    bias: [C], float32.
    epsilon: added to the variance.

  Returns:
    The result [N, H, W, C] in float32 (float64 of float64), and the batch's mean and
    biased variance [C], through which no gradient goes.
  """
  return _normalize_forward(x, scale, bias, epsilon)[0]


def _normalize_forward(x, scale, bias, epsilon):
  y, count = _exact(x), math.prod(x.shape[:3])
  mean = pixel_sums(y)[0] / count
  var = pixel_sums(jnp.square(y - mean))[0] / count
  y = (y - mean) * (scale * jax.lax.rsqrt(var + epsilon)) + bias
  return (y, mean, var), (x, scale, bias, mean, var)


def _normalize_backward(epsilon, residuals, gradients):
  (x, scale, bias, mean, var), (g, _, _) = residuals, gradients
  count = math.prod(x.shape[:3])
  centred = _exact(x) - mean
  inverse = jax.lax.rsqrt(var + epsilon)
  of_bias, products = pixel_sums(g, g * centred)
  of_scale = products * inverse
  of_x = g - of_bias / count - centred * (inverse * of_scale / count)
  of_x = (scale * inverse) * of_x
  return tuple(
    of.astype(a.dtype)
    for of, a in zip((of_x, of_scale, of_bias), (x, scale, bias), strict=True)
  )


normalize.defvjp(_normalize_forward, _normalize_backward)


def _exact(x: jax.Array) -> jax.Array:
  """Returns x in the dtype in which statistics are computed."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class BatchNorm(nn.Module):
  """PyTorch's batch norm over [N, H, W, C], statistics per channel.

  Unlike `nn.BatchNorm`, the running variance takes the unbiased batch variance, and
  the batch variance is computed from centred values.

  Attributes:
    epsilon: added to the variance.
    momentum: weight of the old running statistics (1 minus PyTorch's momentum).
    dtype: of the result; the arithmetic is float32.
  """

  epsilon: float = 1e-5
  momentum: float = 0.9
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Returns x normalized by the batch's (train) or the running statistics."""
    shape = (x.shape[-1],)
    scale = self.param("scale", nn.initializers.ones, shape, jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
    running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
    running_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
    if train:
      y, mean, var = normalize(x, scale, bias, self.epsilon)
      if not self.is_initializing():
        count = math.prod(x.shape[:3])
        unbiased = var * (count / max(count - 1, 1))
        keep, take = self.momentum, 1 - self.momentum
        running_mean.value = keep * running_mean.value + take * mean
        running_var.value = keep * running_var.value + take * unbiased
    else:
      mean, var = running_mean.value, running_var.value
      y = (_exact(x) - mean) * (scale * jax.lax.rsqrt(var + self.epsilon)) + bias
    return y.astype(self.dtype)


class ConvNorm(nn.Module):
  """A square convolution and its batch norm: children `conv` and `bn`.

  Attributes:
    features: output channels.
    kernel: side of the kernel.
    stride: step, in pixels.
    pad: zero padding on every side, or "SAME", as `conv2d` has it.
    norm: batch norm after a convolution without bias; off: a convolution with bias,
      which is also what a folded network uses.
    depthwise: a kernel for each channel, which sees no other; `features` is then the
      number of channels of the input.
    epsilon: batch norm's.
    momentum: likewise.
    kernel_init: of the convolution.
    dtype: compute dtype.
  """

  features: int
  kernel: int
  stride: int = 1
  pad: int | str = 0
  norm: bool = True
  depthwise: bool = False
  epsilon: float = 1e-5
  momentum: float = 0.9
  kernel_init: Callable[..., jax.Array] = he_normal_fan_out
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Returns [N, h, w, features]; no activation."""
    pad = self.pad
    x = Conv(
      self.features,
      (self.kernel, self.kernel),
      strides=(self.stride, self.stride),
      padding=pad if isinstance(pad, str) else ((pad, pad), (pad, pad)),
      depthwise=self.depthwise,
      use_bias=not self.norm,
      kernel_init=self.kernel_init,
      dtype=self.dtype,
      name="conv",
    )(x)
    if self.norm:
      x = BatchNorm(self.epsilon, self.momentum, self.dtype, name="bn")(x, train)
    return x


def dense(features: int, *, dtype: Any, **options: Any) -> nn.Dense:
  """Returns `nn.Dense` whose products have the precision of their dtype."""
  return nn.Dense(features, dtype=dtype, precision=product_precision(dtype), **options)


class Head(nn.Module):
  """A network's fully connected part: [N, F] to logits [N, num_classes].

  Attributes:
    num_classes: length of the logits.
    hidden: widths of the ReLU layers before the last one (`fc1`, `fc2`, ...); the last
      layer is called `logits` in every network.
    dropout: rates before each layer, one more than `hidden`; 0 for none.
    hidden_init: of the hidden kernels.
    dtype: compute dtype; logits are float32.
  """

  num_classes: int
  hidden: Sequence[int] = ()
  dropout: Sequence[float] = (0.0,)
  hidden_init: Callable[..., jax.Array] = torch_default
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Returns float32 logits; dropout acts when `train` and uses the rng "dropout"."""
    for i, width in enumerate(self.hidden):
      x = nn.Dropout(self.dropout[i], deterministic=not train)(x)
      x = dense(
        width, kernel_init=self.hidden_init, dtype=self.dtype, name=f"fc{i + 1}"
      )(x)
      x = nn.relu(x)
    x = nn.Dropout(self.dropout[-1], deterministic=not train)(x)
    x = dense(
      self.num_classes,
      kernel_init=nn.initializers.xavier_uniform(),
      dtype=self.dtype,
      name="logits",
    )(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
