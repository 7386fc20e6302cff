"""Refuses impossible configs before anything runs, in one line each.

The tables below say which fields a kind of stage has, and their types and ranges;
`data.FIELDS` is that of `dataset`, and `degradations.from_config` knows those of
`degradation`. `None` stands only where a field may be unset.
"""

from ml_collections import ConfigDict

from fidelity_jax import data, degradations, errors, fidelity, models, resize, rules
from fidelity_jax.models.calibration import MODULES
from fidelity_jax.models.registry import NAMES as NETWORKS
from fidelity_jax.rules import (
  ANYTHING,
  FLAG,
  NAME,
  SMOOTHING,
  TEXT,
  choice,
  number,
  optional,
  whole,
)

_EPOCHS = whole(0, 1_000_000)
_BATCH = whole(1, 1_000_000)
_RATE = number(0, 1e30)
_SIZE = whole(1, 65_536)

_TRAINING: rules.Table = {
  "seed": whole(0, 2**32 - 1),
  "dataset": data.FIELDS,
  "degradation": ANYTHING,
  "precision": choice("auto", "float32", "bfloat16"),
  "checkpoint_seconds": number(0, 1e9),
  "optimizer": choice("sgd", "adam"),
  "learning_rate": _RATE,
  "batch_size": _BATCH,
  "epochs": _EPOCHS,
  "warmup_epochs": _EPOCHS,
  "validation_rounds": whole(1, 10_000),
}
_STACK: rules.Table = _TRAINING | {
  "model": {
    "depth": whole(2, 200),
    "width": _SIZE,
    "batch_norm": FLAG,
    "weights": optional(NAME),
  },
  "patch_size": whole(1, 4096),
  "patch_stride": whole(1, 4096),
}
_MAP: rules.Table = {
  "map": choice(*fidelity.KINDS),
  "estimator_input": choice("degraded", "restored"),
}
_FIELDS: dict[str, rules.Table] = {
  "classifier": _TRAINING
  | {
    "source": choice("clean", "degraded", "restored"),
    "label_smoothing": SMOOTHING,
    "model": {
      "name": choice(*NETWORKS),
      "stage_sizes": optional(rules.several(whole(1, 200), 1, 8)),
      "width": optional(_SIZE),
      "block": optional(choice("basic", "bottleneck")),
      "transform_input": optional(FLAG),
      "transform_steered": optional(FLAG),
      "weights": optional(NAME),
      "new_head": FLAG,
    },
  },
  "restorer": _STACK,
  "estimator": _STACK | {"fidelity": _MAP},
  "calibration": _TRAINING
  | {
    "fidelity": _MAP | {"source": choice("oracle", "pretrained", "end_to_end")},
    "label_smoothing": SMOOTHING,
    "model": {
      "ratio": number(0, 64),
      "num_convs": whole(2, 3),
      "channels": whole(1, 4096),
      "resize": choice(*resize.METHODS),
      **{module: FLAG for module in MODULES},
      "residual": FLAG,
      "weights": optional(NAME),
    },
    "rematerialize": FLAG,
    "ensemble": {
      "enabled": FLAG,
      "learning_rate": _RATE,
      "epochs": _EPOCHS,
      "warmup_epochs": _EPOCHS,
      "weights": optional(NAME),
    },
  },
}
# What an experiment's last stage may have besides.
_EVALUATED: rules.Table = {
  "experiment": TEXT,
  "evaluation": {
    "rounds": whole(1, 1_000_000),
    "batch_size": _BATCH,
    "examples": whole(1, 32),
  },
}
# Roles of the parents that a kind of stage must have, and that it may have.
_PARENTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
  "classifier": ((), ("restorer",)),
  "restorer": ((), ()),
  "estimator": (("restorer",), ()),
  "calibration": (("classifier", "restorer"), ("estimator",)),
}


def check(config: ConfigDict, where: str = "config") -> None:
  """Checks a stage's config and its parents'.

  Args:
    config: the resolved config.
    where: its path from the top, for messages.

  Raises:
    UsageError: names the first impossible value, and what it may be.
  """
  if not isinstance(config, ConfigDict):
    raise errors.UsageError(f"{where} must be a ConfigDict, not {config!r}.")
  kind = config.get("kind")
  if not isinstance(kind, str) or kind not in _FIELDS:
    near = errors.near(kind, _FIELDS)
    raise rules.refusal(where, "kind", kind, f"is not possible; {near}")
  table = dict(_FIELDS[kind])
  if where == "config":
    # Only the whole method is evaluated.
    if kind == "calibration" and "evaluation" in config:
      table |= _EVALUATED
    elif "experiment" in config:
      table["experiment"] = TEXT
  fields = {k: v for k, v in config.items() if k not in ("kind", "parents")}
  rules.check(ConfigDict(fields), table, where)
  _check_warmup(config, where)
  if "ensemble" in config:
    _check_warmup(config.ensemble, f"{where}.ensemble")
  data.check(config.dataset)
  side = _check_patches(config, where)
  _check_degradation(config, side, where)
  if kind == "classifier":
    models.create(config.model, 2)
  parents = _check_parents(config, where)
  if kind == "calibration":
    _check_calibration(config, where)
  for role, parent in parents.items():
    check(parent, f"{where}.parents.{role}")


def _check_warmup(config: ConfigDict, where: str) -> None:
  if config.epochs and config.warmup_epochs > config.epochs:
    raise rules.refusal(
      where,
      "warmup_epochs",
      config.warmup_epochs,
      f"must be at most epochs ({config.epochs})",
    )


def _check_patches(config: ConfigDict, where: str) -> int:
  """Returns the side of the images that are degraded, in pixels."""
  side = config.dataset.image_size
  if "patch_size" not in config:
    return side
  if config.patch_size > side:
    raise rules.refusal(
      where, "patch_size", config.patch_size, f"must be at most image_size ({side})"
    )
  return config.patch_size


def _check_degradation(config: ConfigDict, side: int, where: str) -> None:
  """Checks the degradation, and that its kernels are not out of all proportion."""
  for step in degradations.from_config(config.degradation).steps:
    longest = dict(step.options).get("kernel_size", 0)
    if step.kind == "motion_blur":
      longest = max(step.levels)
    if longest > 2 * side - 1:
      raise errors.UsageError(
        f"{where}.degradation: {step.kind} over {longest:g} pixels is too much for "
        f"images of {side} pixels: use at most {2 * side - 1}."
      )


def _check_parents(config: ConfigDict, where: str) -> ConfigDict:
  """Returns the parents' configs, checked to be those that the stage builds on."""
  required, possible = _PARENTS[config.kind]
  if config.get("source") == "restored":
    required += ("restorer",)
  parents = config.get("parents", ConfigDict())
  if not isinstance(parents, ConfigDict):
    raise rules.refusal(where, "parents", parents, "must be a ConfigDict")
  for role in required:
    if role not in parents:
      raise errors.UsageError(
        f"{where}.parents.{role} is missing: a {config.kind} builds on it; copy it "
        "from a config in configs/."
      )
  for role, parent in parents.items():
    if role not in (*required, *possible):
      raise errors.UsageError(
        f"{where}.parents.{role}: a {config.kind} has no such parent."
      )
    if isinstance(parent, ConfigDict) and parent.get("kind") != role:
      raise rules.refusal(
        where, f"parents.{role}.kind", parent.get("kind"), f"must be {role!r}"
      )
  return parents


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
    raise rules.refusal(
      where,
      "fidelity.source",
      source,
      f"does not fit this experiment, which {has}: use configs/{source}.py",
    )
  for name in ("map", "estimator_input") if estimator else ():
    given = estimator.get("fidelity", ConfigDict()).get(name)
    if given != config.fidelity[name]:
      raise rules.refusal(
        f"{where}.parents.estimator",
        f"fidelity.{name}",
        given,
        f"must be that of the method, {where}.fidelity.{name} = "
        f"{config.fidelity[name]!r}: set that one alone",
      )
