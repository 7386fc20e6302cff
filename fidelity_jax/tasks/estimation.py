"""Train the fidelity map estimator: a second DnCNN (paper, 4.1 and 5.1)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from fidelity_jax import fidelity, models, rules
from fidelity_jax.tasks import base


@dataclasses.dataclass(frozen=True, kw_only=True)
class EstimationTask(base.Task):
  """The l1 distance between the estimated and the oracle fidelity map.

  Attributes:
    estimator: the network; its output is the map itself.
    restorer: the frozen restorer.
    inputs: gives clean and degraded patches.
    patches_per_image: patches that `inputs` cuts from one image.
    map_name: "l1", "l2" or "cosine".
    estimator_input: "degraded" or "restored".
    frozen: {"restorer": variables}.
    initial: variables to start from, or None for He-normal ones.
  """

  estimator: models.DnCNN
  restorer: models.Restorer
  inputs: base.Inputs
  patches_per_image: int
  map_name: str
  estimator_input: str
  frozen: Any = dataclasses.field(default_factory=dict)
  initial: Any = None
  score = "loss"
  score_sign = -1

  @property
  def network(self):
    return self.estimator

  def init(self, key, initial):
    return base.start_on_patches(self.estimator, key, initial, self.inputs.patch_size)

  def loss(self, params, model_state, frozen, batch, *, train, key):
    clean, degraded = self.inputs(batch, train)
    restored = jax.lax.stop_gradient(
      self.restorer.apply(frozen["restorer"], degraded, method="restore")
    )
    target = fidelity.oracle_map(restored, clean, self.map_name)
    seen = degraded if self.estimator_input == "degraded" else restored
    estimate, model_state = base.apply_trained(
      self.estimator, params, model_state, seen, train, key
    )
    losses = base.mean_absolute_error(estimate, target)
    return jnp.mean(losses), (model_state, {"loss": losses})


_FIELDS: rules.Table = {
  "model": {**models.dncnn.FIELDS, "weights": base.WEIGHTS},
  "fidelity": base.MAP,
  **base.PATCHES,
}


def _make(config, parents, num_classes, inputs):
  del num_classes
  stack = {name: config.model[name] for name in models.dncnn.FIELDS}
  return EstimationTask(
    estimator=models.DnCNN(
      **stack,
      out_channels=fidelity.map_channels(config.fidelity.map),
      dtype=jnp.dtype(config.precision),
    ),
    restorer=parents["restorer"],
    inputs=inputs,
    patches_per_image=base.patches_per_image(config),
    map_name=config.fidelity.map,
    estimator_input=config.fidelity.estimator_input,
  )


KIND = base.Kind(
  name="estimator",
  fields=lambda config: _FIELDS,
  make=_make,
  label=lambda config: f"dncnn{config.model.depth}",
  trained_from=lambda config: ("restorer",),
  evaluated=False,
  check=base.check_norm,
  labelled=False,
)
