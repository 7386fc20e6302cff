"""A small machine that reads the pickles of PyTorch's checkpoints.

Python's unpicklers build whatever a pickle names, and allocate whatever sizes it
states. This one's values are numbers, strings, containers and descriptions of tensors;
it has no operation that calls or changes anything else.
"""

import contextlib
import dataclasses
import io
import math
import pathlib
import pickletools
import sys
import types
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from fidelity_jax import errors

# The longest pickle in opcodes, each of which can make an object of 100 bytes. A tensor
# takes about 40 opcodes.
_MAX_STEPS = 2**20
_MAX_ARGUMENTS = 8
_MAX_DIMENSIONS = 32

_DTYPES = {
  **{
    f"torch.{name}": np.dtype(name)
    for name in (
      *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32"),
      *("int64", "float16", "float32", "float64", "complex64", "complex128"),
    )
  },
  **{
    f"torch.{name}": np.dtype(getattr(ml_dtypes, name))
    for name in (
      *("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2"),
      *("float8_e5m2fnuz", "float8_e8m0fnu"),
    )
  },
}
# Quantized storages are known only to name the tensors on them.
_STORAGES = {
  f"{module}.{name}Storage": _DTYPES[f"torch.{dtype}"]
  for module in ("torch", "torch.cuda", "torch.storage")
  for name, dtype in {
    **{"Double": "float64", "Float": "float32", "Half": "float16"},
    **{"BFloat16": "bfloat16", "Long": "int64", "Int": "int32", "Short": "int16"},
    **{"Char": "int8", "Byte": "uint8", "Bool": "bool", "Untyped": "uint8"},
    **{"ComplexDouble": "complex128", "ComplexFloat": "complex64"},
    **{"QInt8": "int8", "QUInt8": "uint8", "QInt32": "int32"},
    **{"QUInt4x2": "uint8", "QUInt2x4": "uint8"},
  }.items()
}


class Refused(Exception):
  """A file that may be whole, but asks for what is not done; says what."""


@contextlib.contextmanager
def naming(path: pathlib.Path) -> Iterator[None]:
  """Turns what is wrong with a file into one line.

  Raises:
    errors.UsageError: for everything but circumstances of the machine.
  """
  try:
    yield
  except errors.UsageError:
    raise
  except Refused as error:
    raise errors.UsageError(
      f"{path} is refused: {error}; save the network's state_dict() instead"
    ) from error
  except (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    NotImplementedError,  # a feature of zip files that zipfile has not
    RuntimeError,  # encrypted
  ) as error:
    raise errors.UsageError(
      f"{path} is damaged ({_one_line(error)}): get the file again"
    ) from error
  except Exception as error:  # A pickle that is none fails in many ways.
    if errors.circumstance(error):
      raise
    raise errors.UsageError(
      f"{path} is no readable PyTorch checkpoint: {_one_line(error)}"
    ) from error


def _one_line(error: Exception) -> str:
  return " ".join(str(error).split())[:300] or type(error).__name__


@dataclasses.dataclass(frozen=True, slots=True)
class Unsupported:
  """A tensor that is no dense array of numbers in a file.

  Attributes:
    kind: what it is instead, such as "sparse".
  """

  kind: str


class _Number(int):
  """A whole number as a dictionary's key.

  Other numbers' hashes are the numbers, so that a pickle could choose keys which all
  collide; those of strings are salted.
  """

  def __hash__(self) -> int:
    return hash(str(int(self)))


class Source(Protocol):
  """The open file that storages are read from; see `pth`.

  Attributes:
    path: of the file, for errors.
    byteorder: of its storages.
  """

  path: pathlib.Path
  byteorder: str

  def hand_out(self, nbytes: int) -> None:
    """Counts the bytes of a tensor that is about to be made."""

  def read(self, storage: "Storage") -> bytes:
    """Returns a storage's bytes, fewer if the file ends early."""


class Storage:
  """The place of raw bytes in a checkpoint, read when they are first asked for."""

  def __init__(self, source: "Source", key: str, dtype: np.dtype, size: int):
    self.source, self.key, self.dtype, self.size = source, key, dtype, size
    self.nbytes = size * dtype.itemsize
    self._data: bytes | None = None

  def data(self) -> bytes:
    if self._data is None:
      self._data = self.source.read(self)
      if len(self._data) != self.nbytes:
        raise EOFError(f"its storage {self.key!r} ends early")
    return self._data


@dataclasses.dataclass(frozen=True, slots=True)
class Tensor:
  """A strided tensor in an open checkpoint.

  Attributes:
    dtype: of the elements; bfloat16 and the 8-bit floats are ml_dtypes'.
    shape: its size.
  """

  dtype: np.dtype
  shape: tuple[int, ...]
  _storage: Storage
  _offset: int  # in elements, as the strides
  _strides: tuple[int, ...]
  _conjugated: bool
  _negated: bool

  def numpy(self) -> np.ndarray:
    """Returns the numbers, where possible a read-only view of what was read.

    Raises:
      errors.UsageError: the file is damaged, or its tensors outgrow it by far.
    """
    source = self._storage.source
    with naming(source.path):
      source.hand_out(math.prod(self.shape) * self.dtype.itemsize)
      if 0 in self.shape:
        return np.empty(self.shape, self.dtype)
      itemsize = self.dtype.itemsize
      strides = [
        stride * itemsize if size > 1 else itemsize
        for size, stride in zip(self.shape, self._strides, strict=True)
      ]
      array = np.ndarray(
        self.shape, self.dtype, self._storage.data(), self._offset * itemsize, strides
      )
      if source.byteorder != sys.byteorder:
        part = itemsize // 2 if self.dtype.kind == "c" else itemsize
        flat = np.ascontiguousarray(array).reshape(-1).view(f"u{part}").byteswap()
        array = flat.view(self.dtype).reshape(self.shape)
      array = array.conj() if self._conjugated else array
      return -array if self._negated else array


def _rebuild_tensor(
  storage: Any,
  offset: Any,
  shape: Any,
  strides: Any,
  dtype: np.dtype | None = None,
  metadata: Any = None,
) -> Tensor | Unsupported:
  """Returns what a pickle describes as a view of a storage.

  Args:
    storage: the storage.
    offset: of the first element, in elements.
    shape: the size.
    strides: in elements.
    dtype: of the elements; None for the storage's.
    metadata: {"conj": True} and {"neg": True} are views that change signs.
  """
  if not isinstance(storage, Storage):
    raise ValueError("a tensor has no storage")
  dtype = storage.dtype if dtype is None else dtype
  metadata = metadata or {}
  if (
    not isinstance(dtype, np.dtype)
    or not isinstance(shape, tuple)
    or not isinstance(strides, tuple)
    or not len(shape) == len(strides) <= _MAX_DIMENSIONS
    or not all(type(n) is int and n >= 0 for n in (offset, *shape, *strides))
    or not isinstance(metadata, dict)
    or not metadata.keys() <= {"conj", "neg"}
  ):
    raise ValueError("a tensor's shape, strides or dtype make no sense")
  # NumPy, too, counts the bytes of an empty array's other dimensions.
  if math.prod(n or 1 for n in shape) * dtype.itemsize >= 2**63:
    raise ValueError("a tensor's shape makes no sense")
  if 0 not in shape:
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if (last + 1) * dtype.itemsize > storage.nbytes:
      raise ValueError("a tensor reaches beyond its storage")
  conjugated, negated = bool(metadata.get("conj")), bool(metadata.get("neg"))
  return Tensor(dtype, shape, storage, offset, strides, conjugated, negated)


def key_of(key: Any) -> str | int | None:
  """Returns a dictionary's key.

  Hashes of tuples take any time, those of floating-point numbers can be made the same,
  and very large integers take long to write out.
  """
  if key is None or type(key) in (str, bool, _Number):
    return key
  # Old optimizers keep their state by the parameters' addresses.
  if type(key) is int and abs(key) < 2**64:
    return _Number(key)
  kind = "a large number" if type(key) is int else f"of type {type(key).__name__}"
  raise Refused(f"it holds a dictionary with a key that is {kind}")


def _dictionary(items: Any = ()) -> dict[str | int | None, Any]:
  pairs = items.items() if isinstance(items, dict) else items
  return {key_of(key): value for key, value in pairs}


def _unsupported(kind: str) -> Callable[..., Unsupported]:
  return lambda *_: Unsupported(kind)


# What a pickle may name: data types, and functions, of these and no others.
_NAMES: Mapping[str, Any] = {
  **_DTYPES,
  **_STORAGES,
  "collections.OrderedDict": _dictionary,
  # Schedules count their milestones so.
  "collections.Counter": _dictionary,
  "torch.Size": lambda sizes: sizes,
  "torch._utils._rebuild_tensor": _rebuild_tensor,
  "torch._utils._rebuild_tensor_v2": (
    lambda storage, offset, shape, strides, grad, hooks, metadata=None: _rebuild_tensor(
      storage, offset, shape, strides, None, metadata
    )
  ),
  "torch._utils._rebuild_tensor_v3": (
    lambda storage, offset, shape, strides, grad, hooks, dtype, metadata=None: (
      _rebuild_tensor(storage, offset, shape, strides, dtype, metadata)
    )
  ),
  "torch._utils._rebuild_parameter": lambda tensor, grad, hooks: tensor,
  "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
  # How TPUs' tensors are written.
  "torch._utils._rebuild_device_tensor_from_cpu_tensor": lambda tensor, *_: tensor,
  "torch._utils._rebuild_sparse_tensor": _unsupported("sparse"),
  "torch._utils._rebuild_qtensor": _unsupported("quantized"),
  "torch._utils._rebuild_nested_tensor": _unsupported("nested"),
  "torch._utils._rebuild_meta_tensor_no_storage": _unsupported("on the device meta"),
  # What the last ones have among their arguments.
  "torch.serialization._get_layout": lambda name: name,
  "torch.per_tensor_affine": "per_tensor_affine",
  "torch.per_channel_affine": "per_channel_affine",
}

# Opcodes that push what follows them in the file, and those that push a constant.
_ARGUMENTS = frozenset(
  "BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE BINUNICODE8 "
  "BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8".split()
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


def unpickle(stream: io.BytesIO, load_storage: Callable[[Any], Storage]) -> Any:
  """Returns what the next pickle of a stream describes.

  Args:
    stream: is left at the pickle's end.
    load_storage: returns the storage that a persistent id means.

  Raises:
    Refused: it names or does more than tensors need.
    ValueError, and other kinds: it is no pickle.
  """
  stack: list[Any] = []
  marks: list[int] = []
  memo: dict[_Number, Any] = {}
  steps = 0

  def take(count: int) -> list[Any]:
    if count > len(stack):
      raise ValueError("its pickle takes values that are not there")
    values = stack[len(stack) - count :]
    del stack[len(stack) - count :]
    return values

  def marked() -> list[Any]:
    return take(len(stack) - marks.pop())

  def top(kind: type) -> Any:
    if type(stack[-1]) is not kind:
      raise ValueError(f"its pickle fills a {type(stack[-1]).__name__}")
    return stack[-1]

  def named(module: Any, attribute: Any) -> Any:
    if type(module) is not str or type(attribute) is not str:
      raise ValueError("its pickle has a name that is no string")
    name = f"{module}.{attribute}"
    if name not in _NAMES:
      raise Refused(
        f"its pickle names {ascii(name)[1:-1]:.100}, which tensors do not need"
      )
    return _NAMES[name]

  for opcode, argument, _ in pickletools.genops(stream):
    steps += 1
    if steps > _MAX_STEPS:
      raise Refused(f"its pickle takes more than {_MAX_STEPS} steps")
    if opcode.name in _ARGUMENTS:
      stack.append(argument)
      continue
    if opcode.name in _CONSTANTS:
      stack.append(_CONSTANTS[opcode.name])
      continue
    match opcode.name:
      case "BINPUT" | "LONG_BINPUT":
        memo[_Number(argument)] = stack[-1]
      case "MEMOIZE":
        memo[_Number(len(memo))] = stack[-1]
      case "BINGET" | "LONG_BINGET":
        stack.append(memo[_Number(argument)])
      case "MARK":
        marks.append(len(stack))
      case "TUPLE":
        stack.append(tuple(marked()))
      case "TUPLE1" | "TUPLE2" | "TUPLE3":
        stack.append(tuple(take(int(opcode.name[-1]))))
      case "REDUCE":
        function, arguments = take(2)
        if not isinstance(function, types.FunctionType):
          raise ValueError(f"its pickle calls a {type(function).__name__}")
        if type(arguments) is not tuple or len(arguments) > _MAX_ARGUMENTS:
          raise ValueError("its pickle calls a function with too much")
        # One container can be an argument any number of times.
        steps += sum(len(x) for x in arguments if isinstance(x, list | tuple | dict))
        stack.append(function(*arguments))
      case "BINPERSID":
        stack.append(load_storage(*take(1)))
      case "GLOBAL":
        stack.append(named(*argument.split(" ", 1)))
      case "STACK_GLOBAL":
        stack.append(named(*take(2)))
      case "BUILD":
        # The attributes of an ordered dictionary: a module's versions.
        take(1)
        top(dict)
      case "EMPTY_DICT":
        stack.append({})
      case "SETITEM":
        key, value = take(2)
        top(dict)[key_of(key)] = value
      case "SETITEMS":
        items = marked()
        pairs = zip(items[::2], items[1::2], strict=True)
        top(dict).update((key_of(key), value) for key, value in pairs)
      case "EMPTY_LIST":
        stack.append([])
      case "APPEND":
        (value,) = take(1)
        top(list).append(value)
      case "APPENDS":
        items = marked()
        top(list).extend(items)
      case "PROTO" | "FRAME":
        pass
      case "STOP":
        return take(1)[0]
      case _:
        raise Refused(f"its pickle has the opcode {opcode.name}, not for tensors")
