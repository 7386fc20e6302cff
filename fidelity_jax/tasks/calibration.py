"""Train the calibration modules, then the ensemble (report chapters 4 and 5)."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from fidelity_jax import pipeline
from fidelity_jax.tasks import base


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationTask(base.Task):
  """Cross-entropy of the steered classifier; only calibration modules train.

  In end-to-end mode the estimator trains along with them, starting from `initial`.

  Attributes:
    method: the pipeline.
    inputs: gives clean and degraded images.
    image_size: side of the images, pixels.
    label_smoothing: see `base.smoothed_cross_entropy`.
    frozen: variables of `method`'s frozen networks.
    initial: variables to start from, by role: "estimator" in end-to-end training, and
      given weights of "calibration" or "ensemble".
  """

  method: pipeline.Method
  inputs: base.Inputs
  image_size: int
  label_smoothing: float
  frozen: Any
  initial: Any = dataclasses.field(default_factory=dict)

  def init(self, key, initial):
    size = (self.image_size, self.image_size)
    variables = {"calibration": self.method.init_calibration(key, size)}
    variables |= initial
    return {name: tree["params"] for name, tree in variables.items()}, {}

  def loss(self, params, model_state, frozen, batch, *, train, key):
    clean, degraded = self.inputs(batch, train)
    variables = frozen | {name: {"params": tree} for name, tree in params.items()}
    logits = self.method.logits(variables, degraded, clean)
    losses = base.smoothed_cross_entropy(logits, batch["label"], self.label_smoothing)
    metrics = {"loss": losses, "accuracy": base.correct(logits, batch["label"])}
    return jnp.mean(losses), (model_state, metrics)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnsembleTask(CalibrationTask):
  """The second phase: only the ensemble module trains."""

  def init(self, key, initial):
    variables = {"ensemble": self.method.init_ensemble(key)} | initial
    return {name: tree["params"] for name, tree in variables.items()}, {}
