"""From stages to networks: made to be trained, or loaded, folded and frozen."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from fidelity_jax import errors, fidelity, models, pipeline, platform, port, stages

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
  estimates = config.kind == "estimator"
  return models.DnCNN(
    depth=config.model.depth,
    width=config.model.width,
    out_channels=fidelity.map_channels(config.fidelity.map) if estimates else None,
    batch_norm=config.model.batch_norm,
    dtype=compute_dtype(config.precision),
  )


def given_part(config: ConfigDict) -> port.Part | None:
  """Returns the weights that a stage starts from, or None for random ones.

  Args:
    config: a stage's config; `model.weights` names a path, a name such as
      "torchvision/resnet50", or "torchvision" for a classifier's own ImageNet weights.

  Raises:
    UsageError: if the weights are not there or do not hold such a network.
    RunError: if they cannot be downloaded or read.
  """
  source = config.model.weights
  if source is None:
    return None
  if source == "torchvision":
    if config.kind != "classifier":
      raise errors.UsageError(
        f"{config.kind}: torchvision has no weights for it: set model.weights to a "
        "checkpoint's path."
      )
    source = f"torchvision/{config.model.name}"
  part = port.load_part(source, config.kind)
  for path, leaf in jax.tree_util.tree_leaves_with_path(part.variables):
    if not np.isfinite(leaf).all():
      raise errors.UsageError(
        f"{config.kind}: {source} holds numbers that are not finite, in "
        f"{jax.tree_util.keystr(path, simple=True, separator='/')}: get the file again."
      )
  if config.kind in ("restorer", "estimator"):
    module, images = _network_and_input(config, 0)
    expected = jax.eval_shape(module.init, jax.random.key(0), images)
    if config.model.batch_norm:
      raise errors.UsageError(
        f"{config.kind}: set model.batch_norm=False with given weights: batch norm is "
        "folded when they are read."
      )
    described = {name: getattr(module, name) for name in part.config}
    described["out_channels"] = module.out_channels or module.channels
    _check_shapes(config, part, expected, described)
  return part


def initial_weights(config: ConfigDict) -> PyTree | None:
  """Returns the variables of `given_part`."""
  part = given_part(config)
  return None if part is None else part.variables


def check(stage: stages.Stage, num_classes: int, given: port.Part | None) -> None:
  """Checks what a stage is to train, without computing anything.

  Args:
    stage: the stage.
    num_classes: of its dataset.
    given: weights to start from, if any.

  Raises:
    UsageError: if such a network cannot be made or does not fit the memory, or the
      weights are of another.
  """
  config = stage.config
  if stage.kind in ("calibration", "ensemble"):
    above = {s.kind: s.config for s in stage.lineage()}
    network = classifier(above["classifier"], num_classes)
    method = pipeline.Method(
      classifier=network,
      restorer=dncnn(above["restorer"]),
      calibration=_calibration(above["calibration"], network),
      ensemble=_ensemble(config, network),
    )
    expected = _module_shapes(stage, method)
  else:
    module, images = _network_and_input(config, num_classes)
    expected = jax.eval_shape(module.init, jax.random.key(0), images)
  _check_memory(config.kind, expected)
  if given is None:
    return
  if stage.kind == "classifier":
    models.transfer(expected, given.variables, config.model.new_head)
  elif stage.kind in ("calibration", "ensemble"):
    _check_shapes(config, given, expected, config.model.to_dict())


def _check_memory(kind: str, shapes: PyTree) -> None:
  """Raises UsageError if training a network cannot fit the memory.

  A parameter, its gradient and its momentum are the least that there has to be.
  """
  count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  needed, there = 12 * count, platform.memory()
  if needed > there:
    raise errors.UsageError(
      f"{kind}: its {count:,} parameters need at least {needed / 2**30:.3g} GiB to "
      f"train, more than the {there / 2**30:.3g} GiB of this machine: make the network "
      "smaller (model.width, model.ratio)."
    )


def _network_and_input(
  config: ConfigDict, num_classes: int
) -> tuple[nn.Module, jax.Array]:
  """Returns the network of a classifier, restorer or estimator, and an input for it."""
  if config.kind == "classifier":
    size = config.dataset.image_size
    return classifier(config, num_classes), jnp.zeros((1, size, size, 3))
  module = dncnn(config)
  return module, jnp.zeros((1, 8, 8, module.channels))


def _check_shapes(
  config: ConfigDict, part: port.Part, expected: PyTree, described: dict[str, Any]
) -> None:
  """Raises UsageError unless weights have the shapes that a config's network has.

  Args:
    config: the stage's.
    part: the weights.
    expected: the network's variables, or their shapes.
    described: what the network is, in the words of `part.config`.
  """
  shapes = lambda tree: jax.tree.map(lambda x: tuple(x.shape), dict(tree))
  if shapes(expected) == shapes(part.variables):
    return
  differing = [
    f"model.{name} {value!r} (the config's is {described[name]!r})"
    for name, value in part.config.items()
    if name in described and described[name] != value
  ]
  if "feature_size" in part.config:
    differing.append(f"features of {part.config['feature_size']}")
  raise errors.UsageError(
    f"{config.kind}: {config.model.weights} holds another network than the config "
    f"describes, with {', '.join(differing) or 'other shapes'}."
  )


def num_classes(variables: PyTree) -> int:
  """Returns the number of classes of a classifier's head."""
  return variables["params"]["head"]["logits"]["bias"].shape[0]


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


def load_frozen(
  stage: stages.Stage, num_classes: int, dtype: Any = None
) -> tuple[nn.Module, PyTree]:
  """Returns the network that a finished stage trained, frozen.

  Args:
    stage: a classifier, restorer or estimator.
    num_classes: of the classifier.
    dtype: of the variables; by default the stage's compute dtype.
  """
  module, images = _network_and_input(stage.config, num_classes)
  variables = stage.load_module(module, images)
  return freeze(module, variables, dtype or compute_dtype(stage.config.precision))


@dataclasses.dataclass(frozen=True)
class Assembly:
  """The proposed method at some stage of its training.

  Attributes:
    pipeline: the networks.
    frozen: variables of those that the stage does not train.
    initial: variables to start the others from, by role; what is absent starts fresh.
  """

  pipeline: pipeline.Method
  frozen: PyTree
  initial: PyTree


def untrained_method(stage: stages.Stage, num_classes: int) -> Assembly:
  """Returns the method as a calibration or ensemble stage finds it."""
  method = _assemble(stage, num_classes)
  given = initial_weights(stage.config)
  if given is None:
    return method
  return dataclasses.replace(method, initial=method.initial | {stage.kind: given})


def trained_method(stage: stages.Stage, num_classes: int) -> Assembly:
  """Returns the method as a finished stage left it, everything frozen."""
  method = _assemble(stage, num_classes)
  like = {stage.kind: _module_shapes(stage, method.pipeline)} | method.initial
  like = {name: variables["params"] for name, variables in like.items()}
  params = stage.load({"params": like})["params"]
  dtype = compute_dtype(stage.config.precision)
  params = jax.tree.map(lambda x: x.astype(dtype), params)
  variables = {name: {"params": tree} for name, tree in params.items()}
  return Assembly(method.pipeline, method.frozen | variables, {})


def _assemble(stage: stages.Stage, num_classes: int) -> Assembly:
  """Returns the method before a stage, but for weights given to its own modules."""
  config = stage.config
  if stage.kind == "ensemble":
    before = trained_method(stage.parents["calibration"], num_classes)
    ensemble = _ensemble(config, before.pipeline.classifier)
    method = dataclasses.replace(before.pipeline, ensemble=ensemble)
    return Assembly(method, before.frozen, {})
  networks, frozen, initial = {}, {}, {}
  for role, parent in stage.parents.items():
    if role == "estimator" and config.fidelity.source == "end_to_end":
      # It trains, so it starts in full precision whatever it computes in.
      networks[role], initial[role] = load_frozen(parent, num_classes, jnp.float32)
    else:
      networks[role], frozen[role] = load_frozen(parent, num_classes)
  method = pipeline.Method(
    **networks,
    calibration=_calibration(config, networks["classifier"]),
    map_kind=config.fidelity.map,
    estimator_input=config.fidelity.estimator_input,
    rematerialize=config.rematerialize,
  )
  return Assembly(method, frozen, initial)


def _calibration(
  config: ConfigDict, classifier: models.Classifier
) -> models.Calibration:
  return models.Calibration(
    feature_size=classifier.feature_size,
    num_taps=classifier.num_taps,
    dtype=compute_dtype(config.precision),
    **{k: v for k, v in config.model.items() if k != "weights"},
  )


def _ensemble(config: ConfigDict, classifier: models.Classifier) -> models.Ensemble:
  dtype = compute_dtype(config.precision)
  return models.Ensemble(classifier.feature_size, config.model.ratio, dtype)


def _module_shapes(stage: stages.Stage, method: pipeline.Method) -> PyTree:
  """Returns the shapes of the variables of a stage's calibration or ensemble."""
  init = method.init_ensemble
  if stage.kind == "calibration":
    size = stage.config.dataset.image_size
    init = functools.partial(method.init_calibration, size=(size, size))
  return jax.eval_shape(init, jax.random.key(0))
