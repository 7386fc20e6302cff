"""Reads PyTorch's checkpoint files without PyTorch, and without running their code.

`torch.save` writes a pickle, which says how containers and tensors are built
(`unpickling`), and raw storages, of which tensors are views. Since PyTorch 1.6 they are
entries of a zip file; before, they followed each other in one file. All sizes are
compared with the file before a storage is read.
"""

import abc
import contextlib
import io
import os
import pathlib
import pickle
import sys
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from fidelity_jax import errors
from fidelity_jax.port import unpickling

# The longest pickle, or directory of a zip file, in bytes. A tensor takes about 100.
_MAX_DESCRIPTION = 2**23
# How much larger than the file its tensors may be: weights hardly compress, and few of
# them are shared.
_MAX_GROWTH = 16

_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_PROTOCOL_VERSION = 1001


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
    self._storages: dict[str, unpickling.Storage] = {}
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
  def read(self, storage: unpickling.Storage) -> bytes:
    """Returns a storage's bytes, fewer if the file ends early."""

  def _load_storage(self, persistent_id: Any) -> unpickling.Storage:
    match persistent_id:
      # The older form has one more, which part of a storage is meant: None for all.
      case ("storage", np.dtype() as dtype, str() as key, _, int() as size, *part) if (
        part in ([], [None]) and 0 <= size < 2**60
      ):
        storage = self._storages.setdefault(
          key, unpickling.Storage(self, key, dtype, size)
        )
        if (storage.dtype, storage.size) == (dtype, size):
          return storage
    raise ValueError("its pickle describes a storage in a way that makes no sense")

  def _check_growth(self, nbytes: int) -> None:
    if nbytes > _MAX_GROWTH * self._size:
      raise unpickling.Refused(
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
    self.content = unpickling.unpickle(stream, self._load_storage)
    for key, storage in self._storages.items():
      found = self._entry(f"data/{key}").file_size
      if found != storage.nbytes:
        raise ValueError(
          f"its storage {key!r:.30} has {found} bytes instead of {storage.nbytes}"
        )
    self._check_growth(sum(storage.nbytes for storage in self._storages.values()))

  def read(self, storage: unpickling.Storage) -> bytes:
    return self._read_entry(f"data/{storage.key}", storage.nbytes)

  def _entry(self, name: str) -> zipfile.ZipInfo:
    if f"{self._folder}{name}" not in self._entries:
      raise ValueError(f"its part {name!r:.30} is missing")
    return self._entries[f"{self._folder}{name}"]

  def _read_entry(self, name: str, limit: int) -> bytes:
    info = self._entry(name)
    if info.file_size > limit:
      raise unpickling.Refused(f"its part {name!r:.30} has {info.file_size} bytes")
    if info.compress_size > self._size:
      raise ValueError(f"its part {name!r:.30} is larger than the file")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
      raise unpickling.Refused(
        f"its part {name!r:.30} is compressed in a way that is not known"
      )
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
    unpickle = lambda: unpickling.unpickle(stream, self._load_storage)
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
      storage = self._storages[unpickling.key_of(key)]
      file.seek(place)
      found = int.from_bytes(file.read(8), "little")
      self._places[key] = place + 8
      place += 8 + storage.nbytes
      if found != storage.size or place > self._size:
        raise ValueError(f"its storage {key!r:.30} is cut off, or of another size")
    if self._places.keys() != self._storages.keys():
      raise ValueError("storages are missing")

  def read(self, storage: unpickling.Storage) -> bytes:
    self._file.seek(self._places[storage.key])
    return self._file.read(storage.nbytes)


class _File(io.BufferedReader):
  """A file that refuses to read more at once than it is told.

  zipfile reads a directory at once, whatever its size.
  """

  longest_read = sys.maxsize

  def read(self, size: int | None = -1, /) -> bytes:
    if size is not None and size > self.longest_read:
      raise unpickling.Refused(f"its directory is {size} bytes long")
    return super().read(size)


@contextlib.contextmanager
def opened(path: pathlib.Path) -> Iterator[Any]:
  """Yields what a PyTorch checkpoint holds, as plain containers.

  Ordered dictionaries are dictionaries, parameters are tensors, a tensor is an
  `unpickling.Tensor` or `Unsupported`; the numbers can be read until the block ends.
  Wherever they were saved from, they are read to the CPU.

  Args:
    path: a regular file that `torch.save` wrote: of the zip form, or of the one before
      PyTorch 1.6. The tar files before PyTorch 0.1.10 are not read.

  Raises:
    errors.UsageError: it is none, is damaged, names anything else than tensors need, or
      states sizes that do not fit.
    OSError: it cannot be opened.
  """
  with _File(io.FileIO(path)) as file:
    with unpickling.naming(path):
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
