"""Train the calibration modules, then the ensemble (paper, chapters 4 and 5)."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from fidelity_jax import errors, models, resize, rules
from fidelity_jax.method import Method
from fidelity_jax.models import registry
from fidelity_jax.models.calibration import MODULES
from fidelity_jax.tasks import base


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationTask(base.Task):
  """Cross-entropy of the steered classifier; only calibration modules train.

  In end-to-end mode the estimator trains along with them, starting from `initial`.

  Attributes:
    method: the networks and how they are wired.
    inputs: gives clean and degraded images.
    image_size: side of the images, pixels.
    label_smoothing: see `base.smoothed_cross_entropy`.
    own_labels: labels are what the frozen classifier says of the clean images.
    frozen: variables of `method`'s frozen networks.
    initial: variables to start from, by role: "estimator" in end-to-end training, and
      given weights of "calibration" or "ensemble".
    trained_parents: ("estimator",) in end-to-end training.
  """

  method: Method
  inputs: base.Inputs
  image_size: int
  label_smoothing: float
  own_labels: bool = False
  frozen: Any = dataclasses.field(default_factory=dict)
  initial: Any = dataclasses.field(default_factory=dict)
  trained_parents: tuple[str, ...] = ()

  @property
  def network(self):
    return self.method

  def fresh(self, key):
    """Returns what starts random, by role."""
    size = (self.image_size, self.image_size)
    return {"calibration": self.method.init_calibration(key, size)}

  def init(self, key, initial):
    variables = self.fresh(key)
    if "estimator" in self.trained_parents:
      images = jnp.zeros((1, 8, 8, 3))
      variables["estimator"] = self.method.estimator.init(key, images)
    variables = {
      role: base.take_over(fresh, (initial or {}).get(role))
      for role, fresh in variables.items()
    }
    return {role: tree["params"] for role, tree in variables.items()}, {}

  def loss(self, params, model_state, frozen, batch, *, train, key):
    clean, degraded = self.inputs(batch, train)
    variables = frozen | {name: {"params": tree} for name, tree in params.items()}
    logits, label = self.method.logits(variables, degraded, clean), batch["label"]
    if self.own_labels:
      seen = self.method.classify(variables, self.method.plain(variables, clean))
      label = jnp.argmax(seen, -1)
    losses = base.smoothed_cross_entropy(logits, label, self.label_smoothing)
    metrics = {"loss": losses, "accuracy": base.correct(logits, label)}
    return jnp.mean(losses), (model_state, metrics)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnsembleTask(CalibrationTask):
  """The second phase: only the ensemble module trains."""

  def fresh(self, key):
    return {"ensemble": self.method.init_ensemble(key)}


_FIELDS: rules.Table = {
  "fidelity": base.MAP | {"source": rules.choice("oracle", "pretrained", "end_to_end")},
  "label_smoothing": rules.SMOOTHING,
  "model": {
    "ratio": rules.number(0, 64),
    "num_convs": rules.whole(2, 3),
    "channels": rules.whole(1, 4096),
    "resize": rules.choice(*resize.METHODS),
    **{module: rules.FLAG for module in MODULES},
    "residual": rules.FLAG,
    "weights": base.WEIGHTS,
  },
  "rematerialize": rules.FLAG,
  "ensemble": {
    "enabled": rules.FLAG,
    **{name: base.TRAINING[name] for name in ("learning_rate", "epochs")},
    "warmup_epochs": base.TRAINING["warmup_epochs"],
    "weights": base.WEIGHTS,
  },
}


def _make(config, parents, num_classes, inputs):
  del num_classes
  classifier = parents["classifier"]
  modules = {name: value for name, value in config.model.items() if name != "weights"}
  along = config.fidelity.source == "end_to_end"
  return CalibrationTask(
    method=Method(
      **parents,
      calibration=models.Calibration(
        feature_size=classifier.feature_size,
        num_taps=classifier.num_taps,
        dtype=jnp.dtype(config.precision),
        **modules,
      ),
      map_name=config.fidelity.map,
      estimator_input=config.fidelity.estimator_input,
      rematerialize=config.rematerialize,
    ),
    inputs=inputs,
    image_size=config.dataset.image_size,
    label_smoothing=config.label_smoothing,
    own_labels=base.own_labels(config),
    trained_parents=("estimator",) if along else (),
  )


def _make_ensemble(config, parents, num_classes, inputs):
  del num_classes
  before = parents["calibration"]
  size, dtype = before.classifier.feature_size, jnp.dtype(config.precision)
  ensemble = models.Ensemble(size, config.model.ratio, dtype)
  return EnsembleTask(
    method=dataclasses.replace(before, ensemble=ensemble),
    inputs=inputs,
    image_size=config.dataset.image_size,
    label_smoothing=config.label_smoothing,
    own_labels=base.own_labels(config),
  )


def ensemble_config(config: base.ConfigDict) -> base.ConfigDict:
  """Returns the config of the ensemble phase that a calibration's config describes."""
  own = config.ensemble
  shared = [*base.TRAINING, "label_smoothing"]
  # A stored config may be of a version that had fewer fields.
  phase = base.ConfigDict({name: config[name] for name in shared if name in config})
  for name in ("learning_rate", "epochs", "warmup_epochs"):
    phase[name] = own[name]
  phase.kind = ENSEMBLE.name
  phase.model = {"ratio": config.model.ratio, "weights": own.weights}
  phase.parents = base.ConfigDict({KIND.name: config})
  return phase


def last_config(config: base.ConfigDict) -> base.ConfigDict:
  """Returns the config of the last stage of an experiment."""
  with_ensemble = "ensemble" in config and config.ensemble.enabled
  return ensemble_config(config) if with_ensemble else config


def _trained_from(config) -> tuple[str, ...]:
  oracle = config.fidelity.source == "oracle"
  return ("classifier", "restorer", *(() if oracle else ("estimator",)))


def _material(config) -> dict[str, Any]:
  classifier = config.parents.classifier.model
  steering = registry.complete(classifier)
  names = registry.steering_fields(classifier.name)
  fidelity = config.fidelity.to_dict()
  if fidelity["source"] == "oracle":
    del fidelity["estimator_input"]
  return {
    "ensemble": None,
    "rematerialize": None,
    "fidelity": fidelity,
    "steering": {name: steering[name] for name in names} or None,
    "labels": "self" if base.own_labels(config) else None,
  }


def _check(config, where: str) -> None:
  """Checks that something trains, by the map that the estimator gives."""
  if not any(config.model[name] for name in MODULES):
    raise errors.UsageError(
      f"{where}.model: every module is switched off, so there is nothing to train: "
      f"leave one of {', '.join(MODULES)} on."
    )
  source = config.fidelity.source
  estimator = config.get("parents", base.ConfigDict()).get("estimator")
  if (source == "oracle") != (estimator is None):
    has = "has no estimator" if estimator is None else "has an estimator"
    raise rules.refusal(
      where,
      "fidelity.source",
      source,
      f"does not fit this experiment, which {has}: use configs/{source}.py",
    )
  for name in ("map", "estimator_input") if estimator else ():
    given = estimator.get("fidelity", base.ConfigDict()).get(name)
    if given != config.fidelity[name]:
      raise rules.refusal(
        f"{where}.parents.estimator",
        f"fidelity.{name}",
        given,
        f"must be that of the method, {where}.fidelity.{name} = "
        f"{config.fidelity[name]!r}: set that one alone",
      )


KIND = base.Kind(
  name="calibration",
  fields=lambda config: _FIELDS,
  make=_make,
  label=lambda config: config.fidelity.source,
  trained_from=_trained_from,
  whole=True,
  material=_material,
  check=_check,
)
# Configs do not name it: `ensemble_config` makes it of a calibration's.
ENSEMBLE = base.Kind(
  name="ensemble",
  fields=lambda config: {},
  make=_make_ensemble,
  label=lambda config: config.parents.calibration.fidelity.source,
  trained_from=lambda config: (KIND.name,),
  whole=True,
)
