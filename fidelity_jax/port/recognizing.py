"""From tensors by name to the networks that they make up."""

from collections.abc import Mapping
from typing import Any

from flax import traverse_util

from fidelity_jax import errors, models
from fidelity_jax.models import registry, users
from fidelity_jax.models.backbone import State
from fidelity_jax.models.classifier import AUXILIARY
from fidelity_jax.port import layouts, parts
from fidelity_jax.port.parts import Part

# The prefixes of the FG-NIC authors' checkpoints.
_CALIBRATION = ("cnn_layers_weight.", "cnn_layers_bias.", "mul_fc.", "cat_fc.")
_FGNIC = (
  "restoration.",
  "fidelity.",
  "feature_extractor.",
  "ensemble.",
  *_CALIBRATION,
)


def recognize(
  state: State,
  where: str,
  transform_input: bool = True,
  model: Mapping[str, Any] | None = None,
  image_size: int | None = None,
) -> dict[str, Part]:
  """Returns the networks that a checkpoint's tensors make up.

  Args:
    state: tensors by name, in PyTorch's layout, in any form of docs/weights.md.
    where: where they came from, for errors.
    transform_input: whether a GoogLeNet expects its input re-scaled, as torchvision's
      ImageNet weights and all networks fine-tuned from them do. Tensors do not tell.
    model: the network that is expected, see `port.load`.
    image_size: likewise.

  Returns:
    Parts by name: "classifier" (or "backbone" or "head", where there is only that),
    "restorer", "estimator", "calibration", "ensemble"; "dncnn" is a denoiser alone,
    which can serve as restorer or estimator.

  Raises:
    errors.UsageError: they are not recognized, have no numbers, or do not fit what they
      look like; missing, unexpected and misshapen tensors are named.
  """
  empty = sorted(f"{name:.60} {v.shape}" for name, v in state.items() if 0 in v.shape)
  if empty:
    raise errors.UsageError(
      f"{where} does not fit: {layouts.listing('without numbers are', empty)}"
    )
  if model is not None and registry.code(model.get("name")):
    with users.explained(model["name"]):
      return _own(state, where, transform_input, model, image_size)
  if any(name.startswith(_FGNIC) for name in state) or set(state) == {
    "classifier.weight",
    "classifier.bias",
  }:
    return _fgnic(state, where, transform_input)
  for prefix in ("model.", "dncnn."):
    if f"{prefix}0.weight" in state:
      others = sorted(name for name in state if not name.startswith(prefix))
      if others:
        raise errors.UsageError(
          f"{where} looks like a DnCNN, but does not fit: "
          f"{layouts.listing('unexpected', others)}"
        )
      return {"dncnn": parts.dncnn(_below(prefix, state), f"{where}: {prefix}*")}
  found = registry.recognize(state)
  if found is None:
    raise errors.UsageError(
      f"{where} is not recognized: it holds tensors "
      f"{layouts.listing('such as', sorted(state), 4)}; known are "
      f"{', '.join(registry.NAMES)} in their publishers' names, FG-NIC's checkpoints, "
      "and DnCNN"
    )
  config, layout = found
  what = f"{where}, which looks like {config['name']},"
  return parts.network(state, config, layout, transform_input, what)


def _own(
  state: State,
  where: str,
  transform_input: bool,
  model: Mapping[str, Any],
  image_size: int | None,
) -> dict[str, Part]:
  """Returns a network of the user's own, from tensors in our names or its publisher's.

  Raises:
    errors.UsageError: they are in neither, or do not fit.
  """
  config, name = registry.complete(model), model["name"]
  what = f"{where}, as weights of {name},"
  if all(path.startswith(("params/", "batch_stats/")) for path in state):
    bias = state.get("params/head/logits/bias")
    if bias is None:
      raise errors.UsageError(
        f"{what} is no classifier: it has no head, params/head/logits/bias"
      )
    module = models.create(config, bias.size)
    shapes = layouts.variable_shapes(module, parts.image(image_size))
    wanted = {
      path: leaf.shape
      for path, leaf in traverse_util.flatten_dict(shapes, sep="/").items()
      # These may be left out.
      if path in state or path.split("/")[1] not in AUXILIARY
    }
    layouts.check_fit(state, wanted, what)
    variables = traverse_util.unflatten_dict(dict(state), sep="/")
    return {"classifier": parts.classifier(variables, config, bias.size, image_size)}
  for layout in registry.layouts(name):
    known = layout.recognize(state)
    if known is None:
      continue
    if "logits" not in parts.head_names(layout.table):
      raise errors.UsageError(
        f"{what} cannot be read: the network's table lacks the head: add "
        '("head/logits", ITS_NAME), written out'
      )
    full = {**config, **known, "name": name}
    return parts.network(state, full, layout, transform_input, what, image_size)
  raise errors.UsageError(
    f"{what} holds tensors {layouts.listing('such as', sorted(state), 4)}, which the "
    "network does not know: give its class a table of these names, or name a directory "
    "that `fidelity_jax export` wrote."
  )


def _below(prefix: str, state: State) -> State:
  return {
    name.removeprefix(prefix): value
    for name, value in state.items()
    if name.startswith(prefix)
  }


def _fgnic(state: State, where: str, transform_input: bool) -> dict[str, Part]:
  """Returns the parts of a checkpoint of FG-NIC's released code, or of a piece."""
  result = {}
  for prefix, part in (("restoration.", "restorer"), ("fidelity.", "estimator")):
    tensors = _below(prefix, state)
    if tensors:
      stack = _below("model.", tensors)
      others = sorted(
        f"{prefix}{name}" for name in tensors if not name.startswith("model.")
      )
      if others:
        raise errors.UsageError(
          f"{where}: {prefix}* is no DnCNN: {layouts.listing('unexpected', others)}"
        )
      result[part] = parts.dncnn(stack, f"{where}: {prefix}model.*")
  features = _below("feature_extractor.", state)
  head = {k: v for k, v in state.items() if k.startswith("classifier.")}
  if features:
    found = registry.recognize(features)
    if found is None:
      raise errors.UsageError(
        f"{where}: feature_extractor.* is not recognized: it holds tensors "
        f"{layouts.listing('such as', sorted(features), 4)}"
      )
    config, layout = found
    if "classifier.weight" in head:
      logits = dict(layout.table)["head/logits"]
      head = {f"{logits}.{k.removeprefix('classifier.')}": v for k, v in head.items()}
    what = f"{where}: feature_extractor.* and classifier.* of {config['name']}"
    whole = {**features, **head}
    result |= parts.network(whole, config, layout, transform_input, what)
  elif head:
    result["head"] = parts.head(head, f"{where}: classifier.*")
  calibration = {k: v for k, v in state.items() if k.startswith(_CALIBRATION)}
  if calibration:
    result["calibration"] = parts.calibration(calibration, where)
  ensemble = {k: v for k, v in state.items() if k.startswith("ensemble.")}
  if ensemble:
    result["ensemble"] = parts.ensemble(ensemble, where)
  known = (*_FGNIC, "classifier.")
  unknown = sorted(name for name in state if not name.startswith(known))
  if unknown:
    raise errors.UsageError(
      f"{where} looks like an FG-NIC checkpoint, but does not fit: "
      f"{layouts.listing('unexpected', unknown)}"
    )
  return result
