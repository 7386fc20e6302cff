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

  @property
  def radius(self) -> int:
    """How many pixels away an input can be that an output depends on.

    Where all of that is in a window, the window gives what the whole image gives.
    """
    raise NotImplementedError

  @nn.nowrap
  def folded(self) -> "Restorer":
    """Returns the network without batch norm."""
    return self

  def estimate(
    self, degraded: jax.Array, train: bool = False, mask: jax.Array | None = None
  ) -> jax.Array:
    """Returns the restored image as training sees it, not yet clipped.

    Gradients then reach pixels that overshoot.

    Args:
      degraded: float32 [N, H, W, C] in [0, 1].
      train: use and update batch statistics, where there are any.
      mask: [N, H, W, 1], 1 where the images are and 0 beyond their borders, where
        `degraded` is 0: images then are restored as if they ended there. None: they
        are as large as the array.

    Returns:
      float32 [N, H, W, C].
    """
    raise NotImplementedError

  def restore(self, degraded: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Returns the restored image, float32 [N, H, W, C] in [0, 1].

    Args:
      degraded: float32 [N, H, W, C] in [0, 1].
      mask: see `estimate`.
    """
    return jnp.clip(self.estimate(degraded, mask=mask), 0, 1)
