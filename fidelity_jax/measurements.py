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
    self._known: dict[pathlib.Path, dict[int, Values]] = {}
    self._changed: dict[pathlib.Path, Condition] = {}
    files.check_directory(self.directory, write=True)

  def done(self, condition: Condition, round_: int, names: set[str]) -> int:
    """Returns how many images have values of these names in a round.

    Raises:
      RunError: what was kept is damaged.
    """
    values = self._rounds(condition).get(round_, {})
    return len(next(iter(values.values()))) if names <= values.keys() else 0

  def get(self, condition: Condition, round_: int) -> Values:
    """Returns the values of a round that is measured.

    Raises:
      RunError: what was kept is damaged.
    """
    return self._rounds(condition)[round_]

  def add(self, condition: Condition, round_: int, start: int, values: Values) -> None:
    """Takes in the values of the images from number `start` on.

    Those of the images before it are there.
    """
    rounds = self._rounds(condition)
    before = rounds.get(round_, {})
    if start:
      values = {
        name: np.concatenate([before[name][:start], value])
        for name, value in values.items()
      }
    rounds[round_] = {name: value[: self.count] for name, value in values.items()}
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
        for number, values in self._known[path].items()
        for name, value in values.items()
      }
      files.write_arrays(path, arrays, self._record(condition))
    self._changed = {}

  def _record(self, condition: Condition) -> dict[str, Any]:
    return {"of": self.of, "condition": msgspec.to_builtins(condition)}

  def _path(self, condition: Condition) -> pathlib.Path:
    # Conditions of one name may differ in options or ends.
    digest = files.digest(condition.steps, 8)
    return self.directory / f"{condition.name}-{digest}.npz"

  def _rounds(self, condition: Condition) -> dict[int, Values]:
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
    self._known[path] = rounds
    return rounds
