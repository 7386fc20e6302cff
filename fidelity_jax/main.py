r"""Runs an experiment.

  python -m fidelity_jax.main --config=configs/oracle.py:demo --workdir=DIR \
    [--config.any.field=value ...]

Exit status: 0 if all is done, 1 if something failed, 2 if the command or a config is
wrong, 143 after SIGTERM and 130 after SIGINT (everything is saved; the same command
resumes).
"""

import os
import sys

from absl import app, flags
from ml_collections import config_flags

from fidelity_jax import errors

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Path of an experiment's config, such as configs/oracle.py:demo."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Directory for stages, results and pictures; made where absent."
)


def _fail(status: int, message: object) -> None:
  print(f"fidelity_jax: {' '.join(str(message).split())}", file=sys.stderr)
  # Worker threads of JAX, Orbax and Grain must not hold up or spoil the exit.
  sys.stderr.flush()
  sys.stdout.flush()
  os._exit(status)


def _parse(arguments: list[str]) -> list[str]:
  """Parses flags; what a user can get wrong ends in one line and status 2."""
  try:
    rest = flags.FLAGS(arguments)
    if len(rest) > 1:
      raise errors.UsageError(f"unexpected argument {rest[1]!r}.")
    for flag in ("config", "workdir"):
      if flags.FLAGS[flag].value is None:
        raise errors.UsageError(
          f"--{flag} is missing: python -m fidelity_jax.main "
          "--config=configs/oracle.py:demo --workdir=DIR"
        )
    # A config file that cannot be loaded shows at its first use.
    flags.FLAGS["config"].value.lock()
  except OSError as error:
    flag = next((a for a in arguments if a.startswith("--config=")), "--config=")
    path = flag.removeprefix("--config=").partition(":")[0]
    missing = f"config file {path!r} does not exist."
    _fail(2, error if os.path.exists(path) else missing)
  # ml_collections raises these for unknown fields and values of a wrong type.
  except (flags.Error, errors.UsageError, KeyError, TypeError, ValueError) as error:
    _fail(2, error)
  except AttributeError as error:
    _fail(2, f"the config has no such field: {error}")
  return rest


def main(arguments: list[str]) -> None:
  """Runs the experiment that the flags name."""
  del arguments
  # JAX and the libraries behind it take seconds: usage errors should not wait for them.
  from fidelity_jax import experiment, platform, signals

  platform.set_up()
  signals.install()
  try:
    experiment.run(_CONFIG.value, _WORKDIR.value)
  except errors.UsageError as error:
    _fail(2, error)
  except errors.RunError as error:
    _fail(1, error)
  except signals.Stopped as stop:
    _fail(128 + stop.number, stop)


if __name__ == "__main__":
  app.run(main, flags_parser=_parse)
