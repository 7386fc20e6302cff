"""Several processes that work as one: joining, agreeing, and who writes.

Each process runs the same program on the same config and takes the same decisions; on
its devices lie its parts of the arrays, and it reads its part of each batch. Whatever
depends on a clock, a signal or a disk is decided by the first process and told to the
others (`agree`), and the first alone writes what is not an array (`files.locked`).

A process that fails tells the others, which end with its reason; one that vanishes is
missed by the first, and the first by all. So a job ends as a whole, within a bounded
time, and the same command goes on from the last checkpoint.

Imports JAX only to join: commands that are one process need none of it here.
"""

import glob
import importlib.util
import json
import os
import signal
import threading
import time
from typing import Any, TypeVar

from fidelity_jax import errors, signals, streams

T = TypeVar("T")

# Seconds without a sign of life after which a process is given up, and to wait for all
# to come; at least as long as it takes to start on the slowest host.
_PATIENCE_VARIABLE, _PATIENCE = "FIDELITY_JAX_PATIENCE", 60.0
# Seconds between signs of life.
_BEAT = 2.0
_FAILED, _ALIVE = "fidelity_jax/failed", "fidelity_jax/alive/"
# Numbers of processes, as schedulers tell them that JAX knows.
_COUNTS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")

_index, _count = 0, 1
_ticks = 0
_stopping = False
_ending = threading.Event()
# Why another process, or all of them, cannot go on.
_reason: str | None = None


def join() -> None:
  """Joins the other processes of the job, if there are any.

  These are those of JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and
  JAX_PROCESS_ID, or what JAX finds: SLURM's or Open MPI's tasks, a Cloud TPU slice's
  hosts, a JobSet's on GKE. From here on SIGTERM at any one of them stops all.

  Raises:
    UsageError: what the environment says is wrong.
    RunError: the others do not come.
  """
  global _index, _count
  named, told = _named(), _told()
  if not (named or told or _on_tpu()):
    return
  import jax

  patience = _patience()
  try:
    jax.distributed.initialize(
      **named,
      initialization_timeout=int(max(patience, 1)),
      # Ours should be first: it says which process it is.
      heartbeat_timeout_seconds=int(2 * patience) + 10,
      shutdown_timeout_seconds=int(max(patience, 1)),
    )
  except ValueError as error:
    if not (named or told):
      # A TPU VM that is no part of a slice.
      return
    raise errors.UsageError(
      f"the processes of this job cannot be found ({error}): set "
      "JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or "
      "start one process alone."
    ) from error
  except Exception as error:  # JAX raises RuntimeError and others.
    text = " ".join(str(error).split())[:200]
    raise errors.RunError(
      f"process {named.get('process_id', '?')} did not reach all others within "
      f"{patience:g} s ({text}): look at JAX_COORDINATOR_ADDRESS and whether all "
      "were started."
    ) from error
  _index, _count = jax.process_index(), jax.process_count()
  if _count == 1:
    return
  signals.agree_by(_agreed_signal)
  threading.Thread(target=_watch, args=(patience,), daemon=True).start()


def _told() -> bool:
  """Returns whether a scheduler's variables speak of several processes."""
  if any(os.environ.get(name, "1") != "1" for name in _COUNTS):
    return True
  # A slice's hosts on GKE: "one,two,...".
  return "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")


def _on_tpu() -> bool:
  """Returns whether this is a TPU host, which may be one of a slice.

  On Cloud TPU VMs only their metadata server knows, which JAX asks.
  """
  if os.environ.get("JAX_PLATFORMS", "tpu").partition(",")[0] not in ("", "tpu"):
    return False
  chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
  return bool(chips) and importlib.util.find_spec("libtpu") is not None


def _named() -> dict[str, Any]:
  """Returns the arguments that the environment names, {} if JAX is to find them."""
  names = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
  found: dict[str, Any] = {}
  for argument, name in names.items():
    if text := os.environ.get(name):
      if not text.isdecimal():
        raise errors.UsageError(f"{name}={text!r} is no whole number.")
      found[argument] = int(text)
  address = os.environ.get("JAX_COORDINATOR_ADDRESS", "")
  # The address alone is for what JAX finds besides.
  if not found:
    return {}
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


def _patience() -> float:
  text = os.environ.get(_PATIENCE_VARIABLE, str(_PATIENCE))
  try:
    patience = float(text)
  except ValueError:
    patience = 0.0
  if not 1 <= patience < float("inf"):
    raise errors.UsageError(
      f"{_PATIENCE_VARIABLE}={text!r} is no number of seconds from 1 on."
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


def agree(value: T) -> T:
  """Returns the first process's value; all call it at the same place.

  It waits for the devices, so it has no place in a loop over steps.

  Args:
    value: JSON-able.
  """
  if _count == 1:
    return value
  import numpy as np
  from jax.experimental import multihost_utils

  data = np.frombuffer(json.dumps(value).encode(), np.uint8)
  length = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
  padded = np.zeros(length, np.uint8)
  padded[: min(length, len(data))] = data[:length]
  return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())


def wait(name: str) -> None:
  """Waits until all processes are here: what the first wrote can be read.

  Args:
    name: of the place, for JAX's messages.
  """
  if _count > 1:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(name)


def _agreed_signal(number: int | None) -> int | None:
  """Returns the signal that stops all processes, at the same call in all.

  JAX's preemption service takes SIGTERM over, tells all processes and names a later
  call, the same for all.

  Args:
    number: a signal that this process alone received.
  """
  global _ticks, _stopping
  from jax.experimental import multihost_utils

  if number is not None and number != signal.SIGTERM:
    # ^C at a terminal: as if it had been the other one, once.
    os.kill(os.getpid(), signal.SIGTERM)
  _ticks += 1
  _stopping = _stopping or multihost_utils.reached_preemption_sync_point(_ticks)
  return signal.SIGTERM if _stopping else None


def stopped() -> bool:
  """Returns whether all processes were stopped, at the same place."""
  return _count == 1 or _stopping


def _client() -> Any:
  # JAX has no public name for it; Orbax uses the same one.
  from jax._src import distributed

  return distributed.global_state.client


def _watch(patience: float) -> None:
  """Gives signs of life, and ends this process when the job cannot go on."""
  client, heard = _client(), {i: ("", time.monotonic()) for i in range(1, _count)}
  last = time.monotonic()
  while not _ending.is_set():
    try:
      client.key_value_set(f"{_ALIVE}{_index}", str(time.monotonic()), True)
      if _index == 0:
        _look_for_lost(client, heard, patience)
      text = client.blocking_key_value_get(_FAILED, int(_BEAT * 1000))
      _give_up(text)
      return
    except Exception as error:  # JaxRuntimeError: of a time limit, mostly.
      if "DEADLINE_EXCEEDED" in str(error):
        last = time.monotonic()
        continue
      # Perhaps the network alone; a coordinator that is gone stays away.
      if time.monotonic() - last > min(patience, 5.0):
        _give_up("process 0, which coordinates all, cannot be reached any more")
        return
      time.sleep(0.5)


def _look_for_lost(client: Any, heard: dict[int, Any], patience: float) -> None:
  """Tells all if one has given no sign of life for too long."""
  now = time.monotonic()
  for key, beat in client.key_value_dir_get(_ALIVE):
    number = int(key.rpartition("/")[2])
    if number in heard and heard[number][0] != beat:
      heard[number] = (beat, now)
  for number, (_, when) in heard.items():
    if now - when > patience:
      _tell(f"process {number} has given no sign of life for {patience:g} s")
      return


def _tell(reason: str) -> bool:
  """Tells all processes why the job ends; returns whether this was the first reason."""
  try:
    _client().key_value_set(_FAILED, reason)
  except Exception:  # There is one, or nobody to tell.
    return False
  return True


def _give_up(reason: str) -> None:
  """Ends this process, unless it is ending by itself.

  Its main thread may be in a collective operation that will never end.
  """
  global _reason
  _reason = reason
  # It may be about to tell its own reason.
  if _ending.wait(2.0):
    return
  line = f"fidelity_jax: {reason}: everything up to the last checkpoint is saved, "
  print(f"{line}run the same command again to go on.", file=streams.user())
  os._exit(1)


def leave(line: str | None) -> str | None:
  """Ends the joint work.

  Args:
    line: what this process failed with, None if it did not.

  Returns:
    What to say of it, None if the first process says it.
  """
  if _count == 1:
    return line
  if line is None:
    _ending.set()
    import jax

    jax.distributed.shutdown()
    return None
  told = _tell(f"process {_index} failed: {line.rstrip('.')}")
  if not told and not first():
    # The first reason is the cause, and is told by the thread that watches.
    time.sleep(3.0)
  _ending.set()
  if first():
    # The others read the reason from here.
    time.sleep(3.0)
  return line if first() else f"process {_index}: {line}"


def lost(error: BaseException) -> bool:
  """Returns whether a failure is that of another process; waits until that is known.

  A collective operation fails, at once or after a while, if a process is gone.

  Args:
    error: what this process failed with.
  """
  if _count == 1 or isinstance(error, errors.UsageError | errors.RunError):
    return False
  text = f"{type(error).__name__} {error}"
  if not any(word in text for word in ("Gloo", "UNAVAILABLE", "NCCL", "ABORTED")):
    return False
  # The thread that watches ends the process as soon as it knows.
  time.sleep(2 * _patience() + 5)
  return True
