"""Mean inputs of the head, by neuron: the paper's Figure 3.4."""

from collections.abc import Sequence

import matplotlib
import matplotlib.figure
import numpy as np
from matplotlib.axes import Axes

from fidelity_jax.report import groups, pictures
from fidelity_jax.report.content import Activations

# A vector graphic of more points is slow to show.
_MOST_POINTS = 3000


def draw(found: Sequence[Activations]) -> tuple[matplotlib.figure.Figure, str]:
  """Returns the figure, a line of two panels for each class, and its caption."""
  restored = any(one.restored is not None for one in found)
  columns = 2 if restored else 1
  figure = matplotlib.figure.Figure(
    figsize=(5.2 * columns, 3.3 * len(found) + 0.6), layout="constrained"
  )
  grid = figure.subplots(len(found), columns, sharey="row", squeeze=False)
  for row, one in zip(grid, found, strict=True):
    order = ordered(one.degraded)
    where = f"{pictures.name(one.backbone)} · {pictures.name(one.class_name)}"
    _panel(row[0], one, one.degraded[:, order])
    row[0].set_title(f"{where} · degraded", loc="left")
    row[0].set_ylabel("mean input of the head")
    if one.restored is not None:
      _panel(row[1], one, one.restored[:, order])
      row[1].set_title(f"{where} · restored", loc="left")
    elif columns == 2:
      row[1].set_axis_off()
  labels = {}
  for axes in grid.flat:
    for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
      labels.setdefault(label, handle)
  figure.legend(
    labels.values(),
    labels.keys(),
    loc="outside lower center",
    ncols=min(len(labels), 8),
    title="level of degradation",
    title_fontsize=9,
  )
  images = ", ".join(f"{one.class_name} ({one.images} images)" for one in found)
  return figure, (
    "Mean input of the head by neuron, over the images of one class and rounds of "
    f"noise: {images}. Neurons are ordered by the change from clean to the most "
    "severely degraded images, on both sides in the order of the degraded images. "
    "Faint: each neuron; lines: the running mean over 1/50 of the neurons."
  )


def ordered(degraded: np.ndarray) -> np.ndarray:
  """Returns the order of neurons, from the largest fall to the largest rise.

  Args:
    degraded: mean inputs of the head [M, F], clean first, the harshest level last.

  Returns:
    int [F].
  """
  return np.argsort(degraded[-1] - degraded[0], kind="stable")


def _panel(axes: Axes, one: Activations, values: np.ndarray) -> None:
  levels = len(values) - 1
  colours = matplotlib.colormaps["plasma"](np.linspace(0.3, 0.84, max(levels, 1)))
  neurons = np.arange(values.shape[1])
  window = max(values.shape[1] // 50, 1)
  many = values.size > _MOST_POINTS
  # The clean line, which the others fall away from, on top.
  for number in reversed(range(len(values))):
    clean = number == 0
    colour = pictures.INK if clean else colours[number - 1]
    line = values[number]
    axes.plot(neurons, line, color=colour, lw=0.5, alpha=0.25, rasterized=many)
    middle, mean = _running_mean(line, window)
    axes.plot(middle, mean, color=colour, lw=1.6 if clean else 1.3, zorder=3)
  for number, condition in enumerate(one.conditions):
    colour = pictures.INK if number == 0 else colours[number - 1]
    label = groups.heading(condition, condition.kind)
    axes.plot([], [], color=colour, lw=2, label=label)
  axes.set_xlim(0, max(values.shape[1] - 1, 1))
  axes.set_xlabel("neuron, ordered by its change")
  axes.grid(True, axis="y")


def _running_mean(line: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns at most 200 places, and the means of the windows around them."""
  sums = np.concatenate([[0.0], np.cumsum(line, dtype=np.float64)])
  starts = np.arange(len(line) - window + 1)
  starts = starts[:: max(len(starts) // 200, 1)]
  return starts + (window - 1) / 2, (sums[starts + window] - sums[starts]) / window
