"""Networks that are in a file of the user's own: "my_module:MyNet".

docs/own_backbone.md says what such a network has to be.
"""

import collections.abc
import contextlib
import dataclasses
import functools
import importlib.machinery
import importlib.util
import inspect
import numbers
import os
import pathlib
import re
import sys
import time
import traceback
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from fidelity_jax import errors, files, rules
from fidelity_jax.models import folding, layers
from fidelity_jax.models.backbone import Backbone, Family, Field, Layout
from fidelity_jax.models.classifier import AUXILIARY, Classifier

_NAME = re.compile(r"(?P<module>[^\W\d]\w*(?:\.[^\W\d]\w*)*):(?P<attribute>[^\W\d]\w*)")
# Directories that modules are looked for in after the current one and those of
# `sys.path`: where the config is that the command was given.
PLACES: list[str] = []
# SHA-256 of the files of modules as `find` imported them.
_CODES: dict[str, str] = {}
# Networks import this module: what they are made of was read at about this time, or
# later.
_BEGUN = time.time()
# What a config calls otherwise, and what all networks have.
_NOT_FIELDS = ("parent", "name", "dtype")
_TAKEN = ("weights", "new_head", "code")
_PACKAGE = __name__.partition(".")[0]
# What a field of a class may hold, by its type.
_FIELDS = {
  bool: Field(bool, rules.FLAG),
  int: Field(
    int, rules.Rule("a whole number", lambda v: rules.is_a(v, numbers.Integral))
  ),
  float: Field(float, rules.Rule("a number", lambda v: rules.is_a(v, numbers.Real))),
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
    auxiliary: whether it may return inputs of auxiliary heads.
  """

  family: Family
  file: pathlib.Path
  code: str
  auxiliary: bool


def is_name(name: Any) -> bool:
  """Returns whether this is written as "module:Network"."""
  return isinstance(name, str) and _NAME.fullmatch(name) is not None


@functools.cache
def find(name: str) -> Own:
  """Returns the network that a user's module has, imported once a process.

  Args:
    name: "my_module:MyNet", a subclass of `Backbone`, or a `Family` of one variant. The
      module is looked for in the current directory, `sys.path` and `PLACES`.

  Raises:
    errors.UsageError: there is no such module, it cannot be imported, it was edited
      after that, or what it has is no such network.
  """
  match = _NAME.fullmatch(name)
  known = match["module"] in sys.modules
  module = _imported(name, match["module"])
  if getattr(module, "__file__", None) is None:
    raise errors.UsageError(
      f"model.name: {name!r} is in no file: write the class into one, such as "
      "my_module.py."
    )
  file = pathlib.Path(module.__file__)
  with errors.while_doing(f"reading {file}"):
    code, late = files.sha256(file), file.stat().st_mtime > _BEGUN
  imported = _CODES.get(match["module"], None if late else code)
  if known and imported != code:
    raise errors.UsageError(
      f"model.name: {file} was written after this process began, and perhaps after it "
      f"imported {match['module']}: start Python again."
    )
  _CODES[match["module"]] = code
  made = getattr(module, match["attribute"], None)
  if made is None:
    there = [k for k, v in vars(module).items() if _is_backbone(v) and v != Backbone]
    raise errors.UsageError(
      f"model.name: {file} has no {match['attribute']}; "
      f"{errors.near(match['attribute'], there)}"
    )
  if not isinstance(made, Family) and not _is_backbone(made):
    raise errors.UsageError(
      f"model.name: {name!r} is no Backbone: write class {match['attribute']}"
      "(fidelity_jax.models.Backbone)."
    )
  defined = made.build if isinstance(made, Family) else made
  named = inspect.isfunction(defined) or inspect.isclass(defined)
  home = defined.__module__ if named else match["module"]
  # The package's own networks change with its version, like everything in it.
  if home != match["module"] and not home.startswith(f"{_PACKAGE}."):
    raise errors.UsageError(
      f"model.name: {name!r} is defined in the module {home}, and not in {file}: write "
      f"'{home}:{match['attribute']}'."
    )
  if isinstance(made, Family):
    if len(made.variants) != 1:
      raise errors.UsageError(
        f"model.name: {name!r} is a Family of {len(made.variants)} variants: make one "
        "of each, with one variant."
      )
    (fields,) = made.variants.values()
    return Own(dataclasses.replace(made, variants={name: fields}), file, code, True)
  return Own(_family(name, made, file), file, code, False)


def _is_backbone(value: Any) -> bool:
  return inspect.isclass(value) and issubclass(value, Backbone)


def compare(name: str, code: str | None) -> None:
  """Checks that a network's file is a certain one, before its module is imported.

  Args:
    name: as for `find`.
    code: the SHA-256 that the file has to have; None, of a description that says none,
      is refused.

  Raises:
    errors.UsageError: it is another file, or there is none.
  """
  module = _NAME.fullmatch(name)["module"]
  if code is None:
    raise errors.UsageError(
      f"model.name: what describes {name!r} is without the SHA-256 of its file (code), "
      "so that the file is not run: train, export or port it again."
    )
  if module in sys.modules:
    file, now = find(name).file, find(name).code
  else:
    file = _located(module)
    if file is None:
      raise _absent(name, module)
    with errors.while_doing(f"reading {file}"):
      now = files.sha256(file)
  if now != code:
    raise errors.UsageError(
      f"model.name: {file} is not the file that {name!r} was trained from (its SHA-256 "
      f"begins {now[:8]}, not {code!s:.8}): bring that one back, or train again."
    )


@contextlib.contextmanager
def _searching() -> Iterator[None]:
  """Lets modules be found where those of users are."""
  before = list(sys.path)
  sys.path[:] = [os.getcwd(), *before, *PLACES]
  importlib.invalidate_caches()
  try:
    yield
  finally:
    sys.path[:] = before


def _located(module: str) -> pathlib.Path | None:
  """Returns the file that importing a module would run, None if there is none.

  Nothing is imported, nor are the packages that the module is in.
  """
  top, *further = module.split(".")
  with _searching():
    try:
      spec = importlib.util.find_spec(top)
      for part in further:
        inside = spec and spec.submodule_search_locations
        top = f"{top}.{part}"
        spec = importlib.machinery.PathFinder.find_spec(top, inside) if inside else None
    except (ImportError, ValueError):  # A module that says nothing of itself.
      spec = None
  return pathlib.Path(spec.origin) if spec and spec.has_location else None


def _absent(name: str, module: str) -> errors.UsageError:
  return errors.UsageError(
    f"model.name: there is no module {module!r} for {name!r} in "
    f"{', '.join(dict.fromkeys([os.getcwd(), *PLACES]))} or PYTHONPATH: run the "
    f"command where {module.partition('.')[0]}.py is, or set PYTHONPATH to its "
    "directory."
  )


def _imported(name: str, module: str) -> types.ModuleType:
  try:
    with _searching():
      return importlib.import_module(module)
  except ModuleNotFoundError as error:
    if error.name and f"{module}.".startswith(f"{error.name}."):
      raise _absent(name, error.name) from error
    raise _failed(name, error) from error
  except (Exception, SystemExit) as error:  # Modules are programs.
    if isinstance(error, Exception) and errors.circumstance(error):
      raise
    raise _failed(name, error) from error


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


def explained(name: str) -> contextlib.AbstractContextManager[None]:
  """Turns what the code of a network raises into one line that says where.

  Raises:
    errors.UsageError: see `find`; in the place of an error.
  """
  return _explained(name, find(name).file)


@contextlib.contextmanager
def _explained(name: str, file: pathlib.Path) -> Iterator[None]:
  try:
    yield
  except (errors.UsageError, errors.RunError):
    raise
  except Exception as error:  # It is a program.
    if errors.circumstance(error):
      raise
    raise _failed(name, error, file) from error


def check(name: str, network: Classifier, side: int) -> None:
  """Checks that a network is what it says of itself, without computing anything.

  Args:
    name: the network's.
    network: as `models.create` makes it.
    side: of the images, pixels.

  Raises:
    errors.UsageError: its code fails, `num_taps` or `feature_size` is not true, it does
      not train, its batch norms cannot be folded, or a field cannot be hashed.
  """
  try:
    hash(network)
  except TypeError as error:
    raise errors.UsageError(
      f"model.name: a field of {name} cannot be hashed ({error}), as JAX needs: hold "
      "it as a tuple, or as a flax.core.FrozenDict."
    ) from error
  _check(name, network, side)


@functools.lru_cache(maxsize=64)
def _check(name: str, network: Classifier, side: int) -> None:
  backbone, own = network.backbone, find(name)
  file = own.file
  for needed, least in (("num_taps", 1), ("feature_size", 2)):
    with _explained(name, file):
      value = getattr(backbone, needed)
    if not rules.is_a(value, numbers.Integral) or value < least:
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
    paired = isinstance(shapes, tuple) and len(shapes) == 2
    if shapes != (wanted, ()) and not (
      own.auxiliary and paired and shapes[0] == wanted
    ):
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

  epsilons: dict[str, float] = {}

  def note(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext):
    module = context.module
    # What folding takes for one, see `folding`.
    if module.name == "bn" and module.path[0] not in AUXILIARY:
      epsilons["/".join(module.path)] = getattr(module, "epsilon", network.epsilon)
    return call(*args, **kwargs)

  with _explained(name, find(name).file):
    frozen = variables(network.folded())
    with nn.intercept_methods(note):
      whole = variables(network)
  for path, epsilon in epsilons.items():
    if epsilon != network.epsilon:
      raise errors.UsageError(
        f"model.name: the batch norm {path} of {name} has epsilon {epsilon}, and the "
        f"class {network.epsilon}, which it is folded with: write epsilon: "
        f"ClassVar[float] = {epsilon} into the class, and give all its batch norms "
        "that."
      )
  try:
    left = names(jax.eval_shape(lambda given: folding.fold(network, given)[1], whole))
  except (KeyError, TypeError, ValueError):  # A batch norm without its convolution.
    left = {}
  differing = sorted(names(frozen).items() ^ left.items())
  if differing:
    raise errors.UsageError(
      f"model.name: the folded network of {name} has other variables than folding "
      f"leaves, such as {differing[0][0]}: make batch norms by layers.ConvNorm(..., "
      "norm=self.norm) with a field norm, and let folded() return "
      "self.clone(norm=False)."
    )
