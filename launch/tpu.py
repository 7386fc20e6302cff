"""Cloud TPU: one TPU VM, or a slice of several hosts by a queued resource.

On every host JAX finds the others by itself, from the TPU's metadata.
"""

import argparse
import functools
import os
import re
import shlex
import tempfile
import time

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
# States of queued resources that come to nothing, or have.
_OVER = ("FAILED", "SUSPENDING", "SUSPENDED")


def _options(parser: argparse.ArgumentParser, slice_: bool) -> None:
  parser.set_defaults(slice=slice_)
  parser.add_argument("--name", default="fidelity-jax", help="%(default)s")
  parser.add_argument("--zone", required=True, help="such as us-west4-a")
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
    UsageError: an unknown kind of TPU; hosts without a common workdir.
  """
  kind = options.type.rpartition("-")[0]
  if not re.fullmatch(r"[a-z0-9]+-\d+", options.type):
    raise errors.UsageError(f"--type={options.type}: a type is KIND-SIZE: v5litepod-8.")
  if not options.runtime:
    errors.check_choice("kind of TPU", kind, _RUNTIMES)
    options.runtime = _RUNTIMES[kind]
  place = commands.workdir(arguments)
  if options.slice and "run" in options.steps and "://" not in place:
    raise errors.UsageError(
      f"--workdir={place}: the hosts of a slice share no disk; use "
      "--workdir=gs://BUCKET/DIR."
    )
  if options.restarts and "run" in options.steps and "://" not in place:
    raise errors.UsageError(
      f"--workdir={place}: what is on a preempted machine is lost; use "
      "--workdir=gs://BUCKET/DIR, or --restarts=0."
    )


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
  ends = [f"--accelerator-type={options.type}", *["--spot"] * options.spot]
  ends += options.create_flag
  if not options.slice:
    version = f"--version={options.runtime}"
    shell.run(*_gcloud(options, "tpu-vm", "create", options.name, version, *ends))
    return
  ends = [f"--node-id={options.name}", f"--runtime-version={options.runtime}", *ends]
  shell.run(*_gcloud(options, "queued-resources", "create", options.name, *ends))
  _wait(options, shell)


def _state(options: argparse.Namespace, shell: Shell) -> str:
  """Returns the state of the request for a slice, or of a VM; "" if it is gone."""
  if options.slice:
    words = [
      "queued-resources",
      "describe",
      options.name,
      "--format=value(state.state)",
    ]
    return shell.read(*_gcloud(options, *words), dry="ACTIVE") or ""
  words = ["tpu-vm", "describe", options.name, "--format=value(state)"]
  return shell.read(*_gcloud(options, *words), dry="READY") or ""


def _wait(options: argparse.Namespace, shell: Shell) -> None:
  """Waits until a slice has been given.

  Raises:
    RunError: it will not be, or was not in time.
  """
  until, unknown = time.monotonic() + 3600 * options.wait_hours, 0
  while (state := _state(options, shell)) != "ACTIVE":
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


def _set_up(options: argparse.Namespace, arguments: list[str], shell: Shell) -> None:
  """Copies this directory's code to all hosts and installs it there."""
  with tempfile.TemporaryDirectory() as place:
    archive = os.path.join(place, f"{_REMOTE}.tar.gz")
    words = ["tar", "--exclude=__pycache__", "-C", str(ROOT), "-czf", archive]
    shell.run(*words, *_FILES)
    target = f"{options.name}:{_REMOTE}.tar.gz"
    shell.run(*_gcloud(options, "tpu-vm", "scp", archive, target, "--worker=all"))
  steps = [
    f"mkdir -p {_REMOTE}",
    f"tar -xzf {_REMOTE}.tar.gz -C {_REMOTE}",
    f"{_REMOTE}/launch/setup.sh tpu",
  ]
  shell.run(*_ssh(options, " && ".join(steps)))


def _run(options: argparse.Namespace, arguments: list[str], shell: Shell) -> None:
  """Runs the job on all hosts, and anew on other machines after a preemption.

  Raises:
    RunError: it failed, or was preempted too often.
  """
  words = ["launch/job.sh", options.module, *arguments]
  ssh = _ssh(options, f"cd {_REMOTE} && {shlex.join(words)}")
  for left in range(options.restarts, -1, -1):
    try:
      status = shell.status(*ssh)
    except signals.Stopped:
      _stop(options, arguments, shell)
      raise
    if not status:
      return
    if not _preempted(options, shell):
      raise errors.RunError(
        f"the job ended with status {status}. If only the connection was lost, the "
        "step run goes on where it was; delete ends the costs."
      )
    if not left:
      raise errors.RunError(
        f"{options.name} was preempted: delete, create, set up, run."
      )
    print(f"{options.name} was preempted; {left} restarts are left.", flush=True)
    # A preempted machine cannot be started again, only made anew.
    _delete(options, arguments, shell)
    _create(options, arguments, shell)
    _set_up(options, arguments, shell)


def _preempted(options: argparse.Namespace, shell: Shell) -> bool:
  """Returns whether the machines are gone, which their state may say a little late."""
  for look in range(5):
    state = _state(options, shell)
    if state in ("PREEMPTED", "TERMINATED", *_OVER):
      return True
    if look < 4:
      time.sleep(options.poll)
  return False


def _stop(options: argparse.Namespace, arguments: list[str], shell: Shell) -> None:
  shell.status(*_ssh(options, f'kill -TERM "$(cat {_REMOTE}/job.pid)"'))


def _show(options: argparse.Namespace, arguments: list[str], shell: Shell) -> None:
  print(_state(options, shell) or "there is none")


def _fetch(options: argparse.Namespace, arguments: list[str], shell: Shell) -> None:
  place = commands.workdir(arguments)
  if options.slice or place.startswith("gs://"):
    commands.fetch(options, arguments, shell)
    return
  if not place:
    raise errors.UsageError("fetch needs -- --workdir=DIR, as given to run.")
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
  "setup": _set_up,
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
)
SLICE = Launcher(
  about="A Cloud TPU slice of several hosts, by a queued resource.",
  options=functools.partial(_options, slice_=True),
  steps=_STEPS | {"wait": lambda options, arguments, shell: _wait(options, shell)},
  default=("create", "setup", "run"),
  check=_check,
)
