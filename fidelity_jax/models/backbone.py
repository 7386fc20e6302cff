"""What the file of a backbone holds: a `Backbone` and a `Family`, which describes it.

The registry lists the families; docs/backbones.md says how to add one.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from flax import linen as nn

from fidelity_jax import rules
from fidelity_jax.models import layers
from fidelity_jax.models.classifier import Classifier

# Where torchvision's files are.
TORCHVISION = "https://download.pytorch.org/models/"

# Tensors by PyTorch name, in PyTorch's layout.
State = Mapping[str, np.ndarray]

# Pairs (path of a module, PyTorch's name of it): a regular expression for the whole
# path, and what `re.Match.expand` takes. Layers of the head are written out.
Table = Sequence[tuple[str, str]]


class Backbone(nn.Module):
  """A network before its head.

  A subclass has `num_taps`, `feature_size` and a field `dtype`, and is called as

      backbone(x, tap=None, train=False) -> (features, auxiliary inputs)

  with normalized images x [N, H, W, 3]. It passes a feature through
  `layers.apply_tap` at each tap, the input being the first. It returns features
  [N, feature_size] for the head, and a tuple of the inputs of its auxiliary heads.
  """

  # ImageNet's moments, of images in [0, 1].
  mean: ClassVar[tuple[float, float, float]] = layers.IMAGENET_MEAN
  std: ClassVar[tuple[float, float, float]] = layers.IMAGENET_STD
  num_taps: ClassVar[int]
  # Of the batch norms.
  epsilon: ClassVar[float] = 1e-5

  @nn.nowrap
  def folded(self) -> Self:
    """Returns the network that `models.fold` makes variables for.

    A network with batch norm returns itself without.
    """
    return self


@dataclasses.dataclass(frozen=True)
class Layout:
  """How a publisher stores the tensors of a family's networks.

  Attributes:
    table: the publisher's names of our modules.
    recognize: returns the config, for `models.create`, of the network whose tensors
      these are, or None if they are in another layout. A field that tensors do not tell
      is set to what the publisher's weights need.
    prepare: changes tensors that were recognized into what the network takes.
  """

  table: Table
  recognize: Callable[[State], dict[str, Any] | None]
  prepare: Callable[[State], State] = lambda state: state


class Field(NamedTuple):
  """A configurable field of a family's networks: its type, and what it may hold."""

  type: type
  rule: rules.Rule


# A rate of dropout.
RATE = Field(float, rules.SMOOTHING)
# Channels of the first convolution. All other layers keep their ratio to it.
WIDTH = Field(int, rules.whole(1, 65_536))


def scaled(size: int, width: int) -> int:
  """Returns a layer's size in a network narrower or wider than torchvision's.

  Args:
    size: channels or units in torchvision's network, whose first convolution has 64.
    width: channels of this network's first convolution.
  """
  return size * width // 64


@dataclasses.dataclass(frozen=True)
class Family:
  """Networks that share an architecture.

  Attributes:
    variants: by name, a network's configurable fields with their values where a config
      gives none. A value that is a function is called with what the config gives.
    build: called as build(num_classes, dtype, **fields).
    layouts: of weights from elsewhere; the first that recognizes tensors reads them.
    published: where weights are, by name, "PUBLISHER/NAME": a URL, or
      "package:PACKAGE/PATH" for a file of an installed package, whose name does without
      a publisher. A file's name ends in "-" and the first hexadecimal digits of its
      SHA-256.
    fields: of all variants, by name.
    steering_fields: fields that change nothing unless the network is steered.
  """

  variants: Mapping[str, Mapping[str, Any]]
  build: Callable[..., Classifier]
  layouts: Sequence[Layout]
  published: Mapping[str, str] = dataclasses.field(default_factory=dict)
  fields: Mapping[str, Field] = dataclasses.field(default_factory=dict)
  steering_fields: Sequence[str] = ()
