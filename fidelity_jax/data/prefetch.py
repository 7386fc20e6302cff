"""Batches onto devices ahead of their use."""

import collections
from collections.abc import Iterable, Iterator

import jax
import numpy as np

from fidelity_jax.errors import UsageError


def prefetch_to_device(
  iterator: Iterable[dict[str, np.ndarray]],
  sharding: jax.sharding.Sharding | None = None,
  depth: int = 2,
) -> Iterator[dict[str, jax.Array]]:
  """Copies batches to devices while earlier ones are computed on.

  Args:
    iterator: this host's batches; closed, if it can be, with the generator.
    sharding: of the global batch, over its first axis; None for the default device.
    depth: number of batches on their way, at least 1.

  Yields:
    The batches as global arrays.

  Raises:
    UsageError: the depth is less than 1.
  """
  if depth < 1:
    raise UsageError(f"prefetch depth {depth} is less than 1")
  place = lambda batch: {k: _place(v, sharding) for k, v in batch.items()}
  ahead = collections.deque()
  try:
    # Copies are asynchronous: what is queued here is under way already.
    for batch in iterator:
      ahead.append(place(batch))
      if len(ahead) == depth:
        yield ahead.popleft()
    yield from ahead
  finally:
    if hasattr(iterator, "close"):
      iterator.close()


def _place(array: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
  if sharding is None:
    return jax.device_put(array)
  if jax.process_count() == 1:
    return jax.device_put(array, sharding)
  return jax.make_array_from_process_local_data(sharding, array)
