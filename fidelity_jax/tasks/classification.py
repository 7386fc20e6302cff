"""Train a classifier on clean, degraded or restored images (paper, 3.2)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from fidelity_jax import errors, models, rules
from fidelity_jax.models import registry
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
    head_epochs: epochs in which the head trains alone; then all of it does.
    own_labels: labels are what it says itself of the clean images; then nothing trains.
    initial: variables to start from, or None for random ones.
    new_head: start the last layers fresh even if `initial` has them.
    restorer: the frozen restorer; "restored" only.
    frozen: {"restorer": variables} for "restored", else {}.
  """

  classifier: models.Classifier
  inputs: base.Inputs
  source: str
  image_size: int
  label_smoothing: float = 0.1
  head_epochs: int = 0
  own_labels: bool = False
  initial: Any = None
  new_head: bool = True
  restorer: models.Restorer | None = None
  frozen: Any = dataclasses.field(default_factory=dict)

  @property
  def network(self):
    return self.classifier

  def init(self, key, initial):
    images = jnp.zeros((1, self.image_size, self.image_size, 3))
    variables = self.classifier.init(key, images)
    if initial:
      head = initial["params"].get("head")
      given = head["logits"]["bias"].shape[0] if head else self.classifier.num_classes
      if not self.new_head and given != self.classifier.num_classes:
        raise errors.UsageError(
          f"the head of the weights has {given} classes, and the dataset "
          f"{self.classifier.num_classes}: name the dataset that it was trained on, "
          "count its classes by dataset.classes, or set model.new_head=True"
        )
      variables = models.transfer(variables, initial, self.new_head)
    return variables["params"], variables.get("batch_stats", {})

  def loss(self, params, model_state, frozen, batch, *, train, key):
    clean, degraded = self.inputs(batch, train)
    if self.source == "clean":
      images = clean
    elif self.source == "degraded":
      images = degraded
    else:
      images = self.restorer.apply(frozen["restorer"], degraded, method="restore")
    images = self.classifier.normalize(jax.lax.stop_gradient(images))
    if self.head_epochs:
      still = batch["epoch"][0] < self.head_epochs
      hold = lambda p: jnp.where(still, jax.lax.stop_gradient(p), p)
      params = params | {"backbone": jax.tree.map(hold, params["backbone"])}
    (logits, aux_logits), model_state = base.apply_trained(
      self.classifier, params, model_state, images, train, key
    )
    label = batch["label"]
    if self.own_labels:
      clean = self.classifier.normalize(clean)
      (said, _), _ = base.apply_trained(
        self.classifier, params, model_state, clean, False, key
      )
      label = jnp.argmax(said, -1)
    entropy = lambda x: base.smoothed_cross_entropy(x, label, self.label_smoothing)
    # GoogLeNet's auxiliary heads count 0.3 each (docs/method.md, section 2).
    losses = entropy(logits) + sum(0.3 * entropy(aux) for aux in aux_logits)
    metrics = {"loss": losses, "accuracy": base.correct(logits, label)}
    return jnp.mean(losses), (model_state, metrics)


_UNSET = rules.Rule("None, as the network has no such field", lambda v: v is None)


def _fields(config) -> rules.Table:
  model = config.get("model")
  given = model if isinstance(model, base.ConfigDict) else {}
  # Of another network, in a study of several.
  unset = {name: _UNSET for name in given if given[name] is None}
  known = {**registry.FIELDS, **registry.own_fields(given.get("name"))}
  return {
    "source": rules.choice("clean", "degraded", "restored"),
    "label_smoothing": rules.SMOOTHING,
    "head_epochs": rules.whole(0, 1_000_000),
    "model": {
      "name": registry.NAME,
      **unset,
      **{name: rules.optional(field.rule) for name, field in known.items()},
      # Set when a run begins.
      **({"code": rules.TEXT} if "code" in given else {}),
      "weights": base.WEIGHTS,
      "new_head": rules.FLAG,
    },
  }


def _make(config, parents, num_classes, inputs):
  dtype = jnp.dtype(config.precision)
  return ClassificationTask(
    classifier=models.create(config.model, num_classes, dtype),
    inputs=inputs,
    source=config.source,
    image_size=config.dataset.image_size,
    label_smoothing=config.label_smoothing,
    head_epochs=config.get("head_epochs", 0),
    own_labels=base.own_labels(config),
    new_head=config.model.new_head,
    restorer=parents.get("restorer"),
  )


def _material(config) -> dict[str, Any]:
  model = registry.complete(config.model)
  # These change nothing in a network that is not steered.
  for name in registry.steering_fields(config.model.name):
    del model[name]
  if config.model.weights is not None:
    model["new_head"] = config.model.new_head
  held = config.epochs and config.get("head_epochs")
  held = {} if held else {"head_epochs": None}
  clean = {"degradation": None, "validation_rounds": None}
  return {"model": model} | held | (clean if config.source == "clean" else {})


def _check(config, where: str) -> None:
  registry.check(config.model, config.dataset.image_size)
  held = config.get("head_epochs", 0)
  # What is not trained has no head to train alone, whatever its config says.
  if config.epochs and held > config.epochs:
    raise rules.refusal(
      where, "head_epochs", held, f"must be at most epochs ({config.epochs})"
    )
  if base.own_labels(config) and config.epochs:
    raise rules.refusal(
      where,
      "epochs",
      config.epochs,
      "cannot be trained on its own answers (labels=self): set it to 0 for weights as "
      f"they are, or give {where}.dataset other images with labels",
    )


KIND = base.Kind(
  name="classifier",
  fields=_fields,
  make=_make,
  label=lambda config: f"{config.model.name.replace(':', '.')}-{config.source}",
  trained_from=lambda config: ("restorer",) if config.source == "restored" else (),
  evaluated_with=("restorer",),
  material=_material,
  check=_check,
)
