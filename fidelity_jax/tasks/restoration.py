"""Train the restorer: DnCNN on noisy patches (report section 3.2.1)."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from fidelity_jax import models
from fidelity_jax.tasks import base


@dataclasses.dataclass(frozen=True, kw_only=True)
class RestorationTask(base.Task):
  """The l1 distance between the restored and the clean patch.

  Attributes:
    restorer: the network, which predicts the residual.
    inputs: gives clean and degraded patches.
    patches_per_image: patches that `inputs` cuts from one image.
    initial: variables to start from, or None for He-normal ones.
  """

  restorer: models.DnCNN
  inputs: base.Inputs
  patches_per_image: int
  initial: Any = None
  score = "psnr_gain"

  def init(self, key, initial):
    patch = jnp.zeros((1, 8, 8, self.restorer.channels))
    variables = initial or self.restorer.init(key, patch)
    return variables["params"], variables.get("batch_stats", {})

  def loss(self, params, model_state, frozen, batch, *, train, key):
    clean, degraded = self.inputs(batch, train)
    # The loss sees the restored image before clipping, so that gradients reach pixels
    # that overshoot; PSNR sees it after, as everybody downstream does.
    residual, model_state = base.apply_trained(
      self.restorer, params, model_state, degraded, train, key
    )
    restored = degraded - residual
    losses = base.mean_absolute_error(restored, clean)
    psnr = base.psnr(jnp.clip(restored, 0, 1), clean)
    gain = psnr - base.psnr(degraded, clean)
    metrics = {"loss": losses, "psnr": psnr, "psnr_gain": gain}
    return jnp.mean(losses), (model_state, metrics)
