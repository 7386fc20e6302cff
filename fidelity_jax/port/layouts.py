"""How PyTorch names and stores what our variables hold.

Each table turns the path of a variable ("backbone/stem/conv/kernel") into the name of
the PyTorch tensor that holds it ("conv1.weight"). The expected names and shapes then
follow from the Linen module itself, so that one function can check and convert any
network.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from fidelity_jax import errors

Table = Sequence[tuple[str, str]]

_RESNET: Table = (
  (r"backbone/stem/conv", "conv1"),
  (r"backbone/stem/bn", "bn1"),
  (r"backbone/layer(\d)_(\d+)/downsample/conv", r"layer\1.\2.downsample.0"),
  (r"backbone/layer(\d)_(\d+)/downsample/bn", r"layer\1.\2.downsample.1"),
  (r"backbone/layer(\d)_(\d+)/conv(\d)/(conv|bn)", r"layer\1.\2.\4\3"),
  (r"head/logits", "fc"),
)
_ALEXNET: Table = (
  *((f"backbone/conv{i}", f"features.{n}") for i, n in enumerate((0, 3, 6, 8, 10), 1)),
  (r"head/fc1", "classifier.1"),
  (r"head/fc2", "classifier.4"),
  (r"head/logits", "classifier.6"),
)
_VGG16_CONVS = {1: (0, 2), 2: (5, 7), 3: (10, 12, 14), 4: (17, 19, 21), 5: (24, 26, 28)}
_VGG16: Table = (
  *(
    (f"backbone/conv{stage}_{i}", f"features.{n}")
    for stage, numbers in _VGG16_CONVS.items()
    for i, n in enumerate(numbers, 1)
  ),
  (r"head/fc1", "classifier.0"),
  (r"head/fc2", "classifier.3"),
  (r"head/logits", "classifier.6"),
)
_GOOGLENET: Table = (
  (r"backbone/(conv\d)/(conv|bn)", r"\1.\2"),
  (r"backbone/(inception..)/branch1/(conv|bn)", r"\1.branch1.\2"),
  (r"backbone/(inception..)/branch(\d)_reduce/(conv|bn)", r"\1.branch\2.0.\3"),
  (r"backbone/(inception..)/branch(\d)/(conv|bn)", r"\1.branch\2.1.\3"),
  (r"(aux\d)/conv/(conv|bn)", r"\1.conv.\2"),
  (r"(aux\d)/fc1", r"\1.fc1"),
  (r"(aux\d)/logits", r"\1.fc2"),
  (r"head/logits", "fc"),
)
NETWORKS: Mapping[str, Table] = {
  "alexnet": _ALEXNET,
  "googlenet": _GOOGLENET,
  "resnet": _RESNET,
  "resnet18": _RESNET,
  "resnet50": _RESNET,
  "vgg16": _VGG16,
}
# Convolutions sit at every second place of a PyTorch Sequential, ReLUs between them.
_SPATIAL = {"multiplication": "cnn_layers_weight", "addition": "cnn_layers_bias"}
CALIBRATION: Table = (
  *(
    (rf"{ours}_(\d+)/conv_{i}", rf"{theirs}.\1.{2 * i}")
    for ours, theirs in _SPATIAL.items()
    for i in range(10)
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
  """Returns the PyTorch name of the variable at `path` (collection name left out)."""
  module, leaf = "/".join(path[:-1]), path[-1]
  for pattern, replacement in table:
    match = re.fullmatch(pattern, module)
    if match:
      return f"{match.expand(replacement)}.{_LEAVES[leaf]}"
  raise KeyError(f"no PyTorch name for variable {'/'.join(path)}")


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
  """Returns e.g. 'missing a, b', at most `limit` names and how many more."""
  more = f" and {len(names) - limit} more" if len(names) > limit else ""
  return f"{kind} {', '.join(names[:limit])}{more}"


def convert(
  state: Mapping[str, np.ndarray], shapes: Any, table: Table, what: str
) -> dict[str, Any]:
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
  problems = []
  missing = sorted(names.keys() - given.keys())
  unexpected = sorted(given.keys() - names.keys())
  misshapen = []
  for name in sorted(names.keys() & given.keys()):
    expected = to_torch_shape(wanted[names[name]].shape)
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
  flat = {path: from_torch(given[name]) for name, path in names.items()}
  return traverse_util.unflatten_dict(flat)


def variable_shapes(module: Any, *inputs: jax.ShapeDtypeStruct, **kwargs: Any) -> Any:
  """Returns the shapes of a Linen module's variables without computing any."""
  init = lambda *args: module.init(jax.random.key(0), *args, **kwargs)
  return jax.eval_shape(init, *inputs)
