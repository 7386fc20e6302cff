"""torchvision's published weights: names, files, and a cache filled once."""

import fcntl
import hashlib
import http.client
import os
import pathlib
import re
import urllib.error
import urllib.request

from fidelity_jax import errors, progress
from fidelity_jax.models import registry

BASE_URL = "https://download.pytorch.org/models/"
# The hexadecimal digits in a name are the first ones of the file's SHA-256.
FILES = {
  "torchvision/alexnet": "alexnet-owt-7be5be79.pth",
  "torchvision/googlenet": "googlenet-1378be20.pth",
  "torchvision/resnet18": "resnet18-f37072fd.pth",
  "torchvision/resnet50": "resnet50-0676ba61.pth",
  "torchvision/resnet50-v2": "resnet50-11ad3fa6.pth",
  "torchvision/vgg16": "vgg16-397923af.pth",
  "torchvision/vgg16-features": "vgg16_features-amdegroot-88682ab5.pth",
}
_CHUNK = 1 << 20


def cache_folder() -> pathlib.Path:
  """Returns $FIDELITY_JAX_CACHE, or ~/.cache/fidelity_jax."""
  folder = os.environ.get("FIDELITY_JAX_CACHE")
  return pathlib.Path(folder or "~/.cache/fidelity_jax").expanduser()


def find(name: str) -> pathlib.Path:
  """Returns the file of a published network, downloaded once into the cache.

  Args:
    name: a key of `FILES`.

  Raises:
    errors.UsageError: no such name.
    errors.RunError: it could not be downloaded, or its checksum is wrong.
  """
  if name not in FILES:
    raise errors.UsageError(
      f"there are no published weights {name!r}; {registry.near(name, FILES)}"
    )
  return fetch(BASE_URL + FILES[name], cache_folder())


def fetch(url: str, folder: pathlib.Path) -> pathlib.Path:
  """Returns `folder`'s copy of a file whose name carries its checksum.

  Downloads go to a `.part` beside it, which the next call resumes, and get their name
  only when the checksum is right; processes that want the same file take turns.

  Args:
    url: ends in NAME-HEX.SUFFIX, HEX the first digits of the file's SHA-256.
    folder: created if absent.

  Raises:
    errors.RunError: no network, a broken transfer, or a wrong checksum.
  """
  name = url.rsplit("/", 1)[-1]
  checksum = expected_checksum(name)
  path = folder / name
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f".{name}.lock", "w") as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)
      if path.exists():
        _verify(path, checksum, url)
        return path
      part = folder / f"{name}.part"
      _transfer(url, part, checksum, folder)
      _verify(part, checksum, url)
      os.replace(part, path)
  except OSError as error:
    raise errors.RunError(f"cannot write {path}: {error}") from error
  return path


def expected_checksum(file_name: str) -> str:
  """Returns the hexadecimal digits in NAME-HEX.SUFFIX, "" where there are none."""
  match = re.search(r"-([0-9a-f]{8,64})\.[a-z]+$", file_name)
  return match.group(1) if match else ""


def _verify(path: pathlib.Path, checksum: str, url: str) -> None:
  with open(path, "rb") as file:
    digest = hashlib.file_digest(file, "sha256").hexdigest()
  if not digest.startswith(checksum):
    path.unlink()
    raise errors.RunError(
      f"{path} was damaged and is deleted: its SHA-256 starts {digest[:8]}, that of "
      f"{url} starts {checksum}; run again to download it"
    )


def _transfer(
  url: str, part: pathlib.Path, checksum: str, folder: pathlib.Path
) -> None:
  """Appends to `part` what it lacks of the file at `url`."""
  have = part.stat().st_size if part.exists() else 0
  request = urllib.request.Request(url)
  if have:
    request.add_header("Range", f"bytes={have}-")
  try:
    with urllib.request.urlopen(request, timeout=30) as response:
      resumed = response.status == 206
      have = have if resumed else 0
      total = have + int(response.headers.get("Content-Length", 0))
      report = progress.Progress(
        f"download {url.rsplit('/', 1)[-1]}", total >> 20, have >> 20, unit="mebibyte"
      )
      with open(part, "ab" if resumed else "wb") as file:
        while chunk := response.read(_CHUNK):
          file.write(chunk)
          have += len(chunk)
          if report.due() or have == total:
            report.update(have >> 20)
      report.close()
  except urllib.error.HTTPError as error:
    if error.code == 416 and have:  # Everything is here; the checksum will tell.
      return
    raise _unavailable(url, checksum, folder, error) from error
  except (OSError, http.client.HTTPException) as error:
    raise _unavailable(url, checksum, folder, error) from error
  if have < total:
    raise errors.RunError(
      f"the transfer of {url} broke off at {have} of {total} bytes; run again to "
      "resume it"
    )


def _unavailable(
  url: str, checksum: str, folder: pathlib.Path, error: Exception
) -> errors.RunError:
  reason = getattr(error, "reason", None) or error
  return errors.RunError(
    f"cannot download {url} ({reason}): get the file on another machine, check that "
    f"its SHA-256 starts {checksum}, and put it into {folder}"
  )
