"""Reads tensors by name from the files that PyTorch users have."""

import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.flax

from fidelity_jax import errors
from fidelity_jax.port import pth, unpickling

# Where training scripts put the state dict when they save more than that.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "params")
# A pickle can hold a dictionary that holds itself.
_MAX_WRAPPERS = 8


def read_state(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns the tensors of a .safetensors file or a PyTorch checkpoint, by name.

  Floating-point tensors of any width become float32. The checksums that PyTorch's zip
  form carries are compared. Prefixes that wrap every name (`module.`, from
  DataParallel, and `_orig_mod.`, from torch.compile) are removed, however many there
  are. A PyTorch file cannot run code.

  Args:
    path: a regular file; the ending .safetensors tells which kind it is.

  Raises:
    errors.UsageError: no tensors in it, tensors of a kind that networks do not have, or
      it names more than tensors need.
    errors.RunError: the machine has no room or no right to read it.
  """
  with errors.while_doing(f"reading {path}"):
    if path.suffix == ".safetensors":
      state = _to_numpy(_read_safetensors(path), path)
    else:
      with pth.opened(path) as content:
        state = _to_numpy(_unwrap(content, path), path)
  # Of names, for which being cut between two characters is right.
  common = os.path.commonprefix(list(state))  # noqa: RUF071
  wrapping = re.match(r"(?:module\.|_orig_mod\.)*", common)[0]
  return {name.removeprefix(wrapping): value for name, value in state.items()}


def _read_safetensors(path: pathlib.Path) -> Mapping[str, Any]:
  # Opened first, as safetensors does not say why it cannot read a file.
  with open(path, "rb"):
    pass
  try:
    return safetensors.flax.load_file(path)
  except Exception as error:  # It raises many types, KeyError for a dtype.
    if errors.circumstance(error):
      raise
    raise errors.UsageError(
      f"{path} is no readable safetensors file: {error!s:.300}"
    ) from error


def _unwrap(content: Any, path: pathlib.Path) -> Mapping[str, Any]:
  """Returns the state dict inside what a checkpoint holds."""
  for _ in range(_MAX_WRAPPERS):
    outer = content if isinstance(content, dict) else {}
    inner = [outer[name] for name in _WRAPPERS if isinstance(outer.get(name), dict)]
    content = inner[0] if inner else content
  if not isinstance(content, dict) or not content:
    raise errors.UsageError(
      f"{path} holds a {type(content).__name__}, not tensors by name: save the "
      "network's state_dict()"
    )
  for name, value in content.items():
    if not isinstance(name, str) or not name.isprintable():
      raise errors.UsageError(
        f"{path} calls a tensor {name!r:.100}, which is no name: save the network's "
        "state_dict()"
      )
    if not isinstance(value, unpickling.Tensor | unpickling.Unsupported):
      raise errors.UsageError(
        f"{path} holds a {type(value).__name__} called {name!r:.100} among its "
        "tensors: save the network's state_dict()"
      )
  return content


def _to_numpy(content: Mapping[str, Any], path: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns tensors as arrays, those of floating-point numbers as float32.

  Raises:
    errors.UsageError: one is of a kind that no network here has.
  """
  state = {}
  for name, tensor in content.items():
    if isinstance(tensor, unpickling.Unsupported):
      raise errors.UsageError(
        f"{path} holds a tensor that is {tensor.kind}, {name:.100}: save the "
        "network's state_dict() with dense tensors of real numbers on the CPU"
      )
    ours = isinstance(tensor, unpickling.Tensor)
    array = tensor.numpy() if ours else np.asarray(tensor)
    if array.dtype.kind == "c":
      raise errors.UsageError(
        f"{path} holds a tensor that is complex, {name:.100}: networks here have "
        "real numbers"
      )
    # To NumPy, bfloat16 is neither floating-point nor integer.
    if array.dtype.kind not in "iub":
      array = array.astype(np.float32, copy=False)
    state[name] = array
  return state
