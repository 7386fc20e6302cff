"""Batches onto devices ahead of their use."""

import collections
from collections.abc import Iterable, Iterator

import jax
import numpy as np

# Batches on their way to the devices, the one that is asked for among them.
_DEPTH = 2


def prefetch_to_device(
  iterator: Iterable[dict[str, np.ndarray]],
  sharding: jax.sharding.Sharding | None = None,
) -> Iterator[dict[str, jax.Array]]:
  """Copies batches to devices while earlier ones are computed on.

  Args:
    iterator: this host's batches; closed, if it can be, with the generator.
    sharding: of the global batch, over its first axis; None for the default device.

  Yields:
    The batches as global arrays.
  """
  place = lambda batch: {k: _place(v, sharding) for k, v in batch.items()}
  ahead = collections.deque()
  try:
    # Copies are asynchronous: what is queued here is under way already.
    for batch in iterator:
      ahead.append(place(batch))
      if len(ahead) == _DEPTH:
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
