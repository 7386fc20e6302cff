"""Classifiers by name, and by their tensors."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from fidelity_jax import errors, rules
from fidelity_jax.models import alexnet, efficientnet, googlenet, resnet, users, vgg
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

# What `model.name` may be.
NAME = rules.Rule(
  f"one of {', '.join(map(repr, NAMES))}, or 'my_module:MyNet' for one of your own",
  lambda v: isinstance(v, str) and (v in NAMES or users.is_name(v)),
  NAMES,
)

# What a model's config says beside the network: how it is initialized.
_INITIALIZATION = ("weights", "new_head")


def _family(name: Any) -> Family:
  """Returns the family of a network, built in or of the user's own.

  Raises:
    errors.UsageError: there is none.
  """
  if users.is_name(name):
    return users.find(name).family
  if name not in _BY_NAME:
    raise errors.UsageError(
      f"model.name: there is no network {name!r}; {errors.near(name, NAMES)}"
    )
  return _BY_NAME[name]


def own_fields(name: Any) -> Mapping[str, Field]:
  """Returns the fields of a network of the user's own, none of another.

  Raises:
    errors.UsageError: it cannot be imported.
  """
  return _family(name).fields if users.is_name(name) else {}


def code(name: Any) -> str | None:
  """Returns the SHA-256 of the file of a network of the user's own, or None.

  Raises:
    errors.UsageError: it cannot be imported.
  """
  return users.find(name).code if users.is_name(name) else None


def check_code(config: Mapping[str, Any]) -> None:
  """Checks what a directory says of a network, before any code that it names is run.

  Args:
    config: as for `create`, from a file that others may have written.

  Raises:
    errors.UsageError: it is one of the user's own, and no file here has the SHA-256
      that the config has; see `users.compare`.
  """
  if users.is_name(config.get("name")):
    users.compare(config["name"], config.get("code"))


def layouts(name: str) -> Sequence[Layout]:
  """Returns the layouts of a network's weights from elsewhere."""
  return _family(name).layouts


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a model's config with every field of its network.

  Two configs of the same network become equal.

  Args:
    config: as for `create`.

  Returns:
    `name` and the network's fields, with the values that `create` uses; sequences are
    tuples. Of a network of the user's own, also `code`, the SHA-256 of its file.
    `weights` and `new_head` are left out.

  Raises:
    errors.UsageError: unknown network, a field that the network does not have, or
      another `code` than its file has now.
  """
  name = config.get("name")
  given = {key: value for key, value in config.items() if value is not None}
  if users.is_name(name) and "code" in given:
    users.compare(name, given.pop("code"))
  fields = _family(name).variants[name]
  now = code(name)
  for key in given.keys() - fields.keys() - {"name", *_INITIALIZATION}:
    raise errors.UsageError(
      f"model.{key}: network {name!r} has no such field; {errors.near(key, fields)}"
    )
  result = {"name": name} | ({"code": now} if now else {})
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
    config: a mapping or ConfigDict with `name`, one of `NAMES` or "my_module:MyNet"
      (see `users.find`), and any of that network's fields; a field that is absent or
      None takes torchvision's value, or the class's own.
      `weights` may be there too: as in torchvision, a GoogLeNet that starts from
      weights has `transform_input` unless the config says otherwise, and so has an
      EfficientNet-Lite0 a `bn_momentum` of 0.9.
    num_classes: length of the logits.
    dtype: compute dtype; parameters and logits are float32.

  Raises:
    errors.UsageError: unknown network, or a field that the network does not have.
  """
  fields = complete(config)
  fields.pop("code", None)
  build = _family(fields.pop("name")).build
  return build(num_classes, dtype, **fields)


def steering_fields(name: str) -> tuple[str, ...]:
  """Returns the fields that change nothing unless the network is steered.

  Args:
    name: the network's.
  """
  return tuple(_family(name).steering_fields)


def check(config: Mapping[str, Any], side: int) -> None:
  """Checks that there is such a network, and that one of the user's own works.

  Args:
    config: as for `create`.
    side: of the images, pixels.

  Raises:
    errors.UsageError: see `create` and `users.check`.
  """
  network = create(config, 2)
  if users.is_name(config["name"]):
    users.check(config["name"], network, side)


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
