"""A workdir in a bucket: worked in on this machine, kept in step there."""

import fcntl
import pathlib
import threading

from fidelity_jax import buckets, errors, hosts, leases, progress, streams

# Seconds between two looks at what is new here.
_EVERY = 10.0


class Mirror:
  """A workdir in a bucket: worked in here, kept in step there.

  Of several processes the first writes for all. The others have copies of their own,
  which follow wherever they wait for it (`hosts.wait`).

  Attributes:
    place: where this process works.
  """

  def __init__(self, address: str):
    """Opens it; raises as `buckets.copy`, but asks no server yet."""
    address = address.rstrip("/")
    place = buckets.place_of("workdirs", address)
    if hosts.index():
      place = place.with_name(f".{place.name}.{hosts.index()}")
    self.place, self._bucket = place, buckets.Bucket(address, place)
    self._lease = leases.Lease(self._bucket)
    streams.rename(place, address)
    self._turn = threading.Lock()
    self._ended = threading.Event()
    self._follower = threading.Thread(target=self._follow, daemon=True)

  def __enter__(self) -> pathlib.Path:
    with errors.while_doing(f"making the directory {self.place}"):
      self.place.mkdir(parents=True, exist_ok=True)
      self._file = open(self.place.with_name(f".{self.place.name}.lock"), "w")
    try:
      # Of this machine's processes, before anything is changed here.
      try:
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError as error:
        who = "on this machine"
        raise errors.RunError(leases.in_use(self._bucket.address, who)) from error
      if hosts.first():
        self._lease.take()
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
      if not self._lease.lost:
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
    self._lease.give_back()
    self._file.close()

  def _publish(self) -> None:
    with self._turn:
      self._lease.look()
      self._bucket.push(self._lease.check)

  def _follow(self) -> None:
    """Takes to the bucket what is new here, now and then."""
    told = False
    while not self._ended.wait(_EVERY):
      try:
        self._publish()
        told = False
      except Exception as error:  # Told, and tried again.
        if not told and not self._lease.lost:
          what = str(error).rstrip(".").removesuffix(": run the same command again")
          progress.say(f"{what}: it is tried again.")
          told = True
