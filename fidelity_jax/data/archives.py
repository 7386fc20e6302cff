"""Files inside of archives, read one after the other and never written to disk."""

import io
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from fidelity_jax.errors import RunError

_TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_SUFFIXES = (*_TAR_SUFFIXES, ".zip")


def members(path: Path) -> Iterator[tuple[str, bytes]]:
  """Yields the name and content of every regular file in an archive or a folder.

  Archives in archives are opened too. Links and devices are passed over.

  Args:
    path: a folder, or a .tar (also compressed) or .zip file.

  Yields:
    (relative name with forward slashes, content), a folder's in sorted order.

  Raises:
    RunError: the archive is damaged, or a name in it leads out of it ("../",
      absolute); nothing from such an archive is used.
  """
  if path.is_dir():
    yield from _folder(path)
    return
  try:
    with path.open("rb") as file:
      yield from _archive(path.name, file, str(path))
  except (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    OSError,
    NotImplementedError,  # zipfile: an unknown compression
  ) as error:
    raise RunError(
      f"{path} is damaged or cannot be read ({error}); delete it and fetch it again"
    ) from error


def _folder(root: Path) -> Iterator[tuple[str, bytes]]:
  for directory, folders, files in os.walk(root):
    folders.sort()
    for name in sorted(files):
      path = Path(directory) / name
      if path.is_file():
        yield path.relative_to(root).as_posix(), path.read_bytes()


def _archive(name: str, file, where: str) -> Iterator[tuple[str, bytes]]:
  found = _zip(file, where) if name.endswith(".zip") else _tar(file, where)
  for inner, content in found:
    if inner.endswith(_SUFFIXES):
      inside = _archive(inner, io.BytesIO(content), f"{where}:{inner}")
      yield from ((f"{inner}/{deep}", data) for deep, data in inside)
    else:
      yield inner, content


def _tar(file, where: str) -> Iterator[tuple[str, bytes]]:
  with tarfile.open(fileobj=file, mode="r:*") as archive:
    for member in archive:
      name = _safe(member.name, where)
      if member.isfile():
        yield name, archive.extractfile(member).read()


def _zip(file, where: str) -> Iterator[tuple[str, bytes]]:
  with zipfile.ZipFile(file) as archive:
    for member in archive.infolist():
      name = _safe(member.filename, where)
      if not member.is_dir():
        yield name, archive.read(member)


def _safe(name: str, where: str) -> str:
  path = PurePosixPath(name.replace("\\", "/"))
  if path.is_absolute() or ".." in path.parts or ":" in path.parts[:1]:
    raise RunError(
      f"{where} holds {name!r}, a path that leads out of the archive: it was made to "
      "do harm and is refused; download the file again"
    )
  return str(path)
