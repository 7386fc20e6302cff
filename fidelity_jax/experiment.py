"""An experiment: find or train each stage, evaluate, report."""

import contextlib
import os
import pathlib
from collections.abc import Iterator

from ml_collections import ConfigDict

from fidelity_jax import (
  data,
  degradations,
  errors,
  evaluate,
  files,
  networks,
  port,
  progress,
  report,
  sharding,
  signals,
  stages,
  streams,
  tasks,
  train,
  validation,
)
from fidelity_jax.data import patches


def run(config: ConfigDict, workdir: str) -> None:
  """Runs an experiment: trains what is not trained yet, evaluates and reports.

  Args:
    config: an experiment's config, as those in configs/.
    workdir: directory for stages, results and pictures; made where absent.

  Raises:
    UsageError: if the config asks for something impossible.
    RunError: if something fails on the way.
    Stopped: on SIGTERM or SIGINT, once everything is saved.
  """
  config = config.copy_and_resolve_references()
  validation.check(config)
  directory = files.expand(workdir)
  with files.locked(directory), _staying(directory):
    streams.log_to(directory / "log.txt")
    final = stages.resolve(config, directory)
    if "ensemble" in config and config.ensemble.enabled:
      final = stages.resolve(_ensemble_config(config), directory)
    datasets = Datasets()
    plan = list(final.lineage())
    _check(plan, datasets)
    evaluation = None
    if "evaluation" in config:
      evaluation = evaluate.Evaluation(final, config, datasets)
      report.check(directory)
    signals.work_begins()
    for number, stage in enumerate(plan, 1):
      signals.stop_if_received(f"before {stage.name}")
      complete(stage, datasets, f"[{number}/{len(plan)}] ")
    if evaluation:
      results = evaluation.run()
      report.write(directory, config, results, [_describe(stage) for stage in plan])
      progress.say(f"wrote {directory / 'report.md'}, results.json and pictures.")


@contextlib.contextmanager
def _staying(directory: pathlib.Path) -> Iterator[None]:
  """Says so if a failure comes of the workdir's having been removed."""
  # While it is held its inode is given to no other.
  held = os.open(directory, os.O_RDONLY)
  try:
    yield
  except errors.UsageError:
    raise
  except Exception as error:
    there = directory.is_dir() and os.path.samestat(os.fstat(held), directory.stat())
    if not isinstance(error, errors.RunError):
      # What is removed while it is written to may leave its directory behind.
      there = there and (directory / ".lock").exists()
    if not there:
      raise errors.RunError(
        f"workdir {directory} was removed while the run was working in it: run the "
        "same command again to begin anew."
      ) from error
    raise
  finally:
    os.close(held)


def _ensemble_config(config: ConfigDict) -> ConfigDict:
  """Returns the config of the ensemble phase of a calibration experiment."""
  ensemble = ConfigDict(
    {k: v for k, v in config.items() if k not in ("model", "parents")}
  )
  ensemble.kind = "ensemble"
  own = {k: v for k, v in config.ensemble.items() if k not in ("enabled", "weights")}
  ensemble.update(own)
  ensemble.model = {"ratio": config.model.ratio, "weights": config.ensemble.weights}
  ensemble.parents = ConfigDict({"calibration": config})
  return ensemble


def _describe(stage: stages.Stage) -> str:
  record = stage.finished()
  return f"`{stage.name}`: validation {record.metric} {record.score:.4g}"


class Datasets:
  """Loads each split of each dataset once."""

  def __init__(self):
    self._loaded: dict[tuple[str, str], data.Dataset] = {}

  def load(self, config: ConfigDict, split: str) -> data.Dataset:
    """Returns one split ("train", "validation" or "test") of a dataset."""
    key = (config.to_json_best_effort(sort_keys=True), split)
    if key not in self._loaded:
      self._loaded[key] = data.load(config, split)
    return self._loaded[key]

  def fingerprint(self, config: ConfigDict) -> str:
    """Returns the fingerprint of what a stage is trained and selected on."""
    splits = [self.load(config, split) for split in ("train", "validation")]
    return "-".join(dataset.fingerprint[:16] for dataset in splits)


def _check(plan: list[stages.Stage], datasets: Datasets) -> None:
  """Fails now on what would fail after hours: data or weights that are missing or do
  not fit, batch sizes, stages in the workdir that were made of something else.

  Raises:
    UsageError: if something does not fit.
    RunError: names everything that is missing.
  """
  missing = {}

  @contextlib.contextmanager
  def noting():
    try:
      yield
    except errors.Missing as error:
      missing[str(error)] = None

  for stage in plan:
    record = given = None
    with noting():
      record = stage.check(datasets.fingerprint(stage.config.dataset))
    with noting():
      given = None if record else networks.given_part(stage.config)
    with noting():
      _check_fit(stage, given, datasets)
  if missing:
    raise errors.RunError(
      f"{'. Also, '.join(missing)}. Without them, try the experiment on the embedded "
      "photographs: write ':demo' after the config's path."
    )


def _check_fit(
  stage: stages.Stage, given: port.Part | None, datasets: Datasets
) -> None:
  """Raises UsageError unless a stage's batch and networks fit its data and each other.

  Args:
    stage: what is to be trained or used.
    given: the weights it starts from, None for random ones.
    datasets: gives splits.
  """
  config = stage.config
  dataset = datasets.load(config.dataset, "train")
  if dataset.num_classes < 2:
    raise errors.UsageError(
      f"dataset '{dataset.name}' has one class only, '{dataset.class_names[0]}': name "
      "one with several (dataset.path: the folder above the class folders)."
    )
  images = images_per_step(config)
  if images > len(dataset):
    raise errors.UsageError(
      f"{stage.kind}: a batch of {images} images is larger than the training set "
      f"of {len(dataset)}: lower batch_size."
    )
  if (len(dataset) // images) * config.epochs >= 2**31:
    raise errors.UsageError(f"{stage.kind}: more than 2^31 steps: lower epochs.")
  if stage.kind == "classifier" and given and not config.model.new_head:
    data.check_num_classes(dataset, networks.num_classes(given.variables))
  for parent in stage.lineage():
    if parent.kind == "classifier" and parent is not stage:
      trained_on = datasets.load(parent.config.dataset, "train")
      data.check_num_classes(dataset, trained_on.num_classes)
  if not stage.finished():
    sharding.check_batch(sharding.make_mesh(images), images, stage.kind)
    networks.check(stage, dataset.num_classes, given)


def images_per_step(config: ConfigDict) -> int:
  """Returns how many images a step of a stage takes; batch_size may count patches.

  Raises:
    UsageError: if batch_size is not a whole number of images.
  """
  if "patch_size" not in config:
    return config.batch_size
  count = patch_count(config)
  if config.batch_size % count:
    raise errors.UsageError(
      f"{config.kind}: batch_size {config.batch_size} counts patches, and an image "
      f"gives {count}: use a multiple of {count}."
    )
  return config.batch_size // count


def patch_count(config: ConfigDict) -> int:
  """Returns how many patches an image gives."""
  size = config.dataset.image_size
  return len(patches.starts(size, config.patch_size, config.patch_stride)) ** 2


def complete(stage: stages.Stage, datasets: Datasets, prefix: str = "") -> None:
  """Trains a stage whose parents are finished, unless it is finished itself."""
  config = stage.config
  if record := stage.finished():
    progress.say(f"{prefix}{stage.name}: finished ({record.metric} {record.score:.4g})")
    return
  stage.begin(datasets.fingerprint(config.dataset))
  train_data = datasets.load(config.dataset, "train")
  task = make_task(stage, train_data.num_classes)
  trainer = train.Trainer(
    title=f"{prefix}{stage.name}",
    task=task,
    settings=train.Settings(
      seed=config.seed,
      purpose=config.kind,
      image_size=config.dataset.image_size,
      images_per_step=images_per_step(config),
      epochs=config.epochs,
      warmup_epochs=config.warmup_epochs,
      validation_rounds=config.validation_rounds,
      learning_rate=config.learning_rate,
      optimizer=config.optimizer,
      checkpoint_seconds=config.checkpoint_seconds,
      workers=config.dataset.workers,
      crop_area=config.dataset.crop_area,
      crop_aspect=config.dataset.crop_aspect,
      reduced_decode=config.dataset.reduced_decode,
    ),
    train_data=train_data,
    validation_data=datasets.load(config.dataset, "validation"),
    directory=stage.directory,
  )
  result = trainer.run()
  stage.finish(result.step, task.score, result.score)


def make_task(stage: stages.Stage, num_classes: int) -> tasks.Task:
  """Returns what a stage trains, with its parents' networks loaded and frozen."""
  config = stage.config
  inputs = tasks.Inputs(
    degradation=degradations.from_config(config.degradation),
    seed=config.seed,
    purpose=config.kind,
    patch_size=config.get("patch_size"),
    patch_stride=config.get("patch_stride"),
  )
  if config.kind in ("calibration", "ensemble"):
    method = networks.untrained_method(stage, num_classes)
    make = tasks.EnsembleTask if config.kind == "ensemble" else tasks.CalibrationTask
    return make(
      method=method.pipeline,
      inputs=inputs,
      image_size=config.dataset.image_size,
      label_smoothing=config.label_smoothing,
      frozen=method.frozen,
      initial=method.initial,
    )
  restorer, frozen = None, {}
  if "restorer" in stage.parents:
    restorer, variables = networks.load_frozen(stage.parents["restorer"], num_classes)
    frozen = {"restorer": variables}
  initial = networks.initial_weights(config)
  if config.kind == "classifier":
    return tasks.ClassificationTask(
      classifier=networks.classifier(config, num_classes),
      inputs=inputs,
      source=config.source,
      image_size=config.dataset.image_size,
      label_smoothing=config.label_smoothing,
      initial=initial,
      new_head=config.model.new_head,
      restorer=restorer,
      frozen=frozen,
    )
  if config.kind == "restorer":
    return tasks.RestorationTask(
      restorer=networks.dncnn(config),
      inputs=inputs,
      patches_per_image=patch_count(config),
      initial=initial,
    )
  return tasks.EstimationTask(
    estimator=networks.dncnn(config),
    restorer=restorer,
    inputs=inputs,
    patches_per_image=patch_count(config),
    map_kind=config.fidelity.map,
    estimator_input=config.fidelity.estimator_input,
    frozen=frozen,
    initial=initial,
  )
