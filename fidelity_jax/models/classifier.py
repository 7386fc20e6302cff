"""A backbone with its head: what is fine-tuned, and later frozen and steered."""

import functools
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import linen as nn

from fidelity_jax.models import layers

# The children of a network that serve its training alone.
AUXILIARY = ("aux1", "aux2")


class Classifier(nn.Module):
  """Backbone, head and, in training, auxiliary heads.

  Variables: params and batch_stats with the children `backbone`, `head` and, where the
  network has auxiliary heads, `aux1` and `aux2`.

  Attributes:
    backbone: a `Backbone` (models/backbone.py): images to features, with taps.
    head: features to logits.
    aux1: the first auxiliary head, None in most networks and in folded ones.
    aux2: the second one.
  """

  backbone: nn.Module
  head: nn.Module
  aux1: nn.Module | None = None
  aux2: nn.Module | None = None

  @property
  def feature_size(self) -> int:
    """Length F of the feature vector between backbone and head."""
    return self.backbone.feature_size

  @property
  def num_taps(self) -> int:
    """Number of points where the feature can be steered."""
    return self.backbone.num_taps

  @property
  def num_classes(self) -> int:
    """Length of the logits."""
    return self.head.num_classes

  @property
  def epsilon(self) -> float:
    """Of the backbone's batch norms."""
    return self.backbone.epsilon

  def __call__(
    self, x: jax.Array, tap: layers.Tap | None = None, train: bool = False
  ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Returns (logits, auxiliary logits), all float32 [N, num_classes].

    Args:
      x: normalized images [N, H, W, 3].
      tap: called as tap(i, feature [N, h, w, C]) at each tap; returns the feature to
        go on with.
      train: use and update batch statistics (mutable=["batch_stats"]), apply dropout
        (rng "dropout") and the auxiliary heads; otherwise there are no auxiliary
        logits.
    """
    features, aux_inputs = self.backbone(x, tap=tap, train=train)
    aux_logits = ()
    if self.aux1 is not None and (train or self.is_initializing()):
      heads = (self.aux1, self.aux2)
      aux_logits = tuple(
        head(aux_input, train)
        for head, aux_input in zip(heads, aux_inputs, strict=True)
      )
    return self.head(features, train), aux_logits if train else ()

  def features(
    self, x: jax.Array, tap: layers.Tap | None = None, train: bool = False
  ) -> jax.Array:
    """Returns the features [N, F] that the head takes; arguments as `__call__`'s."""
    return self.backbone(x, tap=tap, train=train)[0]

  def classify(self, features: jax.Array, train: bool = False) -> jax.Array:
    """Returns logits, float32 [N, num_classes], of features [N, F]."""
    return self.head(features, train)

  @nn.nowrap
  def normalize(self, images: jax.Array) -> jax.Array:
    """Returns images [N, H, W, 3] in [0, 1] as the network takes them."""
    mean = jnp.asarray(self.backbone.mean, images.dtype)
    return (images - mean) / jnp.asarray(self.backbone.std, images.dtype)

  @nn.nowrap
  def folded(self) -> Self:
    """Returns the network without batch norm and auxiliary heads."""
    return self.clone(backbone=self.backbone.folded(), aux1=None, aux2=None)

  @nn.nowrap
  def tap_sizes(self, image_size: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """Returns the feature size (h, w) at each tap for images of size (H, W)."""
    return _tap_sizes(self, tuple(image_size))


@functools.lru_cache(maxsize=64)
def _tap_sizes(module: Classifier, image_size: tuple[int, int]) -> Any:
  sizes = []

  def record(index, feature):
    del index
    sizes.append(feature.shape[1:3])
    return feature

  images = jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32)
  init = lambda x: module.init(jax.random.key(0), x, tap=record, method="features")
  jax.eval_shape(init, images)
  return tuple(sizes)
