"""VGG-16 (Simonyan and Zisserman, 2015), no batch norm, as torchvision builds it."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from fidelity_jax.models import layers, pooling
from fidelity_jax.models.backbone import (
  RATE,
  TORCHVISION,
  WIDTH,
  Backbone,
  Family,
  Layout,
  State,
  scaled,
)
from fidelity_jax.models.classifier import Classifier

# Channels of the 3x3 convolutions per stage at width 64; every stage ends in a 2x2 max
# pool.
_STAGES = ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3)

_hidden_init = nn.initializers.normal(0.01)


class VGG16(Backbone):
  """The part of VGG-16 before its fully connected layers; 7 taps.

  Taps: the input, the feature before each max pool, and the feature before the
  adaptive average pool to 7x7. Convolutions are called `conv1_1` ... `conv5_3`. Images
  of 32 pixels and more. Features: 25088 at torchvision's width.

  Attributes:
    width: channels of the first convolution; the others keep their ratio to it.
    dtype: compute dtype.
  """

  width: int = 64
  dtype: Any = jnp.float32

  num_taps: ClassVar[int] = 7

  @property
  def feature_size(self) -> int:
    """Length of the feature vector."""
    return scaled(512, self.width) * 7 * 7

  @nn.compact
  def __call__(
    self, x: jax.Array, tap: layers.Tap | None = None, train: bool = False
  ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Returns (features [N, feature_size] in (C, H, W) order, no auxiliary inputs).

    Args:
      x: normalized images [N, H, W, 3].
      tap: called at the seven taps.
      train: changes nothing: there is no batch norm.

    Raises:
      errors.UsageError: the images are too small.
    """
    del train
    layers.check_image(x, "VGG-16", 32)
    x = layers.apply_tap(tap, 0, x.astype(self.dtype))
    for stage, widths in enumerate(_STAGES, 1):
      for i, features in enumerate(widths, 1):
        conv = layers.Conv(
          scaled(features, self.width),
          (3, 3),
          padding=((1, 1), (1, 1)),
          kernel_init=layers.he_normal_fan_out,
          dtype=self.dtype,
          name=f"conv{stage}_{i}",
        )
        x = nn.relu(conv(x))
      x = pooling.max_pool(layers.apply_tap(tap, stage, x), 2, 2)
    x = layers.apply_tap(tap, 6, x)
    return layers.flatten_chw(layers.adaptive_average_pool(x, 7)), ()


def _build(num_classes: int, dtype: Any, *, width: int, dropout: float) -> Classifier:
  rates, hidden = (0.0, dropout, dropout), (scaled(4096, width),) * 2
  head = layers.Head(num_classes, hidden, rates, _hidden_init, dtype)
  return Classifier(VGG16(width, dtype), head)


_CONVS = {1: (0, 2), 2: (5, 7), 3: (10, 12, 14), 4: (17, 19, 21), 5: (24, 26, 28)}
_TORCHVISION = (
  *(
    (f"backbone/conv{stage}_{i}", f"features.{n}")
    for stage, numbers in _CONVS.items()
    for i, n in enumerate(numbers, 1)
  ),
  ("head/fc1", "classifier.0"),
  ("head/fc2", "classifier.3"),
  ("head/logits", "classifier.6"),
)
# What torchvision's feature-only weights were trained on: pixels in [0, 255] less a
# mean (github.com/amdegroot/ssd.pytorch).
_PIXEL_MEAN = np.array((0.48235, 0.45882, 0.40784), np.float32)
_PIXEL_STD = np.full(3, 1 / 255, np.float32)


def _recognize(state: State) -> dict[str, Any] | None:
  first = state.get("features.0.weight")
  if first is None or first.shape[2:] != (3, 3):
    return None
  return {"name": "vgg16"}


def _recognize_features(state: State) -> dict[str, Any] | None:
  """Recognizes torchvision's feature-only weights, whose head is filled with NaN."""
  head = [value for name, value in state.items() if name.startswith("classifier.")]
  first = [state.get(f"features.0.{name}") for name in ("weight", "bias")]
  shapes = [getattr(tensor, "shape", None) for tensor in first]
  if shapes != [(64, 3, 3, 3), (64,)] or not head:
    return None
  return {"name": "vgg16"} if all(np.isnan(value).all() for value in head) else None


def _prepare_features(state: State) -> State:
  """Returns the features alone, the first convolution for ImageNet-normalized input.

  Exact but for the zero padding, which now stands for ImageNet's mean colour instead of
  the original's; they differ by less than 0.003 of the range.
  """
  result = {k: v for k, v in state.items() if k.startswith("features.")}
  kernel, bias = result["features.0.weight"], result["features.0.bias"]
  scale = np.asarray(VGG16.std, np.float32) / _PIXEL_STD
  shift = (np.asarray(VGG16.mean, np.float32) - _PIXEL_MEAN) / _PIXEL_STD
  result["features.0.weight"] = kernel * scale[:, None, None]
  result["features.0.bias"] = bias + np.einsum("oihw,i->o", kernel, shift)
  return result


FAMILY = Family(
  variants={"vgg16": dict(width=64, dropout=0.5)},
  build=_build,
  layouts=(
    Layout(_TORCHVISION, _recognize_features, _prepare_features),
    Layout(_TORCHVISION, _recognize),
  ),
  published={
    "torchvision/vgg16": f"{TORCHVISION}vgg16-397923af.pth",
    "torchvision/vgg16-features": (
      f"{TORCHVISION}vgg16_features-amdegroot-88682ab5.pth"
    ),
  },
  fields={"width": WIDTH, "dropout": RATE},
)
