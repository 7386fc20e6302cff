"""Rectangular crop: a square of the image is lost (docs/method.md, section 3)."""

import jax
import jax.numpy as jnp


def rectangular_crop(key: jax.Array, image: jax.Array, level: jax.Array) -> jax.Array:
  """Sets a square to 0, wholly inside the image at a uniform position.

  The side is floor(level * min(H, W) + 1/2) pixels. With two uniform draws u, v the
  top row is floor(u (H - side + 1)) and the left column floor(v (W - side + 1)).

  Args:
    key: typed PRNG key.
    image: float32 [H, W, C] in [0, 1].
    level: the side's ratio to the shorter side of the image, in [0, 1]: a scalar, or a
      field [H, W, 1]. With a field a pixel is lost if the square of its own level, at
      the image's one (u, v), covers it: the square becomes a wedge or a rounded shape,
      wide where the level is high.

  Returns:
    float32 [H, W, C] in [0, 1]. Level 0 is the identity.
  """
  height, width, _ = image.shape
  shorter = min(height, width)
  side = jnp.clip(jnp.floor(level * shorter + 0.5), 0, shorter)
  u, v = jax.random.uniform(key, (2,))
  top = jnp.minimum(jnp.floor(u * (height - side + 1)), height - side)
  left = jnp.minimum(jnp.floor(v * (width - side + 1)), width - side)
  row = jnp.arange(height, dtype=jnp.float32)[:, None, None]
  column = jnp.arange(width, dtype=jnp.float32)[None, :, None]
  lost = (row >= top) & (row < top + side) & (column >= left) & (column < left + side)
  return jnp.where(lost, 0, image)
