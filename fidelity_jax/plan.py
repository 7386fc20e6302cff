"""What there is to do: the stages of experiments, checked before any is trained."""

import contextlib
import dataclasses
import pathlib
import statistics
from collections.abc import Callable, Iterator

from ml_collections import ConfigDict

from fidelity_jax import (
  assembly,
  data,
  errors,
  platform,
  port,
  progress,
  sharding,
  stages,
  streams,
  subjects,
  tasks,
)
from fidelity_jax.datasets import Datasets, selection
from fidelity_jax.models import registry


@dataclasses.dataclass(frozen=True)
class Planned:
  """An experiment and its stages.

  Attributes:
    config: the experiment's, resolved, its precision included.
    last: its last stage; None if nothing of it was trained here.
    further: stages that serve its evaluation alone, by role.
  """

  config: ConfigDict
  last: stages.Stage | None
  further: dict[str, stages.Stage]

  @property
  def name(self) -> str:
    """The experiment's name."""
    return self.config.experiment

  @property
  def ends(self) -> list[stages.Stage]:
    """The stages that nothing is trained from."""
    return [*self.further.values(), *([self.last] if self.last else [])]

  @property
  def stages(self) -> list[stages.Stage]:
    """All that are to be finished, parents first."""
    return list({s.name: s for end in self.ends for s in end.lineage()}.values())

  def subjects(self) -> list[subjects.Subject]:
    """What is measured; nothing if the experiment is not evaluated."""
    if "evaluation" not in self.config:
      return []
    return subjects.of_experiment(self.config, self.last, self.further)


@dataclasses.dataclass(frozen=True)
class Plan:
  """Experiments that share one workdir.

  Attributes:
    experiments: one or several.
  """

  experiments: list[Planned]

  def serving(self, stage: stages.Stage) -> list[str]:
    """Returns the names of the experiments that need a stage."""
    needs = lambda e: any(s.name == stage.name for s in e.stages)
    return [e.name for e in self.experiments if needs(e)]

  @property
  def stages(self) -> list[stages.Stage]:
    """All stages, each once, parents first."""
    return list({s.name: s for e in self.experiments for s in e.stages}.values())


def make(configs: list[ConfigDict], workdir: pathlib.Path, datasets: Datasets) -> Plan:
  """Returns the stages of experiments.

  Args:
    configs: theirs, checked and resolved.
    workdir: the directory of all stages.
    datasets: what loads their images.

  Raises:
    UsageError: a dataset or weights are impossible.
    RunError: names all that is missing.
  """
  with _missing_together() as noting:
    content = _Contents(workdir, datasets, noting)
    planned = [_planned(config, workdir, content) for config in configs]
  return Plan(planned)


def _planned(config, workdir, content) -> Planned:
  resolve = lambda stage_config: stages.resolve(stage_config, workdir, content)
  last = resolve(tasks.calibration.last_config(config))
  further = {
    role: resolve(config.parents[role])
    for role in tasks.KINDS[config.kind].evaluated_with
    if role in config.get("parents", {})
  }
  return Planned(config, last, further)


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
    parts = [part.rstrip(".") for part in missing]
    raise errors.RunError(
      f"{'. Also, '.join(parts)}. Without them, try the experiment on the embedded "
      "photographs: write ':demo' after the config's path, or ':scratch', which needs "
      "no weights."
    )


class _Contents:
  """Finds what stages are made of besides their configs."""

  def __init__(self, place: pathlib.Path, datasets: "Datasets", noting: Noting):
    self._place, self._datasets, self._noting = place, datasets, noting

  def __call__(self, config: ConfigDict) -> stages.Content:
    images = weights = ""
    with self._noting():
      labelled = tasks.KINDS[config.kind].labelled
      images = self._datasets.fingerprint(config.dataset, labelled)
    given = assembly.weights_of(config)
    with self._noting():
      weights = self._digest(given)
    chosen = " ".join(f"{k}={v}" for k, v in sorted(selection(config).items()))
    places = {
      "images": streams.named(chosen),
      "weights": given and streams.named(given),
    }
    return stages.Content(images, weights, places)

  def _digest(self, given: str | None) -> str | None:
    if given is None:
      return None
    try:
      return port.content_digest(given)
    except (errors.UsageError, errors.Missing):
      # A finished stage needs the file no longer.
      if known := stages.remembered_weights(self._place, streams.named(given)):
        return known
      raise


def resolve(config: ConfigDict) -> None:
  """Replaces what depends on where a config is by what that is here.

  In all parents that there are, "auto" by a precision, and the name of a network of the
  user's own by that and the digest of its file.
  """
  if "precision" in config:
    config.precision = platform.precision(config.precision)
  if config.kind == "classifier" and (code := registry.code(config.model.name)):
    with config.unlocked():
      config.model.code = code
  for parent in config.get("parents", {}).values():
    resolve(parent)


def warn_of_leaks(
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


def check(plan: list[stages.Stage], datasets: Datasets) -> None:
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
      layout = sharding.make_layout(stage.config.mesh, stage.config.batch_size)
      sharding.check_batch(layout, stage.config.batch_size, stage.kind.name)
      assembly.check(stage, classes, given, layout)
      _check_names(stage, datasets, given)


def _check_names(
  stage: stages.Stage, datasets: Datasets, given: port.Part | None
) -> None:
  """Raises UsageError if labels do not count a given classifier's classes."""
  named = given.config.get("class_names") if given else None
  if named and not stage.config.model.get("new_head", True):
    dataset = datasets.encoded(stage.config.dataset, "train")
    data.check_classes(dataset, named)


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
  if config.epochs and images > len(dataset):
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


def seconds(records: list[dict[str, float]]) -> float | None:
  """Returns how long a stage's epochs took, with validation; None if nothing tells.

  Args:
    records: the stage's, see `stages.Stage.records`.
  """
  return sum(record.get("seconds", 0.0) for record in records) or None


def describe(plan: Plan, datasets: Datasets, workdir: pathlib.Path) -> str:
  """Returns a plan as a table, and the time that is left as far as it can be told.

  The time of a stage is estimated from the rate of those like it in the workdir.

  Args:
    plan: the plan, checked.
    datasets: what loads the stages' images.
    workdir: the directory of all stages.
  """
  lines = [("stage", "state", "steps left", "time left", "needed by")]
  rates = _rates(workdir)
  total, unknown = 0.0, 0
  for stage in plan.stages:
    record, steps = stage.finished(), _steps_left(stage, datasets)
    state, estimate = "to do", ""
    if record is not None:
      state = f"finished, {record.metric} {record.score:.4g}"
    elif (stage.directory / "config.json").exists():
      state = "begun"
    rate = rates.get(_like(stage.name), rates.get(stage.kind.name))
    if steps and rate is not None:
      total += steps * rate
      estimate = f"~{progress.format_seconds(steps * rate)}"
    elif steps:
      unknown += 1
      estimate = "?"
    lines.append((stage.name, state, str(steps), estimate, _users(plan, stage)))
  widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
  table = [
    "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
    for line in lines
  ]
  text = f"About {progress.format_seconds(total)} of training are left"
  if unknown:
    text += f", and {unknown} stages of kinds that nothing was trained of here"
  experiments = ", ".join(one.name for one in plan.experiments)
  return "\n".join(
    [*(line.rstrip() for line in table), "", f"Experiments: {experiments}.", f"{text}."]
  )


def _users(plan: Plan, stage: stages.Stage, most: int = 3) -> str:
  """Returns what builds on a stage: other stages, and experiments that end in it."""
  parents = lambda s: [parent.name for parent in s.parents.values()]
  found = [s.name for s in plan.stages if stage.name in parents(s)]
  ends = lambda e: [end.name for end in e.ends]
  found += [e.name for e in plan.experiments if stage.name in ends(e)]
  more = f" and {len(found) - most} more" if len(found) > most else ""
  return ", ".join(found[:most]) + more


def _steps_left(stage: stages.Stage, datasets: Datasets) -> int:
  if stage.finished():
    return 0
  images = tasks.base.images_per_step(stage.config)
  train = datasets.encoded(stage.config.dataset, "train")
  total = len(train) // images * stage.config.epochs
  return total - int(stage.latest_step() or 0)


def _like(name: str) -> str:
  """Returns what a stage's name says of it: kind, network and the like."""
  return name.rpartition("-")[0]


def _rates(workdir: pathlib.Path) -> dict[str, float]:
  """Returns seconds per step: medians over epochs, by kind and by what is alike.

  With validation, but for epochs that were interrupted.
  """
  found: dict[str, list[float]] = {}
  for path in sorted(workdir.glob("*/metrics.jsonl")):
    before = 0
    for record in stages.records(path):
      steps, before = record["step"] - before, record["step"]
      if steps > 0 and "seconds" in record:
        took = record["seconds"] / steps
        # The seconds of an epoch that was interrupted are those of its last steps, and
        # so is the speed, which earlier versions did not record.
        if speed := record.get("steps_per_second"):
          took = max(took, 1 / speed)
        for key in (_like(path.parent.name), path.parent.name.partition("-")[0]):
          found.setdefault(key, []).append(took)
  return {key: statistics.median(rates) for key, rates in found.items()}
