"""Random draws that depend on their place, not on the order of calls.

Every random draw in fidelity_jax is a function of where it is needed: a seed, an
epoch (training) or a round (evaluation), and an example's index in its dataset.
Batch size, device count, host count and resumption cannot change it.
"""

import zlib

import jax


def purpose_key(seed: int, purpose: str) -> jax.Array:
  """Returns the key of one purpose ("degrade", "flip", ...) under a seed.

  Args:
    seed: the experiment's seed, a Python int.
    purpose: a name; different purposes give independent keys.

  Returns:
    A scalar typed PRNG key.
  """
  return jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))


def example_keys(key: jax.Array, epoch: jax.Array, index: jax.Array) -> jax.Array:
  """Returns one key per example of a batch.

  Args:
    key: scalar typed PRNG key, from `purpose_key`.
    epoch: int32, scalar or [N]: the epoch in training, the round in evaluation.
    index: int32 [N]: each example's index in its dataset.

  Returns:
    Typed PRNG keys [N]; key i depends on (key, epoch, index[i]) alone.
  """
  epoch = jax.numpy.broadcast_to(epoch, index.shape)
  fold = lambda e, i: jax.random.fold_in(jax.random.fold_in(key, e), i)
  return jax.vmap(fold)(epoch, index)
