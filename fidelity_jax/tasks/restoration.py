"""Train a restorer on degraded patches (paper, 3.2.1)."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from fidelity_jax import models, rules
from fidelity_jax.tasks import base


@dataclasses.dataclass(frozen=True, kw_only=True)
class RestorationTask(base.Task):
  """The l1 distance between the restored and the clean patch.

  Attributes:
    restorer: the network.
    inputs: gives clean and degraded patches.
    patches_per_image: patches that `inputs` cuts from one image.
    frozen: {}: nothing is.
    initial: variables to start from, or None for the network's own.
  """

  restorer: models.Restorer
  inputs: base.Inputs
  patches_per_image: int
  frozen: Any = dataclasses.field(default_factory=dict)
  initial: Any = None
  score = "psnr_gain"

  @property
  def network(self):
    return self.restorer

  def init(self, key, initial):
    return base.start_on_patches(
      self.restorer, key, initial, self.inputs.patch_size, "estimate"
    )

  def loss(self, params, model_state, frozen, batch, *, train, key):
    clean, degraded = self.inputs(batch, train)
    # The loss sees the restored image before clipping; PSNR sees it after, as all
    # later stages do.
    restored, model_state = base.apply_trained(
      self.restorer, params, model_state, degraded, train, key, "estimate"
    )
    losses = base.mean_absolute_error(restored, clean)
    psnr = base.psnr(jnp.clip(restored, 0, 1), clean)
    gain = psnr - base.psnr(degraded, clean)
    metrics = {"loss": losses, "psnr": psnr, "psnr_gain": gain}
    return jnp.mean(losses), (model_state, metrics)


def _fields(config) -> rules.Table:
  model = config.get("model")
  name = model.get("name") if isinstance(model, base.ConfigDict) else None
  known = models.restorers.NAMES
  own = models.restorers.fields(name if name in known else known[0])
  fields = {"name": rules.choice(*known), "weights": base.WEIGHTS, **own}
  return {"model": fields, **base.PATCHES}


def _make(config, parents, num_classes, inputs):
  del parents, num_classes
  return RestorationTask(
    restorer=models.restorers.create(config.model, jnp.dtype(config.precision)),
    inputs=inputs,
    patches_per_image=base.patches_per_image(config),
  )


KIND = base.Kind(
  name="restorer",
  fields=_fields,
  make=_make,
  label=lambda config: f"{config.model.name}{config.model.get('depth', '')}",
  check=base.check_norm,
  labelled=False,
)
