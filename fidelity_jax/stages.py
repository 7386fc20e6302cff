"""Stages: what identifies them, their directories, and whether they are finished.

A stage is what it was made of: its config, with the precision resolved and without
fields that change nothing; the content of the weights it starts from; the images it is
trained and selected on; and its parents. Of these its directory's name holds a digest,
so that experiments which share a stage share its training, and nothing can be mistaken
for a stage made of something else. Where weights and images lie is no part of it.
"""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
from ml_collections import ConfigDict

from fidelity_jax import checkpoints, degradations, environment, errors, files, tasks

PyTree = Any

# Changes with what config.json holds or what the digest is made of.
FORMAT = 2
# Fields that change how a stage runs or what is done with it, not what it gives.
_IMMATERIAL = (
  "checkpoint_seconds",
  "evaluation",
  "experiment",
  "labels",
  "mesh",
  "parents",
  "profile",
)
# Fields of `dataset` that say more than which images there are.
_DATASET = ("crop_area", "crop_aspect", "image_size", "reduced_decode")


@dataclasses.dataclass(frozen=True)
class Content:
  """What a stage is made of besides its config.

  Attributes:
    images: fingerprint of the images that it is trained and selected on.
    weights: digest of the weights that it starts from, None for none.
    places: where these are and how they were chosen, by the same names.
  """

  images: str
  weights: str | None
  places: dict[str, str | None]


class Begun(msgspec.Struct, forbid_unknown_fields=True):
  """What config.json holds, from a stage's first moment.

  Attributes:
    kind: the stage's kind.
    made_of: what its digest is made of.
    parents: names of the parents' directories, by role.
    products: digests of the parents' products, by role.
    places: where its images and weights were.
    format: `FORMAT` of the version that wrote it.
  """

  kind: str
  made_of: dict[str, Any]
  parents: dict[str, str]
  products: dict[str, str]
  places: dict[str, str | None]
  format: int = FORMAT


class Finished(msgspec.Struct, forbid_unknown_fields=True):
  """What finished.json holds.

  Attributes:
    best_step: the step of the checkpoint that is the stage's product.
    metric: name of the validation metric that selected it.
    score: its value.
    product: digest of the product's arrays.
    files: SHA-256 of the product's files, by path.
    hardware: what it was trained on, "" if that was not noted.
  """

  best_step: int
  metric: str
  score: float
  product: str
  files: dict[str, str]
  hardware: str = ""


@dataclasses.dataclass(frozen=True)
class Stage:
  """One stage of an experiment.

  Attributes:
    config: its resolved config.
    parents: the stages it is trained from, by role ("classifier", "restorer", ...).
    content: its images and weights.
    made_of: all that identifies it, JSON-able.
    directory: where it lives.
  """

  config: ConfigDict
  parents: dict[str, "Stage"]
  content: Content
  made_of: dict[str, Any]
  directory: pathlib.Path

  @property
  def kind(self) -> tasks.Kind:
    """What kind of stage it is."""
    return tasks.KINDS[self.config.kind]

  @property
  def name(self) -> str:
    """The directory's name."""
    return self.directory.name

  @property
  def digest(self) -> str:
    """Eight hexadecimal digits of the digest of what it is made of."""
    return files.digest(self.made_of, 8)

  def lineage(self) -> Iterator["Stage"]:
    """Yields the stages to complete, parents first, each once, then this one."""
    seen = set()
    for stage in [s for p in self.parents.values() for s in p.lineage()] + [self]:
      if stage.name not in seen:
        seen.add(stage.name)
        yield stage

  def networks(self) -> dict[str, "Stage"]:
    """Returns the stages whose networks the stage's own network has in it, by role."""
    found = {}
    if self.kind.whole:
      for parent in self.parents.values():
        found |= parent.networks()
    return found | {self.kind.name: self}

  @property
  def _marker(self) -> pathlib.Path:
    return self.directory / "finished.json"

  @property
  def _checkpoints(self) -> pathlib.Path:
    return self.directory / "checkpoints"

  @property
  def _again(self) -> str:
    return f"delete the directory {self.directory} to train that stage again."

  def check(self) -> Finished | None:
    """Checks what there is of the stage against what it should be now.

    Returns:
      The record of the finished stage, or None if it is not finished.

    Raises:
      RunError: the directory is damaged or cannot be used; the stage, or one like it
        that is not finished, was begun on other images, weights or parents.
    """
    files.check_directory(self.directory)
    files.check_directory(self._checkpoints)
    for name in ("metrics.jsonl", "intervals.jsonl"):
      files.check_file(self.directory / name)
    files.check_file(self._marker)
    path = self.directory / "config.json"
    files.check_file(path)
    if not path.exists():
      if self._marker.exists() or self._checkpoints.exists():
        raise errors.RunError(f"{path} is missing: {self._again}")
      self._check_half_trained()
      return None
    begun = files.read_record(path, Begun, self._again)
    if begun.made_of != self.made_of:
      raise errors.RunError(
        f"{path} is not the config that the directory's name stands for: {self._again}"
      )
    for role, parent in self.parents.items():
      record = parent.finished()
      if record and begun.products[role] != record.product:
        raise errors.RunError(
          f"{self.name} was trained on another {role} than {parent.name} holds now "
          f"(that was trained again since): {self._again}"
        )
    if record := self.finished():
      return record
    files.check_directory(self.directory, write=True)
    return None

  def _check_half_trained(self) -> None:
    """Raises RunError if a stage like this one was begun on what was there before.

    It would never be finished, and that images or weights were exchanged under the same
    name may not be known.
    """
    changing = ("images", "weights", "parents")
    own = {k: v for k, v in self.made_of.items() if k not in changing}
    for path in sorted(self.directory.parent.glob(f"{self.kind.name}-*/config.json")):
      if (path.parent / "finished.json").exists():
        continue
      try:
        begun = files.read_record(path, Begun, "")
      except errors.RunError:
        # Whatever that is, it is not used.
        continue
      if {k: v for k, v in begun.made_of.items() if k not in changing} != own:
        continue
      for name in ("images", "weights"):
        same_place = begun.places[name] == self.content.places[name]
        if same_place and begun.made_of[name] != self.made_of[name]:
          raise errors.RunError(
            f"{path.parent.name} is half trained on other {name} than are there now "
            f"({begun.places[name]}): bring those back and finish it, delete the "
            f"directory {path.parent} to begin anew, or name another with --workdir."
          )

  def finished(self) -> Finished | None:
    """Returns the record of the finished stage, or None if it is not finished.

    Raises:
      RunError: its product is damaged or lost.
    """
    if not self._marker.exists():
      return None
    record = files.read_record(self._marker, Finished, self._again)
    variables = self._variables(record.best_step)
    found = files.digest_tree(variables) if variables.is_dir() else {}
    for name, digest in record.files.items():
      if found.get(name) != digest:
        state = "is damaged" if name in found else "is missing"
        raise errors.RunError(f"{variables / name} {state}: {self._again}")
    return record

  def begin(self) -> None:
    """Makes the directory and writes what the stage is made of, to be checked later.

    The parents are finished.
    """
    with errors.while_doing(f"making the directory {self.directory}"):
      self.directory.mkdir(exist_ok=True)
    begun = Begun(
      kind=self.kind.name,
      made_of=self.made_of,
      parents={role: parent.name for role, parent in self.parents.items()},
      products={role: p.finished().product for role, p in self.parents.items()},
      places=self.content.places,
    )
    files.write_record(self.directory / "config.json", begun)

  def finish(self, step: int, metric: str, score: float, product: str) -> None:
    """Marks the stage finished, with digests of its product.

    Args:
      step: the best checkpoint's step.
      metric: name of the validation metric that selected it.
      score: its value.
      product: digest of the best variables; see `checkpoints.Checkpoints`.

    Raises:
      RunError: there is no product to be finished with.
    """
    found = files.digest_tree(self._variables(step))
    if not found or not (self.directory / "config.json").is_file():
      raise errors.RunError(
        f"{self.name} is trained, but {self._variables(step)} or its config.json is "
        f"missing: {self._again}"
      )
    record = Finished(step, metric, score, product, found, environment.hardware())
    files.write_record(self._marker, record)

  def _variables(self, step: int) -> pathlib.Path:
    return checkpoints.variables_directory(self._checkpoints, step)

  def size(self) -> int:
    """Returns the size of the finished stage's product, in bytes."""
    directory = self._variables(self.finished().best_step)
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())

  def records(self) -> list[dict[str, float]]:
    """Returns what metrics.jsonl holds, a record for each epoch so far."""
    return records(self.directory / "metrics.jsonl")

  def latest_step(self) -> int | None:
    """Returns the step of the latest checkpoint, None if there is none."""
    steps = [int(p.name) for p in self._checkpoints.glob("*") if p.name.isdecimal()]
    return max(steps, default=None)

  def load(self, like: PyTree) -> PyTree:
    """Returns the variables that the finished stage trained.

    Args:
      like: arrays or shapes of the same structure.

    Raises:
      RunError: they cannot be read, or are of another structure.
    """
    directory = self._variables(self.finished().best_step)
    return checkpoints.load_variables(directory, like, verified=True)


def resolve(
  config: ConfigDict, workdir: pathlib.Path, content: Callable[[ConfigDict], Content]
) -> Stage:
  """Returns the stage of a config, with its parents'.

  Args:
    config: resolved, its precision included.
    workdir: the directory of all stages.
    content: finds the content of a stage's images and weights.
  """
  kind = tasks.KINDS[config.kind]
  parents = {
    role: resolve(config.parents[role], workdir, content)
    for role in kind.trained_from(config)
  }
  found = content(config)
  material = {k: v for k, v in config.items() if k not in _IMMATERIAL}
  material |= kind.material(config)
  material["dataset"] = {name: config.dataset[name] for name in _DATASET}
  # Images that are cached are decoded whole.
  reduced = config.dataset.reduced_decode and config.dataset.cache is None
  material["dataset"]["reduced_decode"] = reduced
  if material["degradation"] is not None:
    steps = degradations.from_config(config.degradation).steps
    material["degradation"] = [step.record() for step in steps]
  material["model"] = {k: v for k, v in material["model"].items() if k != "weights"}
  made_of = {
    **{k: as_json(v) for k, v in material.items() if v is not None},
    "images": found.images,
    "weights": found.weights,
    "parents": {role: parent.digest for role, parent in parents.items()},
  }
  name = f"{config.kind}-{kind.label(config)}-{files.digest(made_of, 8)}"
  return Stage(config, parents, found, made_of, workdir / name)


def reopen(config: ConfigDict, directory: pathlib.Path) -> Stage:
  """Returns a stage that was begun, with its parents', from what its directory says.

  Its images and weights need not be there.

  Args:
    config: the stage's, resolved.
    directory: where it lives, beside its parents.

  Raises:
    RunError: a directory is missing or damaged.
  """
  again = "run the experiment again."
  begun = files.read_record(directory / "config.json", Begun, again)
  parents = {
    role: reopen(config.parents[role], directory.parent / name)
    for role, name in begun.parents.items()
  }
  made_of = begun.made_of
  content = Content(made_of["images"], made_of["weights"], begun.places)
  return Stage(config, parents, content, made_of, directory)


def as_json(value: Any) -> Any:
  """Returns a config, or a part of one, with tuples kept apart from lists."""
  if isinstance(value, ConfigDict | dict):
    return {name: as_json(item) for name, item in value.items()}
  if isinstance(value, tuple):
    return {"tuple": [as_json(item) for item in value]}
  if isinstance(value, list):
    return [as_json(item) for item in value]
  return value


def from_json(value: Any) -> Any:
  """Returns what `as_json` was given, configs as ConfigDicts."""
  if isinstance(value, dict):
    if value.keys() == {"tuple"}:
      return tuple(from_json(item) for item in value["tuple"])
    return ConfigDict({name: from_json(item) for name, item in value.items()})
  return [from_json(item) for item in value] if isinstance(value, list) else value


def records(path: pathlib.Path) -> list[dict[str, float]]:
  """Returns the records of a metrics.jsonl, one for each epoch.

  Lines that cannot be read are left out: they are for looking at.
  """
  found = [r for r in files.read_json_lines(path) if isinstance(r.get("step"), int)]
  # Of a stage that was not trained, earlier versions left the epoch out.
  return [{"epoch": 0, **record} for record in found]


def check_workdir(workdir: pathlib.Path) -> None:
  """Refuses a workdir that an earlier version of this package wrote.

  Raises:
    RunError: it is one.
  """
  for path in sorted(workdir.glob("*/config.json")):
    try:
      content = json.loads(files.read_bytes(path))
    except (OSError, ValueError, RecursionError):
      # Damage is named when the stage is needed.
      continue
    ours = isinstance(content, dict) and {"kind", "sha256"} <= content.keys()
    if ours and content.get("format") != FORMAT:
      raise errors.RunError(
        f"{path.parent} is a stage of another version of fidelity_jax, which this one "
        "cannot use: name another directory with --workdir, or delete that one."
      )


def remembered_weights(workdir: pathlib.Path, place: str) -> str | None:
  """Returns the digest that weights had when a stage in the workdir was begun.

  A finished stage needs the file no longer.

  Args:
    workdir: the directory of all stages.
    place: where the weights were.
  """
  found = {}
  for path in workdir.glob("*/config.json"):
    with contextlib.suppress(errors.RunError, OSError):
      begun = files.read_record(path, Begun, "")
      if begun.places["weights"] == place:
        found[path.stat().st_mtime_ns] = begun.made_of["weights"]
  return found[max(found)] if found else None
