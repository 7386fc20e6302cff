"""Downloads: resumed where they broke off, verified by checksum."""

import fcntl
import hashlib
import http.client
import os
import pathlib
import urllib.request

from fidelity_jax import errors, progress

_CHUNK = 1 << 20
_NAMES = {"sha256": "SHA-256", "md5": "MD5"}


def fetch(
  url: str, folder: pathlib.Path, checksum: str, alternative: str = ""
) -> pathlib.Path:
  """Returns a folder's copy of a file, downloaded if absent, its checksum verified.

  A download goes to a `.part` beside the file, which the next call resumes, and gets
  the file's name only when the checksum is right; processes that want the same file
  take turns. A folder that holds the file need not be writable.

  Args:
    url: where the file is; its last component is the file's name.
    folder: created if a download needs it.
    checksum: "sha256:HEX" or "md5:HEX", HEX the first hexadecimal digits or all.
    alternative: what to do without a network; the end of the error line.

  Raises:
    errors.RunError: no network, a broken transfer, a wrong checksum, or a folder that
      cannot be written.
  """
  path = folder / url.rsplit("/", 1)[-1]
  part = path.with_name(f"{path.name}.part")
  try:
    if not path.exists():
      folder.mkdir(parents=True, exist_ok=True)
      with open(folder / f".{path.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
          _transfer(url, part, checksum, alternative)
          _verify_part(part, url, checksum)
          os.replace(part, path)
          return path
    if problem := mismatch(path, checksum):
      raise errors.RunError(
        f"{path} is damaged: {problem}; delete it and run again to fetch {url}"
      )
  except OSError as error:
    raise errors.RunError(f"cannot read or write {path}: {error}") from error
  return path


def _verify_part(part: pathlib.Path, url: str, checksum: str) -> None:
  if problem := mismatch(part, checksum):
    # Resuming it cannot succeed.
    part.unlink()
    raise errors.RunError(
      f"what came from {url} is damaged: {problem}; run again to download it from the "
      "start"
    )


def mismatch(path: pathlib.Path, checksum: str) -> str:
  """Returns what is wrong with a file's checksum, "" if nothing is.

  Args:
    path: of the file.
    checksum: as for `fetch`.

  Raises:
    OSError: it cannot be read.
  """
  algorithm, _, expected = checksum.partition(":")
  with open(path, "rb") as file:
    found = hashlib.file_digest(file, algorithm).hexdigest()
  if found.startswith(expected):
    return ""
  return f"its {_NAMES[algorithm]} starts {found[: len(expected)]}, not {expected}"


def _transfer(url: str, part: pathlib.Path, checksum: str, alternative: str) -> None:
  """Appends to `part` what it lacks of the file at `url`."""
  have = part.stat().st_size if part.exists() else 0
  request = urllib.request.Request(url)
  if have:
    request.add_header("Range", f"bytes={have}-")
  try:
    response = urllib.request.urlopen(request, timeout=30)
  except (OSError, http.client.HTTPException) as error:
    if have and getattr(error, "code", None) == 416:
      return  # All of it is here; the checksum is compared next.
    raise _unavailable(url, part.parent, checksum, alternative, error) from error
  with response:
    resumed = response.status == 206
    have = have if resumed else 0
    total = have + int(response.headers.get("Content-Length", 0))
    name = url.rsplit("/", 1)[-1]
    report = progress.Progress(f"download {name}", total >> 20, have >> 20, "mebibyte")
    try:
      with open(part, "ab" if resumed else "wb") as file:
        while chunk := _read(response):
          file.write(chunk)
          have += len(chunk)
          if report.due() or have == total:
            report.update(have >> 20)
    finally:
      report.close()
  if have < total:
    raise errors.RunError(
      f"the transfer of {url} broke off at {have} of {total} bytes; run again to "
      "resume it"
    )


def _read(response: http.client.HTTPResponse) -> bytes:
  """Returns the next bytes, b"" at the end and where the connection breaks."""
  try:
    return response.read(_CHUNK)
  except (OSError, http.client.HTTPException):
    return b""


def _unavailable(
  url: str,
  folder: pathlib.Path,
  checksum: str,
  alternative: str,
  error: Exception,
) -> errors.Missing:
  reason = getattr(error, "reason", None) or error
  algorithm, _, digits = checksum.partition(":")
  return errors.Missing(
    f"cannot download {url} ({reason}): get the file on another machine, check that "
    f"its {_NAMES[algorithm]} starts {digits}, and put it into {folder}{alternative}"
  )
