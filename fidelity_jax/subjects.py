"""What an experiment measures: methods and images, and the networks behind each."""

import dataclasses
import functools
from collections.abc import Callable, Collection
from typing import Any

import msgspec
from ml_collections import ConfigDict

from fidelity_jax import degradations, stages, tasks
from fidelity_jax.rows import Compared, Facts

PyTree = Any

# What can be left out of a calibration, see `rows.Facts`.
SWITCHES = (*tasks.calibration.MODULES, "residual")
# What is measured of an image.
_CLASSIFIED = {"prediction", "rank", "confidence"}
_RESTORED = {"psnr", "ssim"}
_ESTIMATED = {"error", "ause"}


@dataclasses.dataclass(frozen=True, eq=False)
class Given:
  """Networks that no stage here trained: a checkpoint's, or an exported file.

  Attributes:
    digest: tells whether two are the same.
    parts: a checkpoint's modules and their variables, by role, batch norm folded.
    program: an exported file, from degraded and clean images [N, S, S, 3] to arrays by
      name, see `method.Method.outputs`; None for a checkpoint.
  """

  digest: str
  parts: dict[str, tuple[Any, PyTree]]
  program: Callable[[Any, Any], dict[str, Any]] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
  """Something that is measured, and the networks it is made of.

  Attributes:
    config: the config of the experiment that asks for it.
    compared: what it is.
    facts: what is known of its networks.
    stages: the stages that its values depend on, by role.
    given: the networks, where these are no stages'.
  """

  config: ConfigDict
  compared: Compared
  facts: Facts
  stages: dict[str, stages.Stage]
  given: Given | None = None

  @functools.cached_property
  def conditions(self) -> tuple[degradations.Condition, ...]:
    """The conditions that it is measured under."""
    return degradations.conditions(self.config.degradation)

  @functools.cached_property
  def products(self) -> dict[str, str]:
    """Digests of what its stages gave, by role; they are finished."""
    if self.given is not None:
      return {"given": self.given.digest}
    return {role: s.finished().product for role, s in self.stages.items()}

  @property
  def networks(self) -> dict[str, Any]:
    """What its networks are, JSON-able: its values depend on that."""
    if self.given is not None:
      wiring = self.config.fidelity.to_dict()
      return {"given": self.given.digest, "fidelity": wiring}
    behind = self.stages.items()
    return {"stages": {role: [s.name, self.products[role]] for role, s in behind}}

  @property
  def names(self) -> set[str]:
    """Names of the values that it has for each image."""
    if self.compared.method == "restoration":
      return _RESTORED
    if self.compared.method == "estimation":
      return _ESTIMATED
    keep = self.config.evaluation.keep == "predictions"
    return _CLASSIFIED | ({"logits"} if keep else set())


def of_networks(roles: Collection[str], source: str | None) -> list[Compared]:
  """Returns what can be measured of networks, classification first.

  Args:
    roles: theirs.
    source: where the fidelity map comes from, see `rows.SOURCES`; None for none.
  """
  found = [Compared("restoration", False)]
  if "restorer" in roles:
    found.append(Compared("restoration", True))
  if "classifier" in roles:
    found = [Compared("classifier", c.restored) for c in found] + found
  if "calibration" in roles:
    ensembles = (False, True) if "ensemble" in roles else (False,)
    found += [Compared(source, True, ensemble) for ensemble in ensembles]
  if source not in (None, "oracle"):
    found.append(Compared("estimation", True, source=source))
  return found


def of_experiment(
  config: ConfigDict, last: stages.Stage, further: dict[str, stages.Stage]
) -> list[Subject]:
  """Returns what an experiment measures.

  Args:
    config: the experiment's.
    last: its last stage.
    further: stages that serve its evaluation alone, by role.
  """
  networks = last.networks() | further
  source = config.fidelity.source if "calibration" in networks else None
  known = _facts(config, source, networks)
  found = []
  for c in of_networks(networks, source):
    behind = _behind(c, networks)
    ended = list(behind.values())[-1].config if behind else config
    facts = msgspec.structs.replace(known.of(c), precision=ended.precision)
    found.append(Subject(config, c, facts, behind))
  return found


def _facts(
  config: ConfigDict, source: str | None, networks: dict[str, stages.Stage]
) -> Facts:
  """Returns what is known of an experiment's networks together."""
  configs = {role: stage.config for role, stage in networks.items()}
  name = lambda role: configs[role].model.name if role in configs else None
  steered = configs["calibration"].model if source else None
  return Facts(
    method="",
    source=source,
    trained_on=_trained_on(configs.get("classifier")),
    backbone=name("classifier"),
    restorer=name("restorer"),
    map=config.fidelity.map if source else None,
    resize=steered.resize if steered else None,
    without=[n for n in SWITCHES if not steered[n]] if steered else [],
    ensemble="ensemble" in networks,
    seed=config.seed,
    precision=config.precision,
  )


def _trained_on(config: ConfigDict | None) -> str | None:
  """Returns what a classifier was trained on, see `rows.Facts`; None without one."""
  if config is None:
    return None
  if config.epochs:
    return config.source
  as_given = config.model.weights and not config.model.new_head
  return "given" if as_given else "none"


def _behind(
  compared: Compared, networks: dict[str, stages.Stage]
) -> dict[str, stages.Stage]:
  """Returns the stages that something's values depend on, by role."""
  roles = {"restorer"} if compared.restored else set()
  if compared.method == "estimation":
    # End-to-end training makes another estimator, which the calibration holds.
    roles.add("estimator" if compared.source == "pretrained" else "calibration")
  elif compared.classifies:
    roles.add("classifier")
  if compared.steered:
    roles |= {"calibration", "estimator"}
  if compared.ensemble:
    roles.add("ensemble")
  return {role: stage for role, stage in networks.items() if role in roles}
