"""Buckets: addresses such as gs://BUCKET/DIR instead of paths, through fsspec.

What an address names is copied to this machine before it is read; later only what has
changed is copied again. A workdir is worked in here, too, and kept in step with its
bucket (`mirror`), where nothing can be renamed and no directory is written at once:

- A checkpoint in a bucket counts once `_WHOLE` lies beside its files: it is written
  after them and removed before them. What a stage has is written in the order in which
  it was made; nothing is removed but checkpoints of a stage that trains here.
- Two runs cannot work in one (`leases`).
"""

import base64
import contextlib
import datetime
import fcntl
import functools
import hashlib
import json
import os
import pathlib
import re
import secrets
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from fidelity_jax import errors, files, progress, streams

# Beside the files of a checkpoint, once all of them are there.
_WHOLE = ".whole"
_FINISHED, _BEGUN = "finished.json", "config.json"
# Who wrote to a workdir last.
_OWNER = ".owner"
# Files that are copied at a time, and how often what changes meanwhile is copied anew.
_TOGETHER, _TRIES = 64, 5
# Of a stage, what comes later needs what comes before.
_ORDER = (_BEGUN, r"checkpoints/\d+/.*", r"[^/]*\.jsonl", _FINISHED)


def is_address(place: object) -> bool:
  """Returns whether a place is an address, and no path."""
  return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", str(place)) is not None


def copy(address: str) -> pathlib.Path:
  """Returns this machine's copy of what an address names, brought up to date once.

  Args:
    address: of an object, or of all that begin with it and a slash.

  Returns:
    Where the copy lies; nothing, where the address names nothing.

  Raises:
    UsageError: there are no such addresses, or what reads them is not installed.
    RunError: it cannot be reached, read, or written here.
  """
  return _copy(address.rstrip("/"))


@functools.cache
def _copy(address: str) -> pathlib.Path:
  place = place_of("copies", address)
  streams.rename(place, address)
  with errors.while_doing(f"making the directory {place.parent}"):
    place.parent.mkdir(parents=True, exist_ok=True)
    lock = open(place.with_name(f".{place.name}.lock"), "w")
  # Processes that want the same take turns.
  with lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    Bucket(address, place).pull()
  return place


def is_copy(path: pathlib.Path) -> bool:
  """Returns whether a path is in such a copy, where nothing else stays."""
  return path.is_relative_to(files.cache_folder() / "copies")


def copy_run(address: str) -> pathlib.Path:
  """Returns the same of an experiment's directory, with the stages behind it.

  They are copied beside it. Anything else is copied as it is.
  """
  address = address.rstrip("/")
  for where in (address, address.rpartition("/")[0]):
    if where.partition("://")[2].count("/") < 1:
      break
    record = f"{where}/experiment.json"
    found = Bucket(record, place_of("copies", record)).read()
    if found is None:
      continue
    copy(where)
    with contextlib.suppress(ValueError, LookupError, TypeError):
      experiments = json.loads(found)["experiments"]
      for name in sorted({name for one in experiments for name in one["stages"]}):
        copy(f"{where.rpartition('/')[0]}/{name}")
    return place_of("copies", address)
  return copy(address)


def place_of(kind: str, address: str) -> pathlib.Path:
  """Returns where what is copied of an address lies, below the cache folder.

  Args:
    kind: "copies", or "workdirs" for what is worked in.
    address: see `copy`.

  Raises:
    UsageError: it names nothing.
  """
  scheme, _, rest = address.partition("://")
  parts = [part for part in rest.split("/") if part]
  if not parts or {".", ".."} & set(parts):
    raise errors.UsageError(f"{address} names nothing: write gs://BUCKET/DIR.")
  # What is copied of one address never lies in what is copied of another.
  *above, name = parts
  folder = f"{(above or [scheme])[-1]}-{files.digest([scheme, *above], 8)}"
  return files.cache_folder() / kind / folder / name


def _open(address: str) -> tuple[Any, str]:
  """Returns fsspec's file system of an address, and what it calls what it names."""
  scheme, given = address.partition("://")[0], {}
  if scheme in ("gs", "gcs"):
    # Buckets of other kinds are asked for by gRPC, and some of those have no locks.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
  try:
    import fsspec

    if scheme in ("gs", "gcs"):
      import aiohttp

      # Otherwise a connection that is lost in silence is waited for without end.
      silence = aiohttp.ClientTimeout(total=None, sock_connect=60, sock_read=300)
      given["requests_timeout"] = silence
    system, root = fsspec.url_to_fs(address, use_listings_cache=False, **given)
  except ImportError as error:
    needed = "'fidelity_jax[gcs]'" if scheme in ("gs", "gcs") else "what is named there"
    raise errors.UsageError(
      f"{address} cannot be read ({error}): pip install {needed}"
    ) from error
  except ValueError as error:
    raise errors.UsageError(
      f"{address} is no address that fsspec knows ({error}): write gs://BUCKET/DIR."
    ) from error
  except Exception as error:  # Of credentials, which are of many types.
    raise errors.RunError(_explained("opening", address, error)) from error
  if hasattr(system, "auto_mkdir"):
    system.auto_mkdir = True
  return system, root.rstrip("/")


def _explained(doing: str, address: str, error: Exception) -> str:
  """Returns a line for what fsspec's file systems raise, which are many types."""
  text = re.sub(r"<[^>]*>|\s+", " ", str(error)).strip()[:200]
  if reason := errors.circumstance(error):
    advice = reason
  elif isinstance(error, FileNotFoundError):
    advice = "there is no such bucket, or it is not to be seen: make it first"
  elif re.search(r"forbidden|denied|does not have|\b40[13]\b", text, re.I):
    advice = (
      f"it may not be used ({text}): see who you are to it, with `gcloud auth "
      "application-default login` for gs://, and run the same command again"
    )
  else:
    advice = f"{type(error).__name__}: {text}: run the same command again"
  return f"{doing} {address} failed: {advice}."


class _ChangedError(Exception):
  """Something changed while it was copied."""


class _Record(msgspec.Struct):
  """What is kept beside a copy; see `Bucket`."""

  files: dict[str, list[str]] = {}
  pending: list[str] = []
  owner: str = ""


class Bucket:
  """What an address names, and its copy on this machine.

  Attributes:
    address: see `copy`.
    place: where the copy lies.
    owner: names this machine in `_OWNER`, "" if it never wrote.
  """

  def __init__(self, address: str, place: pathlib.Path):
    """Opens it; raises as `copy`, but asks no server yet."""
    self.address, self.place = address, place
    self._system, self._root = _open(address)
    self._record = place.with_name(f".{place.name}.json")
    # Versions in the bucket and here of what is the same in both, by relative path.
    self._known: dict[str, list[str]] = {}
    # What a push that did not come to its end may have written or removed.
    self._pending: set[str] = set()
    self.owner = ""
    if place.exists():
      with contextlib.suppress(OSError, ValueError):
        record = msgspec.json.decode(files.read_bytes(self._record), type=_Record)
        self._known, self.owner = record.files, record.owner
        self._pending = set(record.pending)

  def _key(self, name: str) -> str:
    return f"{self._root}/{name}" if name else self._root

  def _path(self, name: str) -> pathlib.Path:
    return self.place / name if name else self.place

  @contextlib.contextmanager
  def _reaching(self, doing: str) -> Iterator[None]:
    try:
      yield
    except (errors.UsageError, errors.RunError, _ChangedError):
      raise
    except Exception as error:
      raise errors.RunError(_explained(doing, self.address, error)) from error

  def _listing(self) -> tuple[dict[str, dict[str, Any]], set[str | None], bool]:
    """Returns what fsspec tells of each object, and which checkpoints are whole.

    By relative path, "" for the address itself; without what is this package's own.
    And whether a run ever wrote here: if not, what there is was copied by hand.
    """
    with self._reaching("reading"):
      found = self._system.find(self._root, detail=True)
    every, whole, written = {}, set(), False
    for key, told in found.items():
      name = key[len(self._root) :].lstrip("/")
      if ".." in name.split("/"):
        raise errors.RunError(f"{self.address} holds {name!r}, which leads out of it.")
      # Folders that a console makes are objects, too.
      if key.endswith("/") or told["type"] != "file":
        continue
      checkpoint = _checkpoint(name)
      if checkpoint is not None and name == checkpoint + _WHOLE:
        whole.add(checkpoint)
      elif name == _OWNER:
        written = True
      elif _is_kept(name):
        every[name] = told
    return every, {None, *whole}, written

  def _wholes(self) -> dict[str, dict[str, Any]]:
    """Returns the objects without those of checkpoints that are not whole."""
    every, whole, written = self._listing()
    if not written:
      return every
    # What is finished without marks was copied by hand, too; its digests are checked.
    marked = {_group(checkpoint) for checkpoint in whole if checkpoint}
    done = {_group(n) for n in every if n == f"{_group(n)}/{_FINISHED}"} - marked
    return {
      name: told
      for name, told in every.items()
      if _checkpoint(name) in whole or _group(name) in done
    }

  def pull(self, workdir: bool = False) -> None:
    """Makes the copy what is in the bucket.

    Args:
      workdir: it is one that this machine works in: a stage, or other directory, that
        is in the bucket as it was last seen there stays here as it is.

    Raises:
      RunError: something cannot be reached, read or written.
    """
    for left in reversed(range(_TRIES)):
      try:
        self._pull(workdir)
        return
      except _ChangedError as error:
        if not left:
          raise errors.RunError(
            f"{self.address}/{error} changed while it was copied, or came damaged: run "
            "the same command again."
          ) from error
      finally:
        self._note()

  def _pull(self, workdir: bool) -> None:
    told = self._wholes()
    ours = workdir and bool(self.owner) and self.read(_OWNER) == self.owner.encode()
    local, lacking = _files(self.place), []
    there = {name: _version(told[name]) for name in told}
    changed = {
      _group(name)
      for name in (*told, *self._known)
      if there.get(name) != self._known.get(name, [None])[0]
      and not (ours and name in self._pending)
    }
    for name in sorted({*told, *local, *self._known}):
      # What is absent here is wanted, whoever removed it.
      if (
        workdir and _group(name) not in changed and (name in local or name not in told)
      ):
        continue
      if [there.get(name), local.get(name)] == self._known.get(name):
        continue
      self._known.pop(name, None)
      if name in told:
        lacking.append(name)
      elif name in local:
        with errors.while_doing(f"removing {self._path(name)}"):
          self._path(name).unlink(missing_ok=True)
          self._tidy(self._path(name).parent)
    self._fetch(lacking, told)

  def _tidy(self, directory: pathlib.Path) -> None:
    """Removes a directory in which nothing is left, and those that it leaves so."""
    with contextlib.suppress(OSError):
      while directory != self.place:
        directory.rmdir()
        directory = directory.parent

  def _fetch(self, names: list[str], told: dict[str, dict[str, Any]]) -> None:
    """Copies objects here."""
    bar = progress.Progress(f"copying {self.address}", len(names), unit="file")
    for start in range(0, len(names), _TOGETHER):
      some = names[start : start + _TOGETHER]
      places = [self._path(name) for name in some]
      parts = [path.with_name(f".{path.name}.{os.getpid()}.part") for path in places]
      try:
        with self._reaching("copying"):
          for path in parts:
            path.parent.mkdir(parents=True, exist_ok=True)
          try:
            self._system.get([self._key(n) for n in some], [str(p) for p in parts])
          except FileNotFoundError as error:
            raise _ChangedError(some[0]) from error
          for name, part, path in zip(some, parts, places, strict=True):
            self._compare(name, part, told[name])
            # What was written first is older here, too.
            if isinstance(when := told[name].get("mtime"), datetime.datetime):
              os.utime(part, (when.timestamp(), when.timestamp()))
            os.replace(part, path)
            here = files.version(os.stat(path))
            self._known[name] = [_version(told[name]), here]
      finally:
        for path in parts:
          path.unlink(missing_ok=True)
      if bar.due():
        bar.update(start + len(some))
    bar.close()

  def _compare(self, name: str, path: pathlib.Path, told: dict[str, Any]) -> None:
    """Raises _ChangedError if a copy is not what was told of the object."""
    if told.get("contentEncoding") == "gzip":
      raise errors.RunError(
        f"{self.address}/{name} is stored compressed, and unpacked on its way here: "
        "store it as it is (gcloud storage cp without -z and -Z)."
      )
    same = path.stat().st_size == told["size"]
    if same and (expected := told.get("md5Hash")):
      with open(path, "rb") as file:
        found = hashlib.file_digest(file, "md5").digest()
      same = base64.b64encode(found).decode() == expected
    if not same:
      raise _ChangedError(name)

  def push(self, check: Callable[[], None] = lambda: None) -> None:
    """Takes what is new here to the bucket; what is whole there stays so all the time.

    Args:
      check: raises what ends it; called before each part.

    Raises:
      RunError: something cannot be reached, read or written.
    """
    local = _files(self.place)
    changed = [n for n, here in local.items() if here != self._known.get(n, "..")[1]]
    known = {checkpoint for n in self._known if (checkpoint := _checkpoint(n))}
    kept = {checkpoint for n in local if (checkpoint := _checkpoint(n))}
    if not changed and not known - kept:
      return
    # Of a stage that is finished there nothing is removed any more.
    training = {
      _group(name)
      for name in local
      if name == f"{_group(name)}/{_BEGUN}"
      and f"{_group(name)}/{_FINISHED}" not in self._known
    }
    groups: dict[tuple, list[str]] = {}
    for name in changed:
      groups.setdefault((*self._rank(name, local), _checkpoint(name)), []).append(name)
    for (*_, checkpoint), names in sorted(
      groups.items(), key=lambda group: group[0][:4]
    ):
      check()
      self._pending.update(names)
      self._note()
      with self._reaching("writing to"):
        if checkpoint:
          self._remove(checkpoint + _WHOLE)
        there = self._put(names, check)
        if checkpoint and there and self._arrived(checkpoint, local):
          check()
          self._system.pipe_file(self._key(checkpoint + _WHOLE), b"")
    every, whole, _ = self._listing()
    old = [n for n in every if _checkpoint(n) not in {None, *kept}]
    old = [name for name in old if _group(name) in training]
    if old:
      self._pending.update(old)
      self._note()
    with self._reaching("removing from"):
      for checkpoint in sorted({_checkpoint(name) for name in old}):
        check()
        if checkpoint in whole:
          self._remove(checkpoint + _WHOLE)
        for name in (name for name in old if name.startswith(checkpoint)):
          self._remove(name)
          self._known.pop(name, None)
    for name in changed:
      if name in every and _checkpoint(name) in whole:
        self._known[name] = [_version(every[name]), local[name]]
    self._pending.clear()
    self._note()

  def take(self) -> None:
    """Says that this machine writes from here on; all that was pulled counts as whole.

    Raises:
      RunError: the bucket cannot be reached or written.
    """
    every, whole, written = self._listing()
    unmarked = set(map(_checkpoint, every)) - whole
    for checkpoint in () if written else sorted(unmarked):
      self.write(checkpoint + _WHOLE, b"")
    self.owner = self.owner or secrets.token_hex(8)
    self._note()
    self.write(_OWNER, self.owner.encode())

  def _put(self, names: list[str], check: Callable[[], None]) -> bool:
    """Copies files to the bucket; returns whether all of them were here to the end."""
    for start in range(0, len(names), _TOGETHER):
      check()
      some = names[start : start + _TOGETHER]
      paths = [str(self._path(name)) for name in some]
      try:
        self._system.put(paths, [self._key(name) for name in some])
      except FileNotFoundError:
        if all(map(os.path.exists, paths)):
          raise
      if not all(map(os.path.exists, paths)):
        return False
    return True

  def _arrived(self, checkpoint: str, before: dict[str, str]) -> bool:
    """Returns whether a checkpoint's files, and no others, are in the bucket.

    They are those of before, and none is being removed here. What a run that was killed
    left of another of this step goes.
    """
    place = self._path(checkpoint)
    own = {name: here for name, here in before.items() if name.startswith(checkpoint)}
    if {f"{checkpoint}{name}": here for name, here in _files(place).items()} != own:
      return False
    sizes = {}
    found = self._system.find(self._key(checkpoint.rstrip("/")), detail=True)
    for key, told in found.items():
      name = key[len(self._root) + 1 :]
      if name in own:
        sizes[name] = str(told["size"])
      else:
        self._remove(name)
    # Versions begin with the size.
    return sizes == {name: here.partition("-")[0] for name, here in own.items()}

  def _rank(self, name: str, local: dict[str, str]) -> tuple[float, str, int, int]:
    """Returns what orders files: earlier stages first, and `_ORDER` in each."""
    group, begun = _group(name), float("inf")
    if f"{group}/{_BEGUN}" in local:
      with contextlib.suppress(FileNotFoundError):
        begun = (self.place / group / _BEGUN).stat().st_mtime
    inside = name[len(group) + 1 :]
    ranks = [i for i, pattern in enumerate(_ORDER) if re.fullmatch(pattern, inside)]
    step = re.match(r"checkpoints/(\d+)/", inside)
    rank = ranks[0] if ranks else len(_ORDER)
    return begun, group, rank, int(step[1]) if step else 0

  def _remove(self, name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
      self._system.rm_file(self._key(name))

  def _note(self) -> None:
    with errors.while_doing(f"making the directory {self._record.parent}"):
      self._record.parent.mkdir(parents=True, exist_ok=True)
    record = _Record(self._known, sorted(self._pending), self.owner)
    files.write_bytes(self._record, msgspec.json.encode(record))

  def read(self, name: str = "") -> bytes | None:
    """Returns an object's content, None if there is none.

    Raises:
      RunError: it cannot be reached or read.
    """
    with self._reaching("reading"):
      try:
        return self._system.cat_file(self._key(name))
      except (FileNotFoundError, IsADirectoryError):
        return None

  def write(self, name: str, content: bytes, new: bool = False) -> bool:
    """Writes an object; returns whether it did.

    Args:
      name: its relative path.
      content: what it is to hold.
      new: only if there is none.

    Raises:
      RunError: it cannot be reached or written.
    """
    mode = "create" if new else "overwrite"
    with self._reaching("writing to"):
      try:
        self._system.pipe_file(self._key(name), content, mode=mode)
        return True
      except FileExistsError:
        return False

  def remove(self, name: str) -> None:
    """Removes an object, if it is there; raises as `write`."""
    with self._reaching("writing to"):
      self._remove(name)


def _is_kept(name: str) -> bool:
  """Returns whether a file, by its relative path, is for others, too.

  Not one that is being written, or is this machine's own; Orbax renames what is whole.
  """
  *folders, last = name.split("/")
  if any(part.startswith(".") or "-checkpoint-tmp" in part for part in folders):
    return False
  return not re.fullmatch(r"\..*|.*\.tmp|log-\d+\.txt", last)


def _files(place: pathlib.Path) -> dict[str, str]:
  """Returns the versions of the files at or below a place, by relative path.

  Raises:
    RunError: a directory cannot be read: what is in it would seem to be gone.
  """
  if place.is_file():
    return {"": files.version(place.stat())}

  def failed(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
      raise error

  found = {}
  with errors.while_doing(f"reading {place}"):
    for folder, _, names in os.walk(place, onerror=failed):
      for path in (os.path.join(folder, name) for name in names):
        if _is_kept(name := os.path.relpath(path, place)):
          with contextlib.suppress(FileNotFoundError):
            found[name] = files.version(os.stat(path))
  return found


def _group(name: str) -> str:
  """Returns the directory that a file belongs to as a whole: a stage, an experiment."""
  parts = name.split("/")
  return "/".join(parts[: 2 if parts[0] == "measurements" else 1])


def _checkpoint(name: str) -> str | None:
  """Returns the directory of the checkpoint that a file belongs to, or None."""
  match = re.match(r"[^/]+/checkpoints/\d+/", name)
  return match and match[0]


def _version(told: dict[str, Any]) -> str:
  """Returns what changes whenever an object is written anew."""
  # Others change with what is said of it, too.
  if "generation" in told:
    return f"{told['size']}-{told['generation']}"
  keys = ("etag", "ETag", "VersionId", "mtime", "LastModified")
  return "-".join(str(told[key]) for key in ("size", *keys) if told.get(key))
