r"""Runs an experiment, or a study of several.

  python -m fidelity_jax.main --config=configs/oracle.py:demo --workdir=DIR \
    [--config.any.field=value ...] [--dry_run [--memory]]

--config=FILE[:VARIANT]: an experiment's or a study's config; those of configs/ are also
found where the package is installed. Any field can be set, in parents too
(--config.parents.restorer.epochs=3); None unsets a field that may be unset.
--workdir=DIR: for stages, results and pictures; made where absent.
--dry_run: print what there is to do, and about how long it takes; change nothing.
--memory: with --dry_run, compile each training step, too, and print what it needs in a
  device's memory, and what devices send each other.

Several processes, named by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
JAX_PROCESS_ID, or started by SLURM, Open MPI or on a TPU slice's hosts, work as one:
docs/launch.md.

Exit status: 0 if all is done, 1 if something failed, 2 if the command, a config or an
input is wrong, 143 after SIGTERM and 130 after SIGINT (the same command resumes).
"""

import os
import re
import shlex
import sys
import time
import traceback
from typing import TYPE_CHECKING

from fidelity_jax import boundary, errors, signals

# Libraries are imported where they are needed: usage errors and signals should not wait
# for them.
if TYPE_CHECKING:
  from ml_collections import ConfigDict

# When the command began, all but.
_BEGAN = time.perf_counter()
_CONFIGS = os.path.join(os.path.dirname(__file__), "configs")


def main(arguments: list[str]) -> int:
  """Runs the experiment that a command line names; returns the exit status.

  Args:
    arguments: as in `sys.argv`.
  """
  return boundary.run(lambda: _run(arguments))


def _run(arguments: list[str]) -> None:
  if {"--help", "-help", "-h"} & set(arguments):
    print(__doc__)
    return
  config, workdir, dry_run, memory = parse(arguments)
  from fidelity_jax import experiment, hosts, platform, timing

  signals.interrupt("while it looked at its inputs", "nothing is lost")
  hosts.join(shlex.join(arguments[1:]))
  platform.set_up()
  command = shlex.join(["python", "-m", "fidelity_jax.main", *arguments[1:]])
  timing.count_from(_BEGAN)
  experiment.run(config, workdir, command, dry_run, memory)


def parse(arguments: list[str]) -> "tuple[ConfigDict, str, bool, bool]":
  """Returns the config, with all fields set, the workdir, and whether only to plan.

  And whether to tell, then, what steps need.

  Args:
    arguments: as in `sys.argv`.

  Raises:
    UsageError: something in it is wrong.
  """
  from absl import flags
  from ml_collections import ConfigDict, config_flags
  from ml_collections.config_flags import config_path

  arguments, settings = _settings(arguments)
  arguments, file = _find_config(arguments)
  values = flags.FlagValues()
  config_flags.DEFINE_config_file(
    "config", None, "experiment's config", flag_values=values, sys_argv=arguments
  )
  # Fields of a network of the user's own have to be there before they are set.
  parser = values["config"].parser
  load = parser.parse
  parser.parse = lambda path: _with_own_fields(load(path), file, settings)
  flags.DEFINE_string("workdir", None, "directory to work in", flag_values=values)
  flags.DEFINE_bool("dry_run", False, "only print the plan", flag_values=values)
  flags.DEFINE_bool("memory", False, "and what steps need", flag_values=values)
  try:
    rest = values(arguments)
    config = values["config"].value
  except errors.UsageError:
    raise
  except SystemExit as error:
    raise errors.UsageError(
      f"config file {file} ends the program ({error.code}) instead of returning a "
      "config."
    ) from error
  except flags.Error as error:
    if "parsing config file" in str(error):
      raise errors.UsageError(_explain(error, file)) from error
    text = re.sub(r"invalid literal for int.*", "must be a whole number", str(error))
    text = re.sub(r"could not convert string to float.*", "must be a number", text)
    raise errors.UsageError(text) from error
  except Exception as error:  # Configs are programs and may raise anything.
    raise errors.UsageError(_explain(error, file)) from error
  if len(rest) > 1:
    raise errors.UsageError(f"unexpected argument {rest[1]!r}.")
  for name, value in (("config", file), ("workdir", values["workdir"].value)):
    if not value:
      raise errors.UsageError(
        f"--{name} is missing: python -m fidelity_jax.main "
        "--config=configs/oracle.py:demo --workdir=DIR"
      )
  if not isinstance(config, ConfigDict):
    raise errors.UsageError(
      f"config file {file}: get_config() returned {type(config).__name__}, not a "
      "ConfigDict."
    )
  for path, value in settings.items():
    try:
      held = config_path.get_value(path, config)
    except (KeyError, AttributeError, TypeError) as error:
      raise errors.UsageError(_explain(error, file)) from error
    if value == "None":
      if isinstance(held, ConfigDict):
        raise errors.UsageError(f"config.{path} = None: it has fields; set those.")
      config_path.set_value(path, config, None)
    elif isinstance(held, tuple) and value and value.lstrip()[:1] not in ("(", "["):
      # It would become a tuple of one.
      number = re.compile(r"[-+.\d][-+.\de]*")
      parts = [part.strip("'\" ") for part in value.split(",")]
      shown = [part if number.fullmatch(part) else repr(part) for part in parts]
      shown = ", ".join(shown) + "," * (len(shown) == 1)
      raise errors.UsageError(
        f'config.{path} = {value}: write values in brackets, as "({shown})".'
      )
  dry_run, memory = values["dry_run"].value, values["memory"].value
  if memory and not dry_run:
    raise errors.UsageError("--memory only plans: add --dry_run.")
  return config, values["workdir"].value, dry_run, memory


def _with_own_fields(
  config: "ConfigDict", file: str, settings: dict[str, str | None]
) -> "ConfigDict":
  """Adds the fields of networks of the user's own to the classifiers of a config.

  Args:
    config: as its file gives it.
    file: that file, beside which the networks may be, too.
    settings: fields that the command line sets.

  Raises:
    UsageError: there is no such network.
  """
  from ml_collections import ConfigDict, config_dict

  from fidelity_jax.models import registry, users

  place = os.path.dirname(os.path.abspath(file))
  # The package's configs are no modules of users.
  packaged = os.path.realpath(place) == os.path.realpath(_CONFIGS)
  users.PLACES[:] = [] if packaged else [place]
  waiting, models = [config], []
  while waiting:
    held = waiting.pop(0)
    if isinstance(held, ConfigDict):
      if "new_head" in held:
        models.append(held)
      # A study's experiments follow what it has itself.
      names = sorted(held, key=lambda name: name == "experiments")
      waiting += [held[name] for name in names]
  names = [model.get("name") for model in models]
  names += [v for k, v in settings.items() if re.fullmatch(r"(.+\.)?model\.name", k)]
  for name in dict.fromkeys(names):
    for field, (kind, _) in registry.own_fields(name).items():
      # All follow the first, as a study's experiments do.
      value = config_dict.placeholder(kind)
      for model in models:
        with model.unlocked():
          if field not in model:
            model[field] = value
          value = model.get_oneway_ref(field)
  return config


def _find_config(arguments: list[str]) -> tuple[list[str], str]:
  """Finds the config file that a command line names, here or in the package.

  Returns:
    The arguments with the file's path as it was found, and that path, "" if none.

  Raises:
    UsageError: there is no such file.
  """
  kept, found, waiting = [], "", list(arguments)
  while waiting:
    argument = waiting.pop(0)
    match = re.fullmatch("(--?config)(?:=(.*))?", argument, re.DOTALL)
    if match is not None and (match[2] is not None or waiting):
      value = waiting.pop(0) if match[2] is None else match[2]
      path, colon, variant = value.partition(":")
      found = _existing(path) if path else ""
      argument = f"{match[1]}={found}{colon}{variant}"
    kept.append(argument)
  return kept, found


def _existing(path: str) -> str:
  """Returns where a config file is.

  Raises:
    UsageError: nowhere.
  """
  folder, _, name = path.rpartition("/")
  installed = os.path.join(_CONFIGS, name)
  if folder in ("", "configs") and not os.path.exists(path):
    path = installed if os.path.isfile(installed) else path
  if "\0" in path or not os.path.exists(path):
    raise errors.UsageError(f"config file {path!r} does not exist.")
  if not os.path.isfile(path):
    raise errors.UsageError(f"config file {path!r} is no regular file.")
  return path


def _settings(arguments: list[str]) -> tuple[list[str], dict[str, str | None]]:
  """Returns the arguments without settings to None, and the last value of each field.

  ml_collections would take "None" for a text, or refuse it.
  """
  kept, settings, waiting = [], {}, list(arguments)
  while waiting:
    argument = waiting.pop(0)
    match = re.fullmatch(r"--?config\.([^=]+)(?:=(.*))?", argument, re.DOTALL)
    if match is None:
      kept.append(argument)
      continue
    field, value = match.groups()
    words = [argument]
    if value is None and waiting and not waiting[0].startswith("-"):
      value = waiting.pop(0)
      words.append(value)
    settings[field] = value
    if value != "None":
      kept += words
  return kept, settings


def _explain(error: Exception, file: str) -> str:
  """Returns what a config file, or the setting of a field, failed with."""
  if isinstance(error, SyntaxError) and error.filename == file:
    return f"config file {file}, line {error.lineno}: {error.msg}."
  # ml_collections wraps some errors into texts with a traceback.
  text = "".join(traceback.format_exception(error))
  lines = re.findall(rf'File "{re.escape(file)}", line (\d+)', text) if file else []
  # The last line of what was printed of a traceback says what happened.
  last = (str(error).strip().splitlines() or [""])[-1]
  if lines:
    name = "" if "Error: " in last else f"{type(error).__name__}: "
    return f"config file {file}, line {lines[-1]}: {name}{last}"
  if isinstance(error, KeyError | AttributeError | TypeError) and (
    "get_config" not in last
  ):
    return f"the config has no such field: {error.args[0] if error.args else error}"
  return f"config file {file}: {last}" if "get_config" in last else last


if __name__ == "__main__":
  boundary.start()
  boundary.leave(main(sys.argv))
