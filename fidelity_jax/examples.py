"""Some test images of an experiment on their way, and mean inputs of the head."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from fidelity_jax import data, degradations, errors, files, hosts, sharding, signals
from fidelity_jax.evaluate import Evaluation
from fidelity_jax.report.content import Activations, Examples
from fidelity_jax.rows import Compared, Condition
from fidelity_jax.subjects import Subject
from fidelity_jax.tensors import Tensors


def draw(
  evaluation: Evaluation, chosen: Sequence[Subject], directory: pathlib.Path
) -> Examples:
  """Returns what a picture of examples shows, computed once and kept.

  Args:
    evaluation: the experiment's.
    chosen: what the experiment measures.
    directory: where to keep it.

  Raises:
    RunError: what was kept is damaged.
  """
  config = chosen[0].config
  shown = _shown(chosen[0].conditions)
  path = directory / f"examples-{config.experiment}.npz"
  of = {
    "subjects": [evaluation.of(s) for s in chosen],
    "examples": config.evaluation.examples,
    "conditions": [c.steps for c in shown],
    "format": 2,
  }
  compute = lambda: _examples(evaluation, chosen, shown)
  mapped = any(s.compared.steered for s in chosen)
  return Examples(
    experiment=config.experiment,
    compared=tuple(s.compared for s in chosen),
    map_name=config.fidelity.map if mapped else None,
    trained_on=next((s.facts.trained_on for s in chosen if s.facts.trained_on), None),
    conditions=tuple(map(Condition.of, shown)),
    arrays=_kept(path, of, compute),
  )


def _shown(
  conditions: Sequence[degradations.Condition],
) -> list[degradations.Condition]:
  """Returns a middle level, the strongest one and the 2D variation."""
  uniform = [c for c in conditions if c.vary not in ("1d", "2d")]
  shown = [uniform[len(uniform) // 2], uniform[-1], conditions[-1]]
  return list(dict.fromkeys(shown))


def _kept(path: pathlib.Path, of: dict, compute) -> dict[str, np.ndarray]:
  """Returns arrays that a file holds, if they are of this, or computes them."""
  digest, again = files.digest(of), "delete it to compute it again."

  def look() -> dict[str, np.ndarray] | None:
    files.check_file(path)
    if not path.exists():
      return None
    arrays, record = files.read_arrays(path, again)
    return arrays if record == digest else None

  found = look()
  # All compute, or none does.
  if hosts.agree(found is not None):
    return files.seen(lambda: found or look(), f"{path} is written", path.parent)
  arrays = compute()
  files.write_arrays(path, arrays, digest)
  return arrays


def _examples(evaluation, chosen, shown) -> dict[str, np.ndarray]:
  dataset, config = evaluation.dataset, chosen[0].config
  # The test set is sorted by class: examples spread over it are of different classes.
  count = min(config.evaluation.examples * len(shown), len(dataset))
  spread = np.linspace(0, len(dataset) - 1, count).round().astype(int)
  batches = list(evaluation.batches(dataset.select(spread)))
  seed, result = config.evaluation.seed, {}
  (clean,) = degradations.conditions("clean")
  # What no condition changes.
  fixed: list[dict[str, Any]] = []
  for batch in batches:
    undegraded = Tensors(evaluation.networks, seed, clean, batch, 0)
    fixed.append({"clean": undegraded.clean, "label": batch["label"]})
    for subject in chosen:
      if subject.compared == Compared("classifier", False):
        fixed[-1]["value/clean"] = undegraded.values(subject)["prediction"]
  for condition in shown:
    parts: dict[str, list] = {}
    for batch, same in zip(batches, fixed, strict=True):
      tensors = Tensors(evaluation.networks, seed, condition, batch, 0)
      seen = {"degraded": tensors.degraded, **same}
      for subject in chosen:
        compared = subject.compared
        if compared.restored:
          seen["restored"] = tensors.images(subject)
        if compared.steered:
          seen["map"] = tensors.fidelity_map(subject)
        if compared.method != "estimation":
          name = "psnr" if compared.method == "restoration" else "prediction"
          seen[f"value/{compared.key}"] = tensors.values(subject)[name]
      for key, value in seen.items():
        parts.setdefault(key, []).append(sharding.fetch(value))
    for key, values in parts.items():
      result.setdefault(key, []).append(np.concatenate(values)[:count])
  return {key: np.stack(values) for key, values in result.items()}


def activations(
  evaluation: Evaluation,
  chosen: Sequence[Subject],
  class_name: str | None,
  directory: pathlib.Path,
) -> Activations:
  """Returns the mean inputs of the head over the images of a class.

  Args:
    evaluation: the experiment's.
    chosen: what the experiment measures, a classifier among it.
    class_name: the class; None: the first.
    directory: where to keep what was computed.

  Raises:
    UsageError: there is no such class among the test images.
    RunError: what was kept is damaged.
  """
  config = chosen[0].config
  name, own = of_class(evaluation.dataset, class_name)
  plain = [s for s in chosen if s.compared.method == "classifier"]
  uniform = [c for c in plain[0].conditions if c.vary is None]
  path = directory / f"activations-{config.experiment}.npz"
  of = {
    "subjects": [evaluation.of(s) for s in plain],
    "class": name,
    "rounds": config.evaluation.rounds,
    "conditions": [c.steps for c in uniform],
  }
  compute = lambda: _activations(evaluation, plain, uniform, own)
  arrays = _kept(path, of, compute)
  return Activations(
    class_name=name,
    images=len(own),
    conditions=tuple(map(Condition.of, uniform)),
    degraded=arrays["degraded"],
    restored=arrays.get("restored"),
    backbone=plain[0].stages["classifier"].config.model.name,
  )


def of_class(dataset: data.Dataset, class_name: str | None) -> tuple[str, np.ndarray]:
  """Returns a class and the numbers of its images.

  Args:
    dataset: the test images.
    class_name: the class; None: the first.

  Raises:
    UsageError: there is no such class, or no image of it.
  """
  name = class_name or dataset.class_names[0]
  errors.check_choice("class in config.class_name", name, dataset.class_names)
  own = np.flatnonzero(dataset.labels == list(dataset.class_names).index(name))
  if not len(own):
    raise errors.UsageError(
      f"config.class_name: there is no test image of {name!r}: name another class."
    )
  return name, own


def _activations(evaluation, plain, uniform, own) -> dict[str, np.ndarray]:
  config = plain[0].config
  batches = list(evaluation.batches(evaluation.dataset.select(own)))
  found: dict[str, list[np.ndarray]] = {}
  for condition in uniform:
    signals.stop_if_received("measuring activations")
    rounds = condition.rounds_needed(config.evaluation.rounds)
    sums: dict[str, float | np.ndarray] = {}
    for batch in batches:
      for number in range(rounds):
        seed = config.evaluation.seed
        tensors = Tensors(evaluation.networks, seed, condition, batch, number)
        for subject in plain:
          key = "restored" if subject.compared.restored else "degraded"
          features, mask = sharding.fetch((tensors.features(subject), batch["mask"]))
          total = (features.astype(np.float64) * mask[:, None]).sum(0)
          sums[key] = sums.get(key, 0.0) + total
    for key, total in sums.items():
      found.setdefault(key, []).append(total / (len(own) * rounds))
  return {key: np.stack(values) for key, values in found.items()}
