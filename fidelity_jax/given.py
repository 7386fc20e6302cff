"""Networks that no experiment here trained, made ready to be measured like one's own.

They are a checkpoint's, of which all methods can be measured that it has networks for,
or an exported file, which answers by its whole method alone.
"""

import re

import msgspec
from ml_collections import ConfigDict

from fidelity_jax import exported, inference, runs, stages, subjects
from fidelity_jax.configs import common
from fidelity_jax.method import Method
from fidelity_jax.rows import Compared, Facts
from fidelity_jax.subjects import Given, Subject

# What an experiment is about if nobody says otherwise.
DEGRADATION = "awgn"


def _together(method: Method, source: str | None) -> Compared:
  """Returns what all networks of a method that classifies do together.

  Args:
    method: the networks.
    source: where the map comes from, see `rows.SOURCES`; None for none.
  """
  if method.calibration is not None:
    return Compared(source, True, method.ensemble is not None)
  return Compared("classifier", method.restorer is not None)


def _facts(run: runs.Run) -> Facts | None:
  """Returns what is known of an experiment's networks together.

  None without a classifier.
  """
  method, planned = run.method, run.planned
  if method.classifier is None:
    return None
  found = subjects.of_experiment(planned.config, planned.last, planned.further)
  source = next((s.facts.source for s in found if s.compared.steered), None)
  compared = _together(method, source)
  return next(s.facts for s in found if s.compared == compared)


def about(run: runs.Run) -> exported.About | None:
  """Returns what a run's experiment is about; None for a checkpoint."""
  if run.planned is None or "evaluation" not in run.planned.config:
    return None
  config = run.planned.config
  return exported.About(
    degradation=stages.as_json(config.degradation),
    rounds=config.evaluation.rounds,
    seed=config.evaluation.seed,
    facts=_facts(run),
  )


def _of_checkpoint(run: runs.Run) -> Facts:
  """Returns what is known of a checkpoint's networks: not how they were trained."""
  method, steered = run.method, run.method.calibration
  estimated = "estimated" if method.estimator is not None else None
  return Facts(
    method="",
    source="oracle" if run.needs_clean else estimated,
    trained_on="given",
    backbone=run.backbone,
    restorer="dncnn",
    map=method.map_name,
    resize=steered.resize if steered else None,
    without=[n for n in subjects.SWITCHES if not getattr(steered, n, True)],
    ensemble=method.ensemble is not None,
    seed=None,
    precision="float32",
  )


def _of_file(record: exported.Record) -> Facts:
  """Returns what is known of an exported file's networks."""
  if record.about is not None and record.about.facts is not None:
    return msgspec.structs.replace(record.about.facts, precision=record.precision)
  # Of a checkpoint's, and of those of earlier versions, nothing is noted.
  source = "oracle" if "clean" in record.inputs else "estimated"
  mapped = "fidelity_map" in record.outputs
  return Facts(
    method=source if mapped else "classifier",
    source=source if mapped else None,
    trained_on="given",
    backbone=None,
    restorer="unknown" if "restored" in record.outputs else None,
    map=record.map_name,
    resize=None,
    without=[],
    ensemble=None,
    seed=None,
    precision=record.precision,
  )


def config_for(model: inference.Model, dataset: ConfigDict) -> ConfigDict:
  """Returns an experiment's config for networks that come without one.

  Args:
    model: the networks.
    dataset: the config of the images that they are to be measured on.
  """
  # It names files.
  name = re.sub(r"[^\w.-]+", "-", model.name)[:100]
  made = common.experiment(name, "calibration", "")
  common.evaluation(made, "")
  made.evaluation.batch_size = inference.BATCH
  made.dataset = dataset
  # It may be a list.
  del made.degradation
  made.degradation = ConfigDict({"kind": DEGRADATION})
  if model.about is not None:
    made.degradation = stages.from_json(model.about.degradation)
    made.evaluation.rounds = model.about.rounds
    made.evaluation.seed = model.about.seed
  made.fidelity = ConfigDict({"map": model.map_name})
  if model.run is not None:
    made.fidelity.source = _of_checkpoint(model.run).source
    made.fidelity.estimator_input = model.run.method.estimator_input
  return made


def of_model(model: inference.Model, config: ConfigDict) -> list[Subject]:
  """Returns what can be measured of networks that no experiment here trained.

  Args:
    model: the networks, of a checkpoint or an exported file; they classify.
    config: see `config_for`.
  """
  if model.run is not None:
    method, known = model.run.method, _of_checkpoint(model.run)
    held = model.run.variables.items()
    given = Given(model.digest, {r: (getattr(method, r), own) for r, own in held})
    found = subjects.of_networks(given.parts, known.source)
  else:
    known, outputs = _of_file(model.record), model.record.outputs
    given = Given(model.digest, {}, model.outputs)
    restored = "restored" in outputs
    found = [Compared(known.method, restored, known.ensemble)]
    found += subjects.of_networks({"restorer"} if restored else (), known.source)
  return [Subject(config, c, known.of(c), {}, given) for c in found]
