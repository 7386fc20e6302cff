"""ResNet (He et al., 2016) as torchvision builds it, stride in the 3x3 convolution."""

import re
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import linen as nn

from fidelity_jax import errors, rules
from fidelity_jax.models import layers, pooling
from fidelity_jax.models.backbone import (
  TORCHVISION,
  WIDTH,
  Backbone,
  Family,
  Field,
  Layout,
  State,
)
from fidelity_jax.models.classifier import Classifier


class Block(nn.Module):
  """A residual block: two 3x3 convolutions, or 1x1, 3x3, 1x1 with four-fold width.

  Attributes:
    width: channels of the 3x3 convolutions.
    bottleneck: which of the two kinds.
    stride: of the block, in pixels.
    norm: batch norm (off in a folded network).
    dtype: compute dtype.
  """

  width: int
  bottleneck: bool
  stride: int = 1
  norm: bool = True
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Returns [N, h, w, width] or, for a bottleneck, [N, h, w, 4 * width]."""
    out = self.width * (4 if self.bottleneck else 1)
    conv = lambda features, kernel, stride, name: layers.ConvNorm(
      features,
      kernel,
      stride,
      pad=kernel // 2,
      norm=self.norm,
      dtype=self.dtype,
      name=name,
    )
    if self.bottleneck:
      y = nn.relu(conv(self.width, 1, 1, "conv1")(x, train))
      y = nn.relu(conv(self.width, 3, self.stride, "conv2")(y, train))
      y = conv(out, 1, 1, "conv3")(y, train)
    else:
      y = nn.relu(conv(self.width, 3, self.stride, "conv1")(x, train))
      y = conv(out, 3, 1, "conv2")(y, train)
    if self.stride != 1 or x.shape[-1] != out:
      x = conv(out, 1, self.stride, "downsample")(x, train)
    return nn.relu(y + x)


class ResNet(Backbone):
  """The part of a ResNet before its fully connected layer; 3 taps.

  Taps: the input, the feature before the max pool, the feature before the global
  average pool.

  Attributes:
    stage_sizes: blocks per stage; each stage after the first halves the image and
      doubles the width.
    width: channels of the stem and of the first stage.
    block: "basic" or "bottleneck".
    norm: batch norm (off in a folded network).
    dtype: compute dtype.
  """

  stage_sizes: Sequence[int]
  width: int = 64
  block: str = "bottleneck"
  norm: bool = True
  dtype: Any = jnp.float32

  num_taps: ClassVar[int] = 3

  @property
  def feature_size(self) -> int:
    """Length of the feature vector."""
    expansion = 4 if self.block == "bottleneck" else 1
    return self.width * 2 ** (len(self.stage_sizes) - 1) * expansion

  @nn.nowrap
  def folded(self) -> Self:
    """Returns the network without batch norm."""
    return self.clone(norm=False)

  @nn.compact
  def __call__(
    self, x: jax.Array, tap: layers.Tap | None = None, train: bool = False
  ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Returns (features [N, feature_size], no inputs of auxiliary heads).

    Args:
      x: normalized images [N, H, W, 3].
      tap: called at the three taps.
      train: use and update batch statistics.
    """
    x = layers.apply_tap(tap, 0, x.astype(self.dtype))
    stem = layers.ConvNorm(
      self.width, 7, 2, pad=3, norm=self.norm, dtype=self.dtype, name="stem"
    )
    x = layers.apply_tap(tap, 1, nn.relu(stem(x, train)))
    x = pooling.max_pool(x, 3, 2, pad=1)
    for stage, size in enumerate(self.stage_sizes):
      for i in range(size):
        x = Block(
          self.width * 2**stage,
          self.block == "bottleneck",
          stride=2 if stage and not i else 1,
          norm=self.norm,
          dtype=self.dtype,
          name=f"layer{stage + 1}_{i}",
        )(x, train)
    x = layers.apply_tap(tap, 2, x)
    return layers.flatten_chw(layers.adaptive_average_pool(x, 1)), ()


def _build(
  num_classes: int, dtype: Any, *, stage_sizes: Sequence[int], width: int, block: str
) -> Classifier:
  if block not in ("basic", "bottleneck"):
    raise errors.UsageError(
      f'model.block is {block!r}; a ResNet block is "basic" or "bottleneck"'
    )
  backbone = ResNet(tuple(stage_sizes), width, block, dtype=dtype)
  return Classifier(backbone, layers.Head(num_classes, dtype=dtype))


_VARIANTS = {
  # Of any size; the defaults are `:scratch`'s.
  "resnet": dict(stage_sizes=(1, 1, 1, 1), width=24, block="basic"),
  "resnet18": dict(stage_sizes=(2, 2, 2, 2), width=64, block="basic"),
  "resnet50": dict(stage_sizes=(3, 4, 6, 3), width=64, block="bottleneck"),
}
_TORCHVISION = (
  (r"backbone/stem/conv", "conv1"),
  (r"backbone/stem/bn", "bn1"),
  (r"backbone/layer(\d+)_(\d+)/downsample/conv", r"layer\1.\2.downsample.0"),
  (r"backbone/layer(\d+)_(\d+)/downsample/bn", r"layer\1.\2.downsample.1"),
  (r"backbone/layer(\d+)_(\d+)/conv(\d)/(conv|bn)", r"layer\1.\2.\4\3"),
  (r"head/logits", "fc"),
)


def _recognize(state: State) -> dict[str, Any] | None:
  stem = state.get("conv1.weight")
  if "layer1.0.conv1.weight" not in state or stem is None or stem.ndim != 4:
    return None
  matches = (re.match(r"layer(\d+)\.(\d+)\.", name) for name in state)
  blocks = {match.groups() for match in matches if match}
  sizes = []
  while size := sum(stage == str(len(sizes) + 1) for stage, _ in blocks):
    sizes.append(size)
  width = stem.shape[0]
  block = "bottleneck" if "layer1.0.conv3.weight" in state else "basic"
  for name in ("resnet18", "resnet50"):
    if _VARIANTS[name] == dict(stage_sizes=tuple(sizes), width=width, block=block):
      return {"name": name}
  return {"name": "resnet", "stage_sizes": sizes, "width": width, "block": block}


FAMILY = Family(
  variants=_VARIANTS,
  build=_build,
  layouts=(Layout(_TORCHVISION, _recognize),),
  published={
    "torchvision/resnet18": f"{TORCHVISION}resnet18-f37072fd.pth",
    "torchvision/resnet50": f"{TORCHVISION}resnet50-0676ba61.pth",
    "torchvision/resnet50-v2": f"{TORCHVISION}resnet50-11ad3fa6.pth",
  },
  fields={
    "stage_sizes": Field(tuple, rules.several(rules.whole(1, 200), 1, 8)),
    "width": WIDTH,
    "block": Field(str, rules.choice("basic", "bottleneck")),
  },
)
