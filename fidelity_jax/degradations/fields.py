"""Level fields: how a level varies over an image (docs/method.md, section 3)."""

import jax
import jax.numpy as jnp


def linear(key: jax.Array, size: tuple[int, int], ends: jax.Array) -> jax.Array:
  """1D variation: the level changes linearly along the rows or the columns.

  Two fair coins choose rows or columns, and a to b or b to a. At index i of n the
  level is a (1 - t) + b t with t = i / (n - 1), so both ends are met to the bit.

  Args:
    key: typed PRNG key.
    size: (H, W), static.
    ends: float32 [2], the two ends (a, b).

  Returns:
    float32 [H, W, 1].
  """
  height, width = size
  along_rows, reverse = jax.random.bernoulli(key, shape=(2,))
  row = _fractions(height)[:, None, None]
  column = _fractions(width)[None, :, None]
  t = jnp.where(along_rows, row, column)
  a, b = _coin_order(reverse, ends)
  return a * (1 - t) + b * t


def radial(key: jax.Array, size: tuple[int, int], ends: jax.Array) -> jax.Array:
  """2D variation: the level changes linearly with the distance to a random pixel.

  The pixel p0 is uniform; level(p) = b + (a - b) |p - p0| / (distance from p0 to its
  farthest corner); a fair coin swaps a and b.

  Args:
    key: typed PRNG key.
    size: (H, W), static.
    ends: float32 [2], the two ends (a, b): a at the farthest corner, b at p0.

  Returns:
    float32 [H, W, 1].
  """
  height, width = size
  row_key, column_key, coin_key = jax.random.split(key, 3)
  row = jax.random.randint(row_key, (), 0, height)
  column = jax.random.randint(column_key, (), 0, width)
  a, b = _coin_order(jax.random.bernoulli(coin_key), ends)
  # Squares are integers, hence exact; the compiler's division need not be.
  rows = jnp.square(jnp.arange(height) - row)[:, None, None]
  columns = jnp.square(jnp.arange(width) - column)[None, :, None]
  farthest = jnp.square(jnp.maximum(row, height - 1 - row))
  farthest += jnp.square(jnp.maximum(column, width - 1 - column))
  squared = rows + columns
  root = lambda x: jnp.sqrt(x.astype(jnp.float32))
  t = jnp.where(squared == farthest, 1, root(squared) / root(farthest))
  return a * t + b * (1 - t)


def _fractions(n: int) -> jax.Array:
  """Fractions of the way from first to last index: index / (n - 1)."""
  return jnp.arange(n, dtype=jnp.float32) / max(n - 1, 1)


def _coin_order(swap: jax.Array, ends: jax.Array) -> tuple[jax.Array, jax.Array]:
  return jnp.where(swap, ends[1], ends[0]), jnp.where(swap, ends[0], ends[1])
