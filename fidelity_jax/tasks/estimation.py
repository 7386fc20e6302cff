"""Train the fidelity map estimator: a second DnCNN (report sections 4.1 and 5.1)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from fidelity_jax import fidelity, models, pipeline
from fidelity_jax.tasks import base


@dataclasses.dataclass(frozen=True, kw_only=True)
class EstimationTask(base.Task):
  """The l1 distance between the estimated and the oracle fidelity map.

  Attributes:
    estimator: the network; its output is the map itself.
    restorer: the frozen restorer.
    inputs: gives clean and degraded patches.
    patches_per_image: patches that `inputs` cuts from one image.
    map_kind: "l1", "l2" or "cosine".
    estimator_input: "degraded" or "restored".
    frozen: {"restorer": variables}.
    initial: variables to start from, or None for He-normal ones.
  """

  estimator: models.DnCNN
  restorer: models.DnCNN
  inputs: base.Inputs
  patches_per_image: int
  map_kind: str
  estimator_input: str
  frozen: Any
  initial: Any = None
  score = "loss"
  score_sign = -1

  def init(self, key, initial):
    patch = jnp.zeros((1, 8, 8, self.estimator.channels))
    variables = initial or self.estimator.init(key, patch)
    return variables["params"], variables.get("batch_stats", {})

  def loss(self, params, model_state, frozen, batch, *, train, key):
    clean, degraded = self.inputs(batch, train)
    restored = jax.lax.stop_gradient(
      pipeline.restore(self.restorer, frozen["restorer"], degraded)
    )
    target = fidelity.oracle_map(restored, clean, self.map_kind)
    seen = degraded if self.estimator_input == "degraded" else restored
    estimate, model_state = base.apply_trained(
      self.estimator, params, model_state, seen, train, key
    )
    losses = base.mean_absolute_error(estimate, target)
    return jnp.mean(losses), (model_state, {"loss": losses})
