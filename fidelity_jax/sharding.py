"""Where arrays live, said once: a mesh of devices, and rules from names to its axes.

Batches are split over the mesh's axis "data". Every other array has a name, its path in
the checkpoint; the first rule that matches it says over which axes it is split, and
`jax.jit` does the rest. With the rules there are by default, large arrays are split
over "model", which is one device wide until it is made wider: every device then holds
everything.
"""

import dataclasses
import math
import re
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from fidelity_jax import errors, rules

PyTree = Any

# What a rule may say: axes of the mesh over which an array is split.
_AXES = {
  "": (),
  "data": ("data",),
  "model": ("model",),
  "data+model": ("data", "model"),
}
_LARGE = 2**20
_RULES = ((".*", "model"),)
_SIZE = rules.Rule(
  "a number of devices, or -1 for the rest of them",
  lambda v: v == -1 or rules.whole(1, 1_000_000).holds(v),
)


def _possible_rule(value: Any) -> bool:
  try:
    pattern, axes = value
    re.compile(pattern)
  except (TypeError, ValueError, OverflowError, RecursionError, re.error):
    return False
  return isinstance(pattern, str) and isinstance(axes, str) and axes in _AXES


# Fields of `mesh`.
FIELDS: rules.Table = {
  "data": _SIZE,
  "model": _SIZE,
  "rules": rules.Rule(
    "a tuple of pairs (regular expression, axes), axes "
    f"one of {', '.join(map(repr, _AXES))}",
    lambda v: isinstance(v, tuple | list) and all(map(_possible_rule, v)),
  ),
  "min_size": rules.whole(1, 2**62),
}


def default_config() -> ConfigDict:
  """Returns the field `mesh` of an experiment's config."""
  return ConfigDict(
    {
      # Devices along each axis; -1: what the other leaves. Batches are split over
      # "data" alone.
      "data": -1,
      "model": 1,
      # The first whose expression is found in an array's name counts; what none
      # matches every device holds whole. ((".*", "data"),) is FSDP.
      "rules": _RULES,
      # Elements; smaller arrays are not split.
      "min_size": _LARGE,
    }
  )


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where arrays live.

  Attributes:
    mesh: the devices, with axes "data" and "model".
    rules: pairs of a regular expression and the axes, a key of `_AXES`, over which
      arrays are split in whose name it is found.
    min_size: of the arrays that are split, elements.
  """

  mesh: jax.sharding.Mesh
  rules: tuple[tuple[str, str], ...] = _RULES
  min_size: int = _LARGE

  @property
  def batch(self) -> NamedSharding:
    """The sharding of arrays whose first axis is the global batch."""
    return NamedSharding(self.mesh, PartitionSpec("data"))

  @property
  def replicated(self) -> NamedSharding:
    """The sharding of arrays that every device holds whole."""
    return NamedSharding(self.mesh, PartitionSpec())

  @property
  def parts(self) -> int:
    """Into how many parts a batch is split."""
    return self.mesh.shape["data"]

  def images(self, count: int) -> NamedSharding:
    """Returns the sharding of a batch's images: split, or where uneven, copied.

    Args:
      count: images in the batch.
    """
    return self.replicated if count % self.parts else self.batch

  def of(self, tree: PyTree) -> PyTree:
    """Returns the sharding of each array of a tree.

    Args:
      tree: arrays or their shapes; their paths are their names. Those of what trains
        begin with "params", those of frozen networks with their role, as in
        "classifier/params/head/fc/kernel".
    """

    def where(path, leaf) -> NamedSharding:
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      return NamedSharding(self.mesh, self._spec(name, leaf.shape))

    return jax.tree_util.tree_map_with_path(where, tree)

  def _spec(self, name: str, shape: tuple[int, ...]) -> PartitionSpec:
    if math.prod(shape) < self.min_size:
      return PartitionSpec()
    found = (axes for pattern, axes in self.rules if re.search(pattern, name))
    axes = _AXES[next(found, "")]
    parts = math.prod(self.mesh.shape[axis] for axis in axes)
    # The longest of its axes that can be split; of equal ones the last, the outputs.
    order = sorted(range(len(shape)), key=lambda i: (shape[i], i), reverse=True)
    chosen = next((i for i in order if shape[i] % parts == 0), None)
    if parts == 1 or chosen is None:
      return PartitionSpec()
    return PartitionSpec(*[None] * chosen, axes)

  def shapes(self, tree: PyTree) -> PyTree:
    """Returns the shapes of a tree's arrays with the sharding of each."""
    return placed(tree, self.of(tree))

  def place(self, tree: PyTree) -> PyTree:
    """Returns arrays where they belong.

    Args:
      tree: arrays, the same on all hosts; see `of`.
    """
    where = self.of(tree)
    if jax.process_count() == 1:
      return jax.device_put(tree, where)
    return jax.tree.map(_place, tree, where)


def placed(tree: PyTree, where: PyTree) -> PyTree:
  """Returns the shapes of a tree's arrays with given shardings.

  Args:
    tree: arrays or their shapes.
    where: the sharding of each.
  """
  put = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
  return jax.tree.map(put, tree, where)


def _place(leaf: Any, where: NamedSharding) -> jax.Array:
  if isinstance(leaf, jax.Array) and leaf.sharding.is_equivalent_to(where, leaf.ndim):
    return leaf
  # Each host has it already; `device_put` would send it around to compare.
  array = np.asarray(leaf)
  return jax.make_array_from_callback(array.shape, where, lambda part: array[part])


def make_layout(config: ConfigDict | None = None, size: int | None = None) -> Layout:
  """Returns where arrays live on the devices of all hosts.

  Args:
    config: fields as of `default_config`; None: those.
    size: examples in the batches to be split. On one host, with mesh.data=-1, as many
      devices are taken as split it evenly. None: all are.

  Raises:
    UsageError: there are no such devices.
  """
  config = config or default_config()
  mesh = _mesh(config.data, config.model, size)
  return Layout(mesh, tuple(map(tuple, config.rules)), config.min_size)


def _mesh(data: int, model: int, size: int | None) -> jax.sharding.Mesh:
  # Each host's devices stand together: they hold one part of the batch, which that host
  # reads, and what is split over "model" is gathered within a host if it can be.
  devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
  count, hosts = len(devices), jax.process_count()
  given = f"mesh.data={data}, mesh.model={model}"
  if data == model == -1:
    raise errors.UsageError(f"{given}: one of them can be the rest: set the other.")
  there = f"{count} device{'s' * (count > 1)}"
  if -1 in (data, model) and count % max(data, model):
    raise errors.UsageError(
      f"{given}: {there} cannot be divided by {max(data, model)}: choose a divisor."
    )
  whole = data == -1
  if whole:
    data = count // model
  if model == -1:
    model = count // data
  if whole and size is not None and hosts == 1:
    data = next(n for n in range(min(data, size), 0, -1) if size % n == 0)
  needed, local = data * model, count // hosts
  if needed > count:
    raise errors.UsageError(
      f"{given}: that is {needed} devices, and there are {count}: make one smaller."
    )
  if needed < count and hosts > 1:
    raise errors.UsageError(
      f"{given}: that is {needed} devices, but the processes of a job use all {count} "
      "of theirs: set one to -1."
    )
  if hosts > 1 and local % model and model % local:
    raise errors.UsageError(
      f"{given}: each process has {local} devices, of which a row of {model} must be a "
      "divisor or a multiple."
    )
  grid = np.asarray(devices[:needed]).reshape(data, model)
  return jax.sharding.Mesh(grid, ("data", "model"))


def host_shard(batch: NamedSharding) -> dict[str, int]:
  """Returns the part of each global batch that this host reads.

  Args:
    batch: the batch's sharding.
  """
  if batch.is_fully_replicated:
    return {"shard_index": 0, "shard_count": 1}
  here = jax.process_index()
  grid = batch.mesh.devices
  own = [i for i, row in enumerate(grid) if any(d.process_index == here for d in row)]
  return {"shard_index": own[0] // len(own), "shard_count": len(grid) // len(own)}


def fetch(arrays: PyTree) -> PyTree:
  """Returns arrays on the devices of all hosts as NumPy arrays, whole, on every host.

  Args:
    arrays: JAX arrays; all hosts call it with the same ones.
  """
  if jax.process_count() > 1:
    arrays = multihost_utils.process_allgather(arrays, tiled=True)
  return jax.device_get(arrays)


def gather(array: np.ndarray) -> np.ndarray:
  """Returns each host's array, [P, ...]; all hosts call it.

  Args:
    array: of the same shape and type on all of them.
  """
  if jax.process_count() == 1:
    return array[None]
  return np.asarray(multihost_utils.process_allgather(array))


def round_up(layout: Layout, size: int) -> int:
  """Returns the least batch of at least `size` that splits over the devices."""
  return -(-size // layout.parts) * layout.parts


def check_batch(layout: Layout, size: int, where: str) -> None:
  """Raises UsageError unless a batch of `size` examples splits over the devices."""
  if size % layout.parts:
    raise errors.UsageError(
      f"{where}: batch_size {size} does not split evenly over {layout.parts} devices: "
      f"use a multiple, such as {round_up(layout, size)}."
    )
