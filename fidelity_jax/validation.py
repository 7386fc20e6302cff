"""Refuses impossible configs before anything runs, in one line each."""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from fidelity_jax import data, degradations, errors, fidelity, models, resize
from fidelity_jax.models.calibration import MODULES

_POSITIVE = "a number above 0"
_COUNT = "a whole number, at least 1"
_NOT_NEGATIVE = "a whole number, at least 0"

# Field path (within a stage) to (what it must be, test).
_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
  "batch_size": (_COUNT, lambda v: v >= 1),
  "checkpoint_seconds": (_POSITIVE, lambda v: v > 0),
  "ensemble.epochs": (_NOT_NEGATIVE, lambda v: v >= 0),
  "ensemble.learning_rate": (_POSITIVE, lambda v: v > 0),
  "epochs": (_NOT_NEGATIVE, lambda v: v >= 0),
  "evaluation.batch_size": (_COUNT, lambda v: v >= 1),
  "evaluation.examples": (_COUNT, lambda v: v >= 1),
  "evaluation.rounds": (_COUNT, lambda v: v >= 1),
  "label_smoothing": ("in [0, 1)", lambda v: 0 <= v < 1),
  "learning_rate": (_POSITIVE, lambda v: v > 0),
  "model.channels": (_COUNT, lambda v: v >= 1),
  "model.depth": ("a whole number, at least 2", lambda v: v >= 2),
  "model.num_convs": ("2 or 3", lambda v: v in (2, 3)),
  "model.ratio": (_POSITIVE, lambda v: v > 0),
  "model.width": (_COUNT, lambda v: v >= 1),
  "patch_size": (_COUNT, lambda v: v >= 1),
  "patch_stride": (_COUNT, lambda v: v >= 1),
  "seed": (_NOT_NEGATIVE, lambda v: v >= 0),
  "validation_rounds": (_COUNT, lambda v: v >= 1),
}

_CHOICES: dict[str, tuple[str, ...]] = {
  "fidelity.estimator_input": ("degraded", "restored"),
  "fidelity.map": fidelity.KINDS,
  "fidelity.source": ("oracle", "pretrained", "end_to_end"),
  "model.resize": resize.METHODS,
  "optimizer": ("sgd", "adam"),
  "precision": ("auto", "float32", "bfloat16"),
  "source": ("clean", "degraded", "restored"),
}


def check(config: ConfigDict, where: str = "config") -> None:
  """Checks a stage's config and its parents'.

  Args:
    config: the resolved config.
    where: its path from the top, for messages.

  Raises:
    UsageError: names the first impossible value, and what it may be.
  """
  fields = dict(_walk(config))
  for path, (meaning, valid) in _RULES.items():
    if fields.get(path) is not None and not valid(fields[path]):
      raise _refusal(where, path, fields[path], f"must be {meaning}")
  for path, choices in _CHOICES.items():
    if path in fields and fields[path] not in choices:
      hint = errors.near(fields[path], choices)
      raise _refusal(where, path, fields[path], f"is not possible; {hint}")
  for prefix in ("", "ensemble."):
    warmup, epochs = fields.get(f"{prefix}warmup_epochs"), fields.get(f"{prefix}epochs")
    if warmup is not None and not 0 <= warmup <= max(epochs, warmup * (epochs == 0)):
      raise _refusal(
        where,
        f"{prefix}warmup_epochs",
        warmup,
        f"must be from 0 to epochs ({epochs})",
      )
  degradations.from_config(config.degradation)
  data.validate(config.dataset)
  if config.kind == "classifier":
    models.create(config.model, 2)
  if "patch_size" in config and config.patch_size > config.dataset.image_size:
    raise _refusal(
      where,
      "patch_size",
      config.patch_size,
      f"must be at most dataset.image_size ({config.dataset.image_size})",
    )
  if config.kind == "calibration":
    _check_calibration(config, where)
  for role, parent in config.get("parents", ConfigDict()).items():
    check(parent, f"{where}.parents.{role}")


def _check_calibration(config: ConfigDict, where: str) -> None:
  """Checks that a calibration trains something, by the map that its estimator gives."""
  if not any(config.model[name] for name in MODULES):
    raise errors.UsageError(
      f"{where}.model: every module is switched off, so there is nothing to train: "
      f"leave one of {', '.join(MODULES)} on."
    )
  source, estimator = config.fidelity.source, config.parents.get("estimator")
  if (source == "oracle") != (estimator is None):
    has = "has no estimator" if estimator is None else "has an estimator"
    raise _refusal(
      where,
      "fidelity.source",
      source,
      f"does not fit this experiment, which {has}: use configs/{source}.py",
    )
  for name in ("map", "estimator_input") if estimator else ():
    if estimator.fidelity[name] != config.fidelity[name]:
      raise _refusal(
        f"{where}.parents.estimator",
        f"fidelity.{name}",
        estimator.fidelity[name],
        f"must be that of the method, {where}.fidelity.{name} = "
        f"{config.fidelity[name]!r}: set that one alone",
      )


def _refusal(where: str, path: str, value: Any, rule: str) -> errors.UsageError:
  return errors.UsageError(f"{where}.{path} = {value!r} {rule}.")


def _walk(config: ConfigDict, prefix: str = ""):
  for name, value in config.items():
    if isinstance(value, ConfigDict):
      if name not in ("parents", "dataset", "degradation"):
        yield from _walk(value, f"{prefix}{name}.")
    else:
      yield prefix + name, value
