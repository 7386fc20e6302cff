"""From stages to networks: made to be trained, or loaded, folded and frozen."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from fidelity_jax import errors, models, pipeline, port, stages

PyTree = Any


def compute_dtype(precision: str) -> Any:
  """Returns the dtype of activations for a config's `precision`.

  "auto" is bfloat16 on accelerators and float32 on CPU.
  """
  if precision == "auto":
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
  return jnp.dtype(precision)


def classifier(config: ConfigDict, num_classes: int) -> models.Classifier:
  """Returns the classifier of a stage's config, as it is trained."""
  return models.create(config.model, num_classes, compute_dtype(config.precision))


def dncnn(config: ConfigDict) -> models.DnCNN:
  """Returns the restorer or estimator of a stage's config, as it is trained."""
  one_channel = config.kind == "estimator" and config.fidelity.map == "cosine"
  return models.DnCNN(
    depth=config.model.depth,
    width=config.model.width,
    out_channels=1 if one_channel else None,
    batch_norm=config.model.batch_norm,
    dtype=compute_dtype(config.precision),
  )


def initial_weights(config: ConfigDict) -> PyTree | None:
  """Returns the variables that a stage starts from, or None for random ones.

  Args:
    config: a stage's config; `model.weights` names a path, a name such as
      "torchvision/resnet50", or "torchvision" for the network's own ImageNet weights.

  Raises:
    UsageError: if the weights are not there or do not hold such a network.
    RunError: if they cannot be downloaded or read.
  """
  source = config.model.weights
  if source is None:
    return None
  if source == "torchvision":
    source = f"torchvision/{config.model.name}"
  variables = port.load_part(source, config.kind).variables
  if config.kind in ("restorer", "estimator"):
    _check_shapes(config, variables)
  return variables


def num_classes(variables: PyTree) -> int:
  """Returns the number of classes of a classifier's head."""
  return variables["params"]["head"]["logits"]["bias"].shape[0]


def _check_shapes(config: ConfigDict, variables: PyTree) -> None:
  """Raises UsageError if weights are not of the DnCNN that the config describes."""
  module = dncnn(config)
  images = jnp.zeros((1, 8, 8, module.channels))
  expected = jax.eval_shape(module.init, jax.random.key(0), images)
  shapes = lambda tree: jax.tree.map(lambda x: tuple(x.shape), dict(tree))
  if shapes(expected) != shapes(variables):
    layers = len(variables["params"])
    width = variables["params"]["layer0"]["conv"]["kernel"].shape[-1]
    raise errors.UsageError(
      f"{config.kind}: {config.model.weights} holds a DnCNN of depth {layers} and "
      f"width {width}: set model.depth and model.width to these, and "
      "model.batch_norm=False (it is folded when weights are read)."
    )


def freeze(
  module: nn.Module, variables: PyTree, dtype: Any
) -> tuple[nn.Module, PyTree]:
  """Returns a network for frozen use: batch norm folded, cast to `dtype`."""
  folded = []

  def fold(variables):
    module_, variables = models.fold(module, variables)
    folded.append(module_)
    return jax.tree.map(lambda x: x.astype(dtype), variables)

  variables = jax.jit(fold)(variables)
  return folded[-1], variables


def load_frozen(stage: stages.Stage, num_classes: int) -> tuple[nn.Module, PyTree]:
  """Returns the network that a finished stage trained, frozen."""
  if stage.kind == "classifier":
    module = classifier(stage.config, num_classes)
    size = stage.config.dataset.image_size
    images = jnp.zeros((1, size, size, 3))
  else:
    module = dncnn(stage.config)
    images = jnp.zeros((1, 8, 8, module.channels))
  variables = stage.load_module(module, images)
  return freeze(module, variables, compute_dtype(stage.config.precision))


@dataclasses.dataclass(frozen=True)
class Method:
  """The proposed method at some stage of its training.

  Attributes:
    pipeline: the networks.
    frozen: variables of those that the stage does not train.
    initial: variables to start the others from, by role; what is absent starts fresh.
  """

  pipeline: pipeline.Method
  frozen: PyTree
  initial: PyTree


def untrained_method(stage: stages.Stage, num_classes: int) -> Method:
  """Returns the method as a calibration or ensemble stage finds it."""
  config = stage.config
  given = initial_weights(config)
  initial = {} if given is None else {stage.kind: given}
  dtype = compute_dtype(config.precision)
  if stage.kind == "ensemble":
    before = trained_method(stage.parents["calibration"], num_classes)
    size, ratio = before.pipeline.classifier.feature_size, config.model.ratio
    ensemble = models.Ensemble(size, ratio, dtype)
    method = dataclasses.replace(before.pipeline, ensemble=ensemble)
    return Method(method, before.frozen, initial)
  networks, frozen = {}, {}
  for role, parent in stage.parents.items():
    networks[role], frozen[role] = load_frozen(parent, num_classes)
  if config.fidelity.source == "end_to_end":
    initial["estimator"] = as_float32(frozen.pop("estimator"))
  method = pipeline.Method(
    **networks,
    calibration=models.Calibration(
      feature_size=networks["classifier"].feature_size,
      num_taps=networks["classifier"].num_taps,
      dtype=dtype,
      **{k: v for k, v in config.model.items() if k != "weights"},
    ),
    map_kind=config.fidelity.map,
    estimator_input=config.fidelity.estimator_input,
    rematerialize=config.rematerialize,
  )
  return Method(method, frozen, initial)


def trained_method(stage: stages.Stage, num_classes: int) -> Method:
  """Returns the method as a finished stage left it, everything frozen."""
  method = untrained_method(stage, num_classes)
  key = jax.random.key(0)
  if stage.kind == "calibration":
    size = stage.config.dataset.image_size
    init = lambda key: method.pipeline.init_calibration(key, (size, size))
    like = {"calibration": jax.eval_shape(init, key)["params"]}
    like |= {k: v["params"] for k, v in method.initial.items()}
  else:
    like = {"ensemble": jax.eval_shape(method.pipeline.init_ensemble, key)["params"]}
  params = stage.load({"params": like})["params"]
  variables = {name: {"params": tree} for name, tree in params.items()}
  return Method(method.pipeline, method.frozen | variables, {})


def as_float32(variables: PyTree) -> PyTree:
  """Returns variables that train: in float32 whatever the compute dtype."""
  return jax.tree.map(lambda x: x.astype(jnp.float32), variables)
