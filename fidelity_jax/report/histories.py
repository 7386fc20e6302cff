"""Loss and score against epoch, training and validation: the paper's Figure C.1."""

import math
from collections.abc import Sequence

import matplotlib.figure
import numpy as np
from matplotlib.axes import Axes

from fidelity_jax.report import text
from fidelity_jax.report.content import StageRecord

_TRAIN, _VALIDATION = "#7f7f7f", "#1478bd"
_UNITS = {"accuracy": "accuracy (%)", "psnr_gain": "PSNR gain (dB)"}


def shown(stages: Sequence[StageRecord]) -> list[StageRecord]:
  """Returns the stages that have a history."""
  return [stage for stage in stages if any(measures(stage))]


def measures(stage: StageRecord) -> list[str]:
  """Returns what is drawn of a stage: "loss", and what selected its checkpoint."""
  known = {key.split("/", 1)[1] for r in stage.records for key in r if "/" in key}
  wanted = dict.fromkeys(["loss", score(stage) or "accuracy"])
  return [measure for measure in wanted if measure in known]


def score(stage: StageRecord) -> str | None:
  """Returns the name of the measure that selects a stage's checkpoint."""
  return stage.metric and stage.metric.split("/")[-1]


def best(stage: StageRecord) -> dict[str, float] | None:
  """Returns the record of the epoch that the checkpoint is of, None without records.

  The first of equal ones, as in training.
  """
  measure = score(stage)
  key = f"validation/{measure}"
  there = [record for record in stage.records if key in record]
  if not there:
    return None
  sign = -1 if measure == "loss" else 1
  return max(there, key=lambda record: sign * record[key])


def draw(stages: Sequence[StageRecord]) -> tuple[matplotlib.figure.Figure, str]:
  """Returns the figure of one stage or several, and its caption."""
  stages = shown(stages)
  across = 1 if len(stages) == 1 else 2
  each = max(len(measures(stage)) for stage in stages)
  rows = math.ceil(len(stages) / across)
  width = 3.4 if across == 1 else 2.9
  height = 2.6 if across == 1 else 2.2
  figure = matplotlib.figure.Figure(
    figsize=(width * each * across, height * rows + 0.4), layout="constrained"
  )
  grid = figure.subplots(rows, each * across, squeeze=False)
  for axes in grid.flat:
    axes.set_axis_off()
  for number, stage in enumerate(stages):
    for place, measure in enumerate(measures(stage)):
      axes = grid.flat[number * each + place]
      axes.set_axis_on()
      _panel(axes, stage, measure)
      if place == 0:
        axes.set_title(_short(stage.name), loc="left", fontsize=8)
  handles = {}
  for axes in grid.flat:
    for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
      handles.setdefault(label, handle)
  figure.legend(
    handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles)
  )
  return figure, (
    "Loss and score against epoch, in training (on augmented images, while the weights "
    "change) and validation; the ring marks the epoch of the checkpoint kept."
  )


def _panel(axes: Axes, stage: StageRecord, measure: str) -> None:
  percent = 100 if measure == "accuracy" else 1
  for part, colour, width in (
    ("train", _TRAIN, 1.1),
    ("validation", _VALIDATION, 1.5),
  ):
    key = f"{part}/{measure}"
    there = [record for record in stage.records if key in record]
    values = np.array([percent * record[key] for record in there])
    name = "training" if part == "train" else part
    axes.plot(
      [record["epoch"] for record in there], values, color=colour, lw=width, label=name
    )
  key = f"validation/{measure}"
  if (kept := best(stage)) and key in kept:
    axes.plot(
      *([kept["epoch"]], [percent * kept[key]]),
      ls="none",
      marker="o",
      ms=7,
      mfc="none",
      mec="#d55e00",
      mew=1.6,
      label="checkpoint kept",
      zorder=4,
    )
  axes.set_xlabel("epoch", fontsize=8)
  axes.set_ylabel(_UNITS.get(measure, measure.replace("_", " ")), fontsize=8)
  axes.tick_params(labelsize=8)
  axes.grid(True)


def _short(name: str) -> str:
  shown = text.printable(name)
  return shown if len(shown) <= 46 else f"{shown[:30]}…{shown[-14:]}"
