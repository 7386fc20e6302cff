"""Refuses impossible configs before anything runs, in one line each.

The fields of each kind of stage are in `tasks`; `data.FIELDS` is the table of
`dataset`, and `degradations.from_config` knows the fields of `degradation`. `None`
stands only where a field may be unset.
"""

import re

from ml_collections import ConfigDict

from fidelity_jax import data, degradations, errors, measurements, rules, tasks

_STAGES = tuple(f"{kind}-" for kind in tasks.KINDS)
# It names a directory.
EXPERIMENT = rules.Rule(
  "a name of letters, digits and _ . -, which no stage's begins with",
  lambda v: (
    isinstance(v, str)
    and re.fullmatch(r"[A-Za-z0-9_][\w.-]{0,99}", v, re.A)
    and not v.startswith((*_STAGES, measurements.DIRECTORY))
  ),
)
_EVALUATION: rules.Table = {
  "rounds": rules.whole(1, 1_000_000),
  "seed": rules.whole(0, 2**32 - 1),
  "batch_size": rules.whole(1, 1_000_000),
  "examples": rules.whole(1, 32),
  "keep": rules.optional(rules.choice("predictions")),
}


def check(config: ConfigDict, where: str = "config") -> None:
  """Checks an experiment's config, its parents' included.

  Args:
    config: the resolved config.
    where: its path, for messages.

  Raises:
    UsageError: names the first impossible value, and what it may be.
  """
  _check(config, where, top=True)


def _check(config: ConfigDict, where: str, top: bool = False) -> None:
  """Checks a stage's config and its parents'; `where` is its path from the top."""
  name = config.get("kind")
  if not isinstance(name, str) or name not in tasks.CONFIGURED:
    near = errors.near(name, tasks.CONFIGURED)
    raise rules.refusal(where, "kind", name, f"is not possible; {near}")
  kind = tasks.CONFIGURED[name]
  table = tasks.base.TRAINING | kind.fields(config)
  if top:
    table = table | {"experiment": EXPERIMENT, "labels": data.FIELDS["labels"]}
    if kind.evaluated:
      table["evaluation"] = _EVALUATION
  fields = {k: v for k, v in config.items() if k not in ("kind", "parents")}
  rules.check(ConfigDict(fields), table, where)
  _check_warmup(config, where)
  if "ensemble" in config:
    _check_warmup(config.ensemble, f"{where}.ensemble")
  data.check(config.dataset)
  side = _check_patches(config, where)
  check_degradation(config, side, where)
  parents = config.get("parents", ConfigDict())
  if not isinstance(parents, ConfigDict):
    raise rules.refusal(where, "parents", parents, "must be a ConfigDict")
  _check_are_stages(parents, where)
  kind.check(config, where)
  _check_parents(kind, config, parents, where)
  # A parent that serves an evaluation is used at the top alone.
  used = kind.trained_from(config)
  for role, parent in parents.items():
    if role in used or top:
      _check(parent, f"{where}.parents.{role}")


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


def check_degradation(config: ConfigDict, side: int, where: str) -> None:
  """Checks the degradation, and that its kernels are not larger than images allow.

  Args:
    config: its field `degradation` is checked.
    side: of the images, pixels.
    where: the config's path, for messages.

  Raises:
    UsageError: it is impossible, or too much for these images.
  """
  for step in degradations.from_config(config.degradation).steps:
    longest = dict(step.options).get("kernel_size", 0)
    if step.kind == "motion_blur":
      longest = max(step.levels)
    if longest > 2 * side - 1:
      raise errors.UsageError(
        f"{where}.degradation: {step.kind} over {longest:g} pixels is too much for "
        f"images of {side} pixels: use at most {2 * side - 1}."
      )


def _check_are_stages(parents: ConfigDict, where: str) -> None:
  """Raises UsageError for a parent, or a part of one, that has no fields at all."""
  for role, parent in parents.items():
    path = f"{where}.parents.{role}"
    if not isinstance(parent, ConfigDict):
      raise errors.UsageError(f"{path} must be a ConfigDict, not {parent!r}.")
    for name in ("fidelity", "parents"):
      if not isinstance(parent.get(name, ConfigDict()), ConfigDict):
        raise rules.refusal(path, name, parent[name], "must be a ConfigDict")


def _check_parents(
  kind: tasks.Kind, config: ConfigDict, parents: ConfigDict, where: str
) -> None:
  """Checks that the parents are those that the stage builds on."""
  required = kind.trained_from(config)
  for role in required:
    if role not in parents:
      raise errors.UsageError(
        f"{where}.parents.{role} is missing: a {kind.name} builds on it; copy it "
        "from a config in configs/."
      )
  possible = required + kind.evaluated_with
  for role, parent in parents.items():
    if role not in possible:
      raise errors.UsageError(
        f"{where}.parents.{role}: a {kind.name} has no such parent."
      )
    if parent.get("kind") != role:
      raise rules.refusal(
        where, f"parents.{role}.kind", parent.get("kind"), f"must be {role!r}"
      )
