"""The command `fidelity_jax`: everything that can be done from a shell, by name."""

import importlib
import sys
from typing import NamedTuple, NoReturn

from fidelity_jax import boundary, errors


class _Command(NamedTuple):
  """A module with `main(arguments)`, imported when it is needed, and a line on it."""

  module: str
  does: str


COMMANDS = {
  "train": _Command("main", "run an experiment or a study: train, evaluate, report"),
  "predict": _Command("predict", "classify images; draw restored images and maps"),
  "restore": _Command("restore", "restore images by the denoiser alone"),
  "evaluate": _Command("evaluate_run", "evaluate a run on another labelled folder"),
  "export": _Command("export", "write networks as StableHLO, ONNX or safetensors"),
  "push": _Command("push", "upload a run or an export to Hugging Face's hub"),
  "pull": _Command("pull", "download what was pushed"),
  "port": _Command("port.__main__", "convert a PyTorch checkpoint"),
  "gallery": _Command("gallery", "draw what each degradation does to images"),
}


def main(arguments: list[str]) -> int:
  """Runs a command line; returns the exit status.

  Args:
    arguments: the name of a command, then its own arguments.
  """
  if not arguments or arguments[0] in ("-h", "--help", "help"):
    print(_help())
    return 0 if arguments else 2
  name, *rest = arguments
  if name == "--version":
    print(f"fidelity_jax {_version()}")
    return 0
  if name not in COMMANDS:
    return boundary.run(lambda: _unknown(name))
  module = importlib.import_module(f"fidelity_jax.{COMMANDS[name].module}")
  # The training command takes its own name, as in `sys.argv`.
  return module.main(["fidelity_jax train", *rest] if name == "train" else rest)


def _unknown(name: str) -> NoReturn:
  raise errors.UsageError(
    f"there is no command {name!r}; {errors.near(name, COMMANDS)}"
  )


def _help() -> str:
  lines = [f"  {name:10} {command.does}" for name, command in COMMANDS.items()]
  return "\n".join(
    [
      "usage: fidelity_jax COMMAND ...",
      "",
      "Classify degraded images with frozen, pretrained CNNs.",
      "",
      *lines,
      "",
      "fidelity_jax COMMAND --help tells more of each.",
    ]
  )


def _version() -> str:
  from fidelity_jax import __version__

  return __version__


def run() -> NoReturn:
  """The console script."""
  boundary.start()
  boundary.leave(main(sys.argv[1:]))
