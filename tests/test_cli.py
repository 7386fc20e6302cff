"""The command `fidelity_jax`."""

import importlib
import os
import subprocess
import sys

import pytest
from conftest import one_line

import fidelity_jax
from fidelity_jax import cli


def _run(*arguments, **kwargs):
  program = [sys.executable, "-m", "fidelity_jax", *arguments]
  return subprocess.run(program, capture_output=True, text=True, **kwargs)


def test_help_names_every_command_and_imports_little():
  result = _run("--help")
  assert result.returncode == 0 and not result.stderr
  for name, command in cli.COMMANDS.items():
    assert f"  {name} " in result.stdout and command.does in result.stdout
  program = "import sys; from fidelity_jax import cli; cli.main(['--help']); "
  program += "print(sorted(m for m in ('jax', 'numpy', 'absl') if m in sys.modules))"
  result = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True
  )
  assert result.stdout.endswith("[]\n")
  assert _run().returncode == 2


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name, capsys):
  module = importlib.import_module(f"fidelity_jax.{cli.COMMANDS[name].module}")
  assert callable(module.main)
  assert cli.main([name, "--help"]) == 0
  shown = capsys.readouterr().out
  assert "fidelity_jax" in shown and len(shown) > 200


def test_what_is_no_command_is_refused():
  result = _run("evaluat", "x")
  assert result.returncode == 2
  assert "did you mean 'evaluate'?" in one_line(result.stderr)


def test_version():
  assert _run("--version").stdout == f"fidelity_jax {fidelity_jax.__version__}\n"


def test_the_console_script_is_installed():
  script = os.path.join(os.path.dirname(sys.executable), "fidelity_jax")
  result = subprocess.run([script, "--version"], capture_output=True, text=True)
  assert result.stdout == f"fidelity_jax {fidelity_jax.__version__}\n"
  wrong = subprocess.run([script, "predict"], capture_output=True, text=True)
  assert wrong.returncode == 2 and "RUN" in one_line(wrong.stderr)


def test_training_is_a_command_too(tmp_path):
  result = _run("train", "--config=configs/oracle.py:scratch", cwd=tmp_path)
  assert result.returncode == 2 and "--workdir is missing" in one_line(result.stderr)
