"""AlexNet (Krizhevsky, 2014, the one-tower version) as torchvision builds it."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
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

# Per stage: (channels at width 64, kernel, stride, padding) of its convolutions. Each
# of the three stages ends in a 3x3 max pool of stride 2.
_STAGES = (
  ((64, 11, 4, 2),),
  ((192, 5, 1, 2),),
  ((384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1)),
)


class AlexNet(Backbone):
  """The part of AlexNet before its fully connected layers; 5 taps.

  Taps: the input, the feature before each max pool, and the feature before the
  adaptive average pool to 6x6. Convolutions are called `conv1` ... `conv5`. Images of
  63 pixels and more. Features: 9216 at torchvision's width.

  Attributes:
    width: channels of the first convolution; the others keep their ratio to it.
    dtype: compute dtype.
  """

  width: int = 64
  dtype: Any = jnp.float32

  num_taps: ClassVar[int] = 5

  @property
  def feature_size(self) -> int:
    """Length of the feature vector."""
    return scaled(256, self.width) * 6 * 6

  @nn.compact
  def __call__(
    self, x: jax.Array, tap: layers.Tap | None = None, train: bool = False
  ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Returns (features [N, feature_size] in (C, H, W) order, no auxiliary inputs).

    Args:
      x: normalized images [N, H, W, 3].
      tap: called at the five taps.
      train: changes nothing: there is no batch norm.

    Raises:
      errors.UsageError: the images are too small.
    """
    del train
    layers.check_image(x, "AlexNet", 63)
    x = layers.apply_tap(tap, 0, x.astype(self.dtype))
    number = 0
    for stage, convs in enumerate(_STAGES):
      for features, kernel, stride, pad in convs:
        number += 1
        conv = layers.Conv(
          scaled(features, self.width),
          (kernel, kernel),
          strides=(stride, stride),
          padding=((pad, pad), (pad, pad)),
          kernel_init=layers.torch_default,
          dtype=self.dtype,
          name=f"conv{number}",
        )
        x = nn.relu(conv(x))
      x = pooling.max_pool(layers.apply_tap(tap, stage + 1, x), 3, 2)
    x = layers.apply_tap(tap, 4, x)
    return layers.flatten_chw(layers.adaptive_average_pool(x, 6)), ()


def _build(num_classes: int, dtype: Any, *, width: int, dropout: float) -> Classifier:
  rates, hidden = (dropout, dropout, 0.0), (scaled(4096, width),) * 2
  head = layers.Head(num_classes, hidden, rates, dtype=dtype)
  return Classifier(AlexNet(width, dtype), head)


_TORCHVISION = (
  *((f"backbone/conv{i}", f"features.{n}") for i, n in enumerate((0, 3, 6, 8, 10), 1)),
  ("head/fc1", "classifier.1"),
  ("head/fc2", "classifier.4"),
  ("head/logits", "classifier.6"),
)


def _recognize(state: State) -> dict[str, Any] | None:
  first = state.get("features.0.weight")
  if first is None or first.shape[2:] != (11, 11):
    return None
  return {"name": "alexnet"}


FAMILY = Family(
  variants={"alexnet": dict(width=64, dropout=0.5)},
  build=_build,
  layouts=(Layout(_TORCHVISION, _recognize),),
  published={"torchvision/alexnet": f"{TORCHVISION}alexnet-owt-7be5be79.pth"},
  fields={"width": WIDTH, "dropout": RATE},
)
