"""Where arrays live: batches are split over devices, everything else is copied."""

import jax
import numpy as np

from fidelity_jax import errors


def make_mesh() -> jax.sharding.Mesh:
  """Returns a mesh over all devices of all hosts with the axis "data"."""
  return jax.sharding.Mesh(np.asarray(jax.devices()), ("data",))


def batch(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  """Returns the sharding of arrays whose first axis is the global batch."""
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))


def replicated(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  """Returns the sharding of arrays that every device holds whole."""
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def host_shard() -> dict[str, int]:
  """Returns the part of each global batch that this host reads."""
  return {"shard_index": jax.process_index(), "shard_count": jax.process_count()}


def round_up(mesh: jax.sharding.Mesh, size: int) -> int:
  """Returns the least multiple of the device count that is at least `size`."""
  return -(-size // mesh.size) * mesh.size


def check_batch(mesh: jax.sharding.Mesh, size: int, where: str) -> None:
  """Raises UsageError unless a batch of `size` images splits over the devices."""
  if size % mesh.size:
    raise errors.UsageError(
      f"{where}: a batch of {size} images does not split evenly over {mesh.size} "
      f"devices: use a multiple, such as {round_up(mesh, size)}."
    )
