"""Additive white Gaussian noise, salt and pepper (docs/method.md, section 3)."""

import jax
import jax.numpy as jnp

from fidelity_jax.degradations import random_words


def awgn(key: jax.Array, image: jax.Array, level: jax.Array) -> jax.Array:
  """Adds white Gaussian noise, independent per pixel and channel, and clips.

  Args:
    key: typed PRNG key.
    image: float32 [H, W, C] in [0, 1].
    level: sigma, the noise's standard deviation: a scalar, or a field [H, W, 1].

  Returns:
    float32 [H, W, C] in [0, 1]: clip(image + sigma N(0, 1)). Sigma 0 is the identity.
  """
  noise = random_words.normal(key, image.shape)
  return jnp.clip(image + level * noise, 0, 1)


def salt_and_pepper(key: jax.Array, image: jax.Array, level: jax.Array) -> jax.Array:
  """Replaces values by black or white, independently per pixel and channel.

  Args:
    key: typed PRNG key.
    image: float32 [H, W, C] in [0, 1].
    level: p, the probability of replacement: a scalar, or a field [H, W, 1].

  Returns:
    float32 [H, W, C] in [0, 1]: with u uniform in (0, 1], 0 where u < p / 2, 1 where
    u > 1 - p / 2, else the image. p = 0 is the identity.
  """
  u = random_words.uniform(random_words.words(key, image.shape)[0])
  kept = jnp.where(u > 1 - level / 2, 1, image)
  return jnp.where(u < level / 2, 0, kept)
