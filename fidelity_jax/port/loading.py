"""From a file to the networks in it."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from fidelity_jax import errors, files
from fidelity_jax.models import layers
from fidelity_jax.port import networks, reading
from fidelity_jax.port.networks import Part, State

# The prefixes of the FG-NIC authors' checkpoints.
_CALIBRATION = ("cnn_layers_weight.", "cnn_layers_bias.", "mul_fc.", "cat_fc.")
_FGNIC = (
  "restoration.",
  "fidelity.",
  "feature_extractor.",
  "ensemble.",
  *_CALIBRATION,
)
# What torchvision's feature-only VGG-16 was trained on: pixels in [0, 255] less a mean.
_AMDEGROOT_MEAN = np.array((0.48235, 0.45882, 0.40784), np.float32)
_AMDEGROOT_STD = np.full(3, 1 / 255, np.float32)


def load_file(path: pathlib.Path, transform_input: bool = True) -> dict[str, Part]:
  """Returns the networks that a checkpoint file holds, recognized by content.

  Args:
    path: a .pth or .safetensors file in any layout of docs/weights.md.
    transform_input: whether a GoogLeNet in the file expects its input re-scaled, as
      torchvision's ImageNet weights and all networks fine-tuned from them do. The file
      itself does not tell.

  Returns:
    Parts by name: "classifier" (or "backbone" or "head", where the file holds only
    that), "restorer", "estimator", "calibration", "ensemble"; "dncnn" is a denoiser
    alone, which can serve as restorer or estimator.

  Raises:
    errors.UsageError: the file cannot be read, is not recognized, or does not fit what
      it looks like; missing, unexpected and misshapen tensors are named.
  """
  return recognize(reading.read_state(path), path, transform_input)


def name_classes(
  parts: Mapping[str, Part], class_names: pathlib.Path | None, path: pathlib.Path
) -> None:
  """Gives a classifier, or a head, the names of its classes.

  Args:
    parts: from `load_file`.
    class_names: a text file with one class name a line, in the order of the logits;
      None changes nothing.
    path: where the parts came from, for errors.

  Raises:
    errors.UsageError: the file cannot be read, there is no such part, or it has another
      number of classes.
  """
  if class_names is None:
    return
  names = read_class_names(class_names)
  part = parts.get("classifier") or parts.get("head")
  if part is None:
    raise errors.UsageError(f"{class_names} names classes, but {path} has no head")
  if len(names) != part.config["num_classes"]:
    raise errors.UsageError(
      f"{class_names} names {len(names)} classes, but {path} has "
      f"{part.config['num_classes']}"
    )
  part.config["class_names"] = names


def read_class_names(path: pathlib.Path) -> list[str]:
  """Returns the lines of a text file, without surrounding space and empty lines.

  Raises:
    errors.UsageError: the file cannot be read.
  """
  try:
    lines = files.read_bytes(path).decode("utf-8").splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise errors.UsageError(f"cannot read class names from {path}: {error}") from error
  return [line.strip() for line in lines if line.strip()]


def recognize(
  state: State, path: pathlib.Path, transform_input: bool = True
) -> dict[str, Part]:
  """Returns the networks that tensors by PyTorch name make up.

  Args:
    state: tensors by name, in PyTorch's layout.
    path: where they came from, for errors.
    transform_input: as for `load_file`.
  """
  if any(name.startswith(_FGNIC) for name in state) or set(state) == {
    "classifier.weight",
    "classifier.bias",
  }:
    return _fgnic(state, path, transform_input)
  for prefix in ("model.", "dncnn."):
    if f"{prefix}0.weight" in state:
      return {"dncnn": networks.dncnn(_below(prefix, state), f"{path}: {prefix}*")}
  config = networks.network_config(state)
  if config is None:
    raise errors.UsageError(
      f"{path} is not recognized: it holds {len(state)} tensors such as "
      f"{', '.join(sorted(state)[:4])}; known are torchvision's AlexNet, VGG-16, "
      "GoogLeNet and ResNet, FG-NIC's checkpoints, and DnCNN"
    )
  if config["name"] == "googlenet":
    config["transform_input"] = transform_input
  what = f"{path}, which looks like {config['name']},"
  if config["name"] == "vgg16" and _without_head(state, path):
    features = {k: v for k, v in state.items() if k.startswith("features.")}
    part = networks.backbone(features, config, what)
    params = part.variables["params"]["backbone"]
    params["conv1_1"] = _expect_imagenet_input(params["conv1_1"])
    return {"backbone": part}
  return {"classifier": networks.classifier(state, config, what)}


def _below(prefix: str, state: State) -> dict[str, np.ndarray]:
  return {
    name.removeprefix(prefix): value
    for name, value in state.items()
    if name.startswith(prefix)
  }


def _fgnic(state: State, path: pathlib.Path, transform_input: bool) -> dict[str, Part]:
  """Returns the parts of a checkpoint of FG-NIC's released code, or of a piece."""
  parts = {}
  for prefix, part in (("restoration.", "restorer"), ("fidelity.", "estimator")):
    tensors = _below(prefix, state)
    if tensors:
      stack = _below("model.", tensors)
      if len(stack) != len(tensors):
        raise errors.UsageError(
          f"{path}: {prefix}* is no DnCNN: it holds tensors such as "
          f"{prefix}{min(tensors.keys() - {f'model.{k}' for k in stack})}"
        )
      parts[part] = networks.dncnn(stack, f"{path}: {prefix}model.*")
  features = _below("feature_extractor.", state)
  head = {k: v for k, v in state.items() if k.startswith("classifier.")}
  if features:
    config = networks.network_config(features)
    if config is None:
      raise errors.UsageError(
        f"{path}: feature_extractor.* is not recognized: it holds tensors such as "
        f"{', '.join(sorted(features)[:4])}"
      )
    if config["name"] == "googlenet":
      config["transform_input"] = transform_input
    what = f"{path}: feature_extractor.* and classifier.* of {config['name']}"
    if head:
      if "classifier.weight" in head:
        head = {f"fc.{k.removeprefix('classifier.')}": v for k, v in head.items()}
      parts["classifier"] = networks.classifier({**features, **head}, config, what)
    else:
      parts["backbone"] = networks.backbone(features, config, what)
  elif head:
    parts["head"] = networks.head(head, f"{path}: classifier.*")
  calibration = {k: v for k, v in state.items() if k.startswith(_CALIBRATION)}
  if calibration:
    parts["calibration"] = networks.calibration(calibration, str(path))
  ensemble = {k: v for k, v in state.items() if k.startswith("ensemble.")}
  if ensemble:
    parts["ensemble"] = networks.ensemble(ensemble, str(path))
  known = (*_FGNIC, "classifier.")
  unknown = sorted(name for name in state if not name.startswith(known))
  if unknown:
    raise errors.UsageError(
      f"{path} looks like an FG-NIC checkpoint, but does not fit: "
      f"{networks.layouts.listing('unexpected', unknown)}"
    )
  return parts


def _without_head(state: State, path: pathlib.Path) -> bool:
  """Returns whether a VGG-16 file is torchvision's feature-only one."""
  heads = [v for k, v in state.items() if k.startswith("classifier.")]
  finite = all(np.isfinite(v).all() for v in heads)
  return not finite or path.name.startswith("vgg16_features-")


def _expect_imagenet_input(conv: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a first convolution that takes ImageNet-normalized input.

  Exact but for the zero padding, which now stands for ImageNet's mean colour instead of
  the original's; they differ by less than 0.003 of the range.
  """
  mean = np.asarray(layers.IMAGENET_MEAN, np.float32)
  std = np.asarray(layers.IMAGENET_STD, np.float32)
  shift = (mean - _AMDEGROOT_MEAN) / _AMDEGROOT_STD
  return {
    "kernel": conv["kernel"] * (std / _AMDEGROOT_STD)[:, None],
    "bias": conv["bias"] + np.einsum("hwio,i->o", conv["kernel"], shift),
  }
