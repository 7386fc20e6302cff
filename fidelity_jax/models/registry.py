"""Classifiers by name."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from fidelity_jax import errors
from fidelity_jax.models import layers
from fidelity_jax.models.alexnet import AlexNet
from fidelity_jax.models.classifier import Classifier
from fidelity_jax.models.googlenet import AuxiliaryHead, GoogLeNet
from fidelity_jax.models.resnet import ResNet
from fidelity_jax.models.vgg import VGG16


def _resnet(num_classes, dtype, folded, *, stage_sizes, width, block):
  if block not in ("basic", "bottleneck"):
    raise errors.UsageError(
      f'model.block is {block!r}; a ResNet block is "basic" or "bottleneck"'
    )
  backbone = ResNet(tuple(stage_sizes), width, block, norm=not folded, dtype=dtype)
  return Classifier(backbone, layers.Head(num_classes, dtype=dtype))


def _alexnet(num_classes, dtype, folded, *, dropout):
  rates = (dropout, dropout, 0.0)
  head = layers.Head(num_classes, (4096, 4096), rates, dtype=dtype)
  return Classifier(AlexNet(norm=not folded, dtype=dtype), head)


def _vgg16(num_classes, dtype, folded, *, dropout):
  rates, init = (0.0, dropout, dropout), nn.initializers.normal(0.01)
  head = layers.Head(num_classes, (4096, 4096), rates, init, dtype=dtype)
  return Classifier(VGG16(norm=not folded, dtype=dtype), head)


def _googlenet(
  num_classes,
  dtype,
  folded,
  *,
  transform_input,
  transform_steered,
  dropout,
  aux_dropout,
  aux_heads,
):
  backbone = GoogLeNet(transform_input, transform_steered, norm=not folded, dtype=dtype)
  head = layers.Head(num_classes, dropout=(dropout,), dtype=dtype)
  if folded or not aux_heads:
    return Classifier(backbone, head)
  aux = lambda: AuxiliaryHead(num_classes, aux_dropout, dtype)
  return Classifier(backbone, head, aux(), aux())


# Per name: the builder and its configurable fields with their default values.
_MODELS: dict[str, tuple[Callable[..., Classifier], dict[str, Any]]] = {
  "alexnet": (_alexnet, dict(dropout=0.5)),
  "googlenet": (
    _googlenet,
    dict(
      transform_input=None,
      transform_steered=True,
      dropout=0.2,
      aux_dropout=0.7,
      aux_heads=True,
    ),
  ),
  # The demo's: a config that names another network need not unset any field.
  "resnet": (_resnet, dict(stage_sizes=(1, 1, 1, 1), width=24, block="basic")),
  "resnet18": (_resnet, dict(stage_sizes=(2, 2, 2, 2), width=64, block="basic")),
  "resnet50": (_resnet, dict(stage_sizes=(3, 4, 6, 3), width=64, block="bottleneck")),
  "vgg16": (_vgg16, dict(dropout=0.5)),
}

NAMES = tuple(_MODELS)


def create(
  config: Mapping[str, Any],
  num_classes: int,
  dtype: Any = jnp.float32,
  folded: bool = False,
) -> Classifier:
  """Returns the classifier that a config names.

  Args:
    config: a mapping or ConfigDict with `name`, one of `NAMES`, and any of that
      network's fields; a field that is absent or None takes torchvision's value.
      `weights` may be there too: as in torchvision, a GoogLeNet that starts from
      weights has `transform_input` unless the config says otherwise.
    num_classes: length of the logits.
    dtype: compute dtype; parameters and logits are float32.
    folded: build the network that `fold` makes variables for.

  Raises:
    errors.UsageError: unknown network, or a field that the network does not have.
  """
  name = config.get("name")
  if name not in _MODELS:
    raise errors.UsageError(
      f"model.name: there is no network {name!r}; {errors.near(name, _MODELS)}"
    )
  build, fields = _MODELS[name]
  given = {k: v for k, v in config.items() if v is not None}
  for key in given.keys() - fields.keys() - {"name", "new_head", "weights"}:
    raise errors.UsageError(
      f"model.{key}: network {name!r} has no such field; {errors.near(key, fields)}"
    )
  values = {k: given.get(k, default) for k, default in fields.items()}
  if values.get("transform_input", False) is None:
    values["transform_input"] = "weights" in given
  return build(num_classes, dtype, folded, **values)
