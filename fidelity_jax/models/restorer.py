"""What a restorer is."""

import jax
import jax.numpy as jnp
from flax import linen as nn


class Restorer(nn.Module):
  """A network that restores images; `models/restorers.py` lists them by name.

  One with batch norm has an `epsilon`, and overrides `folded`, as `models.fold` needs.
  """

  @property
  def epsilon(self) -> float:
    """Of the batch norms."""
    return 1e-5

  @nn.nowrap
  def folded(self) -> "Restorer":
    """Returns the network without batch norm."""
    return self

  def estimate(self, degraded: jax.Array, train: bool = False) -> jax.Array:
    """Returns the restored image as training sees it, not yet clipped.

    Gradients then reach pixels that overshoot.

    Args:
      degraded: float32 [N, H, W, C] in [0, 1].
      train: use and update batch statistics, where there are any.

    Returns:
      float32 [N, H, W, C].
    """
    raise NotImplementedError

  def restore(self, degraded: jax.Array) -> jax.Array:
    """Returns the restored image, float32 [N, H, W, C] in [0, 1].

    Args:
      degraded: float32 [N, H, W, C] in [0, 1].
    """
    return jnp.clip(self.estimate(degraded), 0, 1)
