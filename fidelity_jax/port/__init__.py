"""Reads foreign checkpoints: torchvision's, FG-NIC's and DnCNN's weights.

From the shell, `python -m fidelity_jax.port CHECKPOINT --to=DIR`; docs/weights.md lists
what is read.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from fidelity_jax import errors, files, locations
from fidelity_jax.port import published, reading, recognizing, storing
from fidelity_jax.port.parts import Part, name_classes

__all__ = [
  "Part",
  "content_digest",
  "holds_weights",
  "is_name",
  "is_ported",
  "load",
  "load_part",
  "save",
]

save = storing.save
is_ported = storing.is_ported
is_name = published.is_name
holds_weights = published.holds_weights

# A denoiser alone does not say what it is for.
_SUBSTITUTES = {"restorer": "dncnn", "estimator": "dncnn"}


def load(
  checkpoint: str | pathlib.Path,
  class_names: str | pathlib.Path | None = None,
  transform_input: bool = True,
  model: Mapping[str, Any] | None = None,
  image_size: int | None = None,
) -> dict[str, Part]:
  """Returns every network of a checkpoint, by part name.

  Args:
    checkpoint: a .pth or .safetensors file, a directory written by `save` or with one
      such file in it (of several, model.safetensors), or a name that is downloaded
      once: `torchvision/resnet50`, or `hf:OWNER/NAME[/FILE][@REVISION]` on Hugging
      Face's hub; or `efficientnet_lite0`, which is in an installed package.
    class_names: a text file with one class name a line, in the order of the logits.
      None: what a directory says; ImageNet's for published weights.
    transform_input: whether a GoogLeNet in a file expects its input re-scaled (networks
      fine-tuned from torchvision's ImageNet weights do; the file does not tell). A
      directory tells.
    model: the network that is expected; matters where it is one of the user's own,
      "my_module:MyNet", which tensors do not tell.
    image_size: side of the images that such a network is for, pixels; None if it has
      the same variables at all sizes. Other networks need none.

  Returns:
    See `recognizing.recognize`.

  Raises:
    errors.UsageError: nothing there, not recognized, not fitting, numbers that are not
      finite, or `transform_input=False` for a directory.
    errors.Missing: a download failed, or a package is not installed.
    errors.RunError: a downloaded, packaged or ported file is damaged.
  """
  path = published.find(checkpoint)
  if path.is_dir():
    if not transform_input:
      raise errors.UsageError(
        f"{path} is ported, and says itself whether its input is re-scaled: port its "
        "checkpoint again with --transform_input=false"
      )
    parts = storing.read(path)
  else:
    state = reading.read_state(path)
    parts = recognizing.recognize(state, str(path), transform_input, model, image_size)
  for name, part in parts.items():
    for place, leaf in traverse_util.flatten_dict(part.variables, sep="/").items():
      if not np.isfinite(leaf).all():
        raise errors.UsageError(
          f"{path}: its {name} holds numbers that are not finite, in {place}: get the "
          "file again."
        )
  if class_names:
    name_classes(parts, locations.expand(class_names), path)
  else:
    published.name_classes(checkpoint, parts)
  return parts


def load_part(
  checkpoint: str | pathlib.Path,
  part: str,
  model: Mapping[str, Any] | None = None,
  image_size: int | None = None,
) -> Part:
  """Returns one network of a checkpoint.

  Args:
    checkpoint: as for `load`.
    part: "classifier", "backbone", "head", "restorer", "estimator", "calibration" or
      "ensemble". A DnCNN that stands alone in its file serves as restorer or estimator.
    model: as for `load`.
    image_size: likewise.

  Raises:
    errors.UsageError: the checkpoint does not hold that part; otherwise as `load`.
  """
  parts = load(checkpoint, model=model, image_size=image_size)
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
  path = published.find(checkpoint)
  if path.is_dir():
    return storing.content_digest(path)
  with errors.while_doing(f"reading {path}"):
    return files.sha256(path)
