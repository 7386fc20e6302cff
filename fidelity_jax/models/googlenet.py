"""GoogLeNet (Szegedy et al., 2015) with batch norm, as torchvision builds it.

As in torchvision, the branch that Szegedy et al. give a 5x5 convolution has a 3x3 one,
max pools round up, and batch norm's epsilon is 1e-3: its weights need all three.
"""

from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import linen as nn

from fidelity_jax import errors, rules
from fidelity_jax.models import layers, pooling
from fidelity_jax.models.backbone import (
  RATE,
  TORCHVISION,
  WIDTH,
  Backbone,
  Family,
  Field,
  Layout,
  State,
  scaled,
)
from fidelity_jax.models.classifier import Classifier

_EPSILON = 1e-3

# Per Inception block, at width 64: channels of the 1x1 branch, of the two 3x3 branches'
# (1x1 reduction, 3x3 convolution), and of the pooling branch's projection. A pool
# follows 3b and 4e.
_BLOCKS = {
  "3a": (64, (96, 128), (16, 32), 32),
  "3b": (128, (128, 192), (32, 96), 64),
  "4a": (192, (96, 208), (16, 48), 64),
  "4b": (160, (112, 224), (24, 64), 64),
  "4c": (128, (128, 256), (24, 64), 64),
  "4d": (112, (144, 288), (32, 64), 64),
  "4e": (256, (160, 320), (32, 128), 128),
  "5a": (256, (160, 320), (32, 128), 128),
  "5b": (384, (192, 384), (48, 128), 128),
}

_kernel_init = nn.initializers.normal(0.01)


class _ConvReLU(nn.Module):
  """Convolution, batch norm, ReLU: children `conv` and `bn`."""

  features: int
  kernel: int = 1
  stride: int = 1
  norm: bool = True
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    conv = layers.ConvNorm(
      self.features,
      self.kernel,
      self.stride,
      pad=self.kernel // 2,
      norm=self.norm,
      epsilon=_EPSILON,
      kernel_init=_kernel_init,
      dtype=self.dtype,
    )
    nn.share_scope(self, conv)
    return nn.relu(conv(x, train))


class Inception(nn.Module):
  """Four branches side by side: 1x1, two of 1x1 then 3x3, and max pool then 1x1.

  Attributes:
    widths: output channels at width 64, as in `_BLOCKS`.
    width: channels of the network's first convolution.
    norm: batch norm (off in a folded network).
    dtype: compute dtype.
  """

  widths: tuple[int, tuple[int, int], tuple[int, int], int]
  width: int = 64
  norm: bool = True
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Returns the branches' outputs, concatenated by channels: [N, H, W, C]."""
    single, middle, large, pooled = self.widths
    conv = lambda features, kernel, name: _ConvReLU(
      scaled(features, self.width), kernel, norm=self.norm, dtype=self.dtype, name=name
    )
    branches = [conv(single, 1, "branch1")(x, train)]
    for name, (reduced, features) in (("branch2", middle), ("branch3", large)):
      y = conv(reduced, 1, f"{name}_reduce")(x, train)
      branches.append(conv(features, 3, name)(y, train))
    y = pooling.max_pool(x, 3, 1, pad=1, ceil_mode=True)
    branches.append(conv(pooled, 1, "branch4")(y, train))
    return jnp.concatenate(branches, -1)


class AuxiliaryHead(nn.Module):
  """An auxiliary classifier on an Inception block's output; exists in training only.

  Attributes:
    num_classes: length of the logits.
    dropout: rate before the last layer, `logits`.
    width: channels of the network's first convolution.
    dtype: compute dtype; logits are float32.
  """

  num_classes: int
  dropout: float = 0.7
  width: int = 64
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Returns float32 logits [N, num_classes] of a feature [N, h, w, C]."""
    x = layers.adaptive_average_pool(x, 4)
    channels, hidden = scaled(128, self.width), scaled(1024, self.width)
    x = _ConvReLU(channels, dtype=self.dtype, name="conv")(x, train)
    x = layers.flatten_chw(x)
    rates = (0.0, self.dropout)
    head = layers.Head(self.num_classes, (hidden,), rates, dtype=self.dtype)
    nn.share_scope(self, head)
    return head(x, train)


class GoogLeNet(Backbone):
  """The part of GoogLeNet before its fully connected layer; 6 taps.

  Taps: the input, the feature before each of the four max pools of the main path, and
  the feature before the global average pool. Images of 15 pixels and more.
  Features: 1024 at torchvision's width.

  `transform_input` re-scales the input from ImageNet's mean and deviation to 0.5 and
  0.5, which torchvision's own ImageNet weights expect. It acts after tap 0, so that a
  steered input is re-scaled like any other. The FG-NIC authors' released code leaves
  it out on the steered path (and has it on the plain one), which feeds the steered
  network inputs of another scale than it was trained on. `transform_steered=False`
  reproduces that; what was trained with the released code needs it.

  Attributes:
    transform_input: whether to re-scale.
    transform_steered: whether to re-scale where a tap is given, too. Without
      `transform_input` it changes nothing.
    width: channels of the first convolution, a multiple of 8; the others keep their
      ratio to it.
    norm: batch norm (off in a folded network).
    dtype: compute dtype.
  """

  transform_input: bool = False
  transform_steered: bool = True
  width: int = 64
  norm: bool = True
  dtype: Any = jnp.float32

  num_taps: ClassVar[int] = 6
  epsilon: ClassVar[float] = _EPSILON

  @property
  def feature_size(self) -> int:
    """Length of the feature vector."""
    return scaled(1024, self.width)

  @nn.nowrap
  def folded(self) -> Self:
    """Returns the network without batch norm."""
    return self.clone(norm=False)

  @nn.compact
  def __call__(
    self, x: jax.Array, tap: layers.Tap | None = None, train: bool = False
  ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Returns (features [N, feature_size], inputs of the auxiliary heads).

    Those are the outputs of the blocks 4a and 4d.

    Args:
      x: normalized images [N, H, W, 3].
      tap: called at the six taps.
      train: use and update batch statistics.
    """
    conv = lambda features, *args, name: _ConvReLU(
      scaled(features, self.width), *args, norm=self.norm, dtype=self.dtype, name=name
    )
    layers.check_image(x, "GoogLeNet", 15)
    x = layers.apply_tap(tap, 0, x.astype(self.dtype))
    if self.transform_input and (tap is None or self.transform_steered):
      x = _rescale(x)
    x = layers.apply_tap(tap, 1, conv(64, 7, 2, name="conv1")(x, train))
    x = pooling.max_pool(x, 3, 2, ceil_mode=True)
    x = conv(64, 1, name="conv2")(x, train)
    x = layers.apply_tap(tap, 2, conv(192, 3, name="conv3")(x, train))
    x = pooling.max_pool(x, 3, 2, ceil_mode=True)
    aux_inputs = []
    for block, widths in _BLOCKS.items():
      inception = Inception(
        widths, self.width, self.norm, self.dtype, name=f"inception{block}"
      )
      x = inception(x, train)
      if block == "3b":
        x = pooling.max_pool(layers.apply_tap(tap, 3, x), 3, 2, ceil_mode=True)
      elif block == "4e":
        x = pooling.max_pool(layers.apply_tap(tap, 4, x), 2, 2, ceil_mode=True)
      elif block in ("4a", "4d"):
        aux_inputs.append(x)
    x = layers.apply_tap(tap, 5, x)
    return layers.flatten_chw(layers.adaptive_average_pool(x, 1)), tuple(aux_inputs)


def _rescale(x: jax.Array) -> jax.Array:
  """Returns x, normalized by ImageNet's moments, as normalized by 0.5 and 0.5."""
  scale = jnp.asarray(layers.IMAGENET_STD, jnp.float32) / 0.5
  shift = (jnp.asarray(layers.IMAGENET_MEAN, jnp.float32) - 0.5) / 0.5
  return (x * scale + shift).astype(x.dtype)


def _build(
  num_classes: int,
  dtype: Any,
  *,
  transform_input: bool,
  transform_steered: bool,
  dropout: float,
  aux_dropout: float,
  aux_heads: bool,
  width: int,
) -> Classifier:
  if width % 8:
    raise errors.UsageError(
      f"model.width is {width}; GoogLeNet's has to be a multiple of 8, for whole "
      "numbers of channels"
    )
  backbone = GoogLeNet(transform_input, transform_steered, width, dtype=dtype)
  head = layers.Head(num_classes, dropout=(dropout,), dtype=dtype)
  if not aux_heads:
    return Classifier(backbone, head)
  aux = lambda: AuxiliaryHead(num_classes, aux_dropout, width, dtype)
  return Classifier(backbone, head, aux(), aux())


_TORCHVISION = (
  (r"backbone/(conv\d)/(conv|bn)", r"\1.\2"),
  (r"backbone/(inception..)/branch1/(conv|bn)", r"\1.branch1.\2"),
  (r"backbone/(inception..)/branch(\d)_reduce/(conv|bn)", r"\1.branch\2.0.\3"),
  (r"backbone/(inception..)/branch(\d)/(conv|bn)", r"\1.branch\2.1.\3"),
  (r"(aux\d)/conv/(conv|bn)", r"\1.conv.\2"),
  (r"(aux\d)/fc1", r"\1.fc1"),
  (r"(aux\d)/logits", r"\1.fc2"),
  (r"head/logits", "fc"),
)


def _recognize(state: State) -> dict[str, Any] | None:
  if "inception3a.branch1.conv.weight" not in state:
    return None
  aux_heads = any(name.startswith("aux1.") for name in state)
  # Tensors do not tell; torchvision's weights, and what was fine-tuned from them, do.
  return {"name": "googlenet", "aux_heads": aux_heads, "transform_input": True}


FAMILY = Family(
  variants={
    "googlenet": dict(
      # As in torchvision, a network that starts from weights re-scales its input.
      transform_input=lambda given: "weights" in given,
      transform_steered=True,
      dropout=0.2,
      aux_dropout=0.7,
      aux_heads=True,
      width=64,
    )
  },
  build=_build,
  layouts=(Layout(_TORCHVISION, _recognize),),
  published={"torchvision/googlenet": f"{TORCHVISION}googlenet-1378be20.pth"},
  steering_fields=("transform_steered",),
  fields={
    "transform_input": Field(bool, rules.FLAG),
    "transform_steered": Field(bool, rules.FLAG),
    "dropout": RATE,
    "aux_dropout": RATE,
    "aux_heads": Field(bool, rules.FLAG),
    "width": WIDTH,
  },
)
