"""The only training loop.

It knows tasks, batches and checkpoints, and does not depend on what a task trains. The
step is one compiled function; the host feeds it and reads numbers from time to time.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import math
import os
import pathlib
import time
from typing import Any

import flax
import jax
import jax.numpy as jnp
import msgspec
import optax

from fidelity_jax import (
  checkpoints,
  data,
  errors,
  hosts,
  metrics,
  optimizer,
  platform,
  progress,
  randomness,
  sharding,
  signals,
  throughput,
  timing,
  tracing,
)
from fidelity_jax.tasks import Task

PyTree = Any

# Validation keeps nothing for a backward pass, so its batches can be larger than
# training's: at least so many images, or patches.
_VALIDATION_IMAGES, _VALIDATION_PATCHES = 32, 128
# Of several hosts, between looks at whether it is time to save.
_LOOK_SECONDS = 5.0
# At most, for a program that is being compiled when a run stops.
_COMPILING_SECONDS = 20.0


@dataclasses.dataclass(frozen=True)
class Settings:
  """How to train, whatever the task (docs/method.md, section 6).

  Attributes:
    seed: the experiment's seed.
    purpose: names the stage's kind, so that stages draw independently.
    image_size: side of the images, pixels.
    images_per_step: images in one global batch.
    epochs: epochs in all.
    warmup_epochs: epochs of linear warm-up.
    validation_rounds: degradations of each validation image.
    learning_rate: peak learning rate.
    optimizer: "sgd" or "adam".
    checkpoint_seconds: longest time between checkpoints.
    workers: processes that decode images; 0 uses threads.
    crop_area: range of the training crop's share of the area.
    crop_aspect: range of the training crop's width / height.
    reduced_decode: decode JPEGs at reduced scale where the crop allows.
    precision: of the networks, which a chip's peak depends on.
    traced: the first and the last step to trace, or None.
  """

  seed: int
  purpose: str
  image_size: int
  images_per_step: int
  epochs: int
  warmup_epochs: int
  validation_rounds: int
  learning_rate: float
  optimizer: str
  checkpoint_seconds: float
  workers: int
  crop_area: tuple[float, float]
  crop_aspect: tuple[float, float]
  reduced_decode: bool
  precision: str = "float32"
  traced: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Result:
  """What training gave.

  Attributes:
    step: the best step.
    score: its validation score.
    product: digest of its variables.
  """

  step: int
  score: float
  product: str


@flax.struct.dataclass
class TrainState:
  """All that a step changes.

  Attributes:
    step: optimizer steps done, int32 scalar.
    params: what trains.
    model_state: batch statistics and the like.
    opt_state: the optimizer's state.
    averages: running averages of the epoch under way.
    bad_step: the first step whose loss was not finite, or -1.
  """

  step: jax.Array
  params: PyTree
  model_state: PyTree
  opt_state: PyTree
  averages: metrics.Averages
  bad_step: jax.Array

  def variables(self) -> PyTree:
    """Returns what the stage's checkpoint is for."""
    variables = {"params": self.params}
    return variables | ({"batch_stats": self.model_state} if self.model_state else {})

  def training(self) -> PyTree:
    """Returns what only resuming needs."""
    return {"opt_state": self.opt_state, "averages": self.averages}


def make_train_step(task: Task, tx: optax.GradientTransformation, root: jax.Array):
  """Returns the step function (state, frozen, batch) -> state, to be jitted.

  Args:
    task: what to train.
    tx: the optimizer.
    root: scalar PRNG key; each step derives its own from it, for dropout.
  """

  def train_step(state: TrainState, frozen: PyTree, batch) -> TrainState:
    key = jax.random.fold_in(root, state.step)
    loss = functools.partial(task.loss, frozen=frozen, batch=batch, train=True, key=key)
    gradient = jax.value_and_grad(loss, has_aux=True)
    (value, (model_state, values)), grads = gradient(state.params, state.model_state)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    ones = jnp.ones(len(values["loss"]))
    first_bad = (state.bad_step < 0) & ~jnp.isfinite(value)
    return TrainState(
      step=state.step + 1,
      params=optax.apply_updates(state.params, updates),
      model_state=model_state,
      opt_state=opt_state,
      averages=metrics.merge(state.averages, metrics.averages(values, ones)),
      bad_step=jnp.where(first_bad, state.step, state.bad_step),
    )

  return train_step


def make_eval_step(task: Task):
  """Returns (params, model_state, frozen, batch, draw) -> averages, to be jitted."""

  def eval_step(params, model_state, frozen, batch, draw) -> metrics.Averages:
    # Tasks draw degradations by epoch and index.
    batch = batch | {"epoch": jnp.full_like(batch["epoch"], draw)}
    _, (_, values) = task.loss(
      params, model_state, frozen, batch, train=False, key=jax.random.key(0)
    )
    mask = jnp.repeat(batch["mask"], task.patches_per_image)
    return metrics.averages(values, mask)

  return eval_step


def batch_shapes(
  images: int, size: int, where: jax.sharding.Sharding | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shapes of a batch of validation; training's has no "mask".

  Args:
    images: in a batch, over all hosts.
    size: side of the images, pixels.
    where: they live.
  """
  shape = functools.partial(jax.ShapeDtypeStruct, sharding=where)
  return {
    "image": shape((images, size, size, 3), jnp.uint8),
    **{name: shape((images,), jnp.int32) for name in ("label", "index", "epoch")},
    "mask": shape((images,), jnp.float32),
  }


def make_initial_state(task: Task, tx: optax.GradientTransformation, image_size: int):
  """Returns (key, task.initial) -> the state before the first step, to be jitted.

  Args:
    task: what to train.
    tx: the optimizer.
    image_size: side of the images, pixels.
  """

  def init(key: jax.Array, initial: PyTree) -> TrainState:
    params, model_state = task.init(key, initial)
    batch = batch_shapes(1, image_size)
    values = jax.eval_shape(
      make_eval_step(task), params, model_state, task.frozen, batch, 0
    )
    return TrainState(
      step=jnp.int32(0),
      params=params,
      model_state=model_state,
      opt_state=tx.init(params),
      averages=metrics.zeros_like(values),
      bad_step=jnp.int32(-1),
    )

  return init


def state_sharding(
  state: TrainState, tx: optax.GradientTransformation, layout: sharding.Layout
) -> TrainState:
  """Returns where the arrays of a state live; the optimizer's beside the parameters.

  Args:
    state: the state or its shapes.
    tx: the optimizer.
    layout: where arrays live.
  """
  where, whole = layout.of(state.variables()), layout.replicated
  opt_state = optax.tree_utils.tree_map_params(
    tx,
    lambda _, place: place,
    state.opt_state,
    where["params"],
    transform_non_params=lambda _: whole,
  )
  return TrainState(
    step=whole,
    params=where["params"],
    model_state=where.get("batch_stats", {}),
    opt_state=opt_state,
    averages=jax.tree.map(lambda _: whole, state.averages),
    bad_step=whole,
  )


class Trainer:
  """One stage's training: its compiled functions, data, files and state."""

  def __init__(
    self,
    title: str,
    task: Task,
    settings: Settings,
    train_data: data.Dataset,
    validation_data: data.Dataset,
    directory: pathlib.Path,
    layout: sharding.Layout,
  ):
    """Prepares to train.

    Args:
      title: what to call it in progress lines.
      task: what to train.
      settings: how; a batch fits the data.
      train_data: training examples.
      validation_data: validation examples.
      directory: the stage's directory, which exists.
      layout: where arrays live; over its devices a batch's examples (images or
        patches) are split.
    """
    self.title, self.task, self.settings = title, task, settings
    self.train_data, self.validation_data = train_data, validation_data
    self.directory = directory
    self.steps_per_epoch = len(train_data) // settings.images_per_step
    self.total_steps = self.steps_per_epoch * settings.epochs
    self.schedule = optimizer.learning_rate_schedule(
      settings.learning_rate,
      self.steps_per_epoch,
      settings.epochs,
      settings.warmup_epochs,
    )
    self.tx = optimizer.create(settings.optimizer, self.schedule)
    self.layout = layout
    # Where examples are patches, a few images need not split over many devices.
    self.batch_sharding = layout.images(settings.images_per_step)
    self.frozen = layout.place(task.frozen)
    self._init = make_initial_state(task, self.tx, settings.image_size)
    shapes = jax.eval_shape(self._init, jax.random.key(0), task.initial)
    self._state_sharding = state_sharding(shapes, self.tx, layout)
    self._state_shapes = sharding.placed(shapes, self._state_sharding)
    dropout = randomness.purpose_key(settings.seed, f"{settings.purpose}/dropout")
    step = make_train_step(task, self.tx, dropout)
    options = platform.compiler_options()
    self.train_step = jax.jit(
      step,
      donate_argnums=0,
      out_shardings=self._state_sharding,
      compiler_options=options,
    )
    self.eval_step = jax.jit(make_eval_step(task), compiler_options=options)
    self._compiling: concurrent.futures.Future | None = None

  def initial_state(self) -> TrainState:
    """Returns the state before the first step, on the devices."""
    settings = self.settings
    key = randomness.purpose_key(settings.seed, f"{settings.purpose}/init")

    # Run once, so compile cheaply: on CPU four times faster, and runs as fast.
    on_cpu = jax.default_backend() == "cpu"
    options = {"xla_backend_optimization_level": 1} if on_cpu else None
    init = jax.jit(
      self._init, out_shardings=self._state_sharding, compiler_options=options
    )
    return init(key, self.layout.place(self.task.initial))

  def _batches(self, start_step: int) -> data.BatchIterator:
    settings = self.settings
    return data.train_iterator(
      self.train_data,
      image_size=settings.image_size,
      batch_size=settings.images_per_step,
      seed=settings.seed,
      purpose=settings.purpose,
      epochs=settings.epochs,
      start_step=start_step,
      num_workers=settings.workers,
      crop_area=settings.crop_area,
      crop_aspect=settings.crop_aspect,
      reduced_decode=settings.reduced_decode,
      **sharding.host_shard(self.batch_sharding),
    )

  @functools.cached_property
  def _validation_size(self) -> int:
    """Images in a validation batch: as many training batches, which split evenly."""
    patches = self.task.patches_per_image
    least = _VALIDATION_IMAGES if patches == 1 else _VALIDATION_PATCHES // patches
    size = self.settings.images_per_step
    return size * max(1, least // size)

  def _compile_validation(self) -> None:
    """Compiles the validation step for where `validate` will look for it."""
    shapes = self._state_shapes
    size, where = self.settings.image_size, self.batch_sharding
    batch = batch_shapes(self._validation_size, size, where)
    self.eval_step.lower(
      shapes.params, shapes.model_state, self.frozen, batch, 0
    ).compile()

  def validate(self, state: TrainState) -> dict[str, float]:
    """Returns the validation metrics; every epoch draws the same degradations."""
    if self._compiling:
      with timing.kind(timing.COMPILATION):
        self._compiling.result()
    eval_step = platform.in_turn(self.eval_step)
    batches = data.eval_iterator(
      self.validation_data,
      image_size=self.settings.image_size,
      batch_size=self._validation_size,
      num_workers=0,
      **sharding.host_shard(self.batch_sharding),
    )
    total = None
    for batch in data.prefetch_to_device(batches, self.batch_sharding):
      for i in range(self.settings.validation_rounds):
        part = eval_step(state.params, state.model_state, self.frozen, batch, i)
        total = part if total is None else metrics.merge(total, part)
    return metrics.compute(total, "validation/")

  def run(self) -> Result:
    """Trains to the end, resuming from the latest checkpoint if there is one.

    Raises:
      RunError: if a loss is not a number, or a checkpoint cannot be written, cannot be
        read, or is damaged.
      Stopped: on SIGTERM or SIGINT, once everything is saved.
    """
    saved = checkpoints.Checkpoints(self.directory / "checkpoints")
    try:
      with timing.kind("steps"):
        state, progress_ = self._run(saved)
      with timing.kind("checkpoints"):
        saved.wait()
        hosts.wait(f"{self.title} is trained")
        product = saved.check_product(progress_.best_step, state.variables())
    except BaseException:
      # A failed write must not hide the failure that led here.
      with contextlib.suppress(Exception):
        saved.close()
      raise
    saved.close()
    score = progress_.best_score * self.task.score_sign
    return Result(progress_.best_step, score, product)

  def _run(
    self, saved: checkpoints.Checkpoints
  ) -> tuple[TrainState, checkpoints.Progress]:
    start = hosts.agree(saved.latest())
    left = start is None or start < self.total_steps
    if left and jax.default_backend() == "cpu" and (os.cpu_count() or 1) > 1:
      # XLA compiles with one core there: the training step has another.
      pool = concurrent.futures.ThreadPoolExecutor(1)
      self._compiling = pool.submit(self._compile_validation)
      pool.shutdown(wait=False)
    if start is None:
      state, done = self.initial_state(), checkpoints.Progress()
    else:
      like = self._state_shapes
      with timing.kind("checkpoints"):
        variables, training, done = saved.restore(
          start, like.variables(), like.training()
        )
      state = TrainState(
        # Where the first step has it, or the next step would be compiled again.
        step=self.layout.place(jnp.int32(start)),
        params=variables["params"],
        model_state=variables.get("batch_stats", {}),
        bad_step=self.layout.place(jnp.int32(-1)),
        **training,
      )
      progress.say(f"{self.title}: resuming at step {start} of {self.total_steps}.")
    writer = metrics.MetricWriter(self.directory, done.records, start or 0)
    if start is None and self.total_steps == 0:
      record = {"epoch": 0}
      done = self._finish_epoch(0, state, done, writer, record, time.monotonic())
      with timing.kind("checkpoints"):
        saved.save(0, state.variables(), state.training(), done)
    start = start or 0
    bar = progress.Progress(self.title, self.total_steps, start)
    settings = self.settings
    meter = throughput.Meter(
      settings.images_per_step, self.layout.mesh, settings.precision
    )
    tracer = tracing.Tracer(
      self.title,
      self.directory,
      settings.traced,
      start,
      self.total_steps,
      meter.paused,
    )
    last_save = epoch_start = began = time.monotonic()
    next_look = epoch_first = start
    batches = self._batches(start)
    prefetched = data.prefetch_to_device(batches, self.batch_sharding)
    try:
      for step in range(start + 1, self.total_steps + 1):
        with tracer.step(step, state):
          batch = meter.next(prefetched)
          if step == start + 1:
            meter.start(self.train_step, state, self.frozen, batch)
          state = self.train_step(state, self.frozen, batch)
        tracer.done(step, state)
        epoch, within = divmod(step, self.steps_per_epoch)
        improved = False
        if within == 0:
          self._check_finite(state)
          took = time.monotonic() - epoch_start
          record = {
            "epoch": epoch,
            "learning_rate": float(self.schedule(step - 1)),
            **metrics.compute(state.averages, "train/"),
            # Of an epoch that was interrupted, those since then.
            "steps_per_second": (step - epoch_first) / took,
            **meter.read("epoch"),
          }
          state = state.replace(averages=metrics.zeros_like(state.averages))
          with meter.paused():
            done = self._finish_epoch(step, state, done, writer, record, epoch_start)
          improved = done.best_step == step
          epoch_start, epoch_first = time.monotonic(), step
        # Read once a step, so that the message below agrees with the decision here.
        stopping = signals.received() is not None
        overdue = False
        if not hosts.several() or step >= next_look:
          # Clocks differ: the first host's counts, and is asked now and then.
          waited = time.monotonic() - last_save
          pace = max(step - start, 1) / max(time.monotonic() - began, 1e-9)
          waited, pace = hosts.agree([waited, pace])
          overdue = waited > self.settings.checkpoint_seconds
          next_look = step + max(round(_LOOK_SECONDS * pace), 1)
        if improved or stopping or overdue or step == self.total_steps:
          if within:
            self._check_finite(state)
          with meter.paused(), timing.kind("checkpoints"):
            saved.save(step, state.variables(), state.training(), done)
          last_save = time.monotonic()
        if stopping:
          saved.wait()
          signals.stop(f"{self.title} at step {step} of {self.total_steps}")
        if bar.due() or step == self.total_steps:
          self._check_finite(state)
          facts = {
            "epoch": f"{-(-step // self.steps_per_epoch)}/{self.settings.epochs}"
          }
          if within:
            facts["loss"] = metrics.compute(state.averages)["loss"]
          if done.best_step is not None:
            score = done.best_score * self.task.score_sign
            facts[f"best {self.task.score}"] = score
          # On a terminal lines come more often than records.
          if writer.interval_due() or step == self.total_steps:
            interval = {"step": step, "epoch": -(-step // self.steps_per_epoch)}
            if within:
              interval["train/loss"] = facts["loss"]
            writer.write_interval(interval | meter.read("interval"))
          facts |= throughput.facts(meter.read("line"))
          bar.update(step, **facts)
    finally:
      if self._compiling:
        # What is compiled is kept: let it be written to its end.
        concurrent.futures.wait([self._compiling], _COMPILING_SECONDS)
      tracer.close()
      bar.close()
      writer.close()
      batches.close()
    return state, done

  def _finish_epoch(
    self,
    step: int,
    state: TrainState,
    done: checkpoints.Progress,
    writer: metrics.MetricWriter,
    record: dict[str, float],
    start: float,
  ) -> checkpoints.Progress:
    """Validates and records; returns `done` with this epoch, begun at `start`."""
    # The last bit may differ from host to host, and decides what is the best.
    with timing.kind("validation"):
      validation = hosts.agree(self.validate(state))
    for name, value in validation.items():
      if not math.isfinite(value):
        raise errors.RunError(
          f"{self.title}: {name} is {value} after step {step}: lower learning_rate, or "
          "look at the weights that the stage starts from."
        )
    record = {"step": step, **record, **validation}
    # Of an epoch that was interrupted, since then.
    record["seconds"] = round(time.monotonic() - start, 3)
    writer.write(record)
    done = msgspec.structs.replace(done, records=[*done.records, record])
    score = self.task.score_sign * validation[f"validation/{self.task.score}"]
    # Of equal scores the earliest counts.
    if done.best_step is None or score > done.best_score:
      done = msgspec.structs.replace(done, best_step=step, best_score=score)
    return done

  def _check_finite(self, state: TrainState) -> None:
    """Raises RunError if some step's loss was not finite."""
    bad = int(state.bad_step)
    if bad < 0:
      return
    settings = self.settings
    # The loss is that of the whole batch, of which each host reads a part.
    batches = data.train_iterator(
      self.train_data,
      image_size=settings.image_size,
      batch_size=settings.images_per_step,
      seed=settings.seed,
      purpose=settings.purpose,
      epochs=settings.epochs,
      start_step=bad,
      shard_index=0,
      shard_count=1,
    )
    with batches:
      index = next(batches)["index"]
    keys = ", ".join(self.train_data.keys[i] for i in index)
    raise errors.RunError(
      f"{self.title}: the loss is not finite at step {bad + 1} (learning rate "
      f"{float(self.schedule(bad)):.3g}): lower learning_rate or look at the records "
      f"of that batch: {keys}"
    )
