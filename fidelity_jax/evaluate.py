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
import statistics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from fidelity_jax import (
  data,
  degradations,
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


@dataclasses.dataclass(frozen=True)
class Results:
  """What an evaluation measured.

  Attributes:
    rows: one dictionary a method and condition: "method", "restoration", "ensemble",
      "condition", "accuracy" (percent), "std" (percent, over rounds), "rounds".
    examples: arrays for the picture of examples; see `_examples`.
    class_names: names of the classes.
  """

  rows: list[dict[str, Any]]
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
      stage: the finished calibration or ensemble stage.
      config: the experiment's config.
      datasets: gives splits; see `experiment.Datasets`.
    """
    self.config, self.stage = config, stage
    self.dataset = datasets.load(config.dataset, "test")
    material = [
      stage.digest,
      self.dataset.fingerprint,
      stages.as_json(config.evaluation),
    ]
    digest = hashlib.sha256(json.dumps(material, sort_keys=True).encode()).hexdigest()
    self.directory = stage.directory.parent / f"evaluation-{stage.name}-{digest[:8]}"
    self.conditions = degradations.conditions(config.degradation)
    self.mesh = sharding.make_mesh(config.evaluation.batch_size)
    self.sharding = sharding.batch(self.mesh)

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
      Stopped: on SIGTERM or SIGINT, between rounds.
    """
    self.directory.mkdir(exist_ok=True)
    wanted = self.config.evaluation.rounds
    rounds = {c.name: c.rounds_needed(wanted) for c in self.conditions}
    paths = {c.name: self.directory / f"{c.name}.json" for c in self.conditions}
    todo = [c for c in self.conditions if not paths[c.name].exists()]
    bar = progress.Progress(
      "evaluation", sum(rounds[c.name] for c in todo), unit="round"
    )
    done = 0
    for condition in todo:
      measured = []
      for round_ in range(rounds[condition.name]):
        signals.stop_if_received(f"evaluating {condition.name}")
        measured.append(self._round(condition, round_))
        done += 1
        if bar.due():
          bar.update(done, condition=condition.name)
      files.write_json(paths[condition.name], _rows(condition.name, measured))
    if todo:
      bar.update(done)
    bar.close()
    rows = [row for path in paths.values() for row in files.read_json(path)]
    return Results(rows, self._examples(), list(self.dataset.class_names))

  def _examples(self) -> dict[str, np.ndarray]:
    """Returns arrays for the picture of examples, computed once and kept.

    "condition" [M] names M conditions; "clean", "degraded", "restored" [M, N, H, W, 3],
    "map" [M, N, H, W, C], "label" [M, N], and a prediction [M, N] for each method under
    "prediction/METHOD/RESTORATION/ENSEMBLE".
    """
    path = self.directory / "examples.npz"
    if not path.exists():
      files.write_bytes(path, _npz(self._compute_examples()))
    with np.load(path) as arrays:
      return dict(arrays)

  def _compute_examples(self) -> dict[str, np.ndarray]:
    # What a picture can show: a middling and the strongest level, and the 2D variation.
    uniform = [c for c in self.conditions if not c.name.endswith(("-1d", "-2d"))]
    shown = [uniform[len(uniform) // 2], uniform[-1], self.conditions[-1]]
    shown = list(dict.fromkeys(shown))
    # The test set is sorted by class: examples spread over it show different classes.
    count = min(self.config.evaluation.examples * len(shown), len(self.dataset))
    spread = np.linspace(0, len(self.dataset) - 1, count).round().astype(int)
    batch = next(iter(self._batches(self.dataset.select(spread))))
    _, variables = self._network
    result: dict[str, list] = {}
    for condition in shown:
      degraded, clean = self._degrade(condition, batch, 0)
      predictions, seen = self._predict(variables, degraded, clean)
      seen |= {"degraded": degraded, "clean": clean, "label": batch["label"]}
      for name, x in predictions.items():
        seen[f"prediction/{name.method}/{name.restoration}/{name.ensemble}"] = x
      for key, value in seen.items():
        result.setdefault(key, []).append(np.asarray(value)[:count])
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


def _rows(condition: str, measured: list[dict[Compared, float]]) -> list[dict]:
  rows = []
  for name in measured[0]:
    accuracies = [accuracy[name] for accuracy in measured]
    row = name._asdict() | {
      "condition": condition,
      "accuracy": statistics.fmean(accuracies),
      "std": statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0,
      "rounds": len(accuracies),
    }
    rows.append(row)
  return rows


def evaluate(stage: stages.Stage, config: ConfigDict, datasets: Any) -> Results:
  """Evaluates a finished experiment; see `Evaluation`."""
  return Evaluation(stage, config, datasets).run()
