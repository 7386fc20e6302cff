"""What the tests of launch/ share: stand-ins on PATH, and the command itself."""

import contextlib
import functools
import io
import json
import os
import pathlib
import runpy
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from fidelity_jax import errors

PLACE = pathlib.Path(__file__).parent / "launch"
NAMES = {"squeue": "scontrol", "scancel": "scontrol"}


class StandIns:
  """Programs that take the place of clouds' and clusters' own.

  Attributes:
    place: a directory of this test.
    environment: variables with which they are found, and nothing else by their names.
  """

  def __init__(self, place: pathlib.Path):
    self.place = place
    folder = place / "bin"
    folder.mkdir()
    for name in "gcloud kubectl sbatch srun scontrol squeue scancel".split():
      program = PLACE / f"{NAMES.get(name, name)}.py"
      path = folder / name
      path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "{program}" "$@"\n')
      path.chmod(0o755)
    self.environment = os.environ | {
      "PATH": f"{folder}:{os.environ['PATH']}",
      "STANDIN": str(place),
      "PYTHONPATH": f"{PLACE}:{ROOT}",
    }

  def answer(self, answers: dict[str, list]) -> None:
    """Says what calls of commands give, one after the other (launch/gcloud.py)."""
    (self.place / "answers.json").write_text(json.dumps(answers))

  def calls(self) -> list[dict]:
    """Returns what was called so far."""
    path = self.place / "calls.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def launch(*words, check=0, program=None, **options) -> subprocess.CompletedProcess:
  """Runs launch/run to its end, by a Python that finds no packages."""
  program = program or [sys.executable, "-S", "-E", str(ROOT / "launch" / "run")]
  done = subprocess.run(
    [*program, *map(str, words)], capture_output=True, text=True, timeout=300, **options
  )
  assert done.returncode == check, done.stdout + done.stderr
  return done


def here(*words) -> str:
  """Runs launch/run in this process, which is quick; for what starts no process.

  Returns:
    What it prints.

  Raises:
    UsageError: it refuses the words.
  """
  output = io.StringIO()
  with contextlib.redirect_stdout(output):
    _loaded()["main"]([*map(str, words)])
  return output.getvalue()


@functools.cache
def _loaded() -> dict:
  return runpy.run_path(str(ROOT / "launch" / "run"))


def refusal(*words) -> str:
  """Returns the line with which launch/run refuses words."""
  with pytest.raises(errors.UsageError) as caught:
    here(*words)
  return str(caught.value)


def nothing_installed() -> dict[str, str]:
  """Returns an environment in which none of the clouds' tools is there."""
  return {"PATH": "/nowhere", "HOME": "/nowhere"}


def printed(done: subprocess.CompletedProcess | str) -> list[str]:
  """Returns the commands that a launcher printed."""
  text = done if isinstance(done, str) else done.stdout
  return [line[2:] for line in text.splitlines() if line.startswith("+ ")]


def tool(name: str) -> str:
  """Returns the path of a program of this environment, or skips the test."""
  beside = pathlib.Path(sys.executable).parent / name
  found = str(beside) if beside.exists() else shutil.which(name)
  if found is None:
    pytest.skip(f"{name} is not installed: pip install '.[test]'")
  return found
