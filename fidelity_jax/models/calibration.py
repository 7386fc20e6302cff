"""The calibration and ensemble modules (docs/method.md, section 5).

These are the only networks the method trains besides the estimator. They read the
confidence map and steer a frozen backbone: spatially at its taps, and by channel on
the feature it ends in. They know a backbone by two numbers only, how many taps it
has and how long its feature is.

Initialization is PyTorch's default for these layers, which the paper's experiments
used: kernels and biases uniform in +-1/sqrt(fan_in).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fidelity_jax import errors
from fidelity_jax.models.conv import Conv
from fidelity_jax.models.layers import dense, torch_default
from fidelity_jax.resize import check_method, resize1d, resize2d

Map = jax.Array | None

# Switches of the modules that have parameters.
MODULES = (
  "spatial_multiplication",
  "spatial_addition",
  "channel_multiplication",
  "channel_concatenation",
)


def _bias_init(fan_in: int) -> nn.initializers.Initializer:
  bound = 1 / math.sqrt(fan_in)

  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


class ConvStack(nn.Module):
  """Conv3x3 ReLU ... Conv3x3 from one channel to one, reflect padding.

  Attributes:
    num_convs: how many convolutions; 3 in the paper, 2 in the released code.
    channels: width between the convolutions.
    dtype: compute dtype.

  `__call__` maps [N, H, W, 1] to [N, H, W, 1], H and W at least 2.
  """

  num_convs: int = 3
  channels: int = 16
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    if min(x.shape[1:3]) < 2:
      raise errors.UsageError(
        f"a calibration map of {x.shape[1]}x{x.shape[2]} is too small to pad by "
        "reflection: use a larger image"
      )
    for i in range(self.num_convs):
      last = i == self.num_convs - 1
      x = Conv(
        1 if last else self.channels,
        (3, 3),
        padding="REFLECT",
        dtype=self.dtype,
        kernel_init=torch_default,
        bias_init=_bias_init(9 * x.shape[-1]),
        name=f"conv_{i}",
      )(x)
      if not last:
        x = nn.relu(x)
    return x


class TwoLayers(nn.Module):
  """FC ReLU FC: [N, in] to [N, features], `hidden` units between."""

  hidden: int
  features: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = nn.relu(self._dense(x, self.hidden, "hidden"))
    return self._dense(x, self.features, "output")

  def _dense(self, x: jax.Array, features: int, name: str) -> jax.Array:
    layer = dense(
      features,
      dtype=self.dtype,
      kernel_init=torch_default,
      bias_init=_bias_init(x.shape[-1]),
      name=name,
    )
    return layer(x)


def fidelity_feature(
  confidence: jax.Array, length: int, method: str = "bilinear"
) -> jax.Array:
  """Returns phi, the confidence map as a vector (the paper, section 4.3.4).

  The map read row by row fills the first half, the map read column by column the
  second, each resized to its half. For an odd length the first half is the longer.

  Args:
    confidence: float [N, H, W, 1].
    length: length of phi, at least 2.
    method: resize method.

  Returns:
    [N, length], dtype as given.
  """
  batch = confidence.shape[0]
  rows = confidence[..., 0]
  columns = jnp.swapaxes(rows, 1, 2)
  halves = (length - length // 2, length // 2)
  return jnp.concatenate(
    [
      resize1d(image.reshape(batch, -1), half, method)
      for image, half in zip((rows, columns), halves, strict=True)
    ],
    axis=-1,
  )


class Calibration(nn.Module):
  """Spatial and channel calibration of a backbone by a confidence map.

  Attributes:
    feature_size: F, the length of the backbone's feature, at least 2.
    num_taps: how many taps the backbone has.
    ratio: hidden units of the fully connected layers, as a fraction of F.
    num_convs: convolutions per stack; 3 in the paper, 2 in the released code.
    channels: width of the stacks.
    resize: resize method for maps and vectors.
    spatial_multiplication: whether taps multiply by 2 sigmoid(w_i).
    spatial_addition: whether taps add b_i.
    residual: whether each stack after the first adds its input to its output.
    channel_multiplication: whether the feature is multiplied by 2 sigmoid(FC(phi)).
    channel_concatenation: whether the feature and phi pass through cat FCs.
    dtype: compute dtype; parameters are float32.

  A module that is switched off computes nothing and has no parameters.

  Parameters: `multiplication_i` and `addition_i` per tap i (each with conv_0, ...),
  `channel_multiplication` and `channel_concatenation` (each with hidden, output).
  """

  feature_size: int
  num_taps: int
  ratio: float = 0.5
  num_convs: int = 3
  channels: int = 16
  resize: str = "bilinear"
  spatial_multiplication: bool = True
  spatial_addition: bool = True
  residual: bool = True
  channel_multiplication: bool = True
  channel_concatenation: bool = True
  dtype: Any = jnp.float32

  def __post_init__(self):
    check_method(self.resize)
    check_hidden(self.feature_size, self.ratio)
    for name in ("num_convs", "channels", "num_taps"):
      if getattr(self, name) < 1:
        raise errors.UsageError(
          f"model.{name} is {getattr(self, name)}: must be at least 1"
        )
    super().__post_init__()

  def setup(self):
    stacks = lambda name: [
      ConvStack(self.num_convs, self.channels, self.dtype, name=f"{name}_{i}")
      for i in range(self.num_taps)
    ]
    two_layers = lambda name: TwoLayers(
      check_hidden(self.feature_size, self.ratio),
      self.feature_size,
      self.dtype,
      name=name,
    )
    if self.spatial_multiplication:
      self.multiplication = stacks("multiplication")
    if self.spatial_addition:
      self.addition = stacks("addition")
    if self.channel_multiplication:
      self.multiplication_layers = two_layers("channel_multiplication")
    if self.channel_concatenation:
      self.concatenation_layers = two_layers("channel_concatenation")

  def __call__(
    self,
    features: jax.Array,
    confidence: jax.Array,
    tap_sizes: Sequence[tuple[int, int]],
  ) -> tuple[tuple[tuple[Map, Map], ...], jax.Array]:
    """Runs every module, which is what `init` needs.

    No parameter depends on a spatial size: `init` may be given a small map.

    Returns:
      (the result of `spatial_maps`, the result of `channel`).
    """
    maps = self.spatial_maps(confidence, tap_sizes)
    return maps, self.channel(features, confidence)

  def spatial_maps(
    self, confidence: jax.Array, tap_sizes: Sequence[tuple[int, int]]
  ) -> tuple[tuple[Map, Map], ...]:
    """Returns (w_i, b_i) per tap (the paper, sections 4.3.1 to 4.3.3).

    w_0 is the first stack's output; w_i resizes the next stack's output, plus its
    input under the residual mechanism, to tap i. Each stack reads the resized map
    before it. Likewise b_i, with stacks of its own.

    Args:
      confidence: float [N, H, W, 1].
      tap_sizes: (height, width) of the feature at each tap; the first is (H, W),
        the others are at least 2x2 where a stack follows.

    Returns:
      A pair per tap, each [N, h_i, w_i, 1] in the compute dtype, or None where the
      module is switched off.

    Raises:
      UsageError: the sizes do not fit the taps or the confidence map.
    """
    if len(tap_sizes) != self.num_taps:
      raise errors.UsageError(
        f"{len(tap_sizes)} tap sizes for a calibration of {self.num_taps} taps"
      )
    if tuple(tap_sizes[0]) != confidence.shape[1:3]:
      raise errors.UsageError(
        f"the first tap is {tuple(tap_sizes[0])} but the confidence map "
        f"{confidence.shape[1:3]}: both must have the image's size"
      )
    off = (None,) * self.num_taps
    weights, biases = off, off
    if self.spatial_multiplication:
      weights = self._chain(self.multiplication, confidence, tap_sizes)
    if self.spatial_addition:
      biases = self._chain(self.addition, confidence, tap_sizes)
    return tuple(zip(weights, biases, strict=True))

  @staticmethod
  def steer(
    maps: Sequence[tuple[Map, Map]],
  ) -> Callable[[int, jax.Array], jax.Array]:
    """Returns the tap function g -> 2 sigmoid(w_i) g + b_i for a backbone.

    Args:
      maps: (w_i, b_i) per tap from `spatial_maps`, each
        [N, h_i, w_i, 1] or None, which leaves that factor or term out.

    Returns:
      tap(i, g): g is the feature [N, h_i, w_i, C] at tap i; the result has g's shape
      and dtype.
    """

    def tap(index: int, feature: jax.Array) -> jax.Array:
      weight, bias = maps[index]
      if weight is not None:
        feature = feature * (2 * nn.sigmoid(weight)).astype(feature.dtype)
      if bias is not None:
        feature = feature + bias.astype(feature.dtype)
      return feature

    return tap

  def channel(self, features: jax.Array, confidence: jax.Array) -> jax.Array:
    """Returns the feature after the channel modules (docs/method.md, section 5).

    Args:
      features: float [N, F], from the steered backbone.
      confidence: float [N, H, W, 1].

    Returns:
      [N, F] in the compute dtype; `features` itself if both modules are off.
    """
    if not (self.channel_multiplication or self.channel_concatenation):
      return features
    phi = fidelity_feature(confidence, self.feature_size, self.resize)
    if self.channel_multiplication:
      features = features * 2 * nn.sigmoid(self.multiplication_layers(phi))
    if self.channel_concatenation:
      features = self.concatenation_layers(jnp.concatenate([features, phi], axis=-1))
    return features

  def _chain(self, stacks, confidence, tap_sizes) -> tuple[jax.Array, ...]:
    chain = [stacks[0](confidence)]
    for stack, size in zip(stacks[1:], tap_sizes[1:], strict=True):
      previous = chain[-1]
      following = stack(previous)
      if self.residual:
        following = following + previous
      chain.append(resize2d(following, tuple(size), self.resize))
    return tuple(chain)


class Ensemble(nn.Module):
  """Blends the calibrated feature with the plain one (the paper, section 4.3.6).

  Attributes:
    feature_size: F.
    ratio: hidden units as a fraction of F.
    dtype: compute dtype; parameters are float32.

  `__call__`: v = sigmoid(FC(relu(FC(mean of f)))) in R^F, one mean per image; the
  result (1 - v) calibrated + v plain, [N, F]. Parameters: `weights` (hidden, output).
  """

  feature_size: int
  ratio: float = 0.5
  dtype: Any = jnp.float32

  def __post_init__(self):
    check_hidden(self.feature_size, self.ratio)
    super().__post_init__()

  @nn.compact
  def __call__(
    self, calibrated: jax.Array, plain: jax.Array, confidence: jax.Array
  ) -> jax.Array:
    """See the class; `confidence` is [N, H, W, 1], the features are [N, F]."""
    hidden = check_hidden(self.feature_size, self.ratio)
    mean = jnp.mean(confidence, axis=(1, 2))
    v = TwoLayers(hidden, self.feature_size, self.dtype, name="weights")(mean)
    v = nn.sigmoid(v)
    return (1 - v) * calibrated + v * plain


def check_hidden(feature_size: int, ratio: float) -> int:
  """Returns the hidden width int(F * ratio).

  Raises:
    UsageError: F is below 2 or the width below 1.
  """
  hidden = int(feature_size * ratio)
  if feature_size < 2 or hidden < 1:
    raise errors.UsageError(
      f"model.ratio {ratio} of a feature of {feature_size} leaves {hidden} "
      "hidden units: at least 1 is needed"
    )
  return hidden
