"""Stages: a config's directory, whether it is finished, and the network it gave.

A stage's directory is named by what it is and by a digest of its resolved config, in
which each parent counts by its own digest. Experiments that share a parent share its
training, and a changed config can never be mistaken for a finished stage.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import msgspec
from ml_collections import ConfigDict

from fidelity_jax import checkpoints, errors, files

PyTree = Any

# Fields that change how a stage runs or what is done with it, not what it gives.
_IMMATERIAL = ("checkpoint_seconds", "ensemble", "evaluation", "experiment", "parents")
_IMMATERIAL_DATASET = ("cache", "max_pixels", "strict", "workers")


class Finished(msgspec.Struct, forbid_unknown_fields=True):
  """What finished.json holds.

  Attributes:
    best_step: the step of the checkpoint that is the stage's product.
    metric: name of the validation metric that selected it.
    score: its value.
    files: SHA-256 of the product's files, by path.
  """

  best_step: int
  metric: str
  score: float
  files: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Stage:
  """One stage of an experiment.

  Attributes:
    config: its resolved config.
    parents: the stages it builds on, by role ("classifier", "restorer", ...).
    digest: eight hexadecimal digits of the config's digest.
    directory: where it lives.
  """

  config: ConfigDict
  parents: dict[str, "Stage"]
  digest: str
  directory: pathlib.Path

  @property
  def kind(self) -> str:
    """What is trained: "classifier", "restorer", "estimator", ..."""
    return self.config.kind

  @property
  def name(self) -> str:
    """The directory's name."""
    return self.directory.name

  def record(self) -> dict[str, Any]:
    """Returns what config.json holds: all that the result depends on."""
    parents = {role: parent.name for role, parent in self.parents.items()}
    return _material(self.config) | {"parents": parents}

  def lineage(self) -> Iterator["Stage"]:
    """Yields the stages to complete, parents first, each once, then this one."""
    seen = set()
    for stage in [s for p in self.parents.values() for s in p.lineage()] + [self]:
      if stage.digest not in seen:
        seen.add(stage.digest)
        yield stage

  @property
  def _marker(self) -> pathlib.Path:
    return self.directory / "finished.json"

  @property
  def _checkpoints(self) -> pathlib.Path:
    return self.directory / "checkpoints"

  @property
  def _again(self) -> str:
    return f"delete the directory {self.directory} to train that stage again."

  def check(self, fingerprint: str) -> Finished | None:
    """Checks what there is of the stage against what it should be now.

    Args:
      fingerprint: of the data it would be trained on now.

    Returns:
      The record of the finished stage, or None if it is not finished.

    Raises:
      RunError: if the directory is damaged or cannot be used, or if the stage was begun
        with another config or on other data.
    """
    files.check_directory(self.directory)
    files.check_directory(self._checkpoints)
    files.check_file(self.directory / "metrics.jsonl")
    files.check_file(self._marker)
    if self._marker.exists():
      content = files.read_json(self._marker, self._again)
      if isinstance(content, dict) and content.get("files") == {}:
        raise errors.RunError(
          f"{self.directory} is called finished, but its best checkpoint was lost by "
          f"an earlier version of fidelity_jax: {self._again}"
        )
    path = self.directory / "config.json"
    files.check_file(path)
    if not path.exists():
      if self._marker.exists() or self._checkpoints.exists():
        raise errors.RunError(f"{path} is missing: {self._again}")
      return None
    begun = files.read_json(path, self._again)
    if begun == self.record():
      raise errors.RunError(
        f"{self.directory} was begun by an earlier version of fidelity_jax, which did "
        f"not note on which images: {self._again}"
      )
    begun = files.unseal(begun, dict[str, Any], path, self._again)
    if begun | {"data": ""} != self.record() | {"data": ""}:
      raise errors.RunError(
        f"{path} is not the config that the directory's name stands for: {self._again}"
      )
    if begun["data"] != fingerprint:
      raise errors.RunError(
        f"{self.name} was trained on other images than the dataset holds now: bring "
        f"those back, or {self._again}"
      )
    if record := self.finished():
      return record
    files.check_directory(self.directory, write=True)
    return None

  def finished(self) -> Finished | None:
    """Returns the record of the finished stage, or None if it is not finished.

    Raises:
      RunError: if its product is damaged or lost.
    """
    if not self._marker.exists():
      return None
    record = files.read_record(self._marker, Finished, self._again)
    variables = self._variables(record)
    found = files.digest_tree(variables) if variables.is_dir() else {}
    for name, digest in record.files.items():
      if found.get(name) != digest:
        state = "is damaged" if name in found else "is missing"
        raise errors.RunError(f"{variables / name} {state}: {self._again}")
    return record

  def begin(self, fingerprint: str) -> None:
    """Makes the directory and writes what the stage is made of, to be checked later.

    Args:
      fingerprint: of the data it is trained on.
    """
    with errors.while_doing(f"making the directory {self.directory}"):
      self.directory.mkdir(exist_ok=True)
    begun = self.record() | {"data": fingerprint}
    files.write_json(self.directory / "config.json", files.seal(begun))

  def finish(self, step: int, metric: str, score: float) -> None:
    """Marks the stage finished, with digests of its product.

    Args:
      step: the best checkpoint's step.
      metric: name of the validation metric that selected it.
      score: its value.

    Raises:
      RunError: if there is no product to be finished with.
    """
    record = Finished(step, metric, score, {})
    record.files = files.digest_tree(self._variables(record))
    if not record.files or not (self.directory / "config.json").is_file():
      raise errors.RunError(
        f"{self.name} is trained, but {self._variables(record)} or its config.json is "
        f"missing: {self._again}"
      )
    files.write_record(self._marker, record)

  def _variables(self, record: Finished) -> pathlib.Path:
    return checkpoints.variables_directory(self._checkpoints, record.best_step)

  def load(self, like: PyTree) -> PyTree:
    """Returns the variables that the finished stage trained.

    Args:
      like: arrays or shapes of the same structure.
    """
    return checkpoints.load_variables(self._variables(self.finished()), like)

  def load_module(self, module: Any, *inputs: jax.Array) -> PyTree:
    """Returns the variables of a Linen module that this stage trained.

    Args:
      module: the module as it was trained.
      *inputs: inputs that `module.init` takes; only shapes matter.
    """
    return self.load(jax.eval_shape(module.init, jax.random.key(0), *inputs))


def resolve(config: ConfigDict, workdir: pathlib.Path) -> Stage:
  """Returns the stage of a resolved config, with its parents'."""
  parents = {
    role: resolve(parent, workdir)
    for role, parent in config.get("parents", ConfigDict()).items()
  }
  digests = {role: parent.digest for role, parent in parents.items()}
  material = _material(config) | {"parents": digests}
  text = json.dumps(material, sort_keys=True)
  digest = hashlib.sha256(text.encode()).hexdigest()[:8]
  name = "-".join([config.kind, *_labels(config), digest])
  return Stage(config, parents, digest, workdir / name)


def _labels(config: ConfigDict) -> list[str]:
  """Returns what tells a stage from its kin at a glance."""
  if config.kind == "classifier":
    return [config.model.name, config.source]
  if config.kind in ("restorer", "estimator"):
    return [f"dncnn{config.model.depth}"]
  return [config.fidelity.source]


def as_json(config: ConfigDict) -> dict[str, Any]:
  """Returns a config as JSON-able values, in which tuples stay apart from lists."""

  def convert(value):
    if isinstance(value, ConfigDict | dict):
      return {name: convert(item) for name, item in value.items()}
    if isinstance(value, tuple):
      return {"tuple": [convert(item) for item in value]}
    if isinstance(value, list):
      return [convert(item) for item in value]
    return value

  return convert(config)


def _material(config: ConfigDict) -> dict[str, Any]:
  """Returns the fields of a config that its result depends on."""
  material = {k: v for k, v in as_json(config).items() if k not in _IMMATERIAL}
  material["dataset"] = {
    k: v for k, v in material["dataset"].items() if k not in _IMMATERIAL_DATASET
  }
  return material
