"""Runs: networks that belong together, from an experiment or a checkpoint.

A run is what an experiment's directory in a workdir stands for, or a whole checkpoint
of the authors' code, or a classifier or denoiser alone. `inference.load` makes
something of it that takes images.
"""

import argparse
import dataclasses
import glob
import os
import pathlib
from typing import Any

import jax
from ml_collections import ConfigDict

from fidelity_jax import (
  assembly,
  buckets,
  errors,
  fidelity,
  files,
  locations,
  models,
  plan,
  port,
  progress,
  stages,
  tasks,
  workdirs,
)
from fidelity_jax.method import Method

PyTree = Any

_RECORD = "experiment.json"
_AGAIN = "run its command again; nothing is trained anew."
# Of the authors' images, and of torchvision's networks.
IMAGE_SIZE = 224
# Fields of a `Method` that the description of a calibration module or of an estimator
# may have.
WIRING = ("map_name", "estimator_input")
_MODULES = {"calibration": models.Calibration, "ensemble": models.Ensemble}


@dataclasses.dataclass(frozen=True)
class Run:
  """Networks that belong together, and what is known of them.

  Attributes:
    name: the experiment's name, or the checkpoint's.
    method: the networks and how they are wired, batch norm folded; those that a run
      has not are None.
    variables: theirs, by role, in the precision that they compute in.
    image_size: side of the images that the classifier takes, pixels.
    class_names: in the order of the logits; numbers if nobody named them; empty without
      a classifier.
    digest: tells whether two runs have the same networks.
    directory: the experiment's, None for a checkpoint.
    planned: the experiment, its stages finished; None for a checkpoint.
    stages: the stages of the networks, by role; none for a checkpoint.
    backbone: name of a checkpoint's classifier's network, None without one.
    classes_named: whether somebody named the classes.
  """

  name: str
  method: Method
  variables: PyTree
  image_size: int
  class_names: tuple[str, ...]
  digest: str
  directory: pathlib.Path | None = None
  planned: plan.Planned | None = None
  stages: "dict[str, stages.Stage]" = dataclasses.field(default_factory=dict)
  backbone: str | None = None
  classes_named: bool = True

  @property
  def needs_clean(self) -> bool:
    """Whether the map is the oracle's, made from the clean images."""
    return self.method.calibration is not None and self.method.estimator is None


def find(
  place: str | os.PathLike,
  *,
  map_name: str | None = None,
  estimator_input: str | None = None,
) -> Run:
  """Returns the run that a path or a name stands for.

  Args:
    place: an experiment's directory ("runs/demo/oracle-1a2b3c4d", without the digest
      if only one is there, followed by "/NAME" for one of a study's experiments), or a
      checkpoint, a directory or a name that `port.load` takes.
    map_name: of a checkpoint of the authors' code, which does not say it: "l1", "l2"
      or "cosine". None: what the file says, "l1" if nothing.
    estimator_input: likewise, "degraded" or "restored". None: "degraded" if the file
      says nothing.

  Raises:
    UsageError: there is nothing of the kind, or several.
    RunError: it is not finished, or damaged.
  """
  asked = {"map_name": map_name, "estimator_input": estimator_input}
  asked = {k: v for k, v in asked.items() if v is not None}
  address = buckets.is_address(place)
  path = buckets.copy_run(str(place)) if address else locations.expand(place)
  if address and not path.exists() and not (path.parent / _RECORD).is_file():
    raise errors.UsageError(
      f"there is nothing at {place}: name an experiment's directory, with the digest "
      "in its name, or a checkpoint."
    )
  directory, name = _experiment_directory(path), None
  given = path.is_file() or (path.is_dir() and port.holds_weights(path))
  if directory is None and not given:
    directory, name = _experiment_directory(path.parent), path.name
  if directory is not None:
    if asked:
      raise errors.UsageError(
        f"{place} is an experiment, which knows how its map is made: leave "
        f"{' and '.join(asked)} out."
      )
    return _of_experiments(directory, name)
  if path.is_dir() and not given:
    raise errors.UsageError(
      f"{path} is neither an experiment's directory, which has {_RECORD}, nor one that "
      f"`fidelity_jax port` wrote, and has no weights in it{_nearby(path)}"
    )
  if not path.exists() and not port.is_name(str(place)):
    raise errors.UsageError(
      f"there is no {path}: name an experiment's directory in a workdir, or a "
      f"checkpoint{_nearby(path.parent)}"
    )
  return _of_checkpoint(place, asked)


def _experiment_directory(path: pathlib.Path) -> pathlib.Path | None:
  """Returns the experiment's directory of that name, its digest left out or not."""
  if (path / _RECORD).is_file():
    return path
  if path.exists() or not path.name:
    return None
  digests = f"{glob.escape(path.name)}-{'[0-9a-f]' * 8}"
  found = sorted(marker.parent for marker in path.parent.glob(f"{digests}/{_RECORD}"))
  if len(found) > 1:
    names = ", ".join(str(one) for one in found)
    raise errors.UsageError(f"{path} may be several: name one of {names}.")
  return found[0] if found else None


def _nearby(directory: pathlib.Path) -> str:
  """Returns what to say of the experiments that a directory has in it."""
  found = sorted(str(marker.parent) for marker in directory.glob(f"*/{_RECORD}"))
  return f"; there are {', '.join(found[:8])}." if found else "."


def _of_experiments(directory: pathlib.Path, name: str | None) -> Run:
  path = directory / _RECORD
  record = files.read_record(path, workdirs.Experiments, _AGAIN)
  found = {one.config["experiment"]: one for one in record.experiments}
  if name is None and len(found) > 1:
    raise errors.UsageError(
      f"{directory} has several experiments: write {directory}/NAME with one of "
      f"{', '.join(found)}."
    )
  if name is not None:
    errors.check_choice(f"experiment in {directory}:", name, found)
  chosen = found[name] if name else record.experiments[0]
  return _of_experiment(directory, chosen)


def _of_experiment(directory: pathlib.Path, chosen: workdirs.Experiment) -> Run:
  config, workdir = stages.from_json(chosen.config), directory.parent
  _check_code(config)
  last = tasks.calibration.last_config(config)
  last = stages.reopen(last, workdir / chosen.last)
  further = {
    role: stages.reopen(config.parents[role], workdir / name)
    for role, name in chosen.further.items()
  }
  planned = plan.Planned(config, last, further)
  for stage in planned.stages:
    if stage.check() is None:
      raise errors.RunError(f"{stage.directory} is not finished: {_AGAIN}")
  networks = last.networks()
  for role, stage in {**last.parents, **further}.items():
    networks.setdefault(role, stage)
  # A classifier of degraded images is to see these.
  if config.kind == "classifier" and config.source == "degraded":
    networks.pop("restorer", None)
  load = assembly.Loader(len(chosen.class_names))
  if last.kind.whole:
    method, variables = load(last)
  else:
    loaded = {role: load(stage) for role, stage in networks.items()}
    method = Method(**{"classifier": None, "restorer": None, **_networks(loaded)})
    if method.estimator is not None:
      fidelity = config.fidelity
      method = dataclasses.replace(
        method, map_name=fidelity.map, estimator_input=fidelity.estimator_input
      )
    variables = {role: frozen.variables for role, frozen in loaded.items()}
  return Run(
    name=config.experiment,
    method=method,
    variables=variables,
    image_size=config.dataset.image_size,
    class_names=tuple(chosen.class_names) if method.classifier is not None else (),
    digest=files.digest({role: s.finished().product for role, s in networks.items()}),
    directory=directory,
    planned=planned,
    stages=networks,
  )


def _check_code(config: ConfigDict) -> None:
  """Refuses code that is not what the networks of a config were trained with."""
  if config.kind == "classifier":
    models.registry.check_code(config.model)
  for parent in config.get("parents", {}).values():
    _check_code(parent)


def _networks(loaded: dict[str, assembly.Frozen]) -> dict[str, Any]:
  return {role: frozen.network for role, frozen in loaded.items()}


def _of_checkpoint(place: str | os.PathLike, asked: dict[str, str]) -> Run:
  parts = port.load(place)
  if "dncnn" in parts:
    parts["restorer"] = parts.pop("dncnn")
  loaded, names, image_size, described, backbone = {}, (), IMAGE_SIZE, {}, None
  named = True
  for role, part in parts.items():
    config = {k: v for k, v in part.config.items() if k not in WIRING}
    described |= {k: v for k, v in part.config.items() if k in WIRING}
    if role in ("restorer", "estimator"):
      loaded[role] = assembly.Frozen(models.DnCNN(**config), part.variables)
    elif role == "classifier":
      classes = config["num_classes"]
      models.registry.check_code(config["model"])
      module = models.create(config["model"], classes)
      loaded[role] = assembly.Frozen(*models.fold(module, part.variables))
      named = config["class_names"] is not None
      names = config["class_names"] if named else map(str, range(classes))
      image_size = config.get("image_size", IMAGE_SIZE)
      backbone = config["model"]["name"]
  classifier = loaded["classifier"].network if "classifier" in loaded else None
  # Of these the authors' checkpoints say nothing; exported ones do.
  cosine = "estimator" in parts and parts["estimator"].config["out_channels"] == 1
  wiring = {"map_name": "cosine" if cosine else "l1"} | described
  for role, make in _MODULES.items():
    if role not in parts:
      continue
    if classifier is None or "restorer" not in loaded:
      raise errors.UsageError(
        f"{place} has a {role} module, but not the classifier and the restorer that it "
        "was trained with: name the whole checkpoint."
      )
    known = {"feature_size": classifier.feature_size}
    if role == "calibration":
      known["num_taps"] = classifier.num_taps
    known |= {k: v for k, v in parts[role].config.items() if k not in WIRING}
    loaded[role] = assembly.Frozen(make(**known), parts[role].variables)
  if not loaded:
    raise errors.UsageError(
      f"{place} has neither a classifier nor a denoiser, but {', '.join(parts)}."
    )
  if "estimator" in loaded and "restorer" not in loaded:
    raise errors.UsageError(
      f"{place} has an estimator, but not the restorer whose errors it estimates: name "
      "the whole checkpoint."
    )
  networks = {"classifier": None, "restorer": None, **_networks(loaded)}
  method = Method(**networks, **wiring | asked)
  unsaid = _unsaid(method, described | asked)
  if unsaid:
    taken = " and ".join(f"--{name}={getattr(method, name)}" for name in unsaid)
    progress.say(f"{place} does not say how its map is made: {taken} is taken.")
  variables = {role: frozen.variables for role, frozen in loaded.items()}
  return Run(
    name=pathlib.PurePath(place).stem,
    method=method,
    variables=jax.device_put(variables),
    image_size=image_size,
    class_names=tuple(names),
    digest=port.content_digest(place),
    backbone=backbone,
    classes_named=named,
  )


def _unsaid(method: Method, said: dict[str, str]) -> list[str]:
  """Returns which of `WIRING` matters to a method and was not said."""
  matters = []
  if method.calibration is not None or method.estimator is not None:
    matters.append("map_name")
  if method.estimator is not None:
    matters.append("estimator_input")
  return [name for name in matters if name not in said]


def add_wiring(parser: argparse.ArgumentParser) -> None:
  """Adds the options for what `find` is told of a checkpoint."""
  unsaid = "of a checkpoint that does not say it:"
  parser.add_argument(
    "--map_name", choices=fidelity.MAPS, help=f"{unsaid} how the fidelity map is made"
  )
  parser.add_argument(
    "--estimator_input",
    choices=("degraded", "restored"),
    help=f"{unsaid} the images that the map is estimated from",
  )


def wiring_of(args: argparse.Namespace) -> dict[str, str]:
  """Returns what these options say, for `find`."""
  return {name: value for name in WIRING if (value := getattr(args, name)) is not None}
