"""Batch norm folded into convolutions: what a frozen network runs."""

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn

from fidelity_jax.models.classifier import AUXILIARY


class Foldable(Protocol):
  """A Linen module that may have batch norms."""

  @property
  def epsilon(self) -> float:
    """Of the batch norms."""

  def folded(self) -> nn.Module:
    """Returns the module without batch norms and auxiliary heads."""


def fold_conv(
  conv: Mapping[str, jax.Array],
  norm: Mapping[str, jax.Array],
  stats: Mapping[str, jax.Array],
  epsilon: float,
) -> dict[str, jax.Array]:
  """Returns one convolution that does what a convolution and its batch norm do.

  Args:
    conv: kernel [h, w, in, out] and, possibly, bias [out].
    norm: scale and bias [out].
    stats: running mean and var [out].
    epsilon: batch norm's.

  Returns:
    {"kernel", "bias"} of the convolution, float32.
  """
  factor = norm["scale"] / jnp.sqrt(stats["var"] + epsilon)
  shift = conv.get("bias", 0.0) - stats["mean"]
  return {"kernel": conv["kernel"] * factor, "bias": norm["bias"] + shift * factor}


def _fold_tree(params: Any, stats: Any, epsilon: float) -> Any:
  if not isinstance(params, Mapping):
    return params
  if "bn" in params:
    return {"conv": fold_conv(params["conv"], params["bn"], stats["bn"], epsilon)}
  return {
    name: _fold_tree(child, stats.get(name, {}), epsilon)
    for name, child in params.items()
  }


def fold(
  module: Foldable, variables: Mapping[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
  """Returns the module and variables of the same network for frozen inference.

  Batch norm with its running statistics is folded into the convolutions, auxiliary
  heads are dropped and no batch_stats remain. The result equals the original in
  evaluation mode; training it would be another network. Differentiable, and callable
  under `jax.jit`.

  Args:
    module: e.g. a `Classifier` or a `DnCNN`; a folded one comes back as it is.
    variables: its params and, with batch norm, batch_stats.
  """
  params, stats = variables["params"], variables.get("batch_stats", {})
  params = {name: child for name, child in params.items() if name not in AUXILIARY}
  return module.folded(), {"params": _fold_tree(params, stats, module.epsilon)}
