"""Studies: experiments that share one workdir, and how to show them together.

A study's config is an experiment's, whose fields hold for all that the study compares,
and beside them

- `study`: its name, and `shows`: what it is, in a line;
- `experiments`: the configs of its experiments, by name, in the `order` of their names;
  their fields follow those at the top until they are set themselves;
- `seeds`, `backbones`, `degradations`: values that all experiments are run with, one
  after the other; None for the one that the config has;
- `one_backbone`: names of experiments that run on the config's own backbone alone;
- `sections`: what its report begins with; `class_name`: the class that "activations"
  shows, None for the first;
- `only`: names or patterns of the experiments to run, joined by commas; None for all;
- `shard`: "i/n" if this is the i-th of n processes that work on it together.

An experiment without these is a study of its own.
"""

import copy
import dataclasses
import fnmatch
import itertools
import re

from ml_collections import ConfigDict

from fidelity_jax import errors, models, rules, schema

# What a report can begin with.
SECTIONS = ("tables", "curves", "claims", "activations", "histories")
# What the values of axes have that names may not.
_IN_NAMES = str.maketrans({"+": "_", ":": "."})
_AXES = ("seeds", "backbones", "degradations")
_SHARD = rules.Rule(
  'None or "i/n", process i of n, from 1 on',
  lambda v: v is None or (isinstance(v, str) and _shard(v) is not None),
)
_FIELDS: rules.Table = {
  "study": schema.EXPERIMENT,
  "shows": rules.TEXT,
  "experiments": rules.ANYTHING,
  "order": rules.several(rules.NAME, 1, 1000),
  "seeds": rules.optional(rules.several(rules.whole(0, 2**32 - 1), 1, 1000)),
  "backbones": rules.optional(rules.several(models.registry.NAME, 1, 100)),
  "degradations": rules.optional(rules.several(rules.NAME, 1, 100)),
  "one_backbone": rules.several(rules.NAME, 0, 100),
  "sections": rules.several(rules.choice(*SECTIONS), 0, 10),
  "class_name": rules.optional(rules.NAME),
  "only": rules.optional(rules.NAME),
  "shard": _SHARD,
}


@dataclasses.dataclass(frozen=True)
class Study:
  """Experiments, and how to show them.

  Attributes:
    name: names its directory.
    shows: what it is, in a line; "" for a lone experiment.
    sections: what its report begins with.
    class_name: see above.
    experiments: the configs, resolved and checked; their names differ.
    shard: (i, n) with 1 <= i <= n, or None for a process that works alone.
    lone: whether it is an experiment and no study.
  """

  name: str
  shows: str
  sections: tuple[str, ...]
  class_name: str | None
  experiments: list[ConfigDict]
  shard: tuple[int, int] | None
  lone: bool = False


def read(config: ConfigDict) -> Study:
  """Returns what a config asks for.

  Args:
    config: of a study or an experiment.

  Raises:
    UsageError: it asks for something impossible.
  """
  if "study" not in config:
    config = config.copy_and_resolve_references()
    schema.check(config)
    return Study(
      config.experiment, "", ("tables", "curves"), None, [config], None, True
    )
  own = ConfigDict({k: v for k, v in config.items() if k in _FIELDS})
  rules.check(own, _FIELDS, "config")
  for field in ("order", "one_backbone"):
    for name in config[field]:
      errors.check_choice(f"experiment in config.{field}", name, config.experiments)
  # What holds for all is told where it stands.
  top = config.copy_and_resolve_references()
  schema.check(ConfigDict({k: v for k, v in top.items() if k not in _FIELDS}))
  found = [e for values in _combinations(config) for e in _expand(config, values)]
  experiments = list({e.experiment: e for e in found}.values())
  for experiment in experiments:
    schema.check(experiment, f"config.experiments.{experiment.experiment}")
  if config.only is not None:
    experiments = _chosen(experiments, config.only)
  return Study(
    name=config.study,
    shows=config.shows,
    sections=tuple(config.sections),
    class_name=config.class_name,
    experiments=experiments,
    shard=_shard(config.shard) if config.shard else None,
  )


def _combinations(config: ConfigDict) -> list[dict[str, object]]:
  """Returns the values of the axes to run with, by axis; None for the config's own."""
  values = [config[axis] or (None,) for axis in _AXES]
  return [dict(zip(_AXES, v, strict=True)) for v in itertools.product(*values)]


def _expand(config: ConfigDict, values: dict[str, object]) -> list[ConfigDict]:
  """Returns the experiments under some values of the axes."""
  # A copy whose experiments follow it, as those of the original follow that.
  config = copy.deepcopy(config)
  if values["seeds"] is not None:
    config.seed = values["seeds"]
  if values["degradations"] is not None:
    config.degradation.kind = values["degradations"]
  own = config.parents.classifier.model.name
  result = []
  for name in config.order:
    follows = values["backbones"] is not None and name not in config.one_backbone
    config.parents.classifier.model.name = values["backbones"] if follows else own
    experiment = config.experiments[name].copy_and_resolve_references()
    experiment.experiment = _name(config, name, values, follows)
    _check_follows(experiment, name, values, follows)
    result.append(experiment)
  return result


def _check_follows(
  experiment: ConfigDict, name: str, values: dict, follows: bool
) -> None:
  """Raises UsageError if a field of an experiment's own stands against an axis."""
  classifier = experiment.get("parents", {}).get("classifier", experiment)
  held = {
    "seeds": ("seed", experiment.seed),
    "degradations": ("degradation.kind", experiment.degradation.kind),
  }
  if follows:
    held["backbones"] = ("model.name", classifier.model.name)
  for axis, (field, value) in held.items():
    if values[axis] is not None and value != values[axis]:
      raise errors.UsageError(
        f"config.experiments.{name}: its {field} is set to {value!r}, and "
        f"config.{axis} to {values[axis]!r}: leave one of them unset."
      )


def _name(config: ConfigDict, name: str, values: dict, follows: bool) -> str:
  """Returns an experiment's name: what is run with several values has them in it."""
  shown = [
    str(value)
    for axis, value in values.items()
    if len(config[axis] or ()) > 1 and (axis != "backbones" or follows)
  ]
  if values["seeds"] is not None and len(config.seeds) > 1:
    shown[0] = f"seed{shown[0]}"
  return "-".join([name, *shown]).translate(_IN_NAMES)


def _chosen(experiments: list[ConfigDict], only: str) -> list[ConfigDict]:
  """Returns the experiments whose names match.

  Raises:
    UsageError: a pattern matches none.
  """
  patterns = [pattern.strip() for pattern in only.split(",")]
  names = [e.experiment for e in experiments]
  for pattern in patterns:
    if not fnmatch.filter(names, pattern):
      raise errors.UsageError(
        f"config.only: no experiment is called {pattern!r}; "
        f"{errors.near(pattern, names)}"
      )
  wanted = lambda name: any(fnmatch.fnmatch(name, p) for p in patterns)
  return [e for e in experiments if wanted(e.experiment)]


def _shard(text: str) -> tuple[int, int] | None:
  match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
  number, count = map(int, match.groups()) if match else (0, 0)
  return (number, count) if 1 <= number <= count else None
