"""What is measured, and kept: values per image, and rows that stand alone.

Values are kept per method, condition and round, so that more rounds, another condition
or one more method measure only what is new, and experiments that share a workdir share
what they have in common.
"""

import base64
import dataclasses
import pathlib
import statistics
from typing import Any

import msgspec
import numpy as np

from fidelity_jax import degradations, errors, files

# Of all measurements, below the workdir.
DIRECTORY = "measurements"


@dataclasses.dataclass(frozen=True)
class Compared:
  """One of the methods that an evaluation compares.

  Attributes:
    method: "classifier" (the frozen classifier alone), the source of the map that
      steers it ("oracle", "pretrained", "end_to_end"), or "restoration" (no classifier
      at all).
    restored: whether the image is restored first.
    ensemble: whether the ensemble has its part, None where there can be none.
  """

  method: str
  restored: bool
  ensemble: bool | None = None

  @property
  def key(self) -> str:
    """A short name, unique in an experiment."""
    parts = [self.method, "restored" * self.restored, "ensemble" * bool(self.ensemble)]
    return "-".join(part for part in parts if part)


class Condition(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
  """A condition as data; see `degradations.Condition`.

  Attributes:
    name: "clean", "awgn-0.1", ...
    kind: the kind of degradation, several joined by "+".
    level: one level, or the two ends of one that varies; None for a sequence.
    vary: "1d", "2d", "mixture" for a sequence, or None.
    steps: all of it, also what the others leave out.
  """

  name: str
  kind: str
  level: float | list[float] | None
  vary: str | None
  steps: list[dict[str, Any]]

  @classmethod
  def of(cls, condition: degradations.Condition) -> "Condition":
    """Returns a condition as data."""
    c = condition
    return cls(c.name, c.kind, c.level, c.vary, c.steps)


class Row(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
  """What was measured of one method under one condition, and of what.

  Attributes:
    experiment: the experiment's name.
    method: see `Compared`.
    trained_on: what the classifier was trained on: "clean", "degraded" or "restored"
      images; "given" if its weights were used as they came, "none" if its last layer
      was not trained at all.
    backbone: name of the classifier's network.
    restorer: name of the restorer that the image went through, None for none.
    map: name of the fidelity map, None where there is none.
    ensemble: see `Compared`.
    dataset: its name.
    image_size: side of the images, pixels.
    condition: how the images were degraded.
    seed: the experiment's.
    precision: of the experiment's last stage, "float32" or "bfloat16".
    accuracy: mean over images and rounds, percent; None where nothing is classified.
    psnr: mean over images and rounds, dB; None where images are classified.
    std: standard deviation over rounds of the mean over images.
    rounds: how often the noise was drawn.
    images: number of test images.
    fingerprint: of the test images, 16 hexadecimal digits.
    stages: names of the stages behind it, which end in their digests, by role.
    products: digests of what these stages gave, 16 hexadecimal digits, by role.
  """

  experiment: str
  method: str
  trained_on: str | None
  backbone: str | None
  restorer: str | None
  map: str | None
  ensemble: bool | None
  dataset: str
  image_size: int
  condition: Condition
  seed: int
  precision: str
  accuracy: float | None = None
  psnr: float | None = None
  std: float
  rounds: int
  images: int
  fingerprint: str
  stages: dict[str, str]
  products: dict[str, str]

  @property
  def value(self) -> float:
    """What was measured: the accuracy, or the PSNR."""
    return self.psnr if self.accuracy is None else self.accuracy


def mean_and_std(values: list[float]) -> tuple[float, float]:
  """Returns mean and standard deviation over rounds, the latter 0 for one round."""
  std = statistics.stdev(values) if len(values) > 1 else 0.0
  return statistics.fmean(values), std


class _Measured(msgspec.Struct, forbid_unknown_fields=True):
  """What the file of a method and a condition holds.

  Attributes:
    of: what was measured, see `Measurements`.
    condition: the condition.
    dtype: of the values.
    rounds: the values of all images, base64, by round.
  """

  of: dict[str, Any]
  condition: Condition
  dtype: str
  rounds: dict[str, str]


class Measurements:
  """The values of one method on one test set: a number per image, kept in files."""

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
    self._of, self._count = of, count
    self.directory = workdir / DIRECTORY / f"{name}-{files.digest(of, 8)}"
    self._known: dict[str, _Measured] = {}
    files.check_directory(self.directory, write=True)

  def get(self, condition: degradations.Condition, round_: int) -> np.ndarray | None:
    """Returns the values [N] of a round, None if it was not measured.

    Raises:
      RunError: what was kept is damaged.
    """
    path, again = self._path(condition), f"delete {self.directory} to measure again."
    files.check_file(path)
    if path.name not in self._known:
      if not path.exists():
        return None
      record = files.read_record(path, _Measured, again)
      if (record.of, record.condition) != (self._of, Condition.of(condition)):
        raise errors.RunError(f"{path} is of something else: {again}")
      self._known[path.name] = record
    record = self._known[path.name]
    if str(round_) not in record.rounds:
      return None
    raw = base64.b64decode(record.rounds[str(round_)])
    values = np.frombuffer(raw, np.dtype(record.dtype))
    if len(values) != self._count:
      raise errors.RunError(f"{path} is of another number of images: {again}")
    return values

  def put(
    self, condition: degradations.Condition, round_: int, values: np.ndarray
  ) -> None:
    """Keeps the values [N] of a round.

    Raises:
      RunError: they cannot be written.
    """
    path = self._path(condition)
    known = self._known.get(path.name)
    if known is None:
      known = _Measured(self._of, Condition.of(condition), values.dtype.str, {})
    text = base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()
    known.rounds[str(round_)] = text
    with errors.while_doing(f"making the directory {self.directory}"):
      self.directory.mkdir(parents=True, exist_ok=True)
    files.write_record(path, known)
    self._known[path.name] = known

  def _path(self, condition: degradations.Condition) -> pathlib.Path:
    # Conditions of one name may differ in options or ends.
    digest = files.digest(condition.steps, 8)
    return self.directory / f"{condition.name}-{digest}.json"
