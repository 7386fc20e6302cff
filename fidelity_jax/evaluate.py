"""Methods x conditions x rounds -> accuracies (METHOD section 7).

All methods see the same noise: it depends on the seed, the condition, the round and
the example alone. What is measured is kept condition by condition, so that an
evaluation that is cut off goes on where it stopped.
"""

import dataclasses
import functools
import hashlib
import io
import json
import pathlib
import statistics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from ml_collections import ConfigDict

from fidelity_jax import (
  data,
  degradations,
  errors,
  fidelity,
  files,
  networks,
  pipeline,
  platform,
  progress,
  randomness,
  sharding,
  signals,
  stages,
)

PyTree = Any


class Compared(NamedTuple):
  """One of the methods compared: a row's identity in the report's tables."""

  method: str
  restoration: bool
  ensemble: bool | None


class Row(msgspec.Struct, forbid_unknown_fields=True):
  """What was measured of one method under one condition.

  Attributes:
    method: see `Compared`.
    restoration: likewise.
    ensemble: likewise.
    condition: the condition's name.
    accuracy: mean over rounds, percent.
    std: standard deviation over rounds, percent.
    rounds: how many.
  """

  method: str
  restoration: bool
  ensemble: bool | None
  condition: str
  accuracy: float
  std: float
  rounds: int


class _Measured(msgspec.Struct, forbid_unknown_fields=True):
  """What the file of a condition holds."""

  rows: list[Row]


@dataclasses.dataclass(frozen=True)
class Results:
  """What an evaluation measured.

  Attributes:
    rows: one for each method and condition.
    examples: arrays for the picture of examples; see `_examples`.
    class_names: names of the classes.
  """

  rows: list[Row]
  examples: dict[str, np.ndarray]
  class_names: list[str]


def predict(
  method: pipeline.Method,
  source: str,
  variables: PyTree,
  degraded: jax.Array,
  clean: jax.Array,
) -> tuple[dict[Compared, jax.Array], dict[str, jax.Array]]:
  """Returns the predictions of every method compared, and what they were made from.

  Args:
    method: the trained pipeline.
    source: where its fidelity map comes from, which names the method.
    variables: its variables.
    degraded: float32 [N, H, W, 3] in [0, 1].
    clean: likewise; for the oracle map.

  Returns:
    (class int32 [N] by method, {"restored": [N, H, W, 3], "map": [N, H, W, C]}).
  """
  restored = method.restore(variables, degraded)
  fidelity_map = method.fidelity_map(variables, degraded, restored, clean)
  confidence = fidelity.confidence(fidelity_map, method.map_kind)
  plain = method.plain(variables, restored)
  calibrated = method.calibrated(variables, restored, confidence)
  features = {
    Compared("setup1", False, None): method.plain(variables, degraded),
    Compared("setup1", True, None): plain,
    Compared(source, True, False): calibrated,
  }
  if method.ensemble is not None:
    features[Compared(source, True, True)] = method.ensemble.apply(
      variables["ensemble"], calibrated, plain, confidence
    )
  predictions = {
    name: jnp.argmax(method.classify(variables, h), -1) for name, h in features.items()
  }
  return predictions, {"restored": restored, "map": fidelity_map}


class Evaluation:
  """The evaluation of one trained stage: compiled functions, data and files."""

  def __init__(self, stage: stages.Stage, config: ConfigDict, datasets: Any):
    """Prepares to evaluate.

    Args:
      stage: the calibration or ensemble stage, which need not be finished yet.
      config: the experiment's config.
      datasets: gives splits; see `experiment.Datasets`.

    Raises:
      UsageError: if there is nothing to test on.
    """
    self.config, self.stage = config, stage
    self.dataset = datasets.load(config.dataset, "test")
    self.conditions = degradations.conditions(config.degradation)
    self.mesh = sharding.make_mesh(config.evaluation.batch_size)
    self.sharding = sharding.batch(self.mesh)

  @functools.cached_property
  def directory(self) -> pathlib.Path:
    """Where what is measured is kept, named by all that it depends on."""
    lineage = [[s.digest, s.finished().files] for s in self.stage.lineage()]
    evaluation = stages.as_json(self.config.evaluation)
    material = [lineage, self.dataset.fingerprint, evaluation]
    digest = hashlib.sha256(json.dumps(material, sort_keys=True).encode()).hexdigest()
    name = f"evaluation-{self.stage.name}-{digest[:8]}"
    return self.stage.directory.parent / name

  @functools.cached_property
  def _network(self) -> tuple[pipeline.Method, PyTree]:
    trained = networks.trained_method(self.stage, self.dataset.num_classes)
    replicated = sharding.replicated(self.mesh)
    return trained.pipeline, jax.device_put(trained.frozen, replicated)

  @functools.cached_property
  def _predict(self):
    method, _ = self._network
    source = self.config.fidelity.source
    # One compiled function for all conditions: what differs is done before it.
    function = functools.partial(predict, method, source)
    return jax.jit(function, compiler_options=platform.compiler_options())

  def _degrade(self, condition, batch, round_: int) -> tuple[jax.Array, jax.Array]:
    """Returns (degraded, clean) of a batch, float32 [N, H, W, 3] in [0, 1]."""
    seed = self.config.seed
    key = randomness.purpose_key(seed, f"evaluation/{condition.name}")
    return _degrade(condition.degradation, key, batch, jnp.int32(round_))

  def _batches(self, dataset: data.Dataset):
    batches = data.eval_iterator(
      dataset,
      image_size=self.config.dataset.image_size,
      batch_size=sharding.round_up(self.mesh, self.config.evaluation.batch_size),
      num_workers=0,
      **sharding.host_shard(),
    )
    return data.prefetch_to_device(batches, self.sharding)

  def _round(self, condition, round_: int) -> dict[Compared, float]:
    """Returns each method's accuracy in percent in one round of a condition."""
    correct: dict[Compared, Any] = {}
    _, variables = self._network
    for batch in self._batches(self.dataset):
      degraded, clean = self._degrade(condition, batch, round_)
      predictions, _ = self._predict(variables, degraded, clean)
      for name, n in _count(predictions, batch["label"], batch["mask"]).items():
        correct[name] = correct.get(name, 0) + n
    total = len(self.dataset)
    return {name: 100 * float(n) / total for name, n in correct.items()}

  def run(self) -> Results:
    """Evaluates every condition that is not evaluated yet.

    Raises:
      RunError: if what was kept is damaged, or cannot be written.
      Stopped: on SIGTERM or SIGINT, between rounds.
    """
    files.check_directory(self.directory, write=True)
    with errors.while_doing(f"making the directory {self.directory}"):
      self.directory.mkdir(exist_ok=True)
    wanted = self.config.evaluation.rounds
    rounds = {c.name: c.rounds_needed(wanted) for c in self.conditions}
    paths = {c.name: self.directory / f"{c.name}.json" for c in self.conditions}
    for path in paths.values():
      files.check_file(path)
    todo = [c for c in self.conditions if not paths[c.name].exists()]
    rows = {c: self._read(paths[c], c, rounds[c]) for c in paths if paths[c].exists()}
    bar = progress.Progress(
      "evaluation", sum(rounds[c.name] for c in todo), unit="round"
    )
    done = 0
    for condition in todo:
      name, measured = condition.name, []
      for round_ in range(rounds[name]):
        signals.stop_if_received(
          f"evaluating {name}", "what was measured before this condition is saved"
        )
        measured.append(self._round(condition, round_))
        done += 1
        if bar.due():
          bar.update(done, condition=name)
      rows[name] = _rows(name, measured)
      files.write_record(paths[name], _Measured(rows[name]))
    if todo:
      bar.update(done)
    bar.close()
    ordered = [row for condition in paths for row in rows[condition]]
    return Results(ordered, self._examples(), list(self.dataset.class_names))

  def _read(self, path: pathlib.Path, condition: str, rounds: int) -> list[Row]:
    """Returns what was measured of a condition before."""
    again = f"delete the directory {self.directory} to evaluate again."
    rows = files.read_record(path, _Measured, again).rows
    if not rows or any((r.condition, r.rounds) != (condition, rounds) for r in rows):
      raise errors.RunError(f"{path} is of another condition: {again}")
    return rows

  def _examples(self) -> dict[str, np.ndarray]:
    """Returns arrays for the picture of examples, computed once and kept.

    "condition" [M] names M conditions; "clean", "degraded", "restored" [M, N, H, W, 3],
    "map" [M, N, H, W, C], "label" [M, N], and a prediction [M, N] for each method under
    "prediction/METHOD/RESTORATION/ENSEMBLE".
    """
    path = self.directory / "examples.npz"
    files.check_file(path)
    if not path.exists():
      files.write_bytes(path, _npz(self._compute_examples()))
    try:
      # The zip form has checksums, which NumPy compares.
      with errors.while_doing(f"reading {path}"), np.load(path) as arrays:
        examples = dict(arrays)
      count = len(examples["condition"])
      names = ("clean", "degraded", "restored", "map", "label")
      if any(len(examples[name]) != count for name in names):
        raise ValueError("its arrays do not fit each other")
    except errors.RunError:
      raise
    except Exception as error:  # zipfile, zlib and NumPy raise many kinds.
      raise errors.RunError(
        f"{path} is damaged ({error}): delete it to compute it again."
      ) from error
    return examples

  def _compute_examples(self) -> dict[str, np.ndarray]:
    # What a picture can show: a middling and the strongest level, and the 2D variation.
    uniform = [c for c in self.conditions if not c.name.endswith(("-1d", "-2d"))]
    shown = [uniform[len(uniform) // 2], uniform[-1], self.conditions[-1]]
    shown = list(dict.fromkeys(shown))
    # The test set is sorted by class: examples spread over it show different classes.
    count = min(self.config.evaluation.examples * len(shown), len(self.dataset))
    spread = np.linspace(0, len(self.dataset) - 1, count).round().astype(int)
    batches = list(self._batches(self.dataset.select(spread)))
    _, variables = self._network
    result: dict[str, list] = {}
    for condition in shown:
      parts: dict[str, list] = {}
      for batch in batches:
        degraded, clean = self._degrade(condition, batch, 0)
        predictions, seen = self._predict(variables, degraded, clean)
        seen |= {"degraded": degraded, "clean": clean, "label": batch["label"]}
        for name, x in predictions.items():
          seen[f"prediction/{name.method}/{name.restoration}/{name.ensemble}"] = x
        for key, value in seen.items():
          parts.setdefault(key, []).append(np.asarray(value))
      for key, values in parts.items():
        # The padding is at the end.
        result.setdefault(key, []).append(np.concatenate(values)[:count])
    arrays = {key: np.stack(values) for key, values in result.items()}
    return arrays | {"condition": np.array([c.name for c in shown])}


@jax.jit
def _degrade(degradation, key, batch, round_):
  clean = batch["image"].astype(jnp.float32) / 255
  keys = randomness.example_keys(key, round_, batch["index"])
  return degradation(keys, clean), clean


@jax.jit
def _count(predictions, labels, mask):
  count = lambda prediction: jnp.sum((prediction == labels) * mask)
  return {name: count(prediction) for name, prediction in predictions.items()}


def _npz(arrays: dict[str, np.ndarray]) -> bytes:
  buffer = io.BytesIO()
  np.savez_compressed(buffer, **arrays)
  return buffer.getvalue()


def _rows(condition: str, measured: list[dict[Compared, float]]) -> list[Row]:
  rows = []
  for name in measured[0]:
    accuracies = [accuracy[name] for accuracy in measured]
    std = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
    mean = statistics.fmean(accuracies)
    rows.append(Row(*name, condition, mean, std, len(accuracies)))
  return rows
