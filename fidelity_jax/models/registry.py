"""Classifiers by name, and by their tensors."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from fidelity_jax import errors
from fidelity_jax.models import alexnet, efficientnet, googlenet, resnet, vgg
from fidelity_jax.models.backbone import Family, Field, Layout, State
from fidelity_jax.models.classifier import Classifier

FAMILIES: tuple[Family, ...] = (
  alexnet.FAMILY,
  efficientnet.FAMILY,
  googlenet.FAMILY,
  resnet.FAMILY,
  vgg.FAMILY,
)

_BY_NAME = {name: family for family in FAMILIES for name in family.variants}

NAMES = tuple(_BY_NAME)
# Fields of all networks; each network has some of them.
FIELDS: dict[str, Field] = {k: v for f in FAMILIES for k, v in f.fields.items()}

# What a model's config says beside the network: how it is initialized.
_INITIALIZATION = ("weights", "new_head")


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a model's config with every field of its network.

  Two configs of the same network become equal.

  Args:
    config: as for `create`.

  Returns:
    `name` and the network's fields, with the values that `create` uses; sequences are
    tuples. `weights` and `new_head` are left out.

  Raises:
    errors.UsageError: unknown network, or a field that the network does not have.
  """
  name = config.get("name")
  if name not in _BY_NAME:
    raise errors.UsageError(
      f"model.name: there is no network {name!r}; {errors.near(name, NAMES)}"
    )
  fields = _BY_NAME[name].variants[name]
  given = {key: value for key, value in config.items() if value is not None}
  for key in given.keys() - fields.keys() - {"name", *_INITIALIZATION}:
    raise errors.UsageError(
      f"model.{key}: network {name!r} has no such field; {errors.near(key, fields)}"
    )
  result = {"name": name}
  for key, default in fields.items():
    value = given.get(key, default)
    value = value(given) if callable(value) else value
    result[key] = tuple(value) if isinstance(value, list) else value
  return result


def create(
  config: Mapping[str, Any], num_classes: int, dtype: Any = jnp.float32
) -> Classifier:
  """Returns the classifier that a config names.

  Args:
    config: a mapping or ConfigDict with `name`, one of `NAMES`, and any of that
      network's fields; a field that is absent or None takes torchvision's value.
      `weights` may be there too: as in torchvision, a GoogLeNet that starts from
      weights has `transform_input` unless the config says otherwise.
    num_classes: length of the logits.
    dtype: compute dtype; parameters and logits are float32.

  Raises:
    errors.UsageError: unknown network, or a field that the network does not have.
  """
  fields = complete(config)
  build = _BY_NAME[fields.pop("name")].build
  return build(num_classes, dtype, **fields)


def steering_fields(name: str) -> tuple[str, ...]:
  """Returns the fields that change nothing unless the network is steered.

  Args:
    name: one of `NAMES`.
  """
  return tuple(_BY_NAME[name].steering_fields)


def recognize(state: State) -> tuple[dict[str, Any], Layout] | None:
  """Returns the network that tensors belong to, or None.

  Args:
    state: tensors by PyTorch name, in PyTorch's layout.

  Returns:
    (a config for `create`, the layout of the tensors).
  """
  for family in FAMILIES:
    for layout in family.layouts:
      config = layout.recognize(state)
      if config is not None:
        return config, layout
  return None
