"""Pretrained variables into a network with its own head."""

from collections.abc import Mapping
from typing import Any

from flax import traverse_util

from fidelity_jax import errors
from fidelity_jax.models.classifier import AUXILIARY


def transfer(
  fresh: Mapping[str, Any], pretrained: Mapping[str, Any], new_head: bool
) -> dict[str, Any]:
  """Returns a classifier's variables with pretrained values in them.

  Args:
    fresh: the classifier's variables as `init` gives them; they say what there has to
      be, and fill what is not taken over.
    pretrained: variables of the same network, possibly for another number of classes,
      without auxiliary heads, or with the backbone alone.
    new_head: whether the last layers (of the head and of the auxiliary heads, all
      called `logits`) stay fresh: for fine-tuning on other classes. A frozen network
      needs new_head=False. Auxiliary heads that `pretrained` lacks stay fresh; so does,
      with new_head, a missing head.

  Raises:
    errors.UsageError: the pretrained variables are of another shape, or some are
      missing or left over; they are named.
  """
  given = traverse_util.flatten_dict(pretrained)
  wanted = traverse_util.flatten_dict(fresh)
  children = {path[1] for path in given}
  # Auxiliary heads are used in training only and may be missing.
  problems = [
    f"{'/'.join(path)} has no place in it"
    for path in given.keys() - wanted.keys()
    if path[1] not in AUXILIARY
  ]
  problems.sort()
  result = {}
  for path, value in wanted.items():
    child, layer = path[1], path[-2]
    absent = child not in children
    if new_head and (layer == "logits" or (absent and child == "head")):
      result[path] = value
    elif absent and child in AUXILIARY:
      result[path] = value
    elif path not in given:
      problems.append(f"{'/'.join(path)} is missing")
    elif given[path].shape != value.shape:
      shapes = f"{tuple(given[path].shape)}, not {tuple(value.shape)}"
      problems.append(f"{'/'.join(path)} is {shapes}")
    else:
      result[path] = given[path]
  if problems:
    more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
    raise errors.UsageError(
      f"the pretrained weights do not fit the network: {', '.join(problems[:8])}{more}"
    )
  return traverse_util.unflatten_dict(result)
