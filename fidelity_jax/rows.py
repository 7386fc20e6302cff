"""Results: rows that stand alone, and the values per image behind them."""

import dataclasses
from typing import Any

import msgspec
import numpy as np

from fidelity_jax import degradations

# Where the map comes from that steers a method: "estimated" by an estimator that nobody
# said how it was trained of.
SOURCES = ("oracle", "pretrained", "end_to_end", "estimated")


@dataclasses.dataclass(frozen=True)
class Compared:
  """One of the things that an evaluation measures.

  Attributes:
    method: "classifier" (the frozen classifier alone), the source of the map that
      steers it (one of `SOURCES`), "restoration" (of the images, without any
      classifier), or "estimation" (of the map).
    restored: whether the image is restored first.
    ensemble: whether the ensemble has its part, None where there can be none, or where
      nobody said.
    source: where the map that is estimated comes from, one of `SOURCES`; None but for
      "estimation".
  """

  method: str
  restored: bool
  ensemble: bool | None = None
  source: str | None = None

  @property
  def steered(self) -> bool:
    """Whether it is the classifier, steered by a map."""
    return self.method in SOURCES

  @property
  def mapped(self) -> bool:
    """Whether it has a map."""
    return self.steered or self.method == "estimation"

  @property
  def classifies(self) -> bool:
    """Whether it names classes."""
    return self.steered or self.method == "classifier"

  @property
  def key(self) -> str:
    """A short name, unique in an experiment."""
    parts = [self.method, self.source, "restored" * self.restored]
    return "-".join(part for part in [*parts, "ensemble" * bool(self.ensemble)] if part)


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


class Facts(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
  """What is known of a method's networks.

  Attributes:
    method: see `Compared`.
    source: where the map comes from, None where there is none.
    trained_on: what the classifier was trained on: "clean", "degraded" or "restored"
      images; "given" if its weights were used as they came, "none" if its last layer
      was not trained at all; None without a classifier.
    backbone: name of the classifier's network.
    restorer: name of the restorer that the image went through, None for none.
    map: name of the fidelity map, None where there is none.
    resize: how the calibration resizes maps, None without calibration.
    without: the calibration's modules that are switched off.
    ensemble: see `Compared`.
    seed: the experiment's, of training; None if nobody said.
    precision: of the last stage behind it, "float32" or "bfloat16".
  """

  method: str
  source: str | None
  trained_on: str | None
  backbone: str | None
  restorer: str | None
  map: str | None
  resize: str | None
  without: list[str]
  ensemble: bool | None
  seed: int | None
  precision: str

  def of(self, compared: Compared) -> "Facts":
    """Returns what of it is about one of the things that the networks do."""
    classifies, mapped = compared.classifies, compared.mapped
    return msgspec.structs.replace(
      self,
      method=compared.method,
      source=self.source if mapped else None,
      trained_on=self.trained_on if classifies else None,
      backbone=self.backbone if classifies else None,
      restorer=self.restorer if compared.restored else None,
      map=self.map if mapped else None,
      resize=self.resize if compared.steered else None,
      without=self.without if compared.steered else [],
      ensemble=compared.ensemble,
    )


class Row(Facts, forbid_unknown_fields=True, kw_only=True):
  """What was measured of one method under one condition, and of what; see `Facts`.

  Attributes:
    experiment: the name of the first experiment that has it.
    dataset: its name.
    image_size: side of the images, pixels.
    degradation: what the experiment is about, "awgn", ...; clean images are one of its
      conditions.
    condition: how the images were degraded.
    noise_seed: of the noise.
    accuracy: percent of images classified right; None where nothing is classified.
    top5: percent of images whose class is among the first five.
    ece: expected calibration error of the largest probability, percent.
    per_class: accuracy of each class, percent, None for a class without images.
    psnr: of the restored (or degraded) images, dB.
    ssim: likewise, at most 1.
    map_error: mean absolute error of the estimated map.
    ause: area under the sparsification error, see `quality.ause`; 0 if the map ranks
      pixels as their true errors do.
    std: standard deviation over rounds of `value`.
    low: lower end of the 95 % interval of `value`, see `statistics`.
    high: its upper end.
    rounds: how often the noise was drawn.
    images: number of test images.
    fingerprint: of the test images, 16 hexadecimal digits.
    stages: names of the stages behind it, which end in their digests, by role.
    products: digests of what these stages gave, 16 hexadecimal digits, by role.
  """

  experiment: str
  dataset: str
  image_size: int
  degradation: str
  condition: Condition
  noise_seed: int = 0
  accuracy: float | None = None
  top5: float | None = None
  ece: float | None = None
  per_class: list[float | None] | None = None
  psnr: float | None = None
  ssim: float | None = None
  map_error: float | None = None
  ause: float | None = None
  std: float
  low: float
  high: float
  rounds: int
  images: int
  fingerprint: str
  stages: dict[str, str]
  products: dict[str, str]

  @property
  def value(self) -> float:
    """What it is about: the accuracy, the PSNR or the error of the map."""
    first = (self.accuracy, self.psnr, self.map_error)
    return next(value for value in first if value is not None)


def read(record: dict[str, Any]) -> Row:
  """Returns a row of results.json, which has the paper's number beside ours.

  Raises:
    msgspec.ValidationError: it is none.
  """
  own = {name: value for name, value in record.items() if name != "paper"}
  return msgspec.convert(own, Row)


@dataclasses.dataclass(frozen=True)
class Scored:
  """A row with the values that it is made of.

  Attributes:
    row: the row.
    values: per round and image, [R, N]: of a classified row "prediction" int32, "rank"
      int32 (how many classes come before the right one) and "confidence" float32 (the
      largest probability); of a restoration "psnr" and "ssim", of an estimation "error"
      and "ause", float32.
  """

  row: Row
  values: dict[str, np.ndarray]

  @property
  def main(self) -> np.ndarray:
    """The values per round and image whose mean is `row.value`, float64 [R, N]."""
    if "rank" in self.values:
      return 100.0 * (self.values["rank"] == 0)
    name = "psnr" if "psnr" in self.values else "error"
    return self.values[name].astype(np.float64)
