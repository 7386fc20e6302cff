"""Restorers by name. A further one is a file like dncnn.py, and a line here."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from fidelity_jax import errors, rules
from fidelity_jax.models import dncnn
from fidelity_jax.models.restorer import Restorer


class _Entry(NamedTuple):
  """A restorer's class, and the fields of its config with what they may hold."""

  network: Callable[..., Restorer]
  fields: rules.Table


_RESTORERS = {"dncnn": _Entry(dncnn.DnCNN, dncnn.FIELDS)}

NAMES = tuple(_RESTORERS)


def fields(name: str) -> rules.Table:
  """Returns what the config of a restorer may hold.

  Raises:
    UsageError: there is no such restorer.
  """
  errors.check_choice("restorer", name, NAMES)
  return _RESTORERS[name].fields


def create(config: Mapping[str, Any], dtype: Any = jnp.float32) -> Restorer:
  """Returns the restorer that a config names.

  Args:
    config: a mapping or ConfigDict with `name`, one of `NAMES`, and all of that
      restorer's fields.
    dtype: compute dtype.

  Raises:
    UsageError: there is no such restorer.
  """
  values = {name: config[name] for name in fields(config["name"])}
  return _RESTORERS[config["name"]].network(**values, dtype=dtype)
