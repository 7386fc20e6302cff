"""Buckets: addresses such as gs://BUCKET/DIR instead of paths, through fsspec.

What an address names is copied to this machine before it is read; later only what has
changed is copied again. A workdir is worked in here, too, and kept in step with its
bucket (`Mirror`), where nothing can be renamed and no directory is written at once:

- A checkpoint in a bucket counts once `_WHOLE` lies beside its files: it is written
  after them and removed before them. What a stage has is written in the order in which
  it was made; nothing is removed but checkpoints of a stage that trains here.
- A lock is an object that must not be there when it is written. It holds a beat, which
  changes while its owner lives. It needs a store that refuses to overwrite: Google's
  does; on others fsspec looks first and writes then, which two can do at once.
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
import platform
import re
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from fidelity_jax import errors, files, hosts, progress, streams

# Beside the files of a checkpoint, once all of them are there.
_WHOLE = ".whole"
_FINISHED, _BEGUN = "finished.json", "config.json"
# Who works in a workdir, and who wrote to it last.
_LOCK, _OWNER = ".lock", ".owner"
# Seconds between two looks at what is new here, between two beats, and without a beat
# until a lock counts as nobody's.
_EVERY, _BEAT, _LONGEST = 10.0, 15.0, 90.0
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

  def _listing(self) -> tuple[dict[str, dict[str, Any]], set[str | None]]:
    """Returns what fsspec tells of each object, and the checkpoints that are whole.

    By relative path, "" for the address itself; without what is this module's own.
    """
    with self._reaching("reading"):
      found = self._system.find(self._root, detail=True)
    every, whole, self._touched = {}, set(), False
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
        self._touched = True
      elif _is_kept(name):
        every[name] = told
    return every, {None, *whole}

  def _wholes(self) -> dict[str, dict[str, Any]]:
    """Returns the objects without those of checkpoints that are not whole."""
    every, whole = self._listing()
    # Before a run wrote to it, it was copied there by hand.
    if self._touched is False:
      return every
    # So was what is finished without a mark; it is checked by its digests.
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
        if checkpoint in known:
          self._remove(checkpoint + _WHOLE)
        there = self._put(names, check)
        if checkpoint and there and self._unchanged(checkpoint, local):
          check()
          self._system.pipe_file(self._key(checkpoint + _WHOLE), b"")
    every, whole = self._listing()
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
    every, whole = self._listing()
    for checkpoint in sorted({c for n in every if (c := _checkpoint(n))} - whole):
      if not self._touched:
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

  def _unchanged(self, checkpoint: str, before: dict[str, str]) -> bool:
    """Returns whether a checkpoint's files are those of before: none is removed."""
    now = {f"{checkpoint}{n}": v for n, v in _files(self._path(checkpoint)).items()}
    return now == {n: v for n, v in before.items() if n.startswith(checkpoint)}

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
    with errors.while_doing(f"writing {self._record}"):
      self._record.parent.mkdir(parents=True, exist_ok=True)
      record = _Record(self._known, sorted(self._pending), self.owner)
      part = self._record.with_name(f"{self._record.name}.{os.getpid()}.part")
      part.write_bytes(msgspec.json.encode(record))
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
    self._turn = threading.Lock()
    # No more is followed; the lock is given back.
    self._ended, self._left = threading.Event(), threading.Event()
    self._token, self._beats, self._beaten = secrets.token_hex(8), 0, 0.0
    self._lost = False
    self._follower = threading.Thread(target=self._follow, daemon=True)
    self._heart = threading.Thread(target=self._live, daemon=True)

  def __enter__(self) -> pathlib.Path:
    with errors.while_doing(f"making the directory {self.place}"):
      self.place.mkdir(parents=True, exist_ok=True)
      self._file = open(self.place.with_name(f".{self.place.name}.lock"), "w")
    try:
      # Of this machine's processes, before anything is changed here.
      try:
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError as error:
        raise errors.RunError(self._in_use("on this machine")) from error
      if hosts.first():
        self._lock()
        self._heart.start()
        self._bucket.pull(workdir=True)
        self._bucket.take()
        self._publish()
        self._follower.start()
      hosts.exchange(self._publish, self._bucket.pull)
      hosts.wait("workdir in a bucket")
    except BaseException:
      self._leave()
      raise
    return self.place

  def __exit__(self, kind: type | None, *_: object) -> None:
    try:
      if hosts.first():
        self._end_following()
        self._publish()
    except errors.RunError as failure:
      line = str(failure)
      if not self._lost:
        line = (
          f"{line.rstrip('.')}. What is not in the bucket yet is kept on this machine, "
          "and is taken there when the same command runs here again."
        )
      if kind is None or not issubclass(kind, Exception):
        raise errors.RunError(line) from failure
      progress.say(line)
    finally:
      self._leave()
      # What is told from here on does not come into the bucket any more.
      streams.log_to(None)

  def _end_following(self) -> None:
    self._ended.set()
    if self._follower.ident:
      self._follower.join()

  def _leave(self) -> None:
    """Gives the locks back."""
    hosts.exchange(None, None)
    self._end_following()
    self._left.set()
    if self._heart.ident:
      self._heart.join()
      with contextlib.suppress(errors.RunError):
        self._look()
        self._bucket.remove(_LOCK)
    self._file.close()

  def _publish(self) -> None:
    with self._turn:
      self._look()
      self._bucket.push(self._check)

  def _follow(self) -> None:
    """Takes to the bucket what is new here, now and then."""
    told = False
    while not self._ended.wait(_EVERY):
      try:
        self._publish()
        told = False
      except Exception as error:  # Told, and tried again.
        if not told and not self._lost:
          what = str(error).rstrip(".").removesuffix(": run the same command again")
          progress.say(f"{what}: it is tried again.")
          told = True

  def _live(self) -> None:
    """Keeps the lock while it is ours."""
    while not self._left.wait(_BEAT):
      try:
        self._beat()
      except Exception:  # The next may come through.
        if self._lost:
          os.kill(os.getpid(), signal.SIGTERM)
          return

  def _lock(self) -> None:
    """Takes the lock.

    Raises:
      RunError: another run has it.
    """
    bucket, seen, since, told, taken = self._bucket, None, 0.0, False, False
    while not bucket.write(_LOCK, self._content(), new=True):
      if (held := bucket.read(_LOCK)) is None:
        continue
      owner = _owner(held)
      if owner.get("token") == self._token:
        # Written, but the answer did not come.
        break
      who = f"process {owner.get('process')} on {owner.get('host')}"
      if seen is not None and held != seen:
        raise errors.RunError(self._in_use(who))
      if seen is None:
        seen, since = held, _now()
      dead = _dead(owner)
      if dead or _now() - since > _LONGEST:
        if bucket.read(_LOCK) == held:
          bucket.remove(_LOCK)
        seen, taken = None, taken or not dead
        continue
      if not told:
        progress.say(
          f"{bucket.address} was in use by {who}: looking for up to {_LONGEST:g} s "
          "whether it still is."
        )
        told = True
      time.sleep(1.0)
    if taken:
      # Another may have found it without an owner, too, and removed ours.
      time.sleep(2.0)
      self._look()
    self._beaten = _now()

  def _in_use(self, who: str) -> str:
    return (
      f"another run ({who}) is working in {self._bucket.address}: wait for it, or name "
      "another directory with --workdir."
    )

  def _content(self) -> bytes:
    who = {"host": platform.node(), "process": os.getpid(), "machine": _machine()}
    return json.dumps(who | {"token": self._token, "beat": self._beats}).encode()

  def _beat(self) -> None:
    self._look()
    self._beats += 1
    self._bucket.write(_LOCK, self._content())
    self._beaten = _now()

  def _check(self) -> None:
    """Raises RunError if another run has the lock, or may have by now."""
    if self._lost or _now() - self._beaten > _LONGEST / 2:
      self._beat()

  def _look(self) -> None:
    """Raises RunError if another run has the lock."""
    held = self._bucket.read(_LOCK)
    if held is None:
      self._lost = True
      raise errors.RunError(
        f"{self._bucket.address}/{_LOCK} was removed while the run was working there: "
        "run the same command again to go on with what is there."
      )
    if _owner(held).get("token") != self._token:
      self._lost = True
      raise errors.RunError(
        f"{self._bucket.address} was taken over by another run, which saw no sign of "
        f"life of this one for {_LONGEST:g} s: wait for that one, or name another "
        "directory with --workdir."
      )


def _now() -> float:
  """Returns seconds that go on while a machine is suspended."""
  return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


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
