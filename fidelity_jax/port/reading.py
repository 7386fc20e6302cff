"""Reads tensors by name from the files that PyTorch users have."""

import os
import pathlib
import pickle
import zipfile
import zlib
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

  Floating-point tensors of any width become float32. The checksums that PyTorch's zip
  form carries are compared. Prefixes that wrap every name
  (`module.`, from DataParallel, and `_orig_mod.`, from torch.compile) are removed. A
  PyTorch file is read with `torch.load(weights_only=True)`: it cannot run code.

  Args:
    path: a file; the ending .safetensors tells which kind it is.

  Raises:
    errors.UsageError: no such file, no tensors in it, tensors of a kind that networks
      do not have, PyTorch is not installed, or the file wants to run code.
    errors.RunError: the machine has no room or no right to read it.
  """
  if not os.path.isfile(path):
    raise errors.UsageError(f"there is no file {str(path)!r} to read weights from")
  with errors.while_doing(f"reading {path}"):
    if path.suffix == ".safetensors":
      content = _read_safetensors(path)
    else:
      content = _unwrap(_read_torch(path), path)
    state = {name: _to_numpy(tensor, name, path) for name, tensor in content.items()}
  for prefix in ("module.", "_orig_mod."):
    if state and all(name.startswith(prefix) for name in state):
      state = {name.removeprefix(prefix): value for name, value in state.items()}
  return state


def _read_safetensors(path: pathlib.Path) -> Mapping[str, Any]:
  # What keeps it from being read shows here; safetensors would not tell.
  with open(path, "rb"):
    pass
  try:
    return safetensors.flax.load_file(path)
  except Exception as error:  # It raises many kinds, KeyError for a dtype.
    if errors.circumstance(error):
      raise
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
  if damage := _zip_damage(path):
    raise errors.UsageError(f"{path} is damaged ({damage}): get the file again")
  try:
    return torch.load(path, map_location="cpu", weights_only=True)
  except pickle.UnpicklingError as error:
    # PyTorch's own message is long advice; the error inside names what it refused.
    refused = str(error.__context__ or error).splitlines()[0]
    raise errors.UsageError(
      f"{path} is refused: it is a pickle that holds more than tensors and could run "
      f"code ({refused}); save the network's state_dict() instead"
    ) from error
  except Exception as error:  # PyTorch raises many kinds on what is no checkpoint.
    if errors.circumstance(error, context=True):
      raise
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


def _zip_damage(path: pathlib.Path) -> str | None:
  """Returns what is wrong with a zip file by its own checksums, or None.

  PyTorch compares none. Its older files are no zip files and have no checksums.
  """
  if not zipfile.is_zipfile(path):
    return None
  try:
    with zipfile.ZipFile(path) as archive:
      name = archive.testzip()
      return name and f"its part {name!r} is not what its checksum says"
  except (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    NotImplementedError,  # a compression that zipfile does not know
    RuntimeError,  # encrypted
  ) as error:
    return str(error) or type(error).__name__


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
    if not isinstance(name, str):
      raise errors.UsageError(
        f"{path} calls a tensor {name!r}, which is no name: save the network's "
        "state_dict()"
      )
    # A nested tensor has a shape that cannot be asked for.
    if not hasattr(value, "detach") and not hasattr(value, "shape"):
      raise errors.UsageError(
        f"{path} holds a {type(value).__name__} called {name!r} among its tensors: "
        "save the network's state_dict()"
      )
  return content


def _to_numpy(tensor: Any, name: str, path: pathlib.Path) -> np.ndarray:
  """Returns a tensor as an array.

  Raises:
    errors.UsageError: it is of a kind that no network here has.
  """
  if hasattr(tensor, "detach"):
    tensor = tensor.detach()
    if kind := _odd_kind(tensor):
      raise errors.UsageError(
        f"{path} holds a tensor that is {kind}, {name}: save the network's "
        "state_dict() with dense tensors of real numbers on the CPU"
      )
    tensor = tensor.resolve_neg()
    tensor = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
  array = np.asarray(tensor)
  if array.dtype.kind == "c":
    raise errors.UsageError(
      f"{path} holds a tensor that is complex, {name}: networks here have real numbers"
    )
  # bfloat16 is no floating-point kind to NumPy, but it is no integer either.
  return array if array.dtype.kind in "iub" else array.astype(np.float32)


def _odd_kind(tensor: Any) -> str:
  """Returns what sets a PyTorch tensor apart from an ordinary one, "" if nothing."""
  import torch

  if tensor.is_nested:
    return "nested"
  if tensor.layout != torch.strided:
    return "sparse"
  if tensor.is_quantized:
    return "quantized"
  if tensor.device.type != "cpu":
    return f"on the device {tensor.device.type}"
  if tensor.is_complex():
    return "complex"
  # Strides of 0 can make any size of a few bytes.
  if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
    return "expanded"
  return ""
