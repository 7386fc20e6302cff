"""What an experiment measures: methods and images, and the stages behind each."""

import dataclasses
import functools

from ml_collections import ConfigDict

from fidelity_jax import degradations, stages
from fidelity_jax.rows import Compared

# What is measured of an image.
_CLASSIFIED = {"prediction", "rank", "confidence"}
_RESTORED = {"psnr", "ssim"}
_ESTIMATED = {"error", "ause"}


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
  """Something that is measured, and the networks it is made of.

  Attributes:
    config: the config of the experiment that asks for it.
    compared: what it is.
    stages: the stages that its values depend on, by role.
  """

  config: ConfigDict
  compared: Compared
  stages: dict[str, stages.Stage]

  @functools.cached_property
  def conditions(self) -> tuple[degradations.Condition, ...]:
    """The conditions that it is measured under."""
    return degradations.conditions(self.config.degradation)

  @functools.cached_property
  def products(self) -> dict[str, str]:
    """Digests of what its stages gave, by role; they are finished."""
    return {role: s.finished().product for role, s in self.stages.items()}

  @property
  def trained_on(self) -> str | None:
    """What its classifier was trained on, see `rows.Row`; None without one."""
    if "classifier" not in self.stages:
      return None
    config = self.stages["classifier"].config
    if config.epochs:
      return config.source
    as_given = config.model.weights and not config.model.new_head
    return "given" if as_given else "none"

  @property
  def names(self) -> set[str]:
    """Names of the values that it has for each image."""
    if self.compared.method == "restoration":
      return _RESTORED
    if self.compared.method == "estimation":
      return _ESTIMATED
    keep = self.config.evaluation.keep == "predictions"
    return _CLASSIFIED | ({"logits"} if keep else set())


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
  found = [Compared("restoration", False)]
  if "restorer" in networks:
    found.append(Compared("restoration", True))
  if "classifier" in networks:
    found = [Compared("classifier", c.restored) for c in found] + found
  if source is not None:
    ensembles = (False, True) if "ensemble" in networks else (False,)
    found += [Compared(source, True, ensemble) for ensemble in ensembles]
    if source != "oracle":
      found.append(Compared("estimation", True, source=source))
  return [Subject(config, c, _behind(c, networks)) for c in found]


def _behind(
  compared: Compared, networks: dict[str, stages.Stage]
) -> dict[str, stages.Stage]:
  """Returns the stages that something's values depend on, by role."""
  roles = {"restorer"} if compared.restored else set()
  if compared.method == "estimation":
    # End-to-end training makes another estimator, which the calibration holds.
    roles.add("estimator" if compared.source == "pretrained" else "calibration")
  elif compared.method != "restoration":
    roles.add("classifier")
  if compared.ensemble is not None:
    roles |= {"calibration", "estimator"}
  if compared.ensemble:
    roles.add("ensemble")
  return {role: stage for role, stage in networks.items() if role in roles}
