"""Reads foreign checkpoints: torchvision's, FG-NIC's and DnCNN's weights.

From the shell, `python -m fidelity_jax.port CHECKPOINT --to=DIR`; docs/weights.md lists
what is read.
"""

import os
import pathlib

import numpy as np
from flax import traverse_util

from fidelity_jax import errors, files
from fidelity_jax.port import published, reading, recognizing, storing
from fidelity_jax.port.parts import Part, name_classes

__all__ = [
  "Part",
  "content_digest",
  "is_name",
  "is_ported",
  "load",
  "load_part",
  "save",
]

save = storing.save
is_ported = storing.is_ported
is_name = published.is_name

# A denoiser alone does not say what it is for.
_SUBSTITUTES = {"restorer": "dncnn", "estimator": "dncnn"}


def load(
  checkpoint: str | pathlib.Path,
  class_names: str | pathlib.Path | None = None,
  transform_input: bool = True,
) -> dict[str, Part]:
  """Returns every network of a checkpoint, by part name.

  Args:
    checkpoint: a .pth or .safetensors file, a directory written by `save`, or a name
      such as `torchvision/resnet50`, which is downloaded once, or `efficientnet_lite0`,
      which is in an installed package.
    class_names: a text file with one class name a line, in the order of the logits.
      None: what a directory says; ImageNet's for published weights.
    transform_input: whether a GoogLeNet in a file expects its input re-scaled (networks
      fine-tuned from torchvision's ImageNet weights do; the file does not tell). A
      directory tells.

  Returns:
    See `recognizing.recognize`.

  Raises:
    errors.UsageError: nothing there, not recognized, not fitting, numbers that are not
      finite, or `transform_input=False` for a directory.
    errors.Missing: a download failed, or a package is not installed.
    errors.RunError: a downloaded, packaged or ported file is damaged.
  """
  path = _find(checkpoint)
  if path.is_dir():
    if not transform_input:
      raise errors.UsageError(
        f"{path} is ported, and says itself whether its input is re-scaled: port its "
        "checkpoint again with --transform_input=false"
      )
    parts = storing.read(path)
  else:
    state = reading.read_state(path)
    parts = recognizing.recognize(state, str(path), transform_input)
  for name, part in parts.items():
    for place, leaf in traverse_util.flatten_dict(part.variables, sep="/").items():
      if not np.isfinite(leaf).all():
        raise errors.UsageError(
          f"{path}: its {name} holds numbers that are not finite, in {place}: get the "
          "file again."
        )
  if class_names:
    name_classes(parts, files.expand(class_names), path)
  elif _is_published(checkpoint):
    published.name_classes(parts)
  return parts


def load_part(checkpoint: str | pathlib.Path, part: str) -> Part:
  """Returns one network of a checkpoint.

  Args:
    checkpoint: as for `load`.
    part: "classifier", "backbone", "head", "restorer", "estimator", "calibration" or
      "ensemble". A DnCNN that stands alone in its file serves as restorer or estimator.

  Raises:
    errors.UsageError: the checkpoint does not hold that part; otherwise as `load`.
  """
  parts = load(checkpoint)
  for name in (part, _SUBSTITUTES.get(part)):
    if name in parts:
      return parts[name]
  raise errors.UsageError(f"{checkpoint} holds no {part}; {errors.near(part, parts)}")


def content_digest(checkpoint: str | pathlib.Path) -> str:
  """Returns 64 hexadecimal digits that tell what `load` would read.

  They do not change when a file or a ported directory moves.

  Args:
    checkpoint: as for `load`.

  Raises:
    errors.UsageError: nothing there.
    errors.Missing: a download failed, or a package is not installed.
    errors.RunError: it cannot be read, or is damaged.
  """
  path = _find(checkpoint)
  if path.is_dir():
    return storing.content_digest(path)
  with errors.while_doing(f"reading {path}"):
    return files.sha256(path)


def _is_published(checkpoint: str | pathlib.Path) -> bool:
  """Returns whether it is a name of published weights; what lies there comes first."""
  found = os.path.exists(files.expand(checkpoint))
  return not found and published.is_name(str(checkpoint))


def _find(checkpoint: str | pathlib.Path) -> pathlib.Path:
  """Returns the file or ported directory of a checkpoint, downloaded if need be."""
  path = files.expand(checkpoint)
  if os.path.isdir(path):
    if not storing.is_ported(path):
      raise errors.UsageError(
        f"{path} is a directory without port.json: name a file in it, or a directory "
        "that `python -m fidelity_jax.port` wrote"
      )
  elif _is_published(checkpoint):
    return published.find(str(checkpoint))
  elif not os.path.isfile(path):
    raise errors.UsageError(f"there is no file {str(path)!r} to read weights from")
  return path
