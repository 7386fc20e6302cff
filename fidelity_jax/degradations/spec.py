"""Degradations named as data: from a config's fields to a Degradation, or one line."""

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from fidelity_jax.degradations.degradation import Degradation, Step
from fidelity_jax.degradations.kinds import KINDS, Kind
from fidelity_jax.errors import UsageError, near

Spec = str | Mapping[str, Any] | ml_collections.ConfigDict | Sequence[Any]

_MAPPINGS = (Mapping, ml_collections.ConfigDict)
_VARY = ("1d", "2d")
_MIXTURES = ("discrete", "continuous")
_FIELDS = ("kind", "level", "vary", "mixture", "orientation", "kernel_size")
_DEFAULT_ORIENTATION = 45.0
_DEFAULT_KERNEL_SIZE = 13


def from_config(spec: Spec) -> Degradation:
  """Builds the degradation that a config names.

  Args:
    spec: a mapping or ConfigDict with the fields below, a kind's name alone, or a list
      or tuple of such, applied in order. Fields that are None count as absent.
      kind: clean, awgn, salt_and_pepper, gaussian_blur, motion_blur, rectangular_crop;
        "gaussian_blur+awgn" is the sequence of both with their default levels, which
        the command line can write.
      level: a number: the same level everywhere; a list: each example draws one of
        these; a tuple (lo, hi): each example draws from the range. With `vary` the two
        ends (a, b), as a list or a tuple. None: the kind's default levels as a list;
        with "continuous" their range; with `vary` (harshest, none).
      vary: "1d" or "2d": the level varies over the image; None: it does not.
      mixture: "discrete" or "continuous" overrules list and tuple, which JSON and the
        command line cannot tell apart. It only says how to read several levels that do
        not vary over the image: with one level, or with `vary`, it has no effect, so
        that configs can carry a default.
      orientation: motion blur only, degrees clockwise from the horizontal, default 45.
      kernel_size: Gaussian blur only, odd, default 13.

  Returns:
    The Degradation; equal specs give equal (and equally hashed) degradations.

  Raises:
    UsageError: the spec is impossible; one line says what and what to write instead.
  """
  return Degradation(tuple(_step(member) for member in members(spec)))


def members(spec: Spec) -> list[dict[str, Any]]:
  """Returns a spec's members as plain dicts without the fields that are None."""
  if isinstance(spec, list | tuple):
    if not spec:
      raise UsageError(
        "degradation: an empty sequence; write {'kind': 'clean'} for none"
      )
    return [_fields_of(member) for member in spec]
  return _expand(spec)


def _expand(spec: Any) -> list[dict[str, Any]]:
  """Returns the members of a mapping or name, whose kind may be "a+b"."""
  spec = {"kind": spec} if isinstance(spec, str) else spec
  joined = spec.get("kind") if isinstance(spec, _MAPPINGS) else None
  if not (isinstance(joined, str) and "+" in joined):
    return [_fields_of(spec)]
  shared = {k: v for k, v in spec.items() if k != "kind" and v is not None}
  for name in shared.keys() - {"mixture", "vary"}:
    raise UsageError(
      f"degradation: {name} cannot be set for the sequence {joined!r}, whose members "
      "have levels of their own; write a list of mappings in a config file"
    )
  return [_fields_of({"kind": kind, **shared}) for kind in joined.split("+")]


def _fields_of(spec: Any) -> dict[str, Any]:
  if isinstance(spec, str):
    spec = {"kind": spec}
  if not isinstance(spec, _MAPPINGS):
    raise UsageError(
      f"degradation: {spec!r} is not a degradation; write a mapping such as "
      "{'kind': 'awgn', 'level': 0.1}, or a list of them"
    )
  fields = {name: value for name, value in spec.items() if value is not None}
  for name in fields:
    if name not in _FIELDS:
      raise UsageError(f"degradation: unknown field {name!r}; {near(name, _FIELDS)}")
  if "kind" not in fields:
    raise UsageError(f"degradation: no kind given; choose one of {', '.join(KINDS)}")
  kind = fields["kind"]
  if not isinstance(kind, str) or kind not in KINDS:
    raise UsageError(f"degradation: unknown kind {kind!r}; {near(kind, KINDS)}")
  return fields


def _step(fields: dict[str, Any]) -> Step:
  name = fields["kind"]
  kind = KINDS[name]
  vary, mixture = fields.get("vary"), fields.get("mixture")
  _check_choice(name, "vary", vary, _VARY)
  _check_choice(name, "mixture", mixture, _MIXTURES)
  if name == "clean" and vary:
    raise UsageError("clean: nothing can vary; leave vary unset")
  variation, levels = _levels(name, kind, fields.get("level"), vary, mixture)
  options = _options(name, kind, fields, levels)
  if name == "gaussian_blur" and variation == "1d":
    options += (("one_axis", True),)
  return Step(levels, name, variation, options)


def _check_choice(kind: str, field: str, value: Any, choices: Sequence[str]) -> None:
  if value is not None and value not in choices:
    known = " or ".join(repr(c) for c in choices)
    raise UsageError(f"{kind}: {field}={value!r} is unknown; write {known}, or None")


def _levels(
  name: str, kind: Kind, level: Any, vary: str | None, mixture: str | None
) -> tuple[str, tuple[float, ...]]:
  """Returns (variation, levels) of a Step."""
  mildest, harshest = kind.levels[0], kind.levels[-1]
  if level is None:
    if vary:
      return vary, (harshest, mildest)
    if len(kind.levels) == 1:
      return "uniform", kind.levels
    if mixture == "continuous":
      return "continuous", (mildest, harshest)
    return "discrete", kind.levels

  if isinstance(level, numbers.Real) and not isinstance(level, bool):
    if vary:
      raise UsageError(
        f"{name}: vary={vary!r} needs more than the one level {level}; give two ends, "
        "such as level=(a, b)"
      )
    return "uniform", (_check_level(name, kind, level),)

  if not isinstance(level, list | tuple) or not level:
    raise UsageError(
      f"{name}: level={level!r} is no level; write a number, a list of numbers, "
      "a tuple (lo, hi), or None"
    )
  levels = tuple(_check_level(name, kind, value) for value in level)
  continuous = mixture == "continuous" or (mixture is None and isinstance(level, tuple))
  if not vary and not continuous:
    return "discrete", levels
  if len(levels) != 2:
    what = f"vary={vary!r}" if vary else "a continuous mixture"
    raise UsageError(
      f"{name}: {what} takes two levels, not {len(levels)} ({level}); for a draw from "
      "these levels write a list, or mixture='discrete'"
    )
  if vary:
    return vary, levels
  if levels[0] > levels[1]:
    raise UsageError(
      f"{name}: the range {level} is the wrong way round; write "
      f"({level[1]}, {level[0]}), or set vary to let the level vary over the image"
    )
  return "continuous", levels


def _check_level(name: str, kind: Kind, value: Any) -> float:
  what = kind.level_name
  if not isinstance(value, numbers.Real) or isinstance(value, bool):
    raise UsageError(f"{name}: {what} {value!r} is not a number")
  if not math.isfinite(value):
    raise UsageError(f"{name}: {what} {value} is not finite")
  if value < 0:
    raise UsageError(f"{name}: {what} {value} is negative; levels start at 0")
  if kind.largest is not None and value > kind.largest:
    raise UsageError(f"{name}: {what} {value} is above {kind.largest:g}, the largest")
  if kind.odd and value != 0 and value % 2 != 1:
    raise UsageError(
      f"{name}: {what} {value} is not odd; write 1, 3, 5, ... (or 0 for no blur)"
    )
  return float(value)


def _options(
  name: str, kind: Kind, fields: dict[str, Any], levels: tuple[float, ...]
) -> tuple[tuple[str, float], ...]:
  """Checks the kind's own fields and returns its function's static options."""
  for option in ("orientation", "kernel_size"):
    if option in fields and option not in kind.options:
      owner = next(other for other in KINDS if option in KINDS[other].options)
      raise UsageError(f"{name}: {option} belongs to {owner}; leave it unset")
  if "orientation" in kind.options:
    orientation = fields.get("orientation", _DEFAULT_ORIENTATION)
    if not isinstance(orientation, numbers.Real) or not math.isfinite(orientation):
      raise UsageError(f"{name}: orientation {orientation!r} is no angle in degrees")
    longest = max(1, int(max(levels)))
    return (("orientation", float(orientation) % 180), ("max_length", longest))
  if "kernel_size" in kind.options:
    size = fields.get("kernel_size", _DEFAULT_KERNEL_SIZE)
    if not isinstance(size, numbers.Integral) or size < 1 or size % 2 != 1:
      raise UsageError(f"{name}: kernel_size {size!r} is not odd; write 1, 3, ..., 13")
    return (("kernel_size", int(size)),)
  return ()
