"""Foreign checkpoints in: torchvision, FG-NIC and DnCNN weights as variables.

From the shell, `python -m fidelity_jax.port SOURCE --to=DIR`; docs/weights.md lists
what is read.
"""

import os
import pathlib

from fidelity_jax import errors, files
from fidelity_jax.port import loading, published, storing
from fidelity_jax.port.networks import Part

__all__ = ["Part", "load", "load_part", "save"]

save = storing.save

# A denoiser alone does not say what it is for.
_SUBSTITUTES = {"restorer": "dncnn", "estimator": "dncnn"}


def load(
  source: str | pathlib.Path,
  class_names: str | pathlib.Path | None = None,
  transform_input: bool = True,
) -> dict[str, Part]:
  """Returns every network of a checkpoint, by part name.

  Args:
    source: a .pth or .safetensors file, a directory written by `save`, or a name such
      as `torchvision/resnet50`, which is downloaded once.
    class_names: a text file with one class name a line, in the order of the logits.
    transform_input: whether a GoogLeNet in a file expects its input re-scaled (networks
      fine-tuned from torchvision's ImageNet weights do; the file does not tell).

  Returns:
    See `loading.load_file`.

  Raises:
    errors.UsageError: nothing there, not recognized, or not fitting.
    errors.RunError: a download failed or a ported file is damaged.
  """
  path = files.expand(source)
  names = files.expand(class_names) if class_names else None
  if os.path.isdir(path):
    if not storing.is_ported(path):
      raise errors.UsageError(
        f"{path} is a directory without port.json: name a file in it, or a directory "
        "that `python -m fidelity_jax.port` wrote"
      )
    parts = storing.read(path)
    loading.name_classes(parts, names, path)
    return parts
  if str(source).startswith("torchvision/") and not os.path.exists(path):
    path = published.find(str(source))
  parts = loading.load_file(path, transform_input)
  loading.name_classes(parts, names, path)
  return parts


def load_part(source: str | pathlib.Path, part: str) -> Part:
  """Returns one network of a checkpoint.

  Args:
    source: as for `load`.
    part: "classifier", "backbone", "head", "restorer", "estimator", "calibration" or
      "ensemble". A DnCNN that stands alone in its file serves as restorer or estimator.

  Raises:
    errors.UsageError: the checkpoint does not hold that part; otherwise as `load`.
  """
  parts = load(source)
  for name in (part, _SUBSTITUTES.get(part)):
    if name in parts:
      return parts[name]
  raise errors.UsageError(f"{source} holds no {part}; {errors.near(part, parts)}")
