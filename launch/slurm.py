"""SLURM: a batch script whose processes JAX joins by the variables that srun sets."""

import argparse
import os
import re
import sys

from fidelity_jax import errors
from launch import commands
from launch.commands import ROOT, Launcher, Shell


def _options(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--name", default="fidelity-jax", help="%(default)s")
  parser.add_argument(
    "--nodes", type=commands.positive, default=2, help="how many (%(default)s)"
  )
  parser.add_argument(
    "--gpus_per_node",
    type=commands.natural,
    default=8,
    help="one process each; 0: one process per node, on its CPUs (%(default)s)",
  )
  parser.add_argument(
    "--cpus_per_task",
    type=commands.positive,
    help="cores of each process, to read images with; often 1, if not given",
  )
  parser.add_argument("--time", default="24:00:00", help="limit (%(default)s)")
  parser.add_argument("--partition", help="the cluster's own, if not given")
  parser.add_argument("--account", help="yours, if not given")
  parser.add_argument(
    "--sbatch_flag",
    action="append",
    default=[],
    metavar="FLAG",
    help="a further flag for sbatch, such as --sbatch_flag=--mem=0",
  )
  parser.add_argument(
    "--requeues",
    type=commands.natural,
    default=20,
    help="how often to go on after the time limit or a preemption (%(default)s)",
  )
  software = parser.add_mutually_exclusive_group()
  own = ROOT / ".venv" / "bin" / "python"
  software.add_argument(
    "--python", default=str(own if own.exists() else sys.executable), help="%(default)s"
  )
  software.add_argument("--image", help="run in this container image, by apptainer")
  parser.add_argument("--job", help="number of a job, for status and stop")


def _check(options: argparse.Namespace, arguments: list[str]) -> None:
  """Looks at the options.

  Raises:
    UsageError: stop without a job; a limit that is none.
  """
  if "stop" in options.steps and not (options.job or "").isdecimal():
    raise errors.UsageError(
      "stop needs --job=NUMBER: launch/run slurm status has them."
    )
  if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", options.time):
    raise errors.UsageError(f"--time={options.time}: write 24:00:00 or 2-12:00:00.")


def _submit(options: argparse.Namespace, arguments: list[str], shell: Shell) -> None:
  variables = {
    "FIDELITY_JAX_MODULE": options.module,
    "FIDELITY_JAX_PYTHON": options.python,
    "FIDELITY_JAX_REQUEUES": str(options.requeues),
  }
  if options.image:
    variables["FIDELITY_JAX_IMAGE"] = options.image
  flags = [
    f"--job-name={options.name}",
    f"--nodes={options.nodes}",
    # JAX gives the process of number i on a node the GPU of number i.
    f"--ntasks-per-node={options.gpus_per_node or 1}",
    *[f"--gpus-per-node={options.gpus_per_node}"] * bool(options.gpus_per_node),
    *[f"--cpus-per-task={options.cpus_per_task}"] * bool(options.cpus_per_task),
    f"--time={options.time}",
    *[f"--partition={options.partition}"] * bool(options.partition),
    *[f"--account={options.account}"] * bool(options.account),
    *options.sbatch_flag,
  ]
  script = os.path.join(os.path.dirname(__file__), "slurm.sbatch")
  settings = [f"{name}={value}" for name, value in variables.items()]
  shell.run("env", *settings, "sbatch", *flags, script, *arguments)


def _show(options: argparse.Namespace, arguments: list[str], shell: Shell) -> None:
  which = f"--jobs={options.job}" if options.job else f"--name={options.name}"
  shell.run("squeue", which)


def _stop(options: argparse.Namespace, arguments: list[str], shell: Shell) -> None:
  # To all processes SIGTERM, and after the cluster's KillWait SIGKILL.
  shell.run("scancel", options.job)


LAUNCHER = Launcher(
  about="A job of several GPU nodes under SLURM.",
  options=_options,
  steps={"submit": _submit, "status": _show, "stop": _stop},
  default=("submit",),
  check=_check,
)
