"""Images on their way: clean, degraded, restored, the map, and what is predicted."""

from collections.abc import Sequence

import matplotlib.figure
import numpy as np
from matplotlib.axes import Axes

from fidelity_jax.report import groups, pictures
from fidelity_jax.report.content import Examples
from fidelity_jax.rows import Compared, Condition

_MEANINGS = {
  "l1": "|restored - clean|",
  "l2": "(restored - clean)²",
  "cosine": "1 - cosine similarity",
}
_WIDEST = 8
_RIGHT, _WRONG = "#2a9a58", "#dc4a39"


def chosen(examples: Sequence[Examples]) -> list[Examples]:
  """Returns those that are shown: the first two with a map, else the first."""
  with_map = [one for one in examples if "map" in one.arrays]
  return with_map[:2] or list(examples[:1])


def draw(
  examples: Sequence[Examples], class_names: Sequence[str]
) -> tuple[matplotlib.figure.Figure, str]:
  """Returns the figure, and its caption.

  Args:
    examples: of one experiment or more, one above the other.
    class_names: of the classes.
  """
  rows = [_rows(one) for one in examples]
  columns = [_columns(one) for one in examples]
  widest = max(map(len, columns))
  heights = [1.85 * len(r) + (1.1 if r[-1][1] == "map" else 0.4) for r in rows]
  figure = matplotlib.figure.Figure(
    figsize=(1.6 * widest + 0.4, sum(heights)), layout="constrained"
  )
  parts = figure.subfigures(len(examples), 1, height_ratios=heights, squeeze=False)
  for part, one, lines, places in zip(parts.flat, examples, rows, columns, strict=True):
    _draw(part, one, lines, places, class_names)
    if len(examples) > 1:
      part.suptitle(pictures.name(one.experiment), fontsize=10, x=0.01, ha="left")
  return figure, _caption(examples)


def _rows(one: Examples) -> list[tuple[str, str, str]]:
  """Returns (label, array of images, array of values below them or "") from above."""
  classified = any(c.classifies for c in one.compared)
  plain = "classifier" if classified else "restoration"
  steered = [c for c in one.compared if c.steered]
  # With the ensemble, if there is one.
  steered = sorted(steered, key=lambda c: not c.ensemble)
  rows = [
    ("clean", "clean", "clean"),
    ("degraded", "degraded", Compared(plain, False).key),
    ("restored", "restored", Compared(plain, True).key),
    ("map (bright: error)", "map", steered[0].key if steered else ""),
  ]
  return [
    (label, key, value if f"value/{value}" in one.arrays else "")
    for label, key, value in rows
    if key in one.arrays
  ]


def _columns(one: Examples) -> list[tuple[int, int]]:
  """Returns (condition, image): each condition shows images of its own if it can."""
  conditions = len(one.conditions)
  total = one.arrays["clean"].shape[1]
  shown = np.arange(conditions)
  if conditions > _WIDEST:
    shown = np.unique(np.linspace(0, conditions - 1, _WIDEST).astype(int))
  count = min(max(total // conditions, 1), max(_WIDEST // len(shown), 1))
  return [(int(m), (int(m) * count + n) % total) for m in shown for n in range(count)]


def _draw(
  part: matplotlib.figure.SubFigure,
  one: Examples,
  rows: Sequence[tuple[str, str, str]],
  places: Sequence[tuple[int, int]],
  class_names: Sequence[str],
) -> None:
  grid = part.subplots(len(rows), len(places), squeeze=False)
  for i, (label, key, values) in enumerate(rows):
    for j, (m, n) in enumerate(places):
      axes = grid[i, j]
      axes.set(xticks=[], yticks=[])
      for spine in axes.spines.values():
        spine.set_visible(False)
      right = int(one.arrays["label"][m, n])
      if key == "map":
        maps, vmax = _maps(one)
        image = axes.imshow(maps[m, n], cmap="magma", vmin=0, vmax=vmax)
      else:
        axes.imshow(np.clip(one.arrays[key][m, n], 0, 1))
      if i == 0:
        where = _heading(one.conditions[m])
        axes.set_title(f"{where}\n{_class(class_names, right)}", fontsize=8.5)
      if j == 0:
        axes.set_ylabel(label, fontsize=9)
      if values:
        _below(axes, one.arrays[f"value/{values}"][m, n], right, class_names)
    if key == "map":
      meaning = _MEANINGS.get(one.map_name, "map")
      part.colorbar(
        image,
        ax=grid[i].tolist(),
        location="bottom",
        shrink=min(3 / len(places), 0.9),
        aspect=40,
        pad=0.01,
        label=meaning,
      )


def _maps(one: Examples) -> tuple[np.ndarray, float]:
  """Returns maps [M, N, H, W], large where the error is, and the brightest value."""
  maps = one.arrays["map"].mean(-1)
  maps = 1 - maps if one.map_name == "cosine" else maps
  # An estimated map may be below 0.
  return maps, max(float(np.quantile(maps, 0.995)), 1e-3)


def _heading(condition: Condition) -> str:
  """Returns e.g. "noise 0.3", "noise 2D (0.5 to 0)", "clean"."""
  return groups.heading(condition).replace("awgn", "noise")


def _class(class_names: Sequence[str], number: int) -> str:
  """Returns a class's name, short enough to stand above an image."""
  known = 0 <= number < len(class_names)
  name = pictures.name(class_names[number]) if known else f"class {number}"
  return name if len(name) <= 20 else f"{name[:19]}…"


def _below(
  axes: Axes, value: np.generic, right: int, class_names: Sequence[str]
) -> None:
  """Writes a predicted class, right or wrong, or a PSNR below an image."""
  if value.dtype.kind == "f":
    axes.set_xlabel(f"{value:.1f} dB", fontsize=8)
    return
  sign, color = ("✓", _RIGHT) if int(value) == right else ("✗", _WRONG)
  shown = _class(class_names, int(value))
  axes.set_xlabel(f"{sign} {shown}", fontsize=8, color=color)


def _caption(examples: Sequence[Examples]) -> str:
  first = examples[0]
  if not any(c.classifies for c in first.compared):
    return "Below each image, its PSNR to the clean one."
  other = {"given": "as given", "none": "as it started"}
  which = other.get(first.trained_on, f"trained on {first.trained_on} images")
  text = (
    f"Below each image, what is predicted from it: the classifier {which} sees the "
    "clean, the degraded and the restored image"
  )
  if "map" in first.arrays:
    text += "; the proposed method sees the restored image and the map"
  return f"{text}. ✓ right, ✗ wrong."
