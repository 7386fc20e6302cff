"""Networks that are in a file of the user's own: "my_module:MyNet".

docs/own_backbone.md says what such a network has to be.
"""

import collections.abc
import contextlib
import dataclasses
import functools
import importlib
import inspect
import numbers
import os
import pathlib
import re
import sys
import traceback
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util

from fidelity_jax import errors, files, rules
from fidelity_jax.models import folding, layers
from fidelity_jax.models.backbone import Backbone, Family, Field, Layout
from fidelity_jax.models.classifier import Classifier

_NAME = re.compile(r"(?P<module>[^\W\d]\w*(?:\.[^\W\d]\w*)*):(?P<attribute>[^\W\d]\w*)")
# Directories that modules are looked for in after the current one, and before those of
# `sys.path`: where the config is that the command was given.
PLACES: list[str] = []
# What a config calls otherwise, and what all networks have.
_NOT_FIELDS = ("parent", "name", "dtype")
_TAKEN = ("weights", "new_head", "code")
_IS = lambda kind: lambda v: isinstance(v, kind) and not isinstance(v, bool)
# What a field of a class may hold, by its type.
_FIELDS = {
  bool: Field(bool, rules.FLAG),
  int: Field(int, rules.Rule("a whole number", _IS(numbers.Integral))),
  float: Field(float, rules.Rule("a number", _IS(numbers.Real))),
  str: Field(str, rules.TEXT),
  tuple: Field(
    tuple, rules.Rule("values in brackets", lambda v: isinstance(v, tuple | list))
  ),
}


class Own(NamedTuple):
  """A network of a user's own.

  Attributes:
    family: it alone, as its one variant.
    file: where it is.
    code: SHA-256 of that file.
  """

  family: Family
  file: pathlib.Path
  code: str


def is_name(name: Any) -> bool:
  """Returns whether this is written as "module:Network"."""
  return isinstance(name, str) and _NAME.fullmatch(name) is not None


@functools.cache
def find(name: str) -> Own:
  """Returns the network that a user's module has, imported once a process.

  Args:
    name: "my_module:MyNet", a subclass of `Backbone`, or a `Family` of one variant. The
      module is looked for in the current directory, `PLACES` and `sys.path`.

  Raises:
    errors.UsageError: there is no such module, it cannot be imported, or what it has is
      no such network.
  """
  match = _NAME.fullmatch(name)
  module = _imported(name, match["module"])
  if getattr(module, "__file__", None) is None:
    raise errors.UsageError(
      f"model.name: {name!r} is in no file: write the class into one, such as "
      "my_module.py."
    )
  file = pathlib.Path(module.__file__)
  with errors.while_doing(f"reading {file}"):
    code = files.sha256(file)
  made = getattr(module, match["attribute"], None)
  if made is None:
    there = [k for k, v in vars(module).items() if _is_backbone(v) and v != Backbone]
    raise errors.UsageError(
      f"model.name: {file} has no {match['attribute']}; "
      f"{errors.near(match['attribute'], there)}"
    )
  if isinstance(made, Family):
    if len(made.variants) != 1:
      raise errors.UsageError(
        f"model.name: {name!r} is a Family of {len(made.variants)} variants: make one "
        "of each, with one variant."
      )
    (fields,) = made.variants.values()
    return Own(dataclasses.replace(made, variants={name: fields}), file, code)
  if not _is_backbone(made):
    raise errors.UsageError(
      f"model.name: {name!r} is no Backbone: write class {match['attribute']}"
      "(fidelity_jax.models.Backbone)."
    )
  return Own(_family(name, made, file), file, code)


def _is_backbone(value: Any) -> bool:
  return inspect.isclass(value) and issubclass(value, Backbone)


def _imported(name: str, module: str) -> types.ModuleType:
  places = [os.getcwd(), *PLACES]
  before = list(sys.path)
  sys.path[:0] = places
  importlib.invalidate_caches()
  try:
    return importlib.import_module(module)
  except ModuleNotFoundError as error:
    if error.name and f"{module}.".startswith(f"{error.name}."):
      raise errors.UsageError(
        f"model.name: there is no module {error.name!r} for {name!r} in "
        f"{', '.join(dict.fromkeys(places))} or PYTHONPATH: run the command where "
        f"{module.partition('.')[0]}.py is, or set PYTHONPATH to its directory."
      ) from error
    raise _failed(name, error) from error
  except (Exception, SystemExit) as error:  # Modules are programs.
    if isinstance(error, Exception) and errors.circumstance(error):
      raise
    raise _failed(name, error) from error
  finally:
    sys.path[:] = before


def _failed(
  name: str, error: BaseException, file: pathlib.Path | None = None
) -> errors.UsageError:
  """Returns the line that a failure in a user's code ends in.

  Args:
    name: the network's.
    error: what was raised.
    file: the network's; by default the last one outside of the import system.
  """
  where = ""
  if isinstance(error, SyntaxError):
    where = f", {error.filename}, line {error.lineno}"
  else:
    for frame in traceback.extract_tb(error.__traceback__):
      ours = file is None and frame.filename != __file__
      if frame.filename == str(file) or (ours and "importlib" not in frame.filename):
        where = f", {frame.filename}, line {frame.lineno}"
  text = " ".join(f"{type(error).__name__}: {error}".split())
  return errors.UsageError(f"model.name {name}{where}: {text:.300}")


def _family(name: str, cls: type[Backbone], file: pathlib.Path) -> Family:
  """Returns a class, with a head of one layer, as a family."""
  for needed in ("num_taps", "feature_size"):
    if not hasattr(cls, needed):
      what = "taps it has" if needed == "num_taps" else "features it returns"
      raise errors.UsageError(
        f"model.name: {name} has no {needed}: say how many {what}, by a class variable "
        "or a property."
      )
  own = {f.name: f for f in dataclasses.fields(cls) if f.init}
  if "dtype" not in own:
    raise errors.UsageError(
      f"model.name: {name} has no field dtype, what it computes in: write "
      "dtype: Any = jnp.float32"
    )
  for taken in own.keys() & _TAKEN:
    raise errors.UsageError(
      f"model.name: {name} has a field {taken}, which means something else in a "
      "config: call it otherwise."
    )
  try:
    hints = typing.get_type_hints(cls)
  except Exception as error:  # Annotations are programs, too.
    raise _failed(name, error, file) from error
  fields, defaults = {}, {}
  for key, field in own.items():
    kind = _kind(hints.get(key))
    if key in _NOT_FIELDS or kind is None:
      continue
    fields[key] = _FIELDS[kind]
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
      default = field.default_factory()
    defaults[key] = None if default is dataclasses.MISSING else default

  def build(num_classes: int, dtype: Any, **given: Any) -> Classifier:
    given = {key: value for key, value in given.items() if value is not None}
    with _explained(name, file):
      backbone = cls(**given, dtype=dtype)
    return Classifier(backbone, layers.Head(num_classes, dtype=dtype))

  table = getattr(cls, "table", ())
  # The config says which network it is.
  layouts = (Layout(table, lambda state: {}),) if table else ()
  return Family({name: defaults}, build, layouts, fields=fields)


def _kind(hint: Any) -> type | None:
  """Returns the type of a field that configs can set, None of another."""
  options = [hint]
  if typing.get_origin(hint) in (typing.Union, types.UnionType):
    options = [one for one in typing.get_args(hint) if one is not types.NoneType]
  kind = typing.get_origin(options[0]) or options[0]
  if len(options) == 1 and kind in (list, collections.abc.Sequence):
    kind = tuple
  return kind if len(options) == 1 and kind in _FIELDS else None


@contextlib.contextmanager
def _explained(name: str, file: pathlib.Path) -> Iterator[None]:
  """Turns what a user's code raises into one line that says where.

  Raises:
    errors.UsageError: always, in the place of an error.
  """
  try:
    yield
  except (errors.UsageError, errors.RunError):
    raise
  except Exception as error:  # It is a program.
    if errors.circumstance(error):
      raise
    raise _failed(name, error, file) from error


@functools.lru_cache(maxsize=64)
def check(name: str, network: Classifier, side: int) -> None:
  """Checks that a network is what it says of itself, without computing anything.

  Args:
    name: the network's.
    network: as `models.create` makes it.
    side: of the images, pixels.

  Raises:
    errors.UsageError: its code fails, `num_taps` or `feature_size` is not true, it does
      not train, or its batch norms cannot be folded.
  """
  backbone, file = network.backbone, find(name).file
  for needed, least in (("num_taps", 1), ("feature_size", 2)):
    value = getattr(backbone, needed)
    if not _IS(numbers.Integral)(value) or value < least:
      raise errors.UsageError(
        f"model.name: {needed} of {name} is {value!r}; it has to be a whole number of "
        f"at least {least}."
      )
  taps: list[tuple[int, tuple[int, ...]]] = []

  def tap(index: int, feature: jax.Array) -> jax.Array:
    taps.append((index, feature.shape))
    return feature

  key = jax.random.key(0)
  images = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
  train = lambda variables, x: backbone.apply(
    variables, x, train=True, mutable=["batch_stats"], rngs={"dropout": key}
  )[0]
  with _explained(name, file):
    init = lambda x: backbone.init_with_output(key, x, tap=tap)
    output, variables = jax.eval_shape(init, images)
    trained = jax.eval_shape(train, variables, images)
  indices = [index for index, _ in taps]
  if sorted(indices) != list(range(backbone.num_taps)):
    raise errors.UsageError(
      f"model.name: {name} has num_taps {backbone.num_taps}, and calls the taps "
      f"{indices}: call layers.apply_tap once for each of 0 to num_taps - 1."
    )
  for index, shape in taps:
    if len(shape) != 4:
      raise errors.UsageError(
        f"model.name: tap {index} of {name} is given {shape}; it takes [N, h, w, C]."
      )
  wanted = (2, backbone.feature_size)
  for found in (output, trained):
    shapes = jax.tree.map(lambda leaf: leaf.shape, found)
    if shapes != (wanted, ()):
      raise errors.UsageError(
        f"model.name: of 2 images {name} returns arrays of shapes {shapes}; by its "
        f"feature_size they have to be {(wanted, ())}: features, and nothing for "
        "auxiliary heads."
      )
  if others := variables.keys() - {"params", "batch_stats"}:
    raise errors.UsageError(
      f"model.name: {name} has variables of the kind {', '.join(sorted(others))}; a "
      "network has params and batch_stats."
    )
  _check_folding(name, network, images)


def _check_folding(
  name: str, network: Classifier, images: jax.ShapeDtypeStruct
) -> None:
  def variables(module: Any) -> Mapping[str, Any]:
    return jax.eval_shape(lambda x: module.init(jax.random.key(0), x), images)

  def names(tree: Any) -> dict[str, tuple[int, ...]]:
    flat = traverse_util.flatten_dict(tree, sep="/")
    return {path: leaf.shape for path, leaf in flat.items()}

  with _explained(name, find(name).file):
    frozen = variables(network.folded())
  fold = lambda given: folding.fold(network, given)[1]
  left = names(jax.eval_shape(fold, variables(network)))
  differing = sorted(names(frozen).items() ^ left.items())
  if differing:
    raise errors.UsageError(
      f"model.name: the folded network of {name} has other variables than folding "
      f"leaves, such as {differing[0][0]}: make batch norms by layers.ConvNorm(..., "
      "norm=self.norm) with a field norm, and let folded() return "
      "self.clone(norm=False)."
    )
