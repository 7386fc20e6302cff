"""An experiment: find or train each stage, evaluate, report."""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from fidelity_jax import (
  assembly,
  data,
  errors,
  evaluate,
  files,
  platform,
  port,
  progress,
  report,
  rows,
  schema,
  sharding,
  signals,
  stages,
  streams,
  tasks,
  train,
  workdirs,
)


def run(config: ConfigDict, workdir: str) -> None:
  """Runs an experiment: trains what is not trained yet, evaluates and reports.

  Args:
    config: an experiment's config, as those in configs/.
    workdir: directory for stages, results and pictures; made where absent.

  Raises:
    UsageError: the config asks for something impossible.
    RunError: something fails on the way.
    Stopped: on SIGTERM or SIGINT, once everything is saved.
  """
  config = config.copy_and_resolve_references()
  schema.check(config)
  _resolve_precision(config)
  place = files.expand(workdir)
  with files.locked(place), _staying(place):
    streams.log_to(place / "log.txt")
    stages.check_workdir(place)
    files.check_file(place / "index.md")
    datasets = Datasets()
    plan = _plan(config, place, datasets)
    _check(plan.stages, datasets)
    files.check_directory(place / rows.DIRECTORY, write=True)
    test = None
    if "evaluation" in config:
      test = datasets.load(config.dataset, "test")
      _warn_of_leaks(plan.stages, datasets, test)
    where = workdirs.experiment_directory(place, config, plan.ends, test)
    report.check(where)
    signals.work_begins()
    for number, stage in enumerate(plan.stages, 1):
      signals.stop_if_received(f"before {stage.name}")
      complete(stage, datasets, f"[{number}/{len(plan.stages)}] ")
      workdirs.write_index(place)
    with errors.while_doing(f"making the directory {where}"):
      where.mkdir(exist_ok=True)
    if test is not None:
      evaluation = evaluate.Evaluation(plan.last, plan.further, config, test, where)
      report.write(where, config, evaluation.run(), list(map(_describe, plan.stages)))
    workdirs.write_experiment(where, config, plan.stages)
    workdirs.write_index(place)
    what = "experiment.json" if test is None else "report.md, results and pictures"
    progress.say(f"{what}: in {where}.")


def _describe(stage: stages.Stage) -> str:
  record = stage.finished()
  return f"`{stage.name}`: validation {record.metric} {record.score:.4g}"


def _resolve_precision(config: ConfigDict) -> None:
  """Replaces "auto" by what it means here, in all parents that there are."""
  if "precision" in config:
    config.precision = platform.precision(config.precision)
  for parent in config.get("parents", {}).values():
    _resolve_precision(parent)


@dataclasses.dataclass(frozen=True)
class _Plan:
  """What there is to do.

  Attributes:
    last: the experiment's last stage.
    further: stages that serve its evaluation alone, by role.
  """

  last: stages.Stage
  further: dict[str, stages.Stage]

  @property
  def ends(self) -> list[stages.Stage]:
    """The stages that nothing is trained from."""
    return [*self.further.values(), self.last]

  @property
  def stages(self) -> list[stages.Stage]:
    """All that are to be finished, in order."""
    return list({s.name: s for end in self.ends for s in end.lineage()}.values())


def _plan(config: ConfigDict, place: pathlib.Path, datasets: "Datasets") -> _Plan:
  """Returns the stages of an experiment.

  Raises:
    UsageError: a dataset or weights are impossible.
    RunError: names all that is missing.
  """
  with _missing_together() as noting:
    content = _Contents(place, datasets, noting)
    resolve = lambda stage_config: stages.resolve(stage_config, place, content)
    if "ensemble" in config and config.ensemble.enabled:
      last = resolve(tasks.calibration.ensemble_config(config))
    else:
      last = resolve(config)
    further = {
      role: resolve(config.parents[role])
      for role in tasks.KINDS[config.kind].evaluated_with
      if role in config.get("parents", {})
    }
  return _Plan(last, further)


Noting = Callable[[], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def _missing_together() -> Iterator[Noting]:
  """Gives a context that notes what is missing; raises for all of it at the end.

  Raises:
    RunError: names everything.
  """
  missing = {}

  @contextlib.contextmanager
  def noting():
    try:
      yield
    except errors.Missing as error:
      missing[str(error)] = None

  yield noting
  if missing:
    raise errors.RunError(
      f"{'. Also, '.join(missing)}. Without them, try the experiment on the embedded "
      "photographs: write ':demo' after the config's path."
    )


class _Contents:
  """Finds what stages are made of besides their configs."""

  def __init__(self, place: pathlib.Path, datasets: "Datasets", noting: Noting):
    self._place, self._datasets, self._noting = place, datasets, noting

  def __call__(self, config: ConfigDict) -> stages.Content:
    images = weights = ""
    with self._noting():
      images = self._datasets.fingerprint(config.dataset)
    given = assembly.weights_of(config)
    with self._noting():
      weights = self._digest(given)
    chosen = " ".join(f"{k}={v}" for k, v in sorted(_selection(config).items()))
    return stages.Content(images, weights, {"images": chosen, "weights": given})

  def _digest(self, given: str | None) -> str | None:
    if given is None:
      return None
    try:
      return port.content_digest(given)
    except (errors.UsageError, errors.Missing):
      # A finished stage needs the file no longer.
      if known := stages.remembered_weights(self._place, given):
        return known
      raise


@contextlib.contextmanager
def _staying(directory: pathlib.Path) -> Iterator[None]:
  """Raises RunError in place of a failure caused by a removed workdir."""
  # While it is open, its inode is not reused.
  held = os.open(directory, os.O_RDONLY)
  try:
    yield
  except errors.UsageError:
    raise
  except Exception as error:
    there = directory.is_dir() and os.path.samestat(os.fstat(held), directory.stat())
    if not isinstance(error, errors.RunError):
      # A directory that is removed while it is written to may remain, without its lock.
      there = there and (directory / ".lock").exists()
    if not there:
      raise errors.RunError(
        f"workdir {directory} was removed while the run was working in it: run the "
        "same command again to begin anew."
      ) from error
    raise
  finally:
    os.close(held)


# Fields of `dataset` that say how images are read, not which there are.
_READING = (
  *("cache", "crop_area", "crop_aspect", "image_size", "max_pixels"),
  *("reduced_decode", "strict", "workers"),
)


def _selection(config: ConfigDict) -> dict[str, Any]:
  """Returns the fields of a stage's dataset that say which images there are."""
  chosen = {k: v for k, v in config.dataset.items() if k not in _READING}
  if chosen["path"]:
    chosen["path"] = str(files.expand(chosen["path"]).absolute())
  return {k: v for k, v in chosen.items() if v is not None}


class Datasets:
  """Loads each split of each dataset once."""

  def __init__(self):
    self._loaded: dict[str, data.Dataset] = {}

  def load(self, config: ConfigDict, split: str) -> data.Dataset:
    """Returns one split ("train", "validation" or "test") of a dataset."""
    # How images are cropped and resized later makes no other dataset.
    later = ("crop_area", "crop_aspect", "image_size", "reduced_decode", "workers")
    fields = {k: v for k, v in config.items() if k not in later}
    key = files.digest([stages.as_json(fields), split])
    if key not in self._loaded:
      self._loaded[key] = data.load(config, split)
    return self._loaded[key]

  def encoded(self, config: ConfigDict, split: str) -> data.Dataset:
    """Returns the same, not decoded even if it is to be cached."""
    config = config.copy_and_resolve_references()
    config.cache = None
    return self.load(config, split)

  def fingerprint(self, config: ConfigDict) -> str:
    """Returns the fingerprint of what a stage is trained and selected on."""
    splits = [self.encoded(config, split) for split in ("train", "validation")]
    return "-".join(dataset.fingerprint[:32] for dataset in splits)


def _warn_of_leaks(
  plan: list[stages.Stage], datasets: Datasets, test: data.Dataset
) -> None:
  """Says so if a stage is trained on test images, as other splits can make it."""
  tested = set(zip(test.keys, test.digests, strict=True))
  for stage in plan:
    trained_on = datasets.encoded(stage.config.dataset, "train")
    both = tested & set(zip(trained_on.keys, trained_on.digests, strict=True))
    if both:
      some = f"{len(both)} of the {len(test)} test images"
      progress.say(f"warning: {stage.name} is trained on {some}.")


def _check(plan: list[stages.Stage], datasets: Datasets) -> None:
  """Fails now on what would fail after hours: weights that are missing or do not fit,
  batch sizes, stages in the workdir that were made of something else.

  Raises:
    UsageError: something does not fit.
    RunError: names everything that is missing.
  """
  with _missing_together() as noting:
    for stage in plan:
      if stage.check():
        _check_data(stage, datasets)
        continue
      given = None
      with noting():
        given = assembly.given_part(stage.config)
      classes = _check_data(stage, datasets)
      mesh = sharding.make_mesh(stage.config.batch_size)
      sharding.check_batch(mesh, stage.config.batch_size, stage.kind.name)
      assembly.check(stage, classes, given)


def _check_data(stage: stages.Stage, datasets: Datasets) -> int:
  """Checks that a stage's batch and parents fit its images.

  Returns:
    The number of classes.

  Raises:
    UsageError: they do not.
  """
  config, kind = stage.config, stage.kind.name
  dataset = datasets.encoded(config.dataset, "train")
  if dataset.num_classes < 2:
    raise errors.UsageError(
      f"dataset '{dataset.name}' has one class only, '{dataset.class_names[0]}': name "
      "one with several (dataset.path: the folder above the class folders)."
    )
  images = tasks.base.images_per_step(config)
  if images > len(dataset):
    raise errors.UsageError(
      f"{kind}: a batch of {images} images is larger than the training set "
      f"of {len(dataset)}: lower batch_size."
    )
  if (len(dataset) // images) * config.epochs >= 2**31:
    raise errors.UsageError(f"{kind}: more than 2^31 steps: lower epochs.")
  if classifier := stage.networks().get("classifier"):
    known = datasets.encoded(classifier.config.dataset, "train").class_names
    data.check_classes(dataset, known)
  return dataset.num_classes


def complete(stage: stages.Stage, datasets: Datasets, prefix: str = "") -> None:
  """Trains a stage whose parents are finished, unless it is finished itself."""
  config = stage.config
  # Parents may have been trained again since it was checked.
  if record := stage.check():
    progress.say(f"{prefix}{stage.name}: finished ({record.metric} {record.score:.4g})")
    return
  stage.begin()
  train_data = datasets.load(config.dataset, "train")
  mesh = sharding.make_mesh(config.batch_size)
  if mesh.size < jax.device_count():
    progress.say(
      f"{stage.name}: batch_size {config.batch_size} splits evenly over {mesh.size} of "
      f"{jax.device_count()} devices: the others wait."
    )
  patches = sharding.batch(mesh)
  task = assembly.loaded_task(stage, train_data.num_classes, patches)
  trainer = train.Trainer(
    title=f"{prefix}{stage.name}",
    task=task,
    settings=train.Settings(
      seed=config.seed,
      purpose=config.kind,
      image_size=config.dataset.image_size,
      images_per_step=tasks.base.images_per_step(config),
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
    mesh=mesh,
  )
  result = trainer.run()
  stage.finish(result.step, task.score, result.score, result.product)
