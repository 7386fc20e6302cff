"""The fidelity map and the confidence map made from it (docs/method.md, section 4).

A fidelity map says, pixel by pixel, how far the restored image is from the clean
one. Three exist: the l1 distance, the l2 distance, and the cosine similarity
of the colour vectors.
"""

import math

import jax
import jax.numpy as jnp

from fidelity_jax import errors

MAPS = ("l1", "l2", "cosine")

# What the restorer is assumed to leave of the noise: half of its variance. The
# mixture's own would be the sum divided by 6; the paper's appendix B divides by 6
# squared.
VARIANCE = sum(sigma**2 for sigma in (0.1, 0.2, 0.3, 0.4, 0.5)) / (2 * 6**2)

# (mu, s) per map. Errors that are normal with that variance have an l1 distance
# with exactly this mean and standard deviation (the half-normal distribution), and
# an l2 distance with this mean and standard deviation (sigma^2 times chi-squared
# with one degree of freedom; the paper calls sqrt(2) sigma^2 its variance).
NORMALIZATION = {
  "l1": (
    math.sqrt(VARIANCE) * math.sqrt(2 / math.pi),
    math.sqrt(VARIANCE) * math.sqrt(1 - 2 / math.pi),
  ),
  "l2": (VARIANCE, math.sqrt(2) * VARIANCE),
}

_COSINE_EPS = 1e-6


def check_name(name: str) -> str:
  """Returns `name` if it names a fidelity map.

  Raises:
    UsageError: it is not one of `MAPS`.
  """
  return errors.check_choice("fidelity map", name, MAPS)


def map_channels(name: str, image_channels: int = 3) -> int:
  """Returns how many channels a map has: 1 for cosine, else the image's.

  This is the number of output channels of an estimator of that map.

  Raises:
    UsageError: `name` is not one of `MAPS`.
  """
  return 1 if check_name(name) == "cosine" else image_channels


def oracle_map(restored: jax.Array, clean: jax.Array, name: str = "l1") -> jax.Array:
  """Returns the true fidelity map of restored images (the paper, section 4.1).

  Args:
    restored: float [N, H, W, C] in [0, 1].
    clean: float [N, H, W, C] in [0, 1].
    name: "l1": |r - x|; "l2": (r - x)^2; "cosine": the similarity of the two
      pixels' colour vectors, each norm at least 1e-6.

  Returns:
    The map, [N, H, W, C] for l1 and l2, [N, H, W, 1] for cosine; dtype as given.
    In [0, 1] for images in [0, 1].

  Raises:
    UsageError: there is no such map.
  """
  check_name(name)
  if name == "l1":
    return jnp.abs(restored - clean)
  if name == "l2":
    return jnp.square(restored - clean)
  return jnp.sum(_unit(restored) * _unit(clean), axis=-1, keepdims=True)


def confidence(fidelity_map: jax.Array, name: str = "l1") -> jax.Array:
  """Returns the confidence map f = mean over channels of 1 - (m - mu) / s.

  Higher means better restored. For cosine maps f is the similarity itself.

  Args:
    fidelity_map: float [N, H, W, C], from `oracle_map` or an estimator.
    name: the map's; selects mu and s from `NORMALIZATION`.

  Returns:
    f, [N, H, W, 1]; dtype as given. Unbounded; about 1 on average for errors of
    the size the normalization assumes.

  Raises:
    UsageError: there is no such map.
  """
  if check_name(name) != "cosine":
    mean, std = NORMALIZATION[name]
    fidelity_map = 1 - (fidelity_map - mean) / std
  return jnp.mean(fidelity_map, axis=-1, keepdims=True)


def _unit(x: jax.Array) -> jax.Array:
  """Divides by the norm over channels, the norm clamped below at 1e-6."""
  squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  # Clamping under the root keeps the gradient at black pixels finite.
  return x / jnp.sqrt(jnp.maximum(squared, _COSINE_EPS**2))
