"""Measures what experiments and studies ask for, and gathers what reports show."""

import datetime
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fidelity_jax import (
  claims,
  data,
  environment,
  errors,
  evaluate,
  examples,
  files,
  hosts,
  plan,
  platform,
  rows,
  stages,
  statistics,
  study,
  subjects,
  tasks,
)
from fidelity_jax.report.content import Activations, Content, Examples, StageRecord

# Experiments whose images on their way are shown.
_PICTURED = 2


def gather(
  work: study.Study,
  planned: plan.Plan,
  tests: Mapping[str, data.Dataset],
  missing: Mapping[str, str],
  where: pathlib.Path,
  workdir: pathlib.Path,
  command: str,
) -> Content | None:
  """Measures all experiments that are evaluated and whose stages are all there.

  Args:
    work: the experiments, and how to show them.
    planned: the same, with their stages.
    tests: the images that they are evaluated on, by experiment.
    missing: why stages are not there, by name.
    where: the directory of the results.
    workdir: where measurements are kept.
    command: for the record.

  Returns:
    What their report shows; None if none is evaluated at all.
  """
  if not tests:
    return None
  start, measured = time.monotonic(), False
  bootstrap = statistics.Bootstrap(min(map(len, tests.values())))
  found: dict[Any, rows.Scored] = {}
  pictured: list[Examples] = []
  activations: list[Activations] = []
  whole = lambda one: not any(stage.name in missing for stage in one.stages)
  there = [one for one in planned.experiments if one.name in tests and whole(one)]
  tests = {**tests, **{o.name: _labelled(o, tests[o.name], workdir) for o in there}}
  # Experiments on the same images are evaluated together.
  together: dict[tuple[str, int], list[plan.Planned]] = {}
  for one in there:
    key = tests[one.name].fingerprint, one.config.dataset.image_size
    together.setdefault(key, []).append(one)
  for group in (part for same in together.values() for part in passes(same)):
    chosen = {one.name: one.subjects() for one in group}
    dataset = tests[group[0].name]
    everything = [subject for one in chosen.values() for subject in one]
    evaluation = evaluate.Evaluation(everything, dataset, workdir)
    measured |= evaluation.measure()
    # What experiments of several parts have in common has one row.
    found = evaluation.scored(bootstrap) | found
    for one in group:
      _keep(evaluation, chosen[one.name], where / f"predictions-{one.name}.npz")
    steered = lambda one: any(s.compared.steered for s in one.subjects())
    for one in sorted(group, key=steered, reverse=True)[: _PICTURED - len(pictured)]:
      pictured.append(examples.draw(evaluation, chosen[one.name], where))
    if "activations" in work.sections:
      for one in filter(_classifies, group):
        shown = (evaluation, chosen[one.name], work.class_name, where)
        activations.append(examples.activations(*shown))
  scored = list(found.values())
  return Content(
    name=work.name,
    shows=work.shows,
    sections=work.sections,
    command=command,
    rows=[one.row for one in scored],
    comparisons=statistics.comparisons(scored, bootstrap),
    verdicts=[] if work.lone else claims.verdicts(scored, bootstrap),
    stages=[_record(stage, planned) for stage in planned.stages],
    missing=list(missing.values()),
    class_names=list(next(iter(tests.values())).class_names),
    examples=pictured,
    activations=activations,
    environment={
      **environment.versions(),
      "hardware": environment.hardware(),
      "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    },
    seconds=time.monotonic() - start if measured else None,
  )


def _labelled(
  one: plan.Planned, dataset: data.Dataset, workdir: pathlib.Path
) -> data.Dataset:
  """Returns the test images of an experiment, with their labels."""
  if not tasks.base.own_labels(one.config):
    return dataset
  alone = [
    s for s in one.subjects() if s.compared == rows.Compared("classifier", False)
  ]
  return evaluate.labelled(alone[0], dataset, workdir) if alone else dataset


def passes(group: list[plan.Planned]) -> list[list[plan.Planned]]:
  """Splits experiments so that the networks of each part fit the memory together.

  Args:
    group: experiments whose stages are finished.
  """
  room, parts, held = hosts.agree(platform.memory() / 2), [[]], {}
  for one in group:
    own = {stage.name: stage.size() for stage in one.stages}
    if parts[-1] and sum((held | own).values()) > room:
      parts.append([])
      held = {}
    parts[-1].append(one)
    held |= own
  return parts


def _keep(
  evaluation: evaluate.Evaluation,
  chosen: Sequence[subjects.Subject],
  path: pathlib.Path,
) -> None:
  """Writes the logits of all images, float32 [R, N, K] by method and condition.

  Where they are not asked for, removes those of before: they may be of other stages.
  """
  files.check_file(path)
  kept = [subject for subject in chosen if "logits" in subject.names]
  if not kept:
    if hosts.first():
      path.unlink(missing_ok=True)
    return
  arrays = {
    f"{subject.compared.key}/{name}": logits
    for subject in kept
    for name, logits in evaluation.logits(subject).items()
  }
  dataset = evaluation.dataset
  arrays |= {"labels": np.asarray(dataset.labels), "images": np.array(dataset.keys)}
  of = {subject.compared.key: evaluation.of(subject) for subject in kept}
  record = {"class_names": list(dataset.class_names), "of": of}
  files.write_arrays(path, arrays, record)


def check_class(
  work: study.Study, planned: plan.Plan, tests: Mapping[str, data.Dataset]
) -> None:
  """Raises UsageError if a study is to show a class that its images have not."""
  if "activations" in work.sections:
    for one in filter(_classifies, planned.experiments):
      if tasks.base.own_labels(one.config):
        raise errors.UsageError(
          "config.labels=self: images of one class are shown, and they have no labels: "
          "leave it, or config.sections' activations, out."
        )
      examples.of_class(tests[one.name], work.class_name)


def _classifies(one: plan.Planned) -> bool:
  return "classifier" in one.last.networks()


def _record(stage: stages.Stage, planned: plan.Plan) -> StageRecord:
  record, epochs = stage.finished(), stage.records()
  return StageRecord(
    name=stage.name,
    kind=stage.kind.name,
    finished=record is not None,
    metric=record.metric if record else None,
    score=record.score if record else None,
    seconds=plan.seconds(epochs),
    hardware=record.hardware or None if record else None,
    config=stage.made_of,
    records=epochs,
    parents={role: parent.name for role, parent in stage.parents.items()},
    experiments=planned.serving(stage),
  )
