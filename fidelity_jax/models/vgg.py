"""VGG-16 (Simonyan and Zisserman, 2015), no batch norm, as torchvision builds it."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from fidelity_jax.models import layers, pooling

# Channels of the 3x3 convolutions per stage; every stage ends in a 2x2 max pool.
_STAGES = ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3)


class VGG16(nn.Module):
  """The part of VGG-16 before its fully connected layers; 7 taps, 25088 features.

  Taps: the input, the feature before each max pool, and the feature before the
  adaptive average pool to 7x7. Convolutions are called `conv1_1` ... `conv5_3`. Images
  of 32 pixels and more.

  Attributes:
    norm: there is no batch norm; accepted for the interface's sake.
    dtype: compute dtype.
  """

  norm: bool = True
  dtype: Any = jnp.float32

  num_taps: ClassVar[int] = 7
  feature_size: ClassVar[int] = 512 * 7 * 7
  epsilon: ClassVar[float] = 1e-5

  @nn.compact
  def __call__(
    self, x: jax.Array, tap: layers.Tap | None = None, train: bool = False
  ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Returns (features [N, 25088] in (C, H, W) order, no auxiliary inputs).

    Args:
      x: normalized images [N, H, W, 3].
      tap: called at the seven taps.
      train: accepted for the interface's sake.

    Raises:
      errors.UsageError: the images are too small.
    """
    layers.check_image(x, "VGG-16", 32)
    x = layers.apply_tap(tap, 0, x.astype(self.dtype))
    for stage, widths in enumerate(_STAGES, 1):
      for i, features in enumerate(widths, 1):
        conv = layers.Conv(
          features,
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
