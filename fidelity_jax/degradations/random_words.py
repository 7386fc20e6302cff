"""Random words by position: the fast generator that noise is drawn with.

`jax.random.bits` spends one Threefry block per 32-bit word; here one block gives a
pixel both its words. They are those of Threefry-2x32 with 20 rounds (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011), counter = pixel position, the
same on every platform.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry2x32_p

from fidelity_jax import cpu

# sin(pi/2 t) / t as a polynomial in t^2 on [0, 1]: least squares at Chebyshev nodes
# weighted for relative error, 3e-9 off in exact arithmetic.
_HALF_PI = np.pi / 2


def _fit_sine(terms: int = 5) -> tuple[np.float32, ...]:
  x = _HALF_PI * np.cos(np.pi * (np.arange(200) + 0.5) / 400)
  powers = x[:, None] ** (2 * np.arange(terms))
  solution = np.linalg.lstsq(powers, np.sin(x) / x, rcond=None)[0]
  return tuple(np.float32(c) for c in solution)


_SINE = _fit_sine()


def threefry(
  key: tuple[jax.Array, jax.Array], counter: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
  """Threefry-2x32-20: encrypts uint32 counter pairs under a pair of uint32 scalars.

  Args:
    key: two uint32 scalars.
    counter: two uint32 arrays of one shape.

  Returns:
    Two uint32 arrays of that shape, independent and uniform for all practical purposes.
  """
  return cpu.choose(_threefry, cpu.threefry)(*key, *counter)


def _threefry(*words: jax.Array) -> tuple[jax.Array, jax.Array]:
  return tuple(threefry2x32_p.bind(*words))


def words(key: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
  """Returns two independent uint32 arrays of `shape`.

  Args:
    key: a typed PRNG key of any implementation.
    shape: static; the word at a position depends on (key, flat position) alone.
  """
  seed = jax.random.bits(key, (2,), jnp.uint32)
  count = jax.lax.iota(jnp.uint32, int(np.prod(shape))).reshape(shape)
  return threefry((seed[0], seed[1]), (count, jnp.zeros_like(count)))


def uniform(word: jax.Array) -> jax.Array:
  """Maps uint32 words to float32 in (0, 1]: (word + 1/2) / 2^32, rounded."""
  return (word.astype(jnp.float32) + np.float32(0.5)) * np.float32(2**-32)


def normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Returns standard normal float32 values of `shape`, at most 6.77 in size.

  Box and Muller's transform (1958), sqrt(-2 ln u) sin(angle), with the angle uniform
  over half a circle only: the sine has the same distribution over either half.
  """
  first, second = words(key, shape)
  radius = jnp.sqrt(-2 * jnp.log(uniform(first)))
  signed = jax.lax.bitcast_convert_type(second, jnp.int32).astype(jnp.float32)
  angle = signed * np.float32(_HALF_PI / 2**31)
  square = angle * angle
  sine = jnp.full_like(angle, _SINE[-1])
  for coefficient in _SINE[-2::-1]:
    sine = sine * square + coefficient
  return radius * (sine * angle)
