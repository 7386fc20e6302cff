"""From stages to networks: made to be trained, or loaded, folded and frozen."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from fidelity_jax import (
  errors,
  locations,
  models,
  platform,
  port,
  sharding,
  stages,
  tasks,
)
from fidelity_jax.method import Method

PyTree = Any


class Frozen(NamedTuple):
  """A network whose training is finished: a module, or a whole `Method`.

  Attributes:
    network: the network, batch norm folded.
    variables: for its `apply`; a method's are a dictionary by role.
  """

  network: Any
  variables: PyTree


def task_of(stage: stages.Stage, num_classes: int) -> tasks.Task:
  """Returns what a stage trains, without any arrays: parents need not be finished."""
  parents = {
    role: _folded(task_of(parent, num_classes).network)
    for role, parent in stage.parents.items()
  }
  return _make(stage, parents, num_classes)


def _folded(network: Any) -> Any:
  return network.folded() if isinstance(network, nn.Module) else network


def _make(
  stage: stages.Stage,
  parents: dict[str, Any],
  num_classes: int,
  split: jax.sharding.Sharding | None = None,
) -> tasks.Task:
  inputs = tasks.base.make_inputs(stage.config, split)
  return stage.kind.make(stage.config, parents, num_classes, inputs)


def loaded_task(
  stage: stages.Stage, num_classes: int, layout: sharding.Layout
) -> tasks.Task:
  """Returns what a stage trains, with its finished parents' networks and weights.

  Args:
    stage: the stage.
    num_classes: of its dataset.
    layout: where arrays live.
  """
  task, initial = Loader(num_classes, layout).with_parents(stage)
  if part := given_part(stage.config):
    place = weights_of(stage.config)
    if port.content_digest(place) != stage.content.weights:
      raise errors.RunError(
        f"{place} is not what it was when the run began: run the same command again."
      )
    own = isinstance(task.network, nn.Module)
    initial = part.variables if own else initial | {stage.kind.name: part.variables}
  return dataclasses.replace(task, initial=initial or None)


def _start(task: tasks.Task, initial: PyTree) -> PyTree:
  """Returns the shapes of the variables that a stage trains, by collection.

  Raises:
    UsageError: such a network cannot be made, or `initial` is of another.
  """
  params, state = jax.eval_shape(task.init, jax.random.key(0), initial)
  return {"params": params} | ({"batch_stats": state} if state else {})


def trained(
  stage: stages.Stage, num_classes: int, layout: sharding.Layout | None = None
) -> tuple[Any, PyTree]:
  """Returns the network that a finished stage trained, and its variables as trained.

  Batch norm is not folded; of a whole method, the variables are those that trained.

  Args:
    stage: a finished stage.
    num_classes: of its dataset.
    layout: where arrays live; None: on this host's first device.
  """
  task = task_of(stage, num_classes)
  shapes = _start(task, None)
  return task.network, stage.load(layout.shapes(shapes) if layout else shapes)


class Loader:
  """Loads what finished stages gave, frozen, each stage once."""

  def __init__(self, num_classes: int, layout: sharding.Layout | None = None):
    """Loads nothing yet.

    Args:
      num_classes: of the stages' datasets.
      layout: where arrays live; None: on this host's first device.
    """
    self._num_classes, self._layout = num_classes, layout
    self._loaded: dict[tuple[str, Any], Frozen] = {}

  def __call__(self, stage: stages.Stage, dtype: Any = None) -> Frozen:
    """Returns the network that a finished stage gave.

    Args:
      stage: a finished stage.
      dtype: of the variables; by default the stage's compute dtype.
    """
    dtype = jnp.dtype(dtype or stage.config.precision)
    key = stage.name, dtype
    if key not in self._loaded:
      self._loaded[key] = self._load(stage, dtype)
    return self._loaded[key]

  def _load(self, stage: stages.Stage, dtype: Any) -> Frozen:
    network, variables = self._trained(stage)
    cast = functools.partial(jax.tree.map, lambda x: x.astype(dtype))
    if isinstance(network, Method):
      task, _ = self.with_parents(stage)
      each = lambda v: {role: {"params": cast(p)} for role, p in v["params"].items()}
      return Frozen(task.network, task.frozen | self._apply(each, variables))
    role = stage.kind.name
    fold = lambda v: {role: cast(models.fold(network, v)[1])}
    return Frozen(network.folded(), self._apply(fold, variables)[role])

  def _trained(self, stage: stages.Stage) -> tuple[Any, PyTree]:
    return trained(stage, self._num_classes, self._layout)

  def _apply(self, function: Callable[[PyTree], PyTree], variables: PyTree) -> PyTree:
    """Returns what a function makes of variables: others, by role."""
    where = self._layout and self._layout.of(jax.eval_shape(function, variables))
    return jax.jit(function, out_shardings=where)(variables)

  def with_parents(self, stage: stages.Stage) -> tuple[tasks.Task, PyTree]:
    """Returns a stage's task with its parents, and variables of those that train on.

    Args:
      stage: a stage whose parents are finished.
    """
    trained = task_of(stage, self._num_classes).trained_parents
    # What trains starts in full precision, whatever it computes in.
    parents = {
      role: self(parent, jnp.float32 if role in trained else None)
      for role, parent in stage.parents.items()
    }
    networks = {role: parent.network for role, parent in parents.items()}
    frozen, initial = {}, {}
    for role, parent in parents.items():
      if isinstance(parent.network, Method):
        frozen |= parent.variables
      else:
        (initial if role in trained else frozen)[role] = parent.variables
    split = self._layout and self._layout.batch
    task = _make(stage, networks, self._num_classes, split)
    return dataclasses.replace(task, frozen=frozen), initial


class Shapes(Loader):
  """The same of stages that need not be finished: shapes in place of arrays."""

  def _trained(self, stage: stages.Stage) -> tuple[Any, PyTree]:
    task = task_of(stage, self._num_classes)
    return task.network, _start(task, None)

  def _apply(self, function: Callable[[PyTree], PyTree], variables: PyTree) -> PyTree:
    return jax.eval_shape(function, variables)


def weights_of(config: ConfigDict) -> str | None:
  """Returns the path or name of the weights that a stage starts from, None for none.

  Raises:
    UsageError: there are none of that name for it.
  """
  place = config.model.weights
  if place == "torchvision":
    if "name" not in config.model:
      raise errors.UsageError(
        f"{config.kind}: torchvision has no weights for it: set model.weights to a "
        "checkpoint's path."
      )
    return f"torchvision/{config.model.name}"
  # Not Path.exists, which raises for names that are too long.
  if place is None or (
    port.is_name(place) and not os.path.exists(locations.expand(place))
  ):
    return place
  return str(locations.expand(place).absolute())


def given_part(config: ConfigDict) -> port.Part | None:
  """Returns the weights that a stage starts from, or None for its own.

  Args:
    config: a stage's config; `model.weights` names a path, a name such as
      "torchvision/resnet50", or "torchvision" for a classifier's own ImageNet weights.

  Raises:
    UsageError: they are not there or do not hold such a network.
    RunError: they cannot be downloaded or read.
  """
  place = weights_of(config)
  if place is None:
    return None
  side = config.dataset.image_size
  return port.load_part(place, config.kind, config.model, side)


def check(
  stage: stages.Stage,
  num_classes: int,
  given: port.Part | None,
  layout: sharding.Layout,
) -> None:
  """Checks what a stage is to train, without computing anything.

  Args:
    stage: the stage.
    num_classes: of its dataset.
    given: weights to start from, if any.
    layout: where arrays live.

  Raises:
    UsageError: such a network cannot be made or does not fit the memory, or the weights
      are of another.
  """
  task = task_of(stage, num_classes)
  expected = _start(task, None)
  _check_memory(stage.kind.name, layout.shapes(expected))
  if given is None:
    return
  initial = given.variables
  if isinstance(task.network, Method):
    initial = {stage.kind.name: initial}
  try:
    _start(task, initial)
  except errors.UsageError as error:
    differing = _differing(stage.config, task.network, given.config)
    what = f"{stage.kind.name}: {stage.config.model.weights}"
    if not differing:
      raise errors.UsageError(f"{what}: {error}") from error
    raise errors.UsageError(
      f"{what} holds another network than the config describes, with "
      f"{', '.join(differing)}: set model.weights to that network's own, or to None."
    ) from error


def _differing(
  config: ConfigDict, network: Any, described: dict[str, Any]
) -> list[str]:
  """Returns where the description of weights differs from a stage's network."""
  if "model" in described:
    # A classifier's own error names tensors: for another network's it would be all.
    theirs, ours = described["model"].get("name"), config.model.name
    if theirs is None or theirs == ours:
      return []
    return [f"model.name {theirs!r} (the config's is {ours!r})"]
  differing = []
  for name, value in described.items():
    wanted = config.model.get(name, getattr(network, name, None))
    if wanted is not None and wanted != value:
      differing.append(f"model.{name} {value!r} (the config's is {wanted!r})")
  if "feature_size" in described:
    differing.append(f"features of {described['feature_size']}")
  return differing


def _check_memory(kind: str, shapes: PyTree) -> None:
  """Raises UsageError if training a network cannot fit the memory of a device.

  Parameters, gradients and momentum are the least that has to fit.
  """
  leaves = jax.tree.leaves(shapes)
  count = sum(leaf.size for leaf in leaves)
  held = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
  # On a CPU, devices share the machine's.
  sharing = jax.local_device_count() if jax.default_backend() == "cpu" else 1
  needed, there = 12 * held * sharing, platform.memory()
  if needed > there:
    raise errors.UsageError(
      f"{kind}: its {count:,} parameters need at least {needed / 2**30:.3g} GiB to "
      f"train, more than the {there / 2**30:.3g} GiB of this machine: make the network "
      "smaller (model.width, model.ratio), or split it over devices (mesh.model)."
    )
