"""Leases: of two runs that would work in one bucket, the second is refused.

A lease is an object that must not be there when it is written. It holds a beat, which
changes while its owner lives; without one for `_LONGEST` it is nobody's. It needs a
store that refuses to overwrite: Google's does; on others fsspec looks first and writes
then, which two can do at once.
"""

import contextlib
import json
import os
import pathlib
import platform
import secrets
import signal
import threading
import time
from typing import Any

from fidelity_jax import errors, progress
from fidelity_jax.buckets import Bucket

_NAME = ".lock"
# Seconds between two beats, and without a beat until a lease counts as nobody's.
_BEAT, _LONGEST = 15.0, 90.0


class Lease:
  """The right to write to a bucket, while this process lives.

  Attributes:
    lost: whether another has it, or somebody removed it.
  """

  def __init__(self, bucket: Bucket):
    """Prepares it; `take` takes it."""
    self.lost = False
    self._bucket = bucket
    self._token, self._beats, self._beaten = secrets.token_hex(8), 0, 0.0
    self._left = threading.Event()
    self._heart = threading.Thread(target=self._live, daemon=True)

  def take(self) -> None:
    """Takes it, and keeps it from then on.

    Raises:
      RunError: another run has it.
    """
    bucket, seen, since, told, taken = self._bucket, None, 0.0, False, False
    while not bucket.write(_NAME, self._content(), new=True):
      if (held := bucket.read(_NAME)) is None:
        continue
      owner = _owner(held)
      if owner.get("token") == self._token:
        # Written, but the answer did not come.
        break
      who = f"process {owner.get('process')} on {owner.get('host')}"
      if seen is not None and held != seen:
        raise errors.RunError(in_use(bucket.address, who))
      if seen is None:
        seen, since = held, _now()
      dead = _dead(owner)
      if dead or _now() - since > _LONGEST:
        if bucket.read(_NAME) == held:
          bucket.remove(_NAME)
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
      self.look()
    self._beaten = _now()
    self._heart.start()

  def give_back(self) -> None:
    """Gives it back, if it was taken and not lost."""
    self._left.set()
    if not self._heart.ident:
      return
    self._heart.join()
    with contextlib.suppress(errors.RunError):
      self.look()
      self._bucket.remove(_NAME)

  def _live(self) -> None:
    """Beats while the lease is ours."""
    while not self._left.wait(_BEAT):
      try:
        self._beat()
      except Exception:  # The next may come through.
        if self.lost:
          os.kill(os.getpid(), signal.SIGTERM)
          return

  def _content(self) -> bytes:
    who = {"host": platform.node(), "process": os.getpid(), "machine": _machine()}
    return json.dumps(who | {"token": self._token, "beat": self._beats}).encode()

  def _beat(self) -> None:
    self.look()
    self._beats += 1
    self._bucket.write(_NAME, self._content())
    self._beaten = _now()

  def check(self) -> None:
    """Raises RunError if another run has the lock, or may have by now."""
    if self.lost or _now() - self._beaten > _LONGEST / 2:
      self._beat()

  def look(self) -> None:
    """Raises RunError if another run has the lock."""
    held = self._bucket.read(_NAME)
    if held is None:
      self.lost = True
      raise errors.RunError(
        f"{self._bucket.address}/{_NAME} was removed while the run was working there: "
        "run the same command again to go on with what is there."
      )
    if _owner(held).get("token") != self._token:
      self.lost = True
      raise errors.RunError(
        f"{self._bucket.address} was taken over by another run, which saw no sign of "
        f"life of this one for {_LONGEST:g} s: wait for that one, or name another "
        "directory with --workdir."
      )


def in_use(address: str, who: str) -> str:
  """Returns a line that says who works in a bucket."""
  return (
    f"another run ({who}) is working in {address}: wait for it, or name another "
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
