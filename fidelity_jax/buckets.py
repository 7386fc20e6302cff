"""Buckets: addresses such as gs://BUCKET/DIR instead of paths, through fsspec.

What an address names is copied to this machine before it is read; later only what has
changed is copied again. A workdir is worked in here, too, and kept in step with its
bucket (`Mirror`), where nothing can be renamed and no directory is written at once:

- A checkpoint in a bucket counts once `_WHOLE` lies beside its files: it is written
  after them and removed before them. What refers to something is written after it.
- A lock is an object that must not be there when it is written. It holds a beat, which
  changes while its owner lives.
"""

import base64
import contextlib
import fcntl
import functools
import hashlib
import json
import os
import pathlib
import platform
import re
import secrets
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

from fidelity_jax import errors, files, hosts, progress, streams

# Beside the files of a checkpoint, once all of them are there.
_WHOLE = ".whole"
_FINISHED = "finished.json"
# Who works in a workdir, and whose copy came last into it.
_LOCK, _OWNER = ".lock", ".owner"
# Seconds between two looks at what is new here, between two beats, and without a beat
# until a lock counts as nobody's.
_EVERY, _BEAT, _LONGEST = 5.0, 15.0, 90.0
# Files that are copied at a time.
_TOGETHER = 64
# What the others need is written before them.
_ORDER = (
  r"(.*/)?config\.json",
  r".*/checkpoints/\d+/.*",
  r".*\.jsonl",
  rf".*{_FINISHED}",
)


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
  place = _place("copies", address)
  streams.rename(place, address)
  with errors.while_doing(f"making the directory {place.parent}"):
    place.parent.mkdir(parents=True, exist_ok=True)
    lock = open(place.with_name(f".{place.name}.lock"), "w")
  # Processes that want the same take turns.
  with lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    Bucket(address, place).pull()
  return place


def copy_run(address: str) -> pathlib.Path:
  """Returns the same of an experiment's directory, with the stages behind it.

  They are copied beside it. Anything else is copied as it is.
  """
  for where in (address.rstrip("/"), address.rstrip("/").rpartition("/")[0]):
    record = f"{where}/experiment.json"
    found = Bucket(record, _place("copies", record)).read()
    if found is None:
      continue
    copy(where)
    with contextlib.suppress(ValueError, LookupError, TypeError):
      experiments = json.loads(found)["experiments"]
      for name in sorted({name for one in experiments for name in one["stages"]}):
        copy(f"{where.rpartition('/')[0]}/{name}")
    return _place("copies", address)
  return copy(address)


def _place(kind: str, address: str) -> pathlib.Path:
  scheme, _, rest = address.partition("://")
  parts = [part for part in rest.split("/") if part]
  if not parts or {".", ".."} & set(parts):
    raise errors.UsageError(f"{address} names nothing: write gs://BUCKET/DIR.")
  return files.cache_folder() / kind / scheme / pathlib.Path(*parts)


def _open(address: str) -> tuple[Any, str]:
  """Returns fsspec's file system of an address, and what it calls what it names."""
  scheme = address.partition("://")[0]
  try:
    import fsspec

    system, root = fsspec.url_to_fs(address, use_listings_cache=False)
  except ImportError as error:
    needed = "'fidelity_jax[gcs]'" if scheme in ("gs", "gcs") else "what is named there"
    raise errors.UsageError(
      f"{address} cannot be read ({error}): pip install {needed}"
    ) from error
  except ValueError as error:
    raise errors.UsageError(
      f"{address} is no address that fsspec knows ({error}): write gs://BUCKET/DIR."
    ) from error
  if hasattr(system, "auto_mkdir"):
    system.auto_mkdir = True
  return system, root.rstrip("/")


class Bucket:
  """What an address names, and its copy on this machine.

  Attributes:
    address: see `copy`.
    place: where the copy lies.
    owner: of the copy: changes when others have written to the bucket.
  """

  def __init__(self, address: str, place: pathlib.Path):
    """Opens it; raises as `copy`, but asks no server yet."""
    self.address, self.place, self.owner = address, place, ""
    self._system, self._root = _open(address)
    self._record = place.with_name(f".{place.name}.json")
    # Versions in the bucket and here of what is the same in both, by relative path.
    self._known: dict[str, list[str]] = {}
    if place.exists():
      with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        record = json.loads(files.read_bytes(self._record))
        self.owner, self._known = record["owner"], record["files"]

  def _key(self, name: str) -> str:
    return f"{self._root}/{name}" if name else self._root

  def _path(self, name: str) -> pathlib.Path:
    return self.place / name if name else self.place

  @contextlib.contextmanager
  def _reaching(self, doing: str) -> Iterator[None]:
    """Turns what fsspec's file systems raise, which are many types, into a line."""
    try:
      yield
    except errors.RunError:
      raise
    except Exception as error:
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
      raise errors.RunError(f"{doing} {self.address} failed: {advice}.") from error

  def listing(self) -> dict[str, dict[str, Any]]:
    """Returns what fsspec tells of each object, by relative path, "" for the address.

    Without parts of checkpoints that are not whole, and without what is kept beside.

    Raises:
      RunError: the bucket cannot be reached or read.
    """
    with self._reaching("reading"):
      found = self._system.find(self._root, detail=True)
    every, whole = {}, {None}
    for key, told in found.items():
      name = key[len(self._root) :].lstrip("/")
      if ".." in name.split("/"):
        raise errors.RunError(f"{self.address} holds {name!r}, which leads out of it.")
      # Folders that a console makes are objects, too.
      if key.endswith("/") or told["type"] != "file":
        continue
      if name.endswith(_WHOLE):
        whole.add(name.removesuffix(_WHOLE))
      elif name not in (_LOCK, _OWNER):
        every[name] = told
    # What is finished, and perhaps was copied there by hand, is checked by its digests.
    finished = tuple(n.removesuffix(_FINISHED) for n in every if n.endswith(_FINISHED))
    return {
      name: told
      for name, told in every.items()
      if _checkpoint(name) in whole or name.startswith(finished)
    }

  def pull(self, ours: bool = False) -> None:
    """Makes the copy what is in the bucket.

    Args:
      ours: nobody else has written to the bucket: what was written here and is not
        there yet stays, but for what was changed or removed there by hand.

    Raises:
      RunError: something cannot be reached, read or written.
    """
    told = self.listing()
    local, lacking = _files(self.place), []
    for name in sorted({*told, *local, *self._known}):
      there, here = _version(told.get(name)), local.get(name, "")
      base_there, base_here = self._known.get(name, ("", ""))
      if there == base_there and (ours or here == base_here):
        continue
      self._known.pop(name, None)
      if there:
        lacking.append(name)
      elif here:
        with errors.while_doing(f"removing {self._path(name)}"):
          self._path(name).unlink(missing_ok=True)
    try:
      self._fetch(lacking, told)
    finally:
      self._note()

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
          self._system.get([self._key(n) for n in some], [str(path) for path in parts])
          for name, part, path in zip(some, parts, places, strict=True):
            if _differs(part, told[name]):
              raise errors.RunError(
                f"{self.address}/{name} changed while it was copied, or came damaged: "
                "run the same command again."
              )
            os.replace(part, path)
            here = files.version(os.stat(path))
            self._known[name] = [_version(told[name]), here]
      finally:
        for path in parts:
          path.unlink(missing_ok=True)
      if bar.due():
        bar.update(start + len(some))
    bar.close()

  def push(self) -> None:
    """Makes the bucket what the copy is; what is whole there stays so at any moment.

    Raises:
      RunError: something cannot be reached, read or written.
    """
    local = _files(self.place)
    changed = [n for n, here in local.items() if here != self._known.get(n, "..")[1]]
    gone = [name for name in self._known if name not in local]
    if not changed and not gone:
      return
    groups: dict[tuple, list[str]] = {}
    for name in changed:
      groups.setdefault((_rank(name), _step(name), _checkpoint(name)), []).append(name)
    for (*_, checkpoint), names in sorted(groups.items(), key=lambda g: g[0][:2]):
      with self._reaching("writing to"):
        for start in range(0, len(names), _TOGETHER):
          some = names[start : start + _TOGETHER]
          paths = [str(self._path(name)) for name in some]
          if not all(map(os.path.exists, paths)):
            # Removed meanwhile; the next push sees what is there then.
            return
          self._system.put(paths, [self._key(name) for name in some])
        if checkpoint:
          self._system.pipe_file(self._key(checkpoint + _WHOLE), b"")
    with self._reaching("removing from"):
      for name in sorted({f"{_checkpoint(n)}{_WHOLE}" for n in gone if _checkpoint(n)}):
        self._remove(name)
      for name in gone:
        self._remove(name)
        del self._known[name]
    told = self.listing()
    for name in changed:
      if name in told:
        self._known[name] = [_version(told[name]), local[name]]
    self._note()

  def _remove(self, name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
      self._system.rm_file(self._key(name))

  def _note(self) -> None:
    record = json.dumps({"owner": self.owner, "files": self._known})
    with errors.while_doing(f"writing {self._record}"):
      part = self._record.with_name(f"{self._record.name}.{os.getpid()}.part")
      part.write_text(record)
      os.replace(part, self._record)

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


def _files(place: pathlib.Path) -> dict[str, str]:
  """Returns the versions of the files at or below a place that are to be kept.

  By relative path. Not those that are being written or are this machine's own.
  """
  if place.is_file():
    return {"": files.version(place.stat())}
  found = {}
  for folder, folders, names in os.walk(place):
    # Orbax renames what is whole.
    folders[:] = [n for n in folders if n[0] != "." and "-checkpoint-tmp" not in n]
    for name in names:
      path = os.path.join(folder, name)
      if name[0] == "." or name.endswith(".tmp") or re.fullmatch(r"log-\d+\.txt", name):
        continue
      with contextlib.suppress(FileNotFoundError):
        found[os.path.relpath(path, place)] = files.version(os.stat(path))
  return found


def _checkpoint(name: str) -> str | None:
  """Returns the directory of the checkpoint that a file belongs to, or None."""
  match = re.match(r"(?:.*/)?checkpoints/\d+/", name)
  return match and match[0]


def _step(name: str) -> int:
  match = re.search(r"checkpoints/(\d+)/", name)
  return int(match[1]) if match else 0


def _rank(name: str) -> int:
  ranks = [i for i, pattern in enumerate(_ORDER) if re.fullmatch(pattern, name)]
  return ranks[0] if ranks else len(_ORDER)


def _version(told: dict[str, Any] | None) -> str:
  """Returns what changes whenever an object is written anew, "" for none."""
  if told is None:
    return ""
  keys = ("generation", "etag", "ETag", "VersionId", "mtime", "LastModified")
  return "-".join(str(told[key]) for key in ("size", *keys) if told.get(key))


def _differs(path: pathlib.Path, told: dict[str, Any]) -> bool:
  """Returns whether a copy is not what was told of the object."""
  if path.stat().st_size != told["size"]:
    return True
  if not (expected := told.get("md5Hash")):
    return False
  with open(path, "rb") as file:
    found = hashlib.file_digest(file, "md5").digest()
  return base64.b64encode(found).decode() != expected


class Mirror:
  """A workdir in a bucket: worked in here, kept in step there.

  Of several processes the first writes for all. The others have copies of their own,
  which follow wherever they wait for it (`hosts.wait`).

  Attributes:
    place: where this process works.
  """

  def __init__(self, address: str):
    """Opens it; raises as `copy`, but asks no server yet."""
    address = address.rstrip("/")
    place = _place("workdirs", address)
    if hosts.index():
      place = place.with_name(f".{place.name}.{hosts.index()}")
    self.place, self._bucket = place, Bucket(address, place)
    streams.rename(place, address)
    self._turn, self._ended = threading.Lock(), threading.Event()
    self._beats, self._told, self._lost = 0, False, False
    self._thread = threading.Thread(target=self._follow, daemon=True)

  def __enter__(self) -> pathlib.Path:
    with errors.while_doing(f"making the directory {self.place}"):
      self.place.mkdir(parents=True, exist_ok=True)
    if hosts.first():
      self._lock()
      try:
        bucket = self._bucket
        last = bucket.read(_OWNER)
        ours = bool(bucket.owner) and last == bucket.owner.encode()
        if not ours:
          bucket.owner = secrets.token_hex(8)
        bucket.pull(ours)
        bucket.write(_OWNER, bucket.owner.encode())
        bucket.push()
      except BaseException:
        self._unlock()
        raise
      self._thread.start()
    hosts.exchange(self._publish, self._bucket.pull)
    hosts.wait("workdir in a bucket")
    return self.place

  def __exit__(self, kind: type | None, *_: object) -> None:
    hosts.exchange(None, None)
    if not hosts.first():
      return
    self._ended.set()
    self._thread.join()
    try:
      self._publish()
    except errors.RunError as failure:
      what = str(failure).rstrip(".")
      line = (
        f"{what}. What is not in the bucket yet is kept on this machine, and is taken "
        "there when the same command runs here again."
      )
      if kind is None or not issubclass(kind, Exception):
        raise errors.RunError(line) from failure
      progress.say(line)
    finally:
      self._unlock()

  def _publish(self) -> None:
    with self._turn:
      self._check_lock()
      self._bucket.push()

  def _follow(self) -> None:
    """Takes to the bucket what is new here, now and then."""
    last = time.monotonic()
    while not self._ended.wait(_EVERY):
      try:
        with self._turn:
          if time.monotonic() - last > _BEAT:
            self._check_lock()
            self._beat()
            last = time.monotonic()
          self._bucket.push()
        self._told = False
      except Exception as error:
        if self._lost:
          os.kill(os.getpid(), signal.SIGTERM)
          return
        if not self._told:
          progress.say(f"{str(error).rstrip('.')}: it is tried again.")
          self._told = True

  def _lock(self) -> None:
    """Takes the lock.

    Raises:
      RunError: another run has it.
    """
    self._token = secrets.token_hex(8)
    seen, since, told, taken = None, time.monotonic(), False, False
    while not self._bucket.write(_LOCK, self._content(), new=True):
      if (held := self._bucket.read(_LOCK)) is None:
        continue
      owner = _owner(held)
      if seen is not None and held != seen:
        raise errors.RunError(
          f"another run (process {owner.get('process')} on {owner.get('host')}) is "
          f"working in {self._bucket.address}: wait for it, or name another directory "
          "with --workdir."
        )
      if seen is None and not _dead(owner):
        seen, since = held, time.monotonic()
      if seen is None or time.monotonic() - since > _LONGEST:
        self._bucket.remove(_LOCK)
        seen, taken = None, True
        continue
      if not told:
        progress.say(
          f"{self._bucket.address} was in use by process {owner.get('process')} on "
          f"{owner.get('host')}: looking for up to {_LONGEST:g} s whether it still is."
        )
        told = True
      time.sleep(1.0)
    if taken:
      # Another may have found it without an owner, too, and removed ours.
      time.sleep(2.0)
      self._check_lock()

  def _content(self) -> bytes:
    who = {"host": platform.node(), "process": os.getpid(), "machine": _machine()}
    return json.dumps(who | {"token": self._token, "beat": self._beats}).encode()

  def _beat(self) -> None:
    self._beats += 1
    self._bucket.write(_LOCK, self._content())

  def _check_lock(self) -> None:
    """Raises RunError if another run has the lock."""
    held = self._bucket.read(_LOCK)
    self._lost = held is None or _owner(held).get("token") != self._token
    if self._lost:
      raise errors.RunError(
        f"{self._bucket.address} was taken over by another run, which saw no sign of "
        f"life of this one for {_LONGEST:g} s: wait for that one, or name another "
        "directory with --workdir."
      )

  def _unlock(self) -> None:
    with contextlib.suppress(errors.RunError):
      self._check_lock()
      self._bucket.remove(_LOCK)


def _owner(held: bytes) -> dict[str, Any]:
  with contextlib.suppress(ValueError):
    if isinstance(found := json.loads(held), dict):
      return found
  return {}


def _machine() -> str:
  """Returns what processes that know each other's numbers have in common."""
  try:
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"
  except OSError:
    return secrets.token_hex(8)


def _dead(owner: dict[str, Any]) -> bool:
  """Returns whether a lock's owner was on this machine, and is gone."""
  if owner.get("machine") != _machine() or not isinstance(owner.get("process"), int):
    return False
  try:
    os.kill(owner["process"], 0)
  except ProcessLookupError:
    return True
  except OSError:
    pass
  return False
