"""Train a classifier on clean, degraded or restored images (report section 3.2)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from fidelity_jax import models, pipeline
from fidelity_jax.tasks import base


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassificationTask(base.Task):
  """Cross-entropy of a backbone and its head, all of it trained.

  Attributes:
    classifier: the network.
    inputs: gives clean and degraded images.
    source: "clean" (setup 1), "degraded" (setup 2) or "restored" (setup 3).
    image_size: side of the images, pixels.
    label_smoothing: see `base.smoothed_cross_entropy`.
    initial: variables to start from, or None for random ones.
    new_head: start the last layers fresh all the same, for other classes.
    restorer: the frozen restorer; "restored" only.
    frozen: {"restorer": variables} for "restored", else {}.
  """

  classifier: models.Classifier
  inputs: base.Inputs
  source: str
  image_size: int
  label_smoothing: float = 0.1
  initial: Any = None
  new_head: bool = True
  restorer: models.DnCNN | None = None
  frozen: Any = dataclasses.field(default_factory=dict)

  def init(self, key, initial):
    images = jnp.zeros((1, self.image_size, self.image_size, 3))
    variables = self.classifier.init(key, images)
    if initial:
      variables = models.transfer(variables, initial, self.new_head)
    return variables["params"], variables.get("batch_stats", {})

  def loss(self, params, model_state, frozen, batch, *, train, key):
    clean, degraded = self.inputs(batch, train)
    if self.source == "clean":
      images = clean
    elif self.source == "degraded":
      images = degraded
    else:
      images = pipeline.restore(self.restorer, frozen["restorer"], degraded)
    images = models.layers.normalize(jax.lax.stop_gradient(images))
    (logits, aux_logits), model_state = base.apply_trained(
      self.classifier, params, model_state, images, train, key
    )
    entropy = lambda x: base.smoothed_cross_entropy(
      x, batch["label"], self.label_smoothing
    )
    # GoogLeNet's auxiliary heads count 0.3 each (METHOD section 2).
    losses = entropy(logits) + sum(0.3 * entropy(aux) for aux in aux_logits)
    metrics = {"loss": losses, "accuracy": base.correct(logits, batch["label"])}
    return jnp.mean(losses), (model_state, metrics)
