"""What was measured, image by image, kept in the workdir.

Values are kept by method, condition and round, so that more rounds, another condition
or one more method measure only what is new, experiments that share a workdir share what
they have in common, and an evaluation that was interrupted goes on at the next batch.
"""

import json
import pathlib
from typing import Any

import msgspec
import numpy as np

from fidelity_jax import errors, files
from fidelity_jax.rows import Condition

# Of all measurements, below the workdir.
DIRECTORY = "measurements"
# Of one round of a condition: arrays [n] or [n, ...] of the first n images, by name.
Values = dict[str, np.ndarray]


class _Round:
  """Values of the first images of a round, with room for those of all."""

  def __init__(self, count: int, values: Values):
    self.done = 0
    self._arrays = {
      name: np.empty((count, *value.shape[1:]), value.dtype)
      for name, value in values.items()
    }
    self.add(0, values)

  def add(self, start: int, values: Values) -> None:
    # What was measured before may have had more, such as logits.
    self._arrays = {name: self._arrays[name] for name in values}
    for name, array in self._arrays.items():
      part = values[name][: len(array) - start]
      array[start : start + len(part)] = part
      self.done = start + len(part)

  @property
  def names(self) -> set[str]:
    return set(self._arrays)

  @property
  def values(self) -> Values:
    return {name: array[: self.done] for name, array in self._arrays.items()}


class Measurements:
  """The values of one method on one test set, in a file for each condition."""

  def __init__(self, workdir: pathlib.Path, name: str, of: dict[str, Any], count: int):
    """Finds what was measured before.

    Args:
      workdir: the directory of all stages.
      name: the method's, for people.
      of: all that the values depend on but for condition and round, JSON-able.
      count: number of images.

    Raises:
      RunError: the directory cannot be used.
    """
    self.of, self.count = of, count
    self.directory = workdir / DIRECTORY / f"{name}-{files.digest(of, 8)}"
    self._known: dict[pathlib.Path, dict[int, _Round]] = {}
    self._changed: dict[pathlib.Path, Condition] = {}
    files.check_directory(self.directory, write=True)

  def done(self, condition: Condition, round_: int, names: set[str]) -> int:
    """Returns how many images have values of these names in a round.

    Raises:
      RunError: what was kept is damaged.
    """
    found = self._rounds(condition).get(round_)
    return found.done if found is not None and names <= found.names else 0

  def look_again(self, condition: Condition) -> None:
    """Has what is kept of a condition read anew: another host may have written it.

    What is new here is saved.
    """
    self._known.pop(self._path(condition), None)

  def get(self, condition: Condition, round_: int) -> Values:
    """Returns the values of a round that is measured.

    Raises:
      RunError: what was kept is damaged.
    """
    return self._rounds(condition)[round_].values

  def add(self, condition: Condition, round_: int, start: int, values: Values) -> None:
    """Takes in the values of the images from number `start` on.

    Those of the images before it are there.
    """
    rounds = self._rounds(condition)
    if start:
      rounds[round_].add(start, values)
    else:
      rounds[round_] = _Round(self.count, values)
    self._changed[self._path(condition)] = condition

  def save(self) -> None:
    """Writes what is new.

    Raises:
      RunError: it cannot be written.
    """
    for path, condition in self._changed.items():
      with errors.while_doing(f"making the directory {self.directory}"):
        self.directory.mkdir(parents=True, exist_ok=True)
      arrays = {
        f"{number}/{name}": value
        for number, known in self._known[path].items()
        for name, value in known.values.items()
      }
      files.write_arrays(path, arrays, self._record(condition))
    self._changed = {}

  def _record(self, condition: Condition) -> dict[str, Any]:
    return {"of": self.of, "condition": msgspec.to_builtins(condition)}

  def _path(self, condition: Condition) -> pathlib.Path:
    # Conditions of one name may differ in options or ends.
    digest = files.digest(condition.steps, 8)
    return self.directory / f"{condition.name}-{digest}.npz"

  def _rounds(self, condition: Condition) -> dict[int, _Round]:
    path, again = self._path(condition), f"delete {self.directory} to measure again."
    if path in self._known:
      return self._known[path]
    files.check_file(path)
    rounds: dict[int, Values] = {}
    if path.exists():
      arrays, record = files.read_arrays(path, again)
      # Both as JSON has them.
      if record != json.loads(json.dumps(self._record(condition))):
        raise errors.RunError(f"{path} is of something else: {again}")
      for key, value in arrays.items():
        number, _, name = key.partition("/")
        rounds.setdefault(int(number), {})[name] = value
      for values in rounds.values():
        lengths = {len(value) for value in values.values()}
        if len(lengths) > 1 or max(lengths) > self.count:
          raise errors.RunError(f"{path} is of another number of images: {again}")
    self._known[path] = {
      number: _Round(self.count, values) for number, values in rounds.items()
    }
    return self._known[path]
