"""Reads tensors by name from the files that PyTorch users have."""

import pathlib
import pickle
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.flax

from fidelity_jax import errors

# Where training scripts put the state dict when they save more than that.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "params")


def read_state(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns the tensors of a .safetensors file or a PyTorch checkpoint, by name.

  Floating-point tensors of any width become float32. Prefixes that wrap every name
  (`module.`, from DataParallel, and `_orig_mod.`, from torch.compile) are removed. A
  PyTorch file is read with `torch.load(weights_only=True)`: it cannot run code.

  Args:
    path: a file; the ending .safetensors tells which kind it is.

  Raises:
    errors.UsageError: no such file, no tensors in it, PyTorch is not installed, or the
      file wants to run code.
  """
  if not path.is_file():
    raise errors.UsageError(f"there is no file {str(path)!r} to read weights from")
  if path.suffix == ".safetensors":
    content = _read_safetensors(path)
  else:
    content = _unwrap(_read_torch(path), path)
  state = {name: _to_numpy(tensor) for name, tensor in content.items()}
  for prefix in ("module.", "_orig_mod."):
    if state and all(name.startswith(prefix) for name in state):
      state = {name.removeprefix(prefix): value for name, value in state.items()}
  return state


def _read_safetensors(path: pathlib.Path) -> Mapping[str, Any]:
  try:
    return safetensors.flax.load_file(path)
  except (OSError, safetensors.SafetensorError) as error:
    raise errors.UsageError(
      f"{path} is no readable safetensors file: {error}"
    ) from error


def _read_torch(path: pathlib.Path) -> Any:
  try:
    import torch
  except ImportError as error:
    raise errors.UsageError(
      f"reading {path} needs PyTorch: pip install 'fidelity_jax[torch]', or save the "
      "tensors as .safetensors, which needs no PyTorch"
    ) from error
  if not _is_pickle(path):
    raise errors.UsageError(
      f"{path} is neither a PyTorch checkpoint nor a .safetensors file"
    )
  try:
    return torch.load(path, map_location="cpu", weights_only=True)
  except pickle.UnpicklingError as error:
    # PyTorch's own message is long advice; the error inside names what it refused.
    refused = str(error.__context__ or error).splitlines()[0]
    raise errors.UsageError(
      f"{path} is refused: it is a pickle that holds more than tensors and could run "
      f"code ({refused}); save the network's state_dict() instead"
    ) from error
  except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise errors.UsageError(
      f"{path} is no readable PyTorch checkpoint: {reason}"
    ) from error


def _is_pickle(path: pathlib.Path) -> bool:
  """Returns whether a file starts as PyTorch's checkpoints, new or old, do."""
  if zipfile.is_zipfile(path):
    return True
  with open(path, "rb") as file:
    return file.read(1) == pickle.PROTO


def _unwrap(content: Any, path: pathlib.Path) -> Mapping[str, Any]:
  """Returns the state dict inside what a checkpoint holds."""
  for name in _WRAPPERS:
    if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
      return _unwrap(content[name], path)
  if not isinstance(content, Mapping) or not content:
    raise errors.UsageError(
      f"{path} holds a {type(content).__name__}, not tensors by name: save the "
      "network's state_dict()"
    )
  for name, value in content.items():
    if not hasattr(value, "shape"):
      raise errors.UsageError(
        f"{path} holds a {type(value).__name__} called {name!r} among its tensors: "
        "save the network's state_dict()"
      )
  return content


def _to_numpy(tensor: Any) -> np.ndarray:
  if hasattr(tensor, "detach"):
    tensor = tensor.detach()
    tensor = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
  array = np.asarray(tensor)
  # bfloat16 is no floating-point kind to NumPy, but it is no integer either.
  return array if array.dtype.kind in "iub" else array.astype(np.float32)
