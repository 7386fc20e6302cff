"""What all launchers share: steps, and commands that are printed before they run."""

import argparse
import dataclasses
import os
import pathlib
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping

from fidelity_jax import boundary, errors, signals

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Where to get what a command needs.
_TOOLS = {
  "gcloud": "https://cloud.google.com/sdk/docs/install",
  "kubectl": "gcloud components install kubectl",
  "sbatch": "run this on a login node of the cluster",
  "squeue": "run this on a login node of the cluster",
  "scancel": "run this on a login node of the cluster",
}


class Shell:
  """Runs commands, or only prints them."""

  def __init__(self, dry_run: bool):
    self.dry_run = dry_run
    # Whether anything ran.
    self.ran = False

  def status(self, *words: str, text: str | None = None) -> int:
    """Prints a command and runs it.

    Args:
      words: program and arguments.
      text: its standard input, printed too.

    Returns:
      The exit status; 0 if nothing is to be run.

    Raises:
      RunError: there is no such program.
    """
    print("+", shlex.join(words), flush=True)
    if text is not None:
      print(text, end="", flush=True)
    if self.dry_run:
      return 0
    self._begin(words[0])
    return subprocess.run(words, input=text, text=True).returncode

  def run(self, *words: str, text: str | None = None) -> None:
    """Does the same for a command that has to succeed.

    Raises:
      RunError: it did not.
    """
    if status := self.status(*words, text=text):
      raise errors.RunError(
        f"{' '.join(words[:5])} ... ended with status {status}: what it printed above "
        "says why."
      )

  def read(self, *words: str, dry: str | None) -> str | None:
    """Prints a command, runs it and returns what it prints.

    Args:
      words: program and arguments.
      dry: what to return if nothing is to be run.

    Returns:
      The output without white space around it, or None if the command failed.
    """
    print("+", shlex.join(words), flush=True)
    if self.dry_run:
      return dry
    self._begin(words[0])
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
    return None if done.returncode else done.stdout.strip()

  def _begin(self, program: str) -> None:
    if shutil.which(program) is None:
      known = _TOOLS.get(program, "install it")
      raise errors.RunError(f"there is no {program} here: {known}. Or try --dry_run.")
    self.ran = True


# Steps after which machines may be there.
_COSTLY = {"create", "wait", "setup", "run", "stop", "delete"}

Step = Callable[[argparse.Namespace, list[str], Shell], None]


@dataclasses.dataclass(frozen=True)
class Launcher:
  """A way to start jobs.

  Attributes:
    about: a line for --help.
    options: adds the options to a parser.
    steps: what can be asked for, by name.
    default: the steps if none is.
    check: looks at options and arguments of main before anything runs.
    place: options that say what the step delete deletes; none if nothing costs.
  """

  about: str
  options: Callable[[argparse.ArgumentParser], None]
  steps: Mapping[str, Step]
  default: tuple[str, ...]
  check: Callable[[argparse.Namespace, list[str]], None] = lambda options, rest: None
  place: tuple[str, ...] = ()


def start(name: str, launcher: Launcher, words: list[str]) -> None:
  """Runs the steps that a command line names.

  Args:
    name: of the launcher.
    launcher: the launcher.
    words: the command line after its name.

  Raises:
    UsageError: something in it is wrong; nothing has run.
  """
  own, rest = words, []
  if "--" in words:
    place = words.index("--")
    own, rest = words[:place], words[place + 1 :]
  parser = boundary.Parser(
    prog=f"launch/run {name}", description=launcher.about, allow_abbrev=False
  )
  known = " ".join(launcher.steps)
  parser.add_argument(
    "steps", nargs="*", metavar="STEP", help=f"{known} ({' '.join(launcher.default)})"
  )
  parser.add_argument("--dry_run", action="store_true", help="only print the commands")
  parser.add_argument(
    "--module",
    default="fidelity_jax.main",
    help="what to run, as for python -m (%(default)s)",
  )
  launcher.options(parser)
  options = parser.parse_intermixed_args(own)
  options.steps = options.steps or list(launcher.default)
  for step in options.steps:
    errors.check_choice("step", step, launcher.steps)
  if {"run", "submit"} & set(options.steps) and not rest:
    raise errors.UsageError(
      f"no arguments of main: launch/run {name} ... -- --config=configs/oracle.py:demo "
      "--workdir=DIR"
    )
  launcher.check(options, rest)
  signals.interrupt("while it waited for a step", "what was made stays")
  shell = Shell(options.dry_run)
  begun: set[str] = set()
  try:
    for step in options.steps:
      begun.add(step)
      launcher.steps[step](options, rest, shell)
      if step == "delete":
        begun.clear()
  finally:
    if launcher.place and shell.ran and begun & _COSTLY:
      flags = [f"--{k}={v}" for k in launcher.place if (v := getattr(options, k))]
      command = shlex.join(["launch/run", name, "delete", *flags])
      print(f"What was made stays and costs until: {command}", flush=True)


def workdir(arguments: list[str]) -> str:
  """Returns the workdir that arguments of main name, or ""."""
  found = ""
  for index, word in enumerate(arguments):
    flag, equals, value = word.partition("=")
    if flag in ("--workdir", "-workdir"):
      found = value if equals else "".join(arguments[index + 1 : index + 2])
  return found


def check_fetch(arguments: list[str], bucket: bool) -> None:
  """Checks that arguments of main name a workdir to fetch.

  Args:
    arguments: of main.
    bucket: whether it has to be on gs://.

  Raises:
    UsageError: they name none, or another one.
  """
  place = workdir(arguments)
  if not place or (bucket and not place.startswith("gs://")):
    example = "gs://BUCKET/DIR" if bucket else "DIR, as given to run"
    raise errors.UsageError(
      "fetch needs the arguments of main that name the workdir: launch/run ... fetch "
      f"-- --workdir={example}"
    )


def fetch(options: argparse.Namespace, arguments: list[str], shell: Shell) -> None:
  """Copies a workdir on gs:// into `options.to`, under its own name."""
  place = workdir(arguments).rstrip("/")
  target = os.path.join(options.to, place.rpartition("/")[2])
  if not shell.dry_run:
    os.makedirs(target, exist_ok=True)
  shell.run("gcloud", "storage", "rsync", "--recursive", place, target)


def zone(text: str) -> str:
  """Returns the name of a zone of Google Cloud, for argparse.

  Raises:
    ArgumentTypeError: it is none; a region would give machines in three zones.
  """
  if not re.fullmatch(r"[a-z]+-[a-z]+\d+-[a-z]", text):
    raise argparse.ArgumentTypeError(f"{text!r} is no zone, such as us-west4-a")
  return text


def positive(text: str) -> int:
  """Returns a whole number above zero, for argparse.

  Raises:
    ArgumentTypeError: it is none.
  """
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
  return int(text)


def natural(text: str) -> int:
  """The same, zero included."""
  if not text.isdecimal():
    raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0")
  return int(text)
