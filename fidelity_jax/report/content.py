"""What a report is made of: everything that its pages and pictures show, as data."""

import dataclasses
import shlex
from typing import Any

import numpy as np

from fidelity_jax import claims, rows, statistics


@dataclasses.dataclass(frozen=True)
class StageRecord:
  """What is told of a stage.

  Attributes:
    name: its directory's name, which ends in its digest.
    kind: "classifier", "restorer", "estimator", "calibration" or "ensemble".
    finished: whether it is.
    metric: name of the validation metric that selected its checkpoint.
    score: its value; None if it is not finished.
    seconds: time that training took, None where it is not known.
    hardware: what it was trained on, likewise.
    config: all that it is made of.
    records: one for each epoch, as in metrics.jsonl: "step", "epoch", "train/loss",
      "validation/accuracy", ...
    parents: names of the stages that it is trained from, by role.
    experiments: names of the experiments that it serves.
  """

  name: str
  kind: str
  finished: bool
  metric: str | None
  score: float | None
  seconds: float | None
  hardware: str | None
  config: dict[str, Any]
  records: list[dict[str, float]]
  parents: dict[str, str]
  experiments: list[str]


@dataclasses.dataclass(frozen=True)
class Examples:
  """Some images of an experiment on their way.

  Attributes:
    experiment: its name.
    compared: what it measures.
    map_name: name of its map, None for none.
    trained_on: what its classifier was trained on, see `rows.Row`; None without one.
    conditions: M conditions.
    arrays: "clean", "degraded" [M, N, H, W, 3], "label" [M, N], where there are any
      "restored" [M, N, H, W, 3] and "map" [M, N, H, W, C], and by "value/KEY" the
      classes predicted, int32 [M, N], or the PSNR, float32; "value/clean": what the
      classifier alone predicts of the clean images.
  """

  experiment: str
  compared: tuple[rows.Compared, ...]
  map_name: str | None
  trained_on: str | None
  conditions: tuple[rows.Condition, ...]
  arrays: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Activations:
  """Mean inputs of the head, of one class (the paper's Figure 3.4).

  Attributes:
    class_name: the class.
    images: how many images it has.
    conditions: M conditions, clean first, then by level.
    degraded: mean over images and rounds, by neuron, float [M, F].
    restored: likewise of restored images; None without a restorer.
    backbone: name of the network.
  """

  class_name: str
  images: int
  conditions: tuple[rows.Condition, ...]
  degraded: np.ndarray
  restored: np.ndarray | None
  backbone: str


@dataclasses.dataclass(frozen=True)
class Content:
  """All that a report shows.

  Attributes:
    name: of the experiment or study.
    shows: in a line, what it is.
    sections: which of `study.SECTIONS` lead the page; the others follow where there is
      anything to show.
    command: the command that made it.
    rows: its rows.
    comparisons: between methods, on the same images and noise.
    verdicts: what becomes of the paper's claims here.
    stages: of all its experiments, parents first.
    missing: a line for each stage or experiment that is not there, with the reason.
    class_names: of the classes.
    examples: of some experiments.
    activations: of its classifiers, if it shows them.
    environment: versions, hardware, date, by name; texts.
    seconds: how long the evaluation took, None if it was done before.
  """

  name: str
  shows: str
  sections: tuple[str, ...]
  command: str
  rows: list[rows.Row]
  comparisons: list[statistics.Comparison]
  verdicts: list[claims.Verdict]
  stages: list[StageRecord]
  missing: list[str]
  class_names: list[str]
  examples: list[Examples]
  activations: list[Activations]
  environment: dict[str, str]
  seconds: float | None

  def command_of(self, stage: StageRecord) -> str:
    """Returns the command that trains a stage, and as little else as can be."""
    known = {name for one in self.stages for name in one.experiments}
    if not self.command or len(known) < 2 or not stage.experiments:
      return self.command
    return f"{self.command} {shlex.quote(f'--config.only={stage.experiments[0]}')}"
