"""What a config's fields may hold: small rules, composed into declared tables."""

import numbers
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from fidelity_jax import errors


class Rule(NamedTuple):
  """What a field may hold.

  Attributes:
    meaning: in words that follow "must be".
    holds: whether a value may stand in the field.
    choices: names that may stand there, if it is one of a list.
  """

  meaning: str
  holds: Callable[[Any], bool]
  choices: tuple[str, ...] = ()


# Field name to its rule, or to the table of the fields below it.
Table = Mapping[str, "Rule | Table"]

FLAG = Rule("True or False", lambda v: isinstance(v, bool))
ANYTHING = Rule("anything", lambda v: True)
TEXT = Rule("a text", lambda v: isinstance(v, str))
NAME = Rule("a text that is not empty", lambda v: isinstance(v, str) and v != "")
SHARE = Rule("a number from 0 to 1", lambda v: is_a(v, numbers.Real) and 0 <= v <= 1)
SMOOTHING = Rule("a number in [0, 1)", lambda v: is_a(v, numbers.Real) and 0 <= v < 1)


def whole(least: int, most: int) -> Rule:
  """A whole number from `least` to `most`."""
  return Rule(
    f"a whole number from {least} to {most}",
    lambda v: is_a(v, numbers.Integral) and least <= v <= most,
  )


def number(above: float, most: float) -> Rule:
  """A number above `above` and up to `most`."""
  return Rule(
    f"a number above {above:g}, at most {most:g}",
    lambda v: is_a(v, numbers.Real) and above < v <= most,
  )


def choice(*names: str) -> Rule:
  """One of some names."""
  known = ", ".join(map(repr, names))
  return Rule(f"one of {known}", lambda v: isinstance(v, str) and v in names, names)


def optional(rule: Rule) -> Rule:
  """None, or what another rule says."""
  return Rule(
    f"None or {rule.meaning}", lambda v: v is None or rule.holds(v), rule.choices
  )


def several(rule: Rule, least: int, most: int) -> Rule:
  """A tuple or list of `least` to `most` members of which a rule holds."""
  count = f"{least}" if least == most else f"{least} to {most}"
  return Rule(
    f"{count} values in brackets, each {rule.meaning}",
    lambda v: (
      isinstance(v, tuple | list)
      and least <= len(v) <= most
      and all(rule.holds(item) for item in v)
    ),
  )


def span(most: float) -> Rule:
  """A range (low, high) of numbers, 0 < low <= high <= most."""
  bound = several(number(0, most), 2, 2)
  return Rule(
    f"a range (low, high) with 0 < low <= high <= {most:g}",
    lambda v: bound.holds(v) and v[0] <= v[1],
  )


def is_a(value: Any, kind: type) -> bool:
  """Returns whether a value is of a kind of number; True and False are of none."""
  return isinstance(value, kind) and not isinstance(value, bool)


def check(config: ConfigDict, table: Table, where: str) -> None:
  """Checks that a config has the fields of a table and each holds what it may.

  Args:
    config: the config or a part of it.
    table: its fields.
    where: its path, for messages.

  Raises:
    UsageError: a field is missing, unknown, or holds something else.
  """
  if not isinstance(config, ConfigDict):
    raise errors.UsageError(
      f"{where} = {config!r} must be a ConfigDict with the fields {', '.join(table)}."
    )
  for name in config:
    if name not in table:
      raise errors.UsageError(
        f"{where}.{name}: there is no such field; {errors.near(name, table)}"
      )
  for name, rule in table.items():
    if name not in config:
      raise errors.UsageError(
        f"{where}.{name} is missing: copy it from a config in configs/."
      )
    value = config[name]
    if not isinstance(rule, Rule):
      check(value, rule, f"{where}.{name}")
    elif not rule.holds(value):
      near = errors.near(value, rule.choices) if rule.choices else ""
      hint = f"; {near}" if near.startswith("did") else ""
      raise refusal(where, name, value, f"must be {rule.meaning}{hint}")


def refusal(where: str, path: str, value: Any, rule: str) -> errors.UsageError:
  """Returns the error that a field's value is not possible."""
  shown = repr(value)
  shown = shown if len(shown) <= 80 else f"{shown[:80]}..."
  return errors.UsageError(f"{where}.{path} = {shown} {rule}.")
