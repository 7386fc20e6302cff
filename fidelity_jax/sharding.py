"""Where arrays live: batches are split over devices, everything else is copied."""

import jax
import numpy as np

from fidelity_jax import errors


def make_mesh(size: int | None = None) -> jax.sharding.Mesh:
  """Returns a mesh over the devices of all hosts with the axis "data".

  Args:
    size: examples in the batches to be split over it. On one host, as many devices are
      taken as split it evenly. None: all are.
  """
  devices = jax.devices()
  if size is not None and jax.process_count() == 1:
    count = next(n for n in range(min(len(devices), size), 0, -1) if size % n == 0)
    devices = devices[:count]
  return jax.sharding.Mesh(np.asarray(devices), ("data",))


def batch(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  """Returns the sharding of arrays whose first axis is the global batch."""
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))


def images(mesh: jax.sharding.Mesh, count: int) -> jax.sharding.NamedSharding:
  """Returns the sharding of a batch's images: split, or where that is uneven, copied.

  Args:
    mesh: the devices.
    count: images in the batch.
  """
  return replicated(mesh) if count % mesh.size else batch(mesh)


def replicated(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  """Returns the sharding of arrays that every device holds whole."""
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def host_shard(batch: jax.sharding.NamedSharding) -> dict[str, int]:
  """Returns the part of each global batch that this host reads.

  Args:
    batch: the batch's sharding.
  """
  if batch.is_fully_replicated:
    return {"shard_index": 0, "shard_count": 1}
  return {"shard_index": jax.process_index(), "shard_count": jax.process_count()}


def round_up(mesh: jax.sharding.Mesh, size: int) -> int:
  """Returns the least multiple of the device count that is at least `size`."""
  return -(-size // mesh.size) * mesh.size


def check_batch(mesh: jax.sharding.Mesh, size: int, where: str) -> None:
  """Raises UsageError unless a batch of `size` examples splits over the devices."""
  if size % mesh.size:
    raise errors.UsageError(
      f"{where}: batch_size {size} does not split evenly over {mesh.size} devices: "
      f"use a multiple, such as {round_up(mesh, size)}."
    )
