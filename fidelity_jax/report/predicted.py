"""One image on its way: as given, restored, its map, and what is predicted from it."""

import matplotlib.figure
import numpy as np
from matplotlib.axes import Axes

from fidelity_jax.inference import Result
from fidelity_jax.report import pictures

_MEANINGS = {
  "l1": "|restored - clean|",
  "l2": "(restored - clean)²",
  "cosine": "1 - cosine similarity",
}
# Bars of each group.
_BARS = 3


def draw(
  result: Result, map_name: str, title: str, whole: Result | None = None
) -> matplotlib.figure.Figure:
  """Returns the figure of one image.

  Args:
    result: of one image.
    map_name: "l1", "l2" or "cosine".
    title: the image's name.
    whole: the same image, not cropped, to be shown in its place.
  """
  shown = result if whole is None else whole
  panels = [("input", shown.degraded[0])]
  if shown.restored is not None:
    panels.append(("restored", shown.restored[0]))
  mapped, classified = shown.fidelity_map is not None, result.logits is not None
  height, width = shown.degraded.shape[1:3]
  side = max(2.6 * width / max(height, width), 0.9)
  ratios = [side] * (len(panels) + mapped) + [3.4] * classified
  figure = matplotlib.figure.Figure(
    figsize=(sum(ratios) + 0.8 * mapped, 3.1), layout="constrained"
  )
  axes = figure.subplots(1, len(ratios), width_ratios=ratios, squeeze=False)[0]
  figure.suptitle(pictures.name(title), fontsize=9)
  for ax, (name, image) in zip(axes, panels, strict=False):
    _bare(ax, name)
    ax.imshow(image, vmin=0, vmax=1)
  if mapped:
    ax = axes[len(panels)]
    _bare(ax, "fidelity map")
    values = shown.fidelity_map[0].mean(-1)
    values = 1 - values if map_name == "cosine" else values
    # An estimated map may be below 0.
    brightest = max(float(np.quantile(values, 0.995)), 1e-3)
    image = ax.imshow(values, cmap="magma", vmin=0, vmax=brightest)
    figure.colorbar(
      image, ax=ax, location="bottom", pad=0.02, label=_MEANINGS[map_name]
    )
  if classified:
    _bars(axes[-1], result)
    if whole is not None:
      axes[-1].set_title("of the central square", fontsize=8)
  return figure


def _bare(ax: Axes, title: str) -> None:
  ax.set(xticks=[], yticks=[])
  ax.set_title(title)
  for spine in ax.spines.values():
    spine.set_visible(False)


def _bars(ax: Axes, result: Result) -> None:
  """Draws the most probable classes, from each kind of image that is classified."""
  frozen = {"restored": result.restored_logits, "input": result.degraded_logits}
  groups = [
    (f"frozen, on {seen}", logits)
    for seen, logits in frozen.items()
    if logits is not None
  ]
  # Without calibration it is one of these.
  if not any(np.array_equal(result.logits, logits) for _, logits in groups):
    groups.insert(0, ("whole method", result.logits))
  row, ticks, labels = 0.0, [], []
  for number, (name, logits) in enumerate(groups):
    color = pictures.COLOURS[number]
    ax.text(0, row, name, fontsize=8, color=color, va="center", weight="bold")
    for label, probability in result.top(_BARS, logits)[0]:
      row += 1
      ax.barh(row, probability, height=0.75, color=color, alpha=0.75)
      ax.text(min(probability, 0.8) + 0.02, row, f"{probability:.0%}", va="center")
      ticks.append(row)
      shown = pictures.name(label)
      labels.append(shown if len(shown) <= 18 else f"{shown[:17]}…")
    row += 1.4
  ax.set(xlim=(0, 1), ylim=(row - 0.6, -0.8), xticks=[])
  ax.set_yticks(ticks, labels, fontsize=8)
  ax.tick_params(length=0)
  for spine in ax.spines.values():
    spine.set_visible(False)
