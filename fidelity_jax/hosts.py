"""Several processes that work as one: joining, agreeing, and who writes.

Each process runs the same program on the same config and takes the same decisions; on
its devices lie its parts of the arrays, and it reads its part of each batch. Whatever
depends on a clock, a signal or a disk is decided by the first process and told to the
others (`agree`), and the first alone writes what is not an array (`files.locked`).

A process that fails tells the others, which end with its reason; one that vanishes is
missed by the first, and the first by all. So a job ends as a whole, within a bounded
time, and the same command goes on from the last checkpoint.

What is told goes through JAX's coordination service, from host to host: it does not
wait for devices. Imports JAX only to join: commands that are one process need none of
it here.
"""

import contextlib
import glob
import importlib.util
import json
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from fidelity_jax import errors, signals, streams

T = TypeVar("T")

# Seconds without a sign of life after which a process is given up, and to wait for all
# to come.
_PATIENCE_VARIABLE, _PATIENCE = "FIDELITY_JAX_PATIENCE", 60.0
# Seconds between signs of life; and without one if another process has a failure that
# a lost process would explain.
_BEAT, _SUSPICIOUS = 2.0, 8.0
# Seconds that all others may take to get to a place where one is already, such as the
# end of the first one's report.
_LONGEST = 3600.0
# Numbers of tasks, with what is set where these are processes.
_SCHEDULERS = (
  ("SLURM_NTASKS", "SLURM_STEP_NODELIST"),
  ("OMPI_COMM_WORLD_SIZE", "OMPI_MCA_orte_hnp_uri"),
)
_KEPT = "what was saved last is kept, run the same command again on all hosts to go on."
_ROOT = "fidelity_jax"
_FAILED, _SUSPECT, _SIGNAL = f"{_ROOT}/failed", f"{_ROOT}/suspect", f"{_ROOT}/signal"
_ALIVE, _AGREED, _LEFT = f"{_ROOT}/alive", f"{_ROOT}/agreed", f"{_ROOT}/left"

_index, _count = 0, 1
_patience = _PATIENCE
_agreements = _places = _ticks = 0
_stopping: int | None = None
_ending = threading.Event()
# When the coordinator was last heard.
_heard = 0.0
# Without a common disk: what the first does before others wait for it, and they after.
_publish: Callable[[], None] | None = None
_fetch: Callable[[], None] | None = None


def join(command: str = "") -> None:
  """Joins the other processes of the job, if there are any.

  These are those of JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and
  JAX_PROCESS_ID, or what JAX finds: SLURM's or Open MPI's tasks, a Cloud TPU slice's
  hosts, a JobSet's on GKE. From here on SIGTERM at any one of them stops all.

  Args:
    command: what they run, which is the same for all.

  Raises:
    UsageError: what the environment says is wrong, or another runs something else.
    RunError: the others do not come.
  """
  global _index, _count, _patience, _heard
  named = _named()
  told = [] if named else _told()
  if named.get("num_processes") == 1 or not (named or told):
    return
  import jax

  _patience = _seconds()
  by = "" if named else f", as {' and '.join(told)} {'say' if told[1:] else 'says'}"
  try:
    jax.distributed.initialize(
      **named,
      initialization_timeout=int(_patience),
      # Ours are first: they say which process it is.
      heartbeat_timeout_seconds=int(3 * _patience) + 30,
    )
  except ValueError as error:
    raise errors.UsageError(
      f"this is one process of several{by}, but the others cannot be found ({error}): "
      "set JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID; "
      "JAX_NUM_PROCESSES=1 and JAX_PROCESS_ID=0 to work alone."
    ) from error
  except Exception as error:  # JAX raises RuntimeError and others.
    text = " ".join(str(error).split())[:200]
    raise errors.RunError(
      f"this is one process of several{by}, but they did not all meet within "
      f"{_patience:g} s ({text}): look at JAX_COORDINATOR_ADDRESS, whether its port is "
      "free, and whether all were started; set JAX_NUM_PROCESSES=1 and "
      "JAX_PROCESS_ID=0 to work alone."
    ) from error
  # Devices are looked for later.
  from jax._src import distributed

  state = distributed.global_state
  _index, _count = state.process_id, state.num_processes
  signals.agree_by(_agreed_signal)
  _heard = time.monotonic()
  for thread in (_watch, _watch_coordinator):
    threading.Thread(target=thread, daemon=True).start()
  if agree(command) != command:
    raise errors.UsageError(
      "this process was given another command than process 0: all processes of a job "
      "run the same one; set JAX_NUM_PROCESSES=1 and JAX_PROCESS_ID=0 for each that is "
      "to work alone, as with --config.shard."
    )


def _told() -> list[str]:
  """Returns what speaks of several processes."""
  found = [
    f"{count}={os.environ[count]}"
    for count, where in _SCHEDULERS
    if where in os.environ and os.environ.get(count, "1") != "1"
  ]
  # A slice's hosts on GKE: "one,two,...".
  if "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
    found.append("TPU_WORKER_HOSTNAMES")
  if not found and _on_tpu() and slice_hosts() > 1:
    found.append("the TPU's metadata")
  return found


def _on_tpu() -> bool:
  """Returns whether this is a TPU host, which may be one of a slice."""
  if os.environ.get("JAX_PLATFORMS", "tpu").partition(",")[0] not in ("", "tpu"):
    return False
  chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
  return bool(chips) and importlib.util.find_spec("libtpu") is not None


def slice_hosts() -> int:
  """Returns how many hosts a Cloud TPU VM's slice has, 1 if that is not known.

  Its metadata server tells, where JAX looks too
  (https://docs.cloud.google.com/compute/docs/metadata/overview); GCE_METADATA_HOST
  names another one, as for Google's own libraries.
  """
  host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
  path = "computeMetadata/v1/instance/attributes/worker-network-endpoints"
  request = urllib.request.Request(
    f"http://{host}/{path}", headers={"Metadata-Flavor": "Google"}
  )
  try:
    with urllib.request.urlopen(request, timeout=3) as response:
      return len(response.read().decode().split(","))
  except (OSError, ValueError):
    return 1


def _named() -> dict[str, Any]:
  """Returns the arguments that the environment names, {} if JAX is to find them."""
  names = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
  found: dict[str, Any] = {}
  for argument, name in names.items():
    if text := os.environ.get(name):
      if not text.isdecimal():
        raise errors.UsageError(f"{name}={text!r} is no whole number.")
      found[argument] = int(text)
  # The address alone is for what JAX finds besides.
  if not found:
    return {}
  address = os.environ.get("JAX_COORDINATOR_ADDRESS", "")
  missing = [name for argument, name in names.items() if argument not in found]
  missing += [] if address else ["JAX_COORDINATOR_ADDRESS"]
  if missing:
    raise errors.UsageError(
      f"{' and '.join(missing)} must be set where the other names of JAX's processes "
      "are: set all three, or none."
    )
  host, _, port = address.rpartition(":")
  if not host or not port.isdecimal():
    raise errors.UsageError(
      f"JAX_COORDINATOR_ADDRESS={address!r} is not HOST:PORT, of process 0."
    )
  if found["process_id"] >= found["num_processes"]:
    raise errors.UsageError(
      f"JAX_PROCESS_ID={found['process_id']} must be below "
      f"JAX_NUM_PROCESSES={found['num_processes']}."
    )
  return found | {"coordinator_address": address}


def _seconds() -> float:
  text = os.environ.get(_PATIENCE_VARIABLE, str(_PATIENCE))
  try:
    patience = float(text)
  except ValueError:
    patience = 0.0
  if not 5 <= patience < float("inf"):
    raise errors.UsageError(
      f"{_PATIENCE_VARIABLE}={text!r} is no number of seconds from 5 on."
    )
  return patience


def several() -> bool:
  """Returns whether this is one process of several."""
  return _count > 1


def first() -> bool:
  """Returns whether this process speaks and writes for all."""
  return _index == 0


def index() -> int:
  """Returns this process's number."""
  return _index


def _client() -> Any:
  # JAX has no public name for it; Orbax uses the same one.
  from jax._src import distributed

  return distributed.global_state.client


@contextlib.contextmanager
def _waiting(whom: str, place: str) -> Iterator[None]:
  try:
    yield
  except Exception as error:  # JaxRuntimeError: of the time limit, or of the network.
    raise errors.RunError(
      f"{whom} did not come to {place!r} within {_LONGEST / 60:g} min: look at what it "
      "does, stop all, and run the same command again to go on."
    ) from error


def agree(value: T) -> T:
  """Returns the first process's value; all call it at the same places.

  Args:
    value: JSON-able.

  Raises:
    RunError: the first does not come here.
  """
  global _agreements
  if _count == 1:
    return value
  _agreements += 1
  key = f"{_AGREED}/{_agreements}"
  if first():
    _client().key_value_set(key, json.dumps(value))
    return value
  with _waiting("process 0", f"agreement {_agreements}"):
    return json.loads(_client().blocking_key_value_get(key, int(_LONGEST * 1000)))


def exchange(
  publish: Callable[[], None] | None, fetch: Callable[[], None] | None
) -> None:
  """Names how files come from the first process to the others, in `wait`.

  Args:
    publish: what the first does; None: they have a disk in common.
    fetch: what the others do then.
  """
  global _publish, _fetch
  _publish, _fetch = publish, fetch


def apart() -> bool:
  """Returns whether processes have no common disk, but copies; see `exchange`."""
  return several() and _publish is not None


def wait(name: str) -> None:
  """Waits until all processes are here: what the first wrote can be read.

  Args:
    name: of the place.

  Raises:
    RunError: some do not come here, or files cannot be exchanged.
  """
  global _places
  if _count == 1:
    return
  if first() and _publish is not None:
    _publish()
  _places += 1
  with _waiting("another process", name):
    place = f"{_ROOT}/{_places}/{name}"
    _client().wait_at_barrier(place, int(_LONGEST * 1000))
  if first():
    # Everybody has read what was agreed on so far.
    _client().key_value_delete(f"{_AGREED}/")
  elif _fetch is not None:
    _fetch()


def _agreed_signal(number: int | None) -> int | None:
  """Returns the signal that stops all processes, at the same call in all.

  JAX's preemption service takes SIGTERM over, tells all processes and names a later
  call, the same for all.

  Args:
    number: a signal that this process alone received, SIGINT.
  """
  global _ticks, _stopping
  from jax.experimental import multihost_utils

  if number is not None and _stopping is None:
    # ^C at a terminal: as if it had been the other one, but for its name.
    _client().key_value_set(f"{_SIGNAL}/{_index}", str(int(number)), True)
    os.kill(os.getpid(), signal.SIGTERM)
  _ticks += 1
  if _stopping is None and multihost_utils.reached_preemption_sync_point(_ticks):
    known = [int(number) for _, number in _client().key_value_dir_get(_SIGNAL)]
    _stopping = agree(known[0] if known else int(signal.SIGTERM))
  return _stopping


def stopped() -> bool:
  """Returns whether all processes were stopped, at the same place."""
  return _count == 1 or _stopping is not None


def _watch() -> None:
  """Gives signs of life, and ends this process when the job cannot go on."""
  global _heard
  client, beats = _client(), {i: (None, time.monotonic()) for i in range(1, _count)}
  number = 0
  while True:
    number += 1
    try:
      client.key_value_set(f"{_ALIVE}/{_index}", str(number), True)
      _heard = time.monotonic()
      if first():
        _look_for_lost(client, beats)
      text = client.blocking_key_value_get(_FAILED, int(_BEAT * 1000))
    except Exception:  # JaxRuntimeError: of the time limit, or of the network.
      time.sleep(0.2)
      continue
    _heard = time.monotonic()
    _give_up(**json.loads(text))
    return


def _watch_coordinator() -> None:
  """Ends this process when the first one, which coordinates all, does not answer."""
  while time.monotonic() - _heard < _patience:
    time.sleep(0.5)
  _give_up(
    1,
    f"process 0, which coordinates all, has not answered for {_patience:g} s: {_KEPT}",
    silent=True,
  )


def _look_for_lost(client: Any, beats: dict[int, tuple[Any, float]]) -> None:
  """Tells all if one has given no sign of life for too long."""
  now, alive = time.monotonic(), dict(client.key_value_dir_get(_ALIVE))
  left = dict(client.key_value_dir_get(_LEFT))
  suspected = client.key_value_dir_get(_SUSPECT)
  limit = min(_SUSPICIOUS, _patience) if suspected else _patience
  for number, (beat, when) in beats.items():
    new = alive.get(f"{_ALIVE}/{number}")
    if new != beat:
      beats[number] = (new, now)
    elif now - when > limit and f"{_LEFT}/{number}" not in left:
      _tell(
        1,
        f"process {number} has given no sign of life for {limit:g} s: {_KEPT}",
      )


def _tell(status: int, line: str) -> bool:
  """Tells all processes why the job ends; returns whether this was the first reason."""
  try:
    _client().key_value_set(_FAILED, json.dumps({"status": status, "line": line}))
  except Exception:  # There is one, or nobody to tell.
    try:
      _client().key_value_try_get(_FAILED)
    except Exception:  # Nobody.
      return True
    return False
  return True


def _give_up(status: int, line: str, silent: bool = False) -> None:
  """Ends this process, unless it is ending by itself.

  Its main thread may be in a collective operation that will never end.

  Args:
    status: exit status.
    line: why.
    silent: nobody can be told.
  """
  # It may be about to tell its own reason.
  if _ending.wait(1.0):
    return
  print(f"fidelity_jax: {line}", file=streams.user())
  if not silent:
    _note_left()
    if first():
      # One of them may be lost.
      _wait_for_others(5.0)
  os._exit(status)


def _note_left() -> None:
  try:
    _client().key_value_set(f"{_LEFT}/{_index}", "", True)
  except Exception:  # Nobody is there to be told.
    pass


def _wait_for_others(seconds: float | None = None) -> None:
  """Waits until all have read why they end, or have ended; the first leaves last."""
  until = time.monotonic() + (_patience if seconds is None else seconds)
  while time.monotonic() < until:
    try:
      left = dict(_client().key_value_dir_get(_LEFT))
    except Exception:  # The first is gone.
      return
    if len(left) == _count:
      # They hear it a moment later, and JAX aborts those that outlive the first.
      time.sleep(3.0 if first() else 0.0)
      return
    time.sleep(0.1)


def leave(status: int, line: str | None) -> str | None:
  """Ends the joint work.

  Args:
    status: this process's exit status.
    line: what this process failed with; None if it did not, or all stop together.

  Returns:
    What to say of it here, None if another process says it.
  """
  if _count == 1:
    return line
  if line is None:
    _note_left()
    # Another may still report; if it is lost instead, that is told.
    _wait_for_others(_LONGEST)
    _ending.set()
    return None
  if not first():
    # Mostly all fail alike, and the first one's line is enough.
    time.sleep(0.5)
  own = f"process {_index} failed: {line}"
  told = _tell(status, line if first() else own)
  _ending.set()
  _note_left()
  if first():
    _wait_for_others()
    return line
  return own if told else None


def lost(error: BaseException) -> None:
  """Waits for a while if a failure may be another process's, which is gone.

  A collective operation fails, at once or after a while, if a process is gone; the
  thread that watches then ends this process, and says which one it was.

  Args:
    error: what this process failed with.
  """
  if _count == 1 or isinstance(error, errors.UsageError | signals.Stopped):
    return
  cause = error.__cause__ or error.__context__
  if isinstance(error, errors.RunError) and (
    cause is None or isinstance(cause, OSError)
  ):
    return
  try:
    _client().key_value_set(f"{_SUSPECT}/{_index}", "", True)
  except Exception:  # The first is gone.
    time.sleep(_patience)
  time.sleep(_SUSPICIOUS + 3 * _BEAT)
