"""What a stage's training step holds, computes and sends, without running it.

The step is lowered from shapes alone, for whatever devices a mesh has, and compiled:
neither data nor weights nor finished parents are needed.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from fidelity_jax import (
  assembly,
  collectives,
  optimizer,
  platform,
  sharding,
  stages,
  tasks,
  throughput,
  train,
)
from fidelity_jax.datasets import Datasets

PyTree = Any

# Of what is in a device's memory.
_PARTS = ("parameters", "optimizer", "frozen", "batch", "activations")
_COLUMNS = ("stage", "devices", *_PARTS, "in all", "exchanged", "operations")


@dataclasses.dataclass(frozen=True)
class Step:
  """A training step that is lowered, and the shapes of what it is called with.

  Attributes:
    lowered: the step.
    state: `train.TrainState`.
    frozen: the networks that do not train.
    batch: the images and what belongs to them.
    devices: how many share the batch.
  """

  lowered: jax.stages.Lowered
  state: train.TrainState
  frozen: PyTree
  batch: PyTree
  devices: int

  @property
  def trained_bytes(self) -> int:
    """Size of the gradients of all trained parameters, as these are kept."""
    return sum(_size(x.shape, x.dtype) for x in jax.tree.leaves(self.state.params))


@dataclasses.dataclass(frozen=True)
class Footprint:
  """What a device holds and sends in a training step; sizes are bytes.

  Attributes:
    parameters: what trains, with batch statistics.
    optimizer: the optimizer's state.
    frozen: the networks that do not train.
    batch: its part of the batch, as the host hands it over.
    activations: what the step needs beyond these while it runs: features kept for the
      backward pass, gradients, temporary arrays.
    flops: floating-point operations of the step on all devices; None if not known.
    collectives: the operations that devices take part in together.
  """

  parameters: int
  optimizer: int
  frozen: int
  batch: int
  activations: int
  flops: float | None
  collectives: tuple[collectives.Collective, ...]

  @property
  def total(self) -> int:
    """All that is in a device's memory while the step runs."""
    kept = self.parameters + self.optimizer + self.frozen + self.batch
    return kept + self.activations

  @property
  def exchanged(self) -> int:
    """Bytes of all collective operations; see `collectives.Collective.bytes`."""
    return collectives.total(self.collectives)


def lower(stage: stages.Stage, num_classes: int, layout: sharding.Layout) -> Step:
  """Returns a stage's training step, lowered for the devices of a mesh.

  Args:
    stage: the stage; neither it nor its parents need be finished.
    num_classes: of its dataset.
    layout: where arrays live, on devices that need not be here
      (`jax.experimental.topologies`).
  """
  config = stage.config
  task, initial = assembly.Shapes(num_classes, layout).with_parents(stage)
  task = dataclasses.replace(task, initial=initial or None)
  size, images = config.dataset.image_size, tasks.base.images_per_step(config)
  tx = optimizer.create(config.optimizer, lambda step: config.learning_rate)
  init = train.make_initial_state(task, tx, size)
  state = jax.eval_shape(init, jax.random.key(0), task.initial)
  where = train.state_sharding(state, tx, layout)
  state, frozen = sharding.placed(state, where), layout.shapes(task.frozen)
  batch = train.batch_shapes(images, size, layout.images(images))
  step = train.make_train_step(task, tx, jax.random.key(0))
  step = jax.jit(step, donate_argnums=0, out_shardings=where)
  return Step(step.lower(state, frozen, batch), state, frozen, batch, layout.mesh.size)


def measure(step: Step, compiled: jax.stages.Compiled | None = None) -> Footprint:
  """Returns what a device holds and sends in a step.

  Args:
    step: from `lower`.
    compiled: of that, where it has been compiled already.
  """
  compiled = compiled or compile(step)
  memory = compiled.memory_analysis()
  state = step.state
  return Footprint(
    parameters=_held((state.params, state.model_state)),
    optimizer=_held(state.opt_state),
    frozen=_held(step.frozen),
    batch=_held(step.batch),
    activations=memory.temp_size_in_bytes,
    flops=throughput.flops(step.lowered),
    collectives=tuple(collectives.read(compiled.as_text())),
  )


def compile(step: Step) -> jax.stages.Compiled:
  """Returns a step compiled as training compiles it."""
  place = jax.tree.leaves(step.state)[0].sharding.mesh.devices.flat[0]
  options = platform.compiler_options() if place.platform == "cpu" else None
  return step.lowered.compile(compiler_options=options)


def describe(planned: list[stages.Stage], datasets: Datasets) -> str:
  """Returns a table of what the steps of stages hold and send, each compiled for it.

  Args:
    planned: the stages; what nothing is left to do for is left out.
    datasets: what loads their images.
  """
  lines = [_COLUMNS]
  for stage in planned:
    config = stage.config
    if stage.finished() or not config.epochs:
      continue
    classes = datasets.encoded(config.dataset, "train").num_classes
    layout = sharding.make_layout(config.mesh, config.batch_size)
    seen = measure(lower(stage, classes, layout))
    sizes = (getattr(seen, name) for name in (*_PARTS, "total", "exchanged"))
    cells = [f"{size / 2**20:.1f}" for size in sizes]
    operations = str(len(seen.collectives))
    lines.append((stage.name, str(layout.mesh.size), *cells, operations))
  if len(lines) == 1:
    return "\nNothing is left to train."
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  table = [
    "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
    for line in lines
  ]
  title = "Training steps: MiB per device, and exchanged by devices in each step"
  return "\n".join(["", title, "", *(line.rstrip() for line in table)])


def _held(shapes: PyTree) -> int:
  """Returns the bytes of arrays in each device's memory."""
  leaves = jax.tree.leaves(shapes)
  return sum(_size(x.sharding.shard_shape(x.shape), x.dtype) for x in leaves)


def _size(shape: tuple[int, ...], dtype: Any) -> int:
  return math.prod(shape) * jnp.dtype(dtype).itemsize
