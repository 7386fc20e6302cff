"""Cloud TPU: one TPU VM, or a slice of several hosts by a queued resource.

On every host JAX finds the others by itself, from the TPU's metadata.
"""

import argparse
import contextlib
import functools
import json
import os
import re
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from fidelity_jax import errors, signals
from launch import commands
from launch.commands import ROOT, Launcher, Shell

# The software for JAX by kind of TPU, from
# https://docs.cloud.google.com/tpu/docs/runtimes, read on 2026-11-27.
_RUNTIMES = {
  "v6e": "v2-alpha-tpuv6e",
  "v5p": "v2-alpha-tpuv5",
  "v5litepod": "v2-alpha-tpuv5-lite",
  "v4": "tpu-ubuntu2204-base",
  "v3": "tpu-ubuntu2204-base",
  "v2": "tpu-ubuntu2204-base",
}
# What goes to the hosts.
_FILES = (
  "README.md LICENSE pyproject.toml constraints.txt configs fidelity_jax launch".split()
)
_REMOTE = "fidelity_jax"
# States of queued resources that come to nothing, or have; and of machines that are
# gone, or go.
_OVER = ("FAILED", "SUSPENDING", "SUSPENDED")
_GONE = ("PREEMPTED", "TERMINATED", "FAILED", "SUSPENDED")
# A new host does not let anybody in at once.
_TRIES = 3


def _options(parser: argparse.ArgumentParser, slice_: bool) -> None:
  parser.set_defaults(slice=slice_)
  parser.add_argument("--name", default="fidelity-jax", help="%(default)s")
  parser.add_argument(
    "--zone", type=commands.zone, required=True, help="such as us-west4-a"
  )
  parser.add_argument("--project", help="gcloud's own, if not given")
  parser.add_argument(
    "--type",
    default="v5litepod-16" if slice_ else "v5litepod-8",
    help="accelerator type (%(default)s)",
  )
  parser.add_argument("--runtime", help="software version; found from the type")
  parser.add_argument("--spot", action="store_true", help="cheaper, and preempted")
  parser.add_argument(
    "--create_flag",
    action="append",
    default=[],
    metavar="FLAG",
    help="a further flag for gcloud's create, such as --create_flag=--network=NAME",
  )
  parser.add_argument(
    "--restarts",
    type=commands.natural,
    default=20 if slice_ else 0,
    help="how often to start anew after a preemption (%(default)s)",
  )
  parser.add_argument(
    "--poll",
    type=commands.natural,
    default=30,
    help="seconds between looks at a state (%(default)s)",
  )
  parser.add_argument(
    "--wait_hours",
    type=commands.positive,
    default=24,
    help="how long to wait for machines (%(default)s)",
  )
  parser.add_argument(
    "--to", default="fetched", help="where fetch writes (%(default)s)"
  )


def _check(options: argparse.Namespace, arguments: list[str]) -> None:
  """Looks at what can be known before machines are paid for.

  Raises:
    UsageError: an unknown kind of TPU, or one of several hosts for one VM; a workdir
      that is no use there.
  """
  kind, _, size = options.type.rpartition("-")
  if not re.fullmatch(r"[a-z0-9]+-\d+", options.type):
    raise errors.UsageError(f"--type={options.type}: a type is KIND-SIZE: v5litepod-8.")
  if not options.runtime:
    errors.check_choice("kind of TPU", kind, _RUNTIMES)
  # Chips of v5litepod and v6e; of the others cores, two per chip.
  if not options.slice and int(size) > 8:
    raise errors.UsageError(
      f"--type={options.type} has several hosts: launch/run tpu-slice is for those."
    )
  place = commands.workdir(arguments)
  bucket = place.startswith("gs://")
  if "run" in options.steps and not bucket and (options.slice or options.restarts):
    why = "what is on a preempted machine is lost; --restarts=0, or"
    if options.slice:
      why = "the hosts of a slice share no disk;"
    raise errors.UsageError(f"--workdir={place}: {why} use --workdir=gs://BUCKET/DIR.")
  if "fetch" in options.steps:
    commands.check_fetch(arguments, bucket=options.slice)


def _gcloud(options: argparse.Namespace, *words: str) -> list[str]:
  """Returns a command on this zone and project that asks nothing."""
  ends = [f"--zone={options.zone}"]
  if options.project:
    ends.append(f"--project={options.project}")
  return ["gcloud", "compute", "tpus", *words, *ends, "--quiet"]


def _ssh(options: argparse.Namespace, command: str) -> list[str]:
  """Returns the command that runs another on all hosts at once."""
  return _gcloud(
    options, "tpu-vm", "ssh", options.name, "--worker=all", f"--command={command}"
  )


def _create(options: argparse.Namespace, arguments: list[str], shell: Shell) -> None:
  runtime = options.runtime or _RUNTIMES[options.type.rpartition("-")[0]]
  ends = [f"--accelerator-type={options.type}", *["--spot"] * options.spot]
  ends += options.create_flag
  if not options.slice:
    version = f"--version={runtime}"
    shell.run(*_gcloud(options, "tpu-vm", "create", options.name, version, *ends))
    return
  ends = [f"--node-id={options.name}", f"--runtime-version={runtime}", *ends]
  with _request():
    shell.run(*_gcloud(options, "queued-resources", "create", options.name, *ends))
  _wait(options, shell)


@contextlib.contextmanager
def _request() -> Iterator[None]:
  """Has a stop say what is left of a request for a slice."""
  try:
    yield
  except signals.Stopped as stopped:
    stopped.args = (
      f"stopped by {signal.Signals(stopped.number).name} while it waited: the request "
      "stands and costs once granted. Go on with steps wait setup run, or delete it.",
    )
    raise


def _look(options: argparse.Namespace, shell: Shell) -> dict[str, Any]:
  """Returns what is known of the request for a slice, or of a VM; {} if nothing is."""
  kind = "queued-resources" if options.slice else "tpu-vm"
  words = [kind, "describe", options.name, "--format=json"]
  dry = '{"state": {"state": "ACTIVE"}}' if options.slice else '{"state": "READY"}'
  return json.loads(shell.read(*_gcloud(options, *words), dry=dry) or "{}")


def _state(found: dict[str, Any]) -> str:
  """Returns the state, "" if it is not known."""
  state = found.get("state", "")
  return state if isinstance(state, str) else state.get("state", "")


@_request()
def _wait(options: argparse.Namespace, shell: Shell) -> None:
  """Waits until a slice has been given.

  Raises:
    RunError: it will not be, or was not in time.
  """
  until, unknown = time.monotonic() + 3600 * options.wait_hours, 0
  while (state := _state(_look(options, shell))) != "ACTIVE":
    print(f"{options.name}: {state or 'unknown'}", flush=True)
    unknown = 0 if state else unknown + 1
    if unknown == 5:
      raise errors.RunError(
        f"nothing is known of the queued resource {options.name}: what gcloud printed "
        "above says why."
      )
    if state in _OVER:
      raise errors.RunError(
        f"the queued resource {options.name} is {state}: delete it, and ask for "
        "another type, another zone, or without --spot."
      )
    if time.monotonic() > until:
      raise errors.RunError(
        f"no {options.type} in {options.wait_hours} h; the request stands. Wait on "
        "with the step wait, or delete it."
      )
    time.sleep(options.poll)


def _prepare(options: argparse.Namespace, arguments: list[str], shell: Shell) -> None:
  # Where `run` follows, it sets up, and anew if the machines are taken meanwhile.
  if "run" not in options.steps:
    _set_up(options, arguments, shell)


def _set_up(options: argparse.Namespace, arguments: list[str], shell: Shell) -> None:
  """Copies this directory's code to all hosts and installs it there.

  Raises:
    RunError: that failed several times.
  """
  for left in range(_TRIES - 1, -1, -1):
    try:
      _set_up_once(options, shell)
      return
    except errors.RunError as error:
      if not left:
        raise
      print(f"set-up failed ({error}); {left} tries are left.", flush=True)
      time.sleep(options.poll)


def _set_up_once(options: argparse.Namespace, shell: Shell) -> None:
  with tempfile.TemporaryDirectory() as place:
    archive = os.path.join(place, f"{_REMOTE}.tar.gz")
    words = ["tar", "--exclude=__pycache__", "-C", str(ROOT), "-czf", archive]
    shell.run(*words, *_FILES)
    target = f"{options.name}:{_REMOTE}.tar.gz"
    shell.run(*_gcloud(options, "tpu-vm", "scp", archive, target, "--worker=all"))
  steps = [
    f"mkdir -p {_REMOTE}",
    # Modules that are gone here must not be found there.
    f"rm -rf {_REMOTE}/configs {_REMOTE}/fidelity_jax {_REMOTE}/launch",
    f"tar -xzf {_REMOTE}.tar.gz -C {_REMOTE}",
    f"{_REMOTE}/launch/setup.sh tpu",
  ]
  shell.run(*_ssh(options, " && ".join(steps)))


def _job(options: argparse.Namespace, *words: str) -> list[str]:
  """Returns the command that has job.sh do something on all hosts."""
  return _ssh(options, f"cd {_REMOTE} && {shlex.join(['launch/job.sh', *words])}")


def _run(options: argparse.Namespace, arguments: list[str], shell: Shell) -> None:
  """Runs the job on all hosts, and anew on other machines after a preemption.

  Raises:
    RunError: it was preempted too often, or the connection broke.
    SystemExit: it failed, with its status.
  """
  ready = "setup" not in options.steps
  for left in range(options.restarts, -1, -1):
    try:
      gone = _attempt(options, arguments, shell, ready)
    except signals.Stopped:
      print(
        "asking the job to save and end; a second signal does not wait.", flush=True
      )
      shell.status(*_job(options, "stop"))
      raise
    if gone is None:
      return
    if not left:
      raise errors.RunError(
        f"{options.name} was preempted: delete, create, set up, run."
      )
    print(f"{options.name} was preempted; {left} restarts are left.", flush=True)
    _take_over(options, gone)
    # It cannot be started again.
    _delete(options, arguments, shell)
    _create(options, arguments, shell)
    ready = False


def _attempt(
  options: argparse.Namespace, arguments: list[str], shell: Shell, ready: bool
) -> dict[str, Any] | None:
  """Runs the job once, on machines that are set up first if they are not ready.

  Returns:
    None if it ended well; what is known of the machines if they were preempted.
  """
  if not ready:
    try:
      _set_up(options, arguments, shell)
    except errors.RunError:
      if gone := _preempted(options, shell):
        return gone
      raise
  status = shell.status(*_job(options, "run", options.module, *arguments))
  if not status:
    return None
  # ssh's own, or SIGTERM at shutdown; 1 also of hosts that missed one that was gone.
  lost = status in (255, 143) or (status == 1 and options.slice)
  if lost and (gone := _preempted(options, shell)):
    return gone
  if status == 255:
    raise errors.RunError(
      "the connection broke: the step run goes on where it was; delete ends the costs."
    )
  print(f"fidelity_jax: the job ended with status {status}.", file=sys.stderr)
  raise SystemExit(status)


def _preempted(options: argparse.Namespace, shell: Shell) -> dict[str, Any] | None:
  """Returns what is known of machines that are gone, None if they are there.

  Their state may say it a little late, and they have to be gone to be deleted.
  """
  for look in range(60):
    found = _look(options, shell)
    if _state(found) in _GONE:
      return found
    if look >= 4 and _state(found) != "SUSPENDING":
      break
    time.sleep(options.poll)
  return None


def _take_over(options: argparse.Namespace, found: dict[str, Any]) -> None:
  """Makes the next machines like those that there were, whatever today's flags are."""
  node = found
  if options.slice:
    specs = found.get("tpu", {}).get("nodeSpec") or [{}]
    node = specs[0].get("node", {})
  options.type = node.get("acceleratorType", options.type)
  options.runtime = node.get("runtimeVersion", options.runtime)
  spot = "spot" in found or node.get("schedulingConfig", {}).get("spot", False)
  options.spot = options.spot or spot


def _stop(options: argparse.Namespace, arguments: list[str], shell: Shell) -> None:
  """Has the job save and end, and waits for that."""
  shell.run(*_job(options, "stop"))


def _show(options: argparse.Namespace, arguments: list[str], shell: Shell) -> None:
  state = _state(_look(options, shell))
  if not state:
    raise errors.RunError(
      f"the state of {options.name} is not known: what gcloud printed above says why."
    )
  print(state)


def _fetch(options: argparse.Namespace, arguments: list[str], shell: Shell) -> None:
  place = commands.workdir(arguments)
  if place.startswith("gs://"):
    commands.fetch(options, arguments, shell)
    return
  if not shell.dry_run:
    os.makedirs(options.to, exist_ok=True)
  # Where the job ran from, unless it is an absolute path.
  source = f"{options.name}:{place if place.startswith('/') else f'{_REMOTE}/{place}'}"
  words = ["tpu-vm", "scp", source, options.to, "--recurse", "--worker=0"]
  shell.run(*_gcloud(options, *words))


def _delete(options: argparse.Namespace, arguments: list[str], shell: Shell) -> None:
  if options.slice:
    words = ["queued-resources", "delete", options.name, "--force"]
  else:
    words = ["tpu-vm", "delete", options.name]
  shell.run(*_gcloud(options, *words))


_STEPS = {
  "create": _create,
  "setup": _prepare,
  "run": _run,
  "fetch": _fetch,
  "status": _show,
  "stop": _stop,
  "delete": _delete,
}

VM = Launcher(
  about="One Cloud TPU VM.",
  options=functools.partial(_options, slice_=False),
  steps=_STEPS,
  default=("create", "setup", "run"),
  check=_check,
  place=("name", "zone", "project"),
)
SLICE = Launcher(
  about="A Cloud TPU slice of several hosts, by a queued resource.",
  options=functools.partial(_options, slice_=True),
  steps=_STEPS | {"wait": lambda options, arguments, shell: _wait(options, shell)},
  default=("create", "setup", "run"),
  check=_check,
  place=("name", "zone", "project"),
)
