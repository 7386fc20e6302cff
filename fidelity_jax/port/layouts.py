"""PyTorch's names and layouts of this package's variables.

A table turns the path of a variable ("backbone/stem/conv/kernel") into the name of the
PyTorch tensor that holds it ("conv1.weight"). The expected names and shapes then follow
from the Linen module itself, so that one function can check and convert any network.
The tables of backbones are in their files in models/.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from fidelity_jax import errors
from fidelity_jax.models.backbone import State, Table

# Convolutions sit at every second place of a PyTorch Sequential, ReLUs between them.
_SPATIAL = {"multiplication": "cnn_layers_weight", "addition": "cnn_layers_bias"}
MAX_CONVS = 10
CALIBRATION: Table = (
  *(
    (rf"{ours}_(\d+)/conv_{i}", rf"{theirs}.\1.{2 * i}")
    for ours, theirs in _SPATIAL.items()
    for i in range(MAX_CONVS)
  ),
  (r"channel_multiplication/hidden", "mul_fc.0"),
  (r"channel_multiplication/output", "mul_fc.2"),
  (r"channel_concatenation/hidden", "cat_fc.0"),
  (r"channel_concatenation/output", "cat_fc.2"),
)
ENSEMBLE: Table = (
  (r"weights/hidden", "ensemble.0"),
  (r"weights/output", "ensemble.2"),
)
_LEAVES = {
  "kernel": "weight",
  "scale": "weight",
  "bias": "bias",
  "mean": "running_mean",
  "var": "running_var",
}


def torch_name(path: Sequence[str], table: Table) -> str:
  """Returns the PyTorch name of the variable at `path` (collection name left out).

  Raises:
    errors.UsageError: a table of a user's own is broken, or lacks the variable.
  """
  module, leaf = "/".join(path[:-1]), path[-1]
  for pattern, replacement in table:
    try:
      match = re.fullmatch(pattern, module)
      name = match and match.expand(replacement)
    except (re.error, IndexError) as error:
      raise errors.UsageError(
        f"the network's table has {pattern!r}, {replacement!r}, which fails for the "
        f"variable {'/'.join(path)}: {error}"
      ) from error
    if name is not None and leaf in _LEAVES:
      return f"{name}.{_LEAVES[leaf]}"
  raise errors.UsageError(
    f"the network's table has no PyTorch name for the variable {'/'.join(path)}: add "
    "a line for its layer"
  )


def to_torch_shape(shape: Sequence[int]) -> tuple[int, ...]:
  """Returns the shape in PyTorch's layout of a variable shaped `shape` in ours."""
  if len(shape) == 4:
    height, width, inputs, outputs = shape
    return outputs, inputs, height, width
  return tuple(reversed(shape))


def from_torch(tensor: np.ndarray) -> np.ndarray:
  """Returns a PyTorch weight in our layout: OIHW to HWIO, [out, in] to [in, out]."""
  if tensor.ndim == 4:
    tensor = tensor.transpose(2, 3, 1, 0)
  elif tensor.ndim == 2:
    tensor = tensor.T
  return np.ascontiguousarray(tensor, np.float32)


def listing(kind: str, names: Sequence[str], limit: int = 20) -> str:
  """Returns e.g. 'missing a, b', at most `limit` names and how many more.

  Names, which a file can make as long as it likes, are cut to 100 characters.
  """
  more = f" and {len(names) - limit} more" if len(names) > limit else ""
  return f"{kind} {', '.join(name[:100] for name in names[:limit])}{more}"


def convert(state: State, shapes: Any, table: Table, what: str) -> dict[str, Any]:
  """Returns the variables that `state` holds, checked against the module's.

  Args:
    state: tensors by PyTorch name, in PyTorch's layout. `num_batches_tracked` counters
      are ignored; everything else has to be used.
    shapes: the module's variables (or their shapes, from `jax.eval_shape`).
    table: names the variables as PyTorch does.
    what: names the tensors' origin in the error.

  Returns:
    Variables shaped as `shapes`, float32 NumPy arrays.

  Raises:
    errors.UsageError: tensors are missing, unexpected or misshapen; all are named.
  """
  wanted, names = traverse_util.flatten_dict(shapes), {}
  for path in wanted:
    names[torch_name(path[1:], table)] = path
  given = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
  check_fit(given, {k: to_torch_shape(wanted[p].shape) for k, p in names.items()}, what)
  flat = {path: from_torch(given[name]) for name, path in names.items()}
  return traverse_util.unflatten_dict(flat)


def check_fit(given: State, wanted: Mapping[str, tuple[int, ...]], what: str) -> None:
  """Checks that tensors are those that a network has.

  Args:
    given: tensors by name.
    wanted: shapes by name.
    what: names the tensors' origin in the error.

  Raises:
    errors.UsageError: tensors are missing, unexpected or misshapen; all are named.
  """
  problems = []
  missing = sorted(wanted.keys() - given.keys())
  unexpected = sorted(given.keys() - wanted.keys())
  misshapen = []
  for name in sorted(wanted.keys() & given.keys()):
    expected = wanted[name]
    if given[name].dtype.kind != "f":
      misshapen.append(f"{name} {given[name].dtype} (should be floating-point)")
    elif tuple(given[name].shape) != expected:
      misshapen.append(f"{name} {tuple(given[name].shape)} (should be {expected})")
  for kind, found in (
    ("missing", missing),
    ("unexpected", unexpected),
    ("misshapen", misshapen),
  ):
    if found:
      problems.append(listing(kind, found))
  if problems:
    raise errors.UsageError(f"{what} does not fit: {'; '.join(problems)}")


def variable_shapes(module: Any, *inputs: jax.ShapeDtypeStruct, **kwargs: Any) -> Any:
  """Returns the shapes of a Linen module's variables without computing any."""
  init = lambda *args: module.init(jax.random.key(0), *args, **kwargs)
  return jax.eval_shape(init, *inputs)
