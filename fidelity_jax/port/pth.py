"""Reads PyTorch's checkpoint files without PyTorch, and without running their code.

`torch.save` writes a pickle, which says how containers and tensors are built, and raw
storages, of which tensors are views. Since PyTorch 1.6 they are entries of a zip file;
before, they followed each other in one file.

Python's unpicklers build whatever a pickle names, and allocate whatever sizes it
states. Here the pickle is read by a small machine whose values are numbers, strings,
containers and descriptions of tensors; it has no operation that calls or changes
anything else. All sizes are compared with the file before a storage is read.
"""

import abc
import contextlib
import dataclasses
import io
import math
import os
import pathlib
import pickle
import pickletools
import sys
import types
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from fidelity_jax import errors

# The longest pickle, or directory of a zip file, in bytes, and the longest pickle in
# opcodes, each of which can make an object of 100 bytes. A tensor takes about 100 bytes
# and 40 opcodes.
_MAX_DESCRIPTION = 2**23
_MAX_STEPS = 2**20
_MAX_ARGUMENTS = 8
# How much larger than the file its tensors may be: weights hardly compress, and few of
# them are shared.
_MAX_GROWTH = 16
_MAX_DIMENSIONS = 32

_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_PROTOCOL_VERSION = 1001

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


class _Refused(Exception):
  """A file that may be whole, but asks for what is not done; says what."""


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


class _Storage:
  """The place of raw bytes in a checkpoint, read when they are first asked for."""

  def __init__(self, source: "_Source", key: str, dtype: np.dtype, size: int):
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
  _storage: _Storage
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
    with _naming(source.path):
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
  if not isinstance(storage, _Storage):
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


def _key(key: Any) -> str | int | None:
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
  raise _Refused(f"it holds a dictionary with a key that is {kind}")


def _dictionary(items: Any = ()) -> dict[str | int | None, Any]:
  pairs = items.items() if isinstance(items, dict) else items
  return {_key(key): value for key, value in pairs}


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


def _unpickle(stream: io.BytesIO, load_storage: Callable[[Any], _Storage]) -> Any:
  """Returns what the next pickle of a stream describes.

  Args:
    stream: is left at the pickle's end.
    load_storage: returns the storage that a persistent id means.

  Raises:
    _Refused: it names or does more than tensors need.
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
      raise _Refused(
        f"its pickle names {ascii(name)[1:-1]:.100}, which tensors do not need"
      )
    return _NAMES[name]

  for opcode, argument, _ in pickletools.genops(stream):
    steps += 1
    if steps > _MAX_STEPS:
      raise _Refused(f"its pickle takes more than {_MAX_STEPS} steps")
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
        top(dict)[_key(key)] = value
      case "SETITEMS":
        items = marked()
        pairs = zip(items[::2], items[1::2], strict=True)
        top(dict).update((_key(key), value) for key, value in pairs)
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
        raise _Refused(f"its pickle has the opcode {opcode.name}, not for tensors")


class _Source(abc.ABC):
  """An open checkpoint file.

  Attributes:
    path: of the file, for errors.
    content: what its pickle describes.
    byteorder: of its storages.
  """

  path: pathlib.Path
  content: Any
  byteorder: str

  def __init__(self, file: io.BufferedReader, path: pathlib.Path):
    self._file, self.path = file, path
    self._size = os.fstat(file.fileno()).st_size
    self._storages: dict[str, _Storage] = {}
    self._handed_out = 0

  def hand_out(self, nbytes: int) -> None:
    """Counts the bytes of a tensor that is about to be made.

    With strides of 0, a few bytes in the file can stand for any number of them.
    """
    self._handed_out += nbytes
    self._check_growth(self._handed_out)

  def close(self) -> None:
    """Lets go of the storages, of which arrays keep what they view."""
    self.content = None
    self._storages.clear()

  @abc.abstractmethod
  def read(self, storage: _Storage) -> bytes:
    """Returns a storage's bytes, fewer if the file ends early."""

  def _load_storage(self, persistent_id: Any) -> _Storage:
    match persistent_id:
      # The older form has one more, which part of a storage is meant: None for all.
      case ("storage", np.dtype() as dtype, str() as key, _, int() as size, *part) if (
        part in ([], [None]) and 0 <= size < 2**60
      ):
        storage = self._storages.setdefault(key, _Storage(self, key, dtype, size))
        if (storage.dtype, storage.size) == (dtype, size):
          return storage
    raise ValueError("its pickle describes a storage in a way that makes no sense")

  def _check_growth(self, nbytes: int) -> None:
    if nbytes > _MAX_GROWTH * self._size:
      raise _Refused(
        f"its tensors would be more than {_MAX_GROWTH} times as large as the file"
      )


class _Zip(_Source):
  """The form since PyTorch 1.6: FOLDER/data.pkl, and each storage in FOLDER/data/."""

  def __init__(self, file: "_File", path: pathlib.Path):
    super().__init__(file, path)
    file.longest_read = _MAX_DESCRIPTION
    self._archive = zipfile.ZipFile(file)
    file.longest_read = sys.maxsize
    self._entries = {info.filename: info for info in self._archive.infolist()}
    folders = [name[:-8] for name in self._entries if name.endswith("/data.pkl")]
    if len(folders) != 1:
      raise ValueError("it is a zip file without FOLDER/data.pkl, or with several")
    self._folder = folders[0]
    self.byteorder = "little"
    if f"{self._folder}byteorder" in self._entries:
      self.byteorder = self._read_entry("byteorder", _MAX_DESCRIPTION).decode()
      if self.byteorder not in ("little", "big"):
        raise ValueError(f"its byte order is {self.byteorder!r:.30}")
    stream = io.BytesIO(self._read_entry("data.pkl", _MAX_DESCRIPTION))
    self.content = _unpickle(stream, self._load_storage)
    for key, storage in self._storages.items():
      found = self._entry(f"data/{key}").file_size
      if found != storage.nbytes:
        raise ValueError(
          f"its storage {key!r:.30} has {found} bytes instead of {storage.nbytes}"
        )
    self._check_growth(sum(storage.nbytes for storage in self._storages.values()))

  def read(self, storage: _Storage) -> bytes:
    return self._read_entry(f"data/{storage.key}", storage.nbytes)

  def _entry(self, name: str) -> zipfile.ZipInfo:
    if f"{self._folder}{name}" not in self._entries:
      raise ValueError(f"its part {name!r:.30} is missing")
    return self._entries[f"{self._folder}{name}"]

  def _read_entry(self, name: str, limit: int) -> bytes:
    info = self._entry(name)
    if info.file_size > limit:
      raise _Refused(f"its part {name!r:.30} has {info.file_size} bytes")
    if info.compress_size > self._size:
      raise ValueError(f"its part {name!r:.30} is larger than the file")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
      raise _Refused(f"its part {name!r:.30} is compressed in a way that is not known")
    with self._archive.open(info) as entry:
      try:
        # With a size, no more than that is ever decompressed.
        return entry.read(info.file_size)
      except zipfile.BadZipFile as error:
        raise zipfile.BadZipFile(
          f"its part {name!r:.30} is not what its checksum says"
        ) from error


class _Legacy(_Source):
  """The form before 1.6: five pickles, then each storage after its length."""

  byteorder = "little"

  def __init__(self, file: io.BufferedReader, path: pathlib.Path):
    super().__init__(file, path)
    file.seek(0)
    stream = io.BytesIO(file.read(_MAX_DESCRIPTION))
    unpickle = lambda: _unpickle(stream, self._load_storage)
    if unpickle() != _MAGIC_NUMBER:
      raise ValueError("it is a pickle, but does not begin as PyTorch's do")
    if unpickle() != _PROTOCOL_VERSION:
      raise ValueError("it is of an unknown version")
    unpickle()  # The machine that wrote it; its byte order plays no part.
    self.content = unpickle()
    keys = unpickle()
    self._places: dict[str, int] = {}
    place = stream.tell()
    for key in keys:
      storage = self._storages[_key(key)]
      file.seek(place)
      found = int.from_bytes(file.read(8), "little")
      self._places[key] = place + 8
      place += 8 + storage.nbytes
      if found != storage.size or place > self._size:
        raise ValueError(f"its storage {key!r:.30} is cut off, or of another size")
    if self._places.keys() != self._storages.keys():
      raise ValueError("storages are missing")

  def read(self, storage: _Storage) -> bytes:
    self._file.seek(self._places[storage.key])
    return self._file.read(storage.nbytes)


class _File(io.BufferedReader):
  """A file that refuses to read more at once than it is told.

  zipfile reads a directory at once, whatever its size.
  """

  longest_read = sys.maxsize

  def read(self, size: int | None = -1, /) -> bytes:
    if size is not None and size > self.longest_read:
      raise _Refused(f"its directory is {size} bytes long")
    return super().read(size)


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
  """Turns what is wrong with a file into one line.

  Raises:
    errors.UsageError: for everything but circumstances of the machine.
  """
  try:
    yield
  except errors.UsageError:
    raise
  except _Refused as error:
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


@contextlib.contextmanager
def opened(path: pathlib.Path) -> Iterator[Any]:
  """Yields what a PyTorch checkpoint holds, as plain containers.

  Ordered dictionaries are dictionaries, parameters are tensors, a tensor is a `Tensor`
  or an `Unsupported`; the numbers can be read until the block ends. Wherever they were
  saved from, they are read to the CPU.

  Args:
    path: a regular file that `torch.save` wrote: of the zip form, or of the one before
      PyTorch 1.6. The tar files before PyTorch 0.1.10 are not read.

  Raises:
    errors.UsageError: it is none, is damaged, names anything else than tensors need, or
      states sizes that do not fit.
    OSError: it cannot be opened.
  """
  with _File(io.FileIO(path)) as file:
    with _naming(path):
      source = _source(file, path)
    try:
      yield source.content
    finally:
      source.close()


def _source(file: _File, path: pathlib.Path) -> _Source:
  if zipfile.is_zipfile(file):
    return _Zip(file, path)
  file.seek(0)
  start = file.read(512)
  if start[257:262] == b"ustar":
    raise errors.UsageError(
      f"{path} is a tar file, as PyTorch wrote them before 0.1.10: load and save it "
      "with a newer PyTorch"
    )
  if start[:1] != pickle.PROTO:
    raise errors.UsageError(
      f"{path} is neither a PyTorch checkpoint nor a .safetensors file"
    )
  return _Legacy(file, path)
