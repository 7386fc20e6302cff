"""Recognizes whose tensors a state dict holds, and converts them."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fidelity_jax import errors, models
from fidelity_jax.models import calibration as calibration_lib
from fidelity_jax.models import folding, layers
from fidelity_jax.port import layouts

State = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Part:
  """One network out of a checkpoint.

  Attributes:
    variables: for its Linen module's `apply`; float32 NumPy arrays.
    config: what describes that module, JSON-serializable. Classifiers: `model` (for
      `models.create`), `num_classes`, `class_names` (or None). DnCNN: `depth`, `width`,
      `channels`, `out_channels`. Calibration and ensemble: the fields of their modules
      that the tensors tell.
  """

  variables: dict[str, Any]
  config: dict[str, Any]


def _numbers(pattern: str, state: State) -> list[tuple[int, ...]]:
  matches = (re.match(pattern, name) for name in state)
  return sorted({tuple(int(g) for g in match.groups()) for match in matches if match})


def _shape(state: State, name: str, what: str) -> tuple[int, ...]:
  if name not in state:
    raise errors.UsageError(f"{what} does not fit: missing {name}")
  return tuple(state[name].shape)


def network_config(state: State) -> dict[str, Any] | None:
  """Returns the `models.create` config of a backbone in torchvision's names, or None.

  GoogLeNet's `transform_input` is not in the tensors; it is left out here.
  """
  if "layer1.0.conv1.weight" in state and "conv1.weight" in state:
    blocks = _numbers(r"layer(\d+)\.(\d+)\.", state)
    stages = max(stage for stage, _ in blocks)
    sizes = tuple(sum(s == stage for s, _ in blocks) for stage in range(1, stages + 1))
    bottleneck = "layer1.0.conv3.weight" in state
    config = {
      "stage_sizes": list(sizes),
      "width": int(state["conv1.weight"].shape[0]),
      "block": "bottleneck" if bottleneck else "basic",
    }
    for name in ("resnet18", "resnet50"):
      known = models.create({"name": name}, 2).backbone
      if (tuple(known.stage_sizes), known.width, known.block) == (
        sizes,
        config["width"],
        config["block"],
      ):
        return {"name": name}
    return {"name": "resnet", **config}
  if "inception3a.branch1.conv.weight" in state:
    aux_heads = any(name.startswith("aux1.") for name in state)
    return {"name": "googlenet", "aux_heads": aux_heads}
  if "features.0.weight" in state:
    kernel = state["features.0.weight"].shape[-1]
    return {"name": "alexnet" if kernel == 11 else "vgg16"}
  return None


def _image() -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)


def classifier(state: State, config: Mapping[str, Any], what: str) -> Part:
  """Returns the whole network whose tensors, in torchvision's names, are `state`."""
  name = config["name"]
  table = layouts.NETWORKS[name]
  last = f"{dict(table)['head/logits']}.weight"
  num_classes = int(_shape(state, last, what)[0])
  module = models.create(config, num_classes)
  shapes = layouts.variable_shapes(module, _image())
  variables = layouts.convert(state, shapes, table, what)
  described = {"model": dict(config), "num_classes": num_classes, "class_names": None}
  return Part(variables, described)


def backbone(state: State, config: Mapping[str, Any], what: str) -> Part:
  """Returns a backbone alone: variables with the one child `backbone`."""
  module = models.create(config, 2)
  shapes = layouts.variable_shapes(module, _image(), method="features")
  table = layouts.NETWORKS[config["name"]]
  return Part(layouts.convert(state, shapes, table, what), {"model": dict(config)})


def head(state: State, what: str) -> Part:
  """Returns fully connected layers alone: variables with the one child `head`.

  Args:
    state: `classifier.weight` and `classifier.bias` of a ResNet or GoogLeNet, or
      `classifier.N.weight` ... of an AlexNet or VGG-16.
    what: names the tensors' origin in errors.
  """
  if "classifier.weight" in state:
    table: layouts.Table = (("head/logits", "classifier"),)
    last, hidden = "classifier", ()
  else:
    name = "alexnet" if "classifier.1.weight" in state else "vgg16"
    table, last = layouts.NETWORKS[name], "classifier.6"
    hidden = [
      _shape(state, f"{dict(table)[f'head/fc{i}']}.weight", what)[0] for i in (1, 2)
    ]
  num_classes = int(_shape(state, f"{last}.weight", what)[0])
  first = min(name for name in state if name.endswith(".weight"))
  inputs = jax.ShapeDtypeStruct((1, state[first].shape[1]), jnp.float32)
  module = layers.Head(num_classes, tuple(hidden), (0.0,) * (len(hidden) + 1))
  params = layouts.variable_shapes(module, inputs)["params"]
  variables = layouts.convert(state, {"params": {"head": params}}, table, what)
  return Part(variables, {"num_classes": num_classes, "class_names": None})


def dncnn(state: State, what: str) -> Part:
  """Returns a DnCNN, batch norm folded into the convolutions.

  Args:
    state: tensors of a PyTorch Sequential, named "0.weight" and so on.
    what: names the tensors' origin in errors.
  """
  # KAIR's batch norms have this epsilon and follow convolutions with a bias;
  # DnCNN-PyTorch's have PyTorch's default and its convolutions have no bias.
  epsilon = 1e-4 if "0.bias" in state else 1e-5
  convs: list[dict[str, Any]] = []
  used, misshapen = set(), []
  for name, value in state.items():
    if not name.endswith("batches_tracked") and value.dtype.kind != "f":
      misshapen.append(f"{name} {value.dtype} (should be floating-point)")
  take = lambda name: used.add(name) or layouts.from_torch(state[name])
  for (number,) in _numbers(r"(\d+)\.weight$", state):
    if state[f"{number}.weight"].ndim == 4:
      kernel = take(f"{number}.weight")
      before = convs[-1]["kernel"].shape[-1] if convs else kernel.shape[2]
      if kernel.shape[:3] != (3, 3, before):
        shape = tuple(state[f"{number}.weight"].shape)
        misshapen.append(f"{number}.weight {shape} (should be (any, {before}, 3, 3))")
      convs.append({"kernel": kernel, "bias": np.zeros(kernel.shape[-1], np.float32)})
      if f"{number}.bias" in state:
        convs[-1]["bias"] = take(f"{number}.bias")
    elif convs:
      names = ("weight", "bias", "running_mean", "running_var")
      missing = [f"{number}.{n}" for n in names if f"{number}.{n}" not in state]
      if missing:
        raise errors.UsageError(f"{what} does not fit: missing {', '.join(missing)}")
      scale, bias, mean, var = (take(f"{number}.{n}") for n in names)
      folded = folding.fold_conv(
        convs[-1], {"scale": scale, "bias": bias}, {"mean": mean, "var": var}, epsilon
      )
      convs[-1] = jax.tree.map(np.asarray, folded)
  unused = [
    name for name in state if name not in used and not name.endswith("batches_tracked")
  ]
  if misshapen or unused or len(convs) < 2:
    problems = [f"unexpected {', '.join(unused)}"] if unused else []
    problems += [f"misshapen {', '.join(misshapen)}"] if misshapen else []
    problems += ["fewer than two convolutions"] if len(convs) < 2 else []
    raise errors.UsageError(f"{what} is no DnCNN: {'; '.join(problems)}")
  params = {f"layer{i}": {"conv": conv} for i, conv in enumerate(convs)}
  config = {
    "depth": len(convs),
    "width": int(convs[0]["kernel"].shape[-1]),
    "channels": int(convs[0]["kernel"].shape[2]),
    "out_channels": int(convs[-1]["kernel"].shape[-1]),
  }
  return Part({"params": params}, config)


def calibration(state: State, what: str) -> Part:
  """Returns the calibration modules that `state` holds, whichever are there."""
  config: dict[str, Any] = {}
  taps = _numbers(r"cnn_layers_(?:weight|bias)\.(\d+)\.(\d+)\.", state)
  groups = {
    "spatial_multiplication": "cnn_layers_weight.",
    "spatial_addition": "cnn_layers_bias.",
    "channel_multiplication": "mul_fc.",
    "channel_concatenation": "cat_fc.",
  }
  for switch, prefix in groups.items():
    config[switch] = any(name.startswith(prefix) for name in state)
  if taps:
    config["num_taps"] = max(tap for tap, _ in taps) + 1
    config["num_convs"] = max(index for _, index in taps) // 2 + 1
    first = next(name for name in sorted(state) if name.startswith("cnn_layers_"))
    prefix = first.split(".")[0]
    config["channels"] = int(_shape(state, f"{prefix}.0.0.weight", what)[0])
  for fc, inputs in (("mul_fc", 1), ("cat_fc", 2)):
    if any(name.startswith(f"{fc}.") for name in state):
      hidden, size = _shape(state, f"{fc}.0.weight", what)
      config["feature_size"] = size // inputs
      config["ratio"] = _ratio(hidden, size // inputs)
  fields = {"feature_size": 2, "num_taps": 1, **config}
  module = calibration_lib.Calibration(**fields)
  size = (8, 8)
  shapes = layouts.variable_shapes(
    module,
    jax.ShapeDtypeStruct((1, module.feature_size), jnp.float32),
    jax.ShapeDtypeStruct((1, *size, 1), jnp.float32),
    tap_sizes=(size,) * module.num_taps,
  )
  return Part(layouts.convert(state, shapes, layouts.CALIBRATION, what), config)


def ensemble(state: State, what: str) -> Part:
  """Returns the ensemble module."""
  size, hidden = _shape(state, "ensemble.2.weight", what)
  config = {"feature_size": size, "ratio": _ratio(hidden, size)}
  feature = jax.ShapeDtypeStruct((1, size), jnp.float32)
  confidence = jax.ShapeDtypeStruct((1, 2, 2, 1), jnp.float32)
  module = calibration_lib.Ensemble(**config)
  shapes = layouts.variable_shapes(module, feature, feature, confidence)
  return Part(layouts.convert(state, shapes, layouts.ENSEMBLE, what), config)


def _ratio(hidden: int, size: int) -> float:
  """Returns a ratio that gives `hidden` back as int(size * ratio)."""
  ratio = hidden / size
  return ratio if int(size * ratio) == hidden else (hidden + 0.5) / size
