"""The networks in a checkpoint, one by one: tensors checked and converted."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fidelity_jax import errors, files, models
from fidelity_jax.models import folding, layers, registry
from fidelity_jax.models.backbone import Layout, State, Table
from fidelity_jax.port import layouts


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


# Numbers as PyTorch writes them: not 01, nor thousands of digits.
_NUMBER = "(0|[1-9][0-9]{0,3})"


def _numbers(pattern: str, state: State) -> list[tuple[int, ...]]:
  matches = (re.match(pattern, name) for name in state)
  return sorted({tuple(int(g) for g in match.groups()) for match in matches if match})


def _shape(state: State, name: str, ndim: int, what: str) -> tuple[int, ...]:
  """Returns a tensor's shape, refusing one that is missing or not of `ndim` axes."""
  if name not in state:
    raise errors.UsageError(f"{what} does not fit: missing {name}")
  shape = tuple(state[name].shape)
  if len(shape) != ndim:
    raise errors.UsageError(
      f"{what} does not fit: misshapen {name} {shape} (should have {ndim} axes)"
    )
  return shape


def image(side: int | None = None) -> jax.ShapeDtypeStruct:
  """Returns the shape of images that tell a classifier's variables.

  Args:
    side: pixels. None: networks that are built in have the same variables at all sizes.
  """
  return jax.ShapeDtypeStruct((1, side or 64, side or 64, 3), jnp.float32)


def head_names(table: Table) -> dict[str, str]:
  """Returns the part of a table that names the head's layers: "logits", "fc1" ..."""
  return {
    ours.removeprefix("head/"): theirs
    for ours, theirs in table
    if ours.startswith("head/")
  }


def network(
  state: State,
  config: Mapping[str, Any],
  layout: Layout,
  transform_input: bool,
  what: str,
  image_size: int | None = None,
) -> dict[str, Part]:
  """Returns {"classifier": ...}, or {"backbone": ...} where there is no head.

  Args:
    state: the network's tensors.
    config: for `models.create`, as `registry.recognize` returns it.
    layout: likewise.
    transform_input: for that field, where the network has it.
    what: names the tensors' origin in errors.
    image_size: of the images that the network is for, pixels; None if any will do.
  """
  config = dict(config)
  if "transform_input" in config:
    config["transform_input"] = transform_input
  state, names = layout.prepare(state), head_names(layout.table)
  if not any(name.rpartition(".")[0] in names.values() for name in state):
    module = models.create(config, 2)
    shapes = layouts.variable_shapes(module, image(image_size), method="features")
    variables = layouts.convert(state, shapes, layout.table, what)
    return {"backbone": Part(variables, {"model": config})}
  num_classes, _ = _shape(state, f"{names['logits']}.weight", 2, what)
  module = models.create(config, num_classes)
  shapes = layouts.variable_shapes(module, image(image_size))
  variables = layouts.convert(state, shapes, layout.table, what)
  return {"classifier": classifier(variables, config, num_classes, image_size)}


def classifier(
  variables: dict[str, Any],
  config: Mapping[str, Any],
  num_classes: int,
  image_size: int | None,
) -> Part:
  """Returns a classifier whose classes have no names yet; arguments as `network`'s."""
  described = {"model": config, "num_classes": num_classes, "class_names": None}
  size = {"image_size": image_size} if image_size else {}
  return Part(variables, described | size)


def head(state: State, what: str) -> Part:
  """Returns fully connected layers alone: variables with the one child `head`.

  Args:
    state: `classifier.weight` and `classifier.bias`, or several layers in the names
      that a backbone's publisher has for them.
    what: names the tensors' origin in errors.
  """
  known = [{"logits": "classifier"}]
  for family in registry.FAMILIES:
    known += [head_names(layout.table) for layout in family.layouts]
  names = max(
    known, key=lambda k: sum(f"{name}.weight" in state for name in k.values())
  )
  sizes = {ours: _shape(state, f"{names[ours]}.weight", 2, what) for ours in names}
  num_classes, features = sizes.pop("logits")
  hidden = [sizes[ours][0] for ours in sorted(sizes)]
  if hidden:
    features = sizes["fc1"][1]
  module = layers.Head(num_classes, tuple(hidden), (0.0,) * (len(hidden) + 1))
  inputs = jax.ShapeDtypeStruct((1, features), jnp.float32)
  params = layouts.variable_shapes(module, inputs)["params"]
  table = [(f"head/{ours}", theirs) for ours, theirs in names.items()]
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
  for (number,) in _numbers(rf"{_NUMBER}\.weight\Z", state):
    if state[f"{number}.weight"].ndim == 4:
      kernel = take(f"{number}.weight")
      before = convs[-1]["kernel"].shape[-1] if convs else kernel.shape[2]
      if kernel.shape[:3] != (3, 3, before):
        shape = tuple(state[f"{number}.weight"].shape)
        misshapen.append(f"{number}.weight {shape} (should be (any, {before}, 3, 3))")
      convs.append({"kernel": kernel, "bias": np.zeros(kernel.shape[-1], np.float32)})
      if f"{number}.bias" in state:
        convs[-1]["bias"] = take(f"{number}.bias")
        if convs[-1]["bias"].shape != kernel.shape[-1:]:
          misshapen.append(f"{number}.bias (should be {kernel.shape[-1:]})")
    elif convs:
      names = ("weight", "bias", "running_mean", "running_var")
      missing = [f"{number}.{n}" for n in names if f"{number}.{n}" not in state]
      if missing:
        raise errors.UsageError(f"{what} does not fit: missing {', '.join(missing)}")
      scale, bias, mean, var = vectors = [take(f"{number}.{n}") for n in names]
      if any(vector.shape != convs[-1]["bias"].shape for vector in vectors):
        misshapen.append(f"{number}.* (should be {convs[-1]['bias'].shape})")
        continue
      folded = folding.fold_conv(
        convs[-1], {"scale": scale, "bias": bias}, {"mean": mean, "var": var}, epsilon
      )
      convs[-1] = jax.tree.map(np.asarray, folded)
  unused = [
    name for name in state if name not in used and not name.endswith("batches_tracked")
  ]
  if misshapen or unused or len(convs) < 2:
    problems = [layouts.listing("unexpected", unused)] if unused else []
    problems += [layouts.listing("misshapen", misshapen)] if misshapen else []
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
  taps = _numbers(rf"cnn_layers_(?:weight|bias)\.{_NUMBER}\.{_NUMBER}\.", state)
  groups = {
    "spatial_multiplication": "cnn_layers_weight.",
    "spatial_addition": "cnn_layers_bias.",
    "channel_multiplication": "mul_fc.",
    "channel_concatenation": "cat_fc.",
  }
  for switch, prefix in groups.items():
    config[switch] = any(name.startswith(prefix) for name in state)
  if taps:
    config["num_taps"] = len({tap for tap, _ in taps})
    config["num_convs"] = len({index for _, index in taps})
    if not 2 <= config["num_convs"] <= layouts.MAX_CONVS:
      raise errors.UsageError(
        f"{what} does not fit: its calibration stacks have {config['num_convs']} "
        f"convolutions (should be 2 to {layouts.MAX_CONVS})"
      )
    first = next(name for name in sorted(state) if name.startswith("cnn_layers_"))
    prefix = first.split(".")[0]
    config["channels"] = _shape(state, f"{prefix}.0.0.weight", 4, what)[0]
  for fc, inputs in (("mul_fc", 1), ("cat_fc", 2)):
    if any(name.startswith(f"{fc}.") for name in state):
      hidden, size = _shape(state, f"{fc}.0.weight", 2, what)
      config["feature_size"] = size // inputs
      config["ratio"] = _ratio(hidden, size // inputs, what)
  fields = {"feature_size": 2, "num_taps": 1, **config}
  module = models.Calibration(**fields)
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
  size, hidden = _shape(state, "ensemble.2.weight", 2, what)
  config = {"feature_size": size, "ratio": _ratio(hidden, size, what)}
  feature = jax.ShapeDtypeStruct((1, size), jnp.float32)
  confidence = jax.ShapeDtypeStruct((1, 2, 2, 1), jnp.float32)
  module = models.Ensemble(**config)
  shapes = layouts.variable_shapes(module, feature, feature, confidence)
  return Part(layouts.convert(state, shapes, layouts.ENSEMBLE, what), config)


def _ratio(hidden: int, size: int, what: str) -> float:
  """Returns a ratio that gives `hidden` back as int(size * ratio)."""
  if size < 2:
    raise errors.UsageError(
      f"{what} does not fit: its fully connected layers are for a feature of {size} "
      "(should be at least 2)"
    )
  ratio = hidden / size
  return ratio if int(size * ratio) == hidden else (hidden + 0.5) / size


def name_classes(
  parts: Mapping[str, Part], class_names: pathlib.Path, where: pathlib.Path
) -> None:
  """Gives a classifier, or a head, the names of its classes.

  Args:
    parts: a checkpoint's.
    class_names: a text file with one class name a line, in the order of the logits.
      Surrounding space and empty lines do not count.
    where: where the parts came from, for errors.

  Raises:
    errors.UsageError: the file cannot be read, there is no such part, or it has another
      number of classes.
  """
  try:
    lines = files.read_bytes(class_names).decode("utf-8").splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise errors.UsageError(
      f"cannot read class names from {class_names}: {error}"
    ) from error
  names = [line.strip() for line in lines if line.strip()]
  part = parts.get("classifier") or parts.get("head")
  if part is None:
    raise errors.UsageError(f"{class_names} names classes, but {where} has no head")
  if len(names) != part.config["num_classes"]:
    raise errors.UsageError(
      f"{class_names} names {len(names)} classes, but {where} has "
      f"{part.config['num_classes']}"
    )
  part.config["class_names"] = names
