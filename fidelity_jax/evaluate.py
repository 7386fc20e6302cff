"""Methods x conditions x rounds -> rows (docs/method.md, section 7).

All methods see the same noise: it depends on the seed, the condition, the round and
the example alone.
"""

import dataclasses
import functools
import io
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from fidelity_jax import (
  assembly,
  data,
  degradations,
  errors,
  fidelity,
  files,
  platform,
  progress,
  randomness,
  rows,
  sharding,
  signals,
  stages,
  tasks,
)
from fidelity_jax.method import Method
from fidelity_jax.rows import Compared

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Results:
  """What an evaluation measured.

  Attributes:
    rows: one for each method and condition.
    examples: arrays for the picture of examples; see `Evaluation._examples`.
    class_names: names of the classes.
  """

  rows: list[rows.Row]
  examples: dict[str, np.ndarray]
  class_names: list[str]


def compared_methods(
  networks: dict[str, stages.Stage], source: str | None
) -> tuple[Compared, ...]:
  """Returns the methods that some networks make up, for comparison.

  Args:
    networks: stages by role.
    source: where the fidelity map comes from, None without calibration.
  """
  plain = "classifier" if "classifier" in networks else "restoration"
  found = [Compared(plain, False)]
  if "restorer" in networks:
    found.append(Compared(plain, True))
  if "calibration" in networks:
    found.append(Compared(source, True, False))
  if "ensemble" in networks:
    found.append(Compared(source, True, True))
  return tuple(found)


def measure(
  method: Method,
  wanted: tuple[Compared, ...],
  variables: PyTree,
  degraded: jax.Array,
  clean: jax.Array,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
  """Returns what methods make of degraded images.

  Args:
    method: the networks.
    wanted: the methods compared.
    variables: the networks' variables.
    degraded: float32 [N, H, W, 3] in [0, 1].
    clean: likewise; for the oracle map, and for PSNR.

  Returns:
    (by `Compared.key` the predicted classes, int32 [N], or without a classifier the
    PSNR, float32 [N]; the images on the way: "restored" [N, H, W, 3] and "map"
    [N, H, W, C], where there are any).
  """
  seen, images = {}, {False: degraded}
  if method.restorer is not None:
    images[True] = seen["restored"] = method.restore(variables, degraded)
  if method.classifier is None:
    psnr = lambda c: tasks.base.psnr(images[c.restored], clean)
    return {c.key: psnr(c) for c in wanted}, seen
  features = {}
  for c in wanted:
    if c.method == "classifier":
      features[c.key] = method.plain(variables, images[c.restored])
  if method.calibration is not None:
    restored = images[True]
    seen["map"] = method.fidelity_map(variables, degraded, restored, clean)
    confidence = fidelity.confidence(seen["map"], method.map_name)
    calibrated = method.calibrated(variables, restored, confidence)
    for c in wanted:
      if c.ensemble:
        plain = method.plain(variables, restored)
        features[c.key] = method.ensemble.apply(
          variables["ensemble"], calibrated, plain, confidence
        )
      elif c.method != "classifier":
        features[c.key] = calibrated
  classify = lambda h: jnp.argmax(method.classify(variables, h), -1).astype(jnp.int32)
  return {key: classify(h) for key, h in features.items()}, seen


class Evaluation:
  """The evaluation of one experiment: compiled functions, data and files."""

  def __init__(
    self,
    stage: stages.Stage,
    further: dict[str, stages.Stage],
    config: ConfigDict,
    dataset: data.Dataset,
    directory: pathlib.Path,
  ):
    """Prepares to evaluate.

    Args:
      stage: the experiment's last stage, which need not be finished yet.
      further: stages that serve its evaluation alone, by role.
      config: the experiment's config.
      dataset: the test images.
      directory: the experiment's.
    """
    self.config, self.stage, self.further = config, stage, further
    self.directory, self.dataset = directory, dataset
    self.conditions = degradations.conditions(config.degradation)
    self.networks = stage.networks() | further
    source = config.fidelity.source if "calibration" in self.networks else None
    self.compared = compared_methods(self.networks, source)
    self.mesh = sharding.make_mesh()
    self.sharding = sharding.batch(self.mesh)
    self._compiled: dict[tuple[Compared, ...], Any] = {}

  def _behind(self, compared: Compared) -> dict[str, stages.Stage]:
    """Returns the stages that a method's values depend on, by role."""
    without = set()
    if not compared.ensemble:
      without.add("ensemble")
    if compared.method in ("classifier", "restoration"):
      without |= {"calibration", "estimator"}
    if not compared.restored:
      without.add("restorer")
    return {r: stage for r, stage in self.networks.items() if r not in without}

  @functools.cached_property
  def _products(self) -> dict[str, str]:
    """Digests of what the stages gave, by role."""
    return {role: s.finished().product for role, s in self.networks.items()}

  def _of(self, compared: Compared) -> dict[str, Any]:
    """Returns all that a method's values depend on but for condition and round."""
    behind = self._behind(compared).items()
    return {
      "method": compared.key,
      "stages": {role: [s.name, self._products[role]] for role, s in behind},
      "images": self.dataset.fingerprint,
      "image_size": self.config.dataset.image_size,
      "seed": self.config.seed,
    }

  @functools.cached_property
  def _network(self) -> assembly.Frozen:
    classes = self.dataset.num_classes
    loaded = assembly.load_method(self.stage, self.further, classes)
    variables = jax.device_put(loaded.variables, sharding.replicated(self.mesh))
    return assembly.Frozen(loaded.network, variables)

  def _measure(self, wanted: tuple[Compared, ...]):
    # One compiled function for all conditions: what differs is done before it.
    if wanted not in self._compiled:
      function = functools.partial(measure, self._network.network, wanted)
      options = platform.compiler_options()
      self._compiled[wanted] = jax.jit(function, compiler_options=options)
    return self._compiled[wanted]

  def _degraded(self, condition, batch, round_: int) -> tuple[jax.Array, jax.Array]:
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
      **sharding.host_shard(self.sharding),
    )
    return data.prefetch_to_device(batches, self.sharding)

  def _round(
    self, condition, round_: int, wanted: tuple[Compared, ...]
  ) -> dict[str, np.ndarray]:
    """Returns methods' values [N] in one round of a condition, by `Compared.key`."""
    found: dict[str, list[jax.Array]] = {c.key: [] for c in wanted}
    function = self._measure(wanted)
    for batch in self._batches(self.dataset):
      degraded, clean = self._degraded(condition, batch, round_)
      values, _ = function(self._network.variables, degraded, clean)
      for key, value in values.items():
        found[key].append(value)
    # The padding is at the end.
    whole = lambda parts: np.concatenate(list(map(np.asarray, parts)))
    return {key: whole(parts)[: len(self.dataset)] for key, parts in found.items()}

  def run(self) -> Results:
    """Measures every round of every condition that is not measured yet.

    Raises:
      RunError: what was kept is damaged, or cannot be written.
      Stopped: on SIGTERM or SIGINT, between rounds.
    """
    workdir, count = self.stage.directory.parent, len(self.dataset)
    kept = {
      c: rows.Measurements(workdir, c.key, self._of(c), count) for c in self.compared
    }
    rounds = self.config.evaluation.rounds
    places = [(c, r) for c in self.conditions for r in range(c.rounds_needed(rounds))]
    todo = []
    for condition, round_ in places:
      is_new = lambda c, at=(condition, round_): kept[c].get(*at) is None
      if wanted := tuple(filter(is_new, self.compared)):
        todo.append((condition, round_, wanted))
    bar = progress.Progress("evaluation", len(todo), unit="round")
    for done, (condition, round_, wanted) in enumerate(todo, 1):
      signals.stop_if_received(f"evaluating {condition.name}")
      values = self._round(condition, round_, wanted)
      for c in wanted:
        kept[c].put(condition, round_, values[c.key])
      if bar.due() or done == len(todo):
        bar.update(done, condition=condition.name)
    bar.close()
    found = []
    for condition in self.conditions:
      numbers = range(condition.rounds_needed(rounds))
      for c in self.compared:
        measured = [kept[c].get(condition, number) for number in numbers]
        found.append(self._row(c, condition, measured))
    return Results(found, self._examples(), list(self.dataset.class_names))

  def _row(
    self,
    compared: Compared,
    condition: degradations.Condition,
    measured: list[np.ndarray],
  ) -> rows.Row:
    """Returns the row of a method's values [N], round by round."""
    behind = self._behind(compared)
    configs = {role: stage.config for role, stage in behind.items()}
    classifier = configs.get("classifier")
    facts = {}
    if classifier is None:
      name, per_round = "psnr", [float(np.mean(v)) for v in measured]
    else:
      name = "accuracy"
      right = [v == self.dataset.labels for v in measured]
      per_round = [100 * float(np.mean(v)) for v in right]
    facts[name], std = rows.mean_and_std(per_round)
    trained_on = classifier.source if classifier else None
    if classifier and not classifier.epochs:
      as_given = classifier.model.weights and not classifier.model.new_head
      trained_on = "given" if as_given else "none"
    return rows.Row(
      experiment=self.config.experiment,
      method=compared.method,
      trained_on=trained_on,
      backbone=classifier.model.name if classifier else None,
      restorer=configs["restorer"].model.name if compared.restored else None,
      map=configs["calibration"].fidelity.map if "calibration" in configs else None,
      ensemble=compared.ensemble,
      dataset=self.config.dataset.name,
      image_size=self.config.dataset.image_size,
      condition=rows.Condition.of(condition),
      seed=self.config.seed,
      precision=self.config.precision,
      std=std,
      rounds=len(measured),
      images=len(self.dataset),
      fingerprint=self.dataset.fingerprint[:16],
      stages={role: stage.name for role, stage in behind.items()},
      products={role: self._products[role][:16] for role in behind},
      **facts,
    )

  def _examples(self) -> dict[str, np.ndarray]:
    """Returns arrays for the picture of examples, computed once and kept.

    "condition" [M] names M conditions; "clean", "degraded" [M, N, H, W, 3], "label"
    [M, N], where there are any "restored" [M, N, H, W, 3] and "map" [M, N, H, W, C],
    and each method's values [M, N] under "value/KEY".
    """
    path = self.directory / "examples.npz"
    files.check_file(path)
    of = [
      *(self._of(c) for c in self.compared),
      self.config.evaluation.examples,
      [c.steps for c in self.conditions],
    ]
    digest = files.digest(of)
    if path.exists():
      examples = _read_npz(path)
      if str(examples.get("of")) == digest:
        return examples
    examples = self._compute_examples()
    files.write_bytes(path, _npz(examples | {"of": np.array(digest)}))
    return examples

  def _compute_examples(self) -> dict[str, np.ndarray]:
    # The picture shows a middle level, the strongest one and the 2D variation.
    uniform = [c for c in self.conditions if c.vary not in ("1d", "2d")]
    shown = [uniform[len(uniform) // 2], uniform[-1], self.conditions[-1]]
    shown = list(dict.fromkeys(shown))
    # The test set is sorted by class: examples spread over it are of different classes.
    count = min(self.config.evaluation.examples * len(shown), len(self.dataset))
    spread = np.linspace(0, len(self.dataset) - 1, count).round().astype(int)
    batches = list(self._batches(self.dataset.select(spread)))
    function = self._measure(self.compared)
    result: dict[str, list] = {}
    for condition in shown:
      parts: dict[str, list] = {}
      for batch in batches:
        degraded, clean = self._degraded(condition, batch, 0)
        values, seen = function(self._network.variables, degraded, clean)
        seen |= {"degraded": degraded, "clean": clean, "label": batch["label"]}
        seen |= {f"value/{key}": value for key, value in values.items()}
        for key, value in seen.items():
          parts.setdefault(key, []).append(np.asarray(value))
      for key, values in parts.items():
        result.setdefault(key, []).append(np.concatenate(values)[:count])
    arrays = {key: np.stack(values) for key, values in result.items()}
    return arrays | {"condition": np.array([c.name for c in shown])}


@jax.jit
def _degrade(degradation, key, batch, round_):
  clean = batch["image"].astype(jnp.float32) / 255
  keys = randomness.example_keys(key, round_, batch["index"])
  return degradation(keys, clean), clean


def _npz(arrays: dict[str, np.ndarray]) -> bytes:
  buffer = io.BytesIO()
  np.savez_compressed(buffer, **arrays)
  return buffer.getvalue()


def _read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns the arrays of examples.npz.

  Raises:
    RunError: it cannot be read or is damaged.
  """
  try:
    # The zip form has checksums, which NumPy compares.
    with errors.while_doing(f"reading {path}"), np.load(path) as arrays:
      examples = dict(arrays)
    count = len(examples["condition"])
    if any(len(examples[name]) != count for name in ("clean", "degraded", "label")):
      raise ValueError("its arrays do not fit each other")
  except errors.RunError:
    raise
  except Exception as error:  # zipfile, zlib and NumPy raise many types.
    raise errors.RunError(
      f"{path} is damaged ({error}): delete it to compute it again."
    ) from error
  return examples
