"""Where arrays live: batches are split over devices, everything else is copied."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from fidelity_jax import errors

PyTree = Any


def make_mesh(size: int | None = None) -> jax.sharding.Mesh:
  """Returns a mesh over the devices of all hosts with the axis "data".

  Args:
    size: examples in the batches to be split over it. On one host, as many devices are
      taken as split it evenly. None: all are.
  """
  # Each host's devices hold one part of the batch, which that host reads.
  devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
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


def everywhere(mesh: jax.sharding.Mesh, tree: PyTree) -> PyTree:
  """Returns arrays that every device holds whole.

  Args:
    mesh: the devices.
    tree: arrays, the same on all hosts.
  """
  where = replicated(mesh)
  if jax.process_count() == 1:
    return jax.device_put(tree, where)

  def place(leaf):
    # Each host has it already; `device_put` would send it around to compare.
    array = np.asarray(leaf)
    return jax.make_array_from_callback(array.shape, where, lambda part: array[part])

  return jax.tree.map(place, tree)


def host_shard(batch: jax.sharding.NamedSharding) -> dict[str, int]:
  """Returns the part of each global batch that this host reads.

  Args:
    batch: the batch's sharding.
  """
  if batch.is_fully_replicated:
    return {"shard_index": 0, "shard_count": 1}
  return {"shard_index": jax.process_index(), "shard_count": jax.process_count()}


def fetch(arrays: PyTree) -> PyTree:
  """Returns arrays on the devices of all hosts as NumPy arrays, whole, on every host.

  Args:
    arrays: JAX arrays; all hosts call it with the same ones.
  """
  if jax.process_count() > 1:
    arrays = multihost_utils.process_allgather(arrays, tiled=True)
  return jax.device_get(arrays)


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
