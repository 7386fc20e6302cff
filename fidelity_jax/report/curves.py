"""Accuracy, or PSNR, against the level of degradation: a panel for each group."""

import math
from collections.abc import Collection, Sequence

import matplotlib.figure
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from fidelity_jax.report import pictures
from fidelity_jax.report.groups import MEASURES, Entry, Group
from fidelity_jax.rows import SOURCES, Condition, Row

_PANEL = (3.3, 2.7)
_ALONE = (8.0, 4.2)


def draw(
  found: Sequence[Group], class_names: Sequence[str]
) -> tuple[matplotlib.figure.Figure, str]:
  """Returns the figure, and its caption.

  Args:
    found: all groups, at least one; those are shown that are about accuracy, or if
      there are none, about PSNR, or else about the map's error.
    class_names: for the level of chance.
  """
  about = {group.field for group in found}
  field = next(field for field in ("accuracy", "psnr", "map_error") if field in about)
  found = [group for group in found if group.field == field]
  looks = _looks(found)
  rows, columns = _grid(found)
  varying = max(len(_shown(group, group.others)) for group in found)
  width, height = _ALONE if len(found) == 1 else _PANEL
  across = _across(width * columns, looks)
  lines = math.ceil(len(looks) / across)
  figure = matplotlib.figure.Figure(
    figsize=(width * columns, height * rows + 0.19 * lines + 0.5),
    layout="constrained",
  )
  ratios = (3, 0.5 + 0.35 * varying) if varying else (1,)
  grid = figure.subplots(
    rows,
    columns * len(ratios),
    sharey=True,
    squeeze=False,
    width_ratios=ratios * columns,
  )
  for axes in grid.flat[len(found) * len(ratios) :]:
    axes.set_axis_off()
  common, heads = _apart(found)
  for number, (group, head) in enumerate(zip(found, heads, strict=True)):
    start = number * len(ratios)
    panel = grid.flat[start : start + len(ratios)]
    _panel(panel, group, looks, head)
    if start % grid.shape[1] == 0:
      panel[0].set_ylabel(_axis(field))
    else:
      panel[0].tick_params(labelleft=False)
  if common:
    figure.suptitle(common, fontsize=10)
  grid[0, 0].set_ylim(*_range(field, found))
  if field == "accuracy" and class_names:
    for number in range(len(found)):
      panel = grid.flat[number * len(ratios) : (number + 1) * len(ratios)]
      _chance(panel, 100 / len(class_names))
  figure.legend(
    [Line2D([], [], **look) for look in looks.values()],
    list(looks),
    loc="outside lower center",
    ncols=across,
    handlelength=3.2,
    fontsize=8.5,
  )
  return figure, _caption(field, found)


def _across(width: float, titles: Collection[str]) -> int:
  """Returns how many columns a legend has in a figure of a width in inches."""
  column = 0.6 + 0.062 * max(map(len, titles))
  return max(1, min(4, int(width / column)))


def _apart(found: Sequence[Group]) -> tuple[str, list[str]]:
  """Returns what all groups' names share, and what heads each panel."""
  names = [group.name.split(", ") for group in found]
  # What stands below a panel's axis needs no heading, unless there is no other.
  kinds = [group.first.degradation for group in found]
  parts = [
    [part for part in name if part != kind]
    for name, kind in zip(names, kinds, strict=True)
  ]
  shared = [part for part in parts[0] if all(part in other for other in parts)]
  heads = [[part for part in own if part not in shared] for own in parts]
  if len(found) == 1:
    return "", [_joined(names[0])]
  heads = [own or [kind] for own, kind in zip(heads, kinds, strict=True)]
  return _joined(shared), [_joined(own) for own in heads]


def _joined(parts: Sequence[str]) -> str:
  return " · ".join(map(pictures.name, parts))


def _range(field: str, found: Sequence[Group]) -> tuple[float | None, float | None]:
  """Returns the ends of the vertical axis, None for what matplotlib finds."""
  if field == "psnr":
    return None, None
  entries = [entry for group in found for entry in group.entries.values()]
  if field == "map_error":
    return 0, None
  low = min(entry.low for entry in entries)
  high = max(entry.high for entry in entries)
  return max(0, 10 * math.floor(low / 10)), min(100, 10 * math.ceil(high / 10))


def _axis(field: str) -> str:
  measure = MEASURES[field]
  unit = f" ({measure.unit})" if measure.unit else ""
  return {"psnr": "PSNR of test images"}.get(field, measure.name) + unit


def _grid(found: Sequence[Group]) -> tuple[int, int]:
  """Returns rows and columns of panels: a row a degradation, if they make a grid."""
  count = len(found)
  kinds = [group.first.degradation for group in found]
  first = kinds.count(kinds[0])
  regular = [kind for i, kind in enumerate(kinds) if kind == kinds[i - i % first]]
  if (
    1 < first < count and first <= 5 and len(regular) == count == first * len({*kinds})
  ):
    return count // first, first
  columns = count if count <= 3 else 2 if count == 4 else min(4, math.ceil(count / 2))
  if count > 8 and count % 5 == 0:
    columns = 5
  return math.ceil(count / columns), columns


def _family(row: Row) -> tuple:
  """Returns what lines of one colour share: all but restoration and ensemble."""
  return (
    *(row.method, row.source, row.trained_on),
    *(row.map, row.resize, tuple(row.without)),
  )


def _looks(found: Sequence[Group]) -> dict[str, dict]:
  """Returns how each title's line looks, the same in all panels."""
  families, looks = {}, {}
  for group in found:
    for title in group.titles:
      if title in looks:
        continue
      row = group.of(title)[0].first
      number = families.setdefault(_family(row), len(families))
      look = pictures.look(number)
      proposed = row.method in SOURCES
      hollow = row.ensemble is False
      looks[title] = look | {
        "ls": "-" if proposed or not row.restorer else (0, (4, 1.6)),
        "lw": 2.0 if proposed else 1.1,
        "ms": 6 if proposed else 4,
        "mfc": pictures.PAPER if hollow else look["color"],
        "mew": 1.4 if hollow else 0.6,
        "zorder": 3 if proposed else 2,
      }
  return looks


def _shown(group: Group, conditions: Sequence[Condition]) -> list[Condition]:
  """Returns the conditions that are drawn."""
  if group.field != "psnr":
    return list(conditions)
  # The PSNR of identical images, counted as 100 dB, would flatten all others.
  return [c for c in conditions if c.name != "clean"]


def _panel(
  panel: Sequence[Axes], group: Group, looks: dict[str, dict], head: str
) -> None:
  left = panel[0]
  uniform = _shown(group, group.uniform)
  others = _shown(group, group.others)
  # Lines stand beside each other, so that their intervals can be seen.
  levels = [c.level for c in uniform]
  step = min(np.diff(levels), default=1.0)
  count = len(group.titles)
  for number, title in enumerate(group.titles):
    look = looks[title]
    place = (number - (count - 1) / 2) / count
    near = 0.025 * count * step * place if count > 2 else 0.0
    _line(left, group, title, [(c.level + near, c) for c in uniform], look)
    if others:
      spread = min(0.8, 0.18 * count) * place
      places = [(i + spread, c) for i, c in enumerate(others)]
      _line(panel[1], group, title, places, look | {"ls": "none"})
  left.set_xlabel(_level(group.first.degradation), fontsize=8.5)
  left.set_xticks([c.level for c in uniform])
  left.set_xticklabels([f"{c.level:g}" for c in uniform])
  left.set_title(head, loc="left", fontsize=9)
  if len(panel) > 1:
    right = panel[1]
    right.tick_params(labelleft=False)
    right.set(xticks=range(len(others)), xlim=(-0.6, max(len(others), 1) - 0.4))
    right.set_xticklabels([_short(c) for c in others])
    if not others:
      right.set_axis_off()
  for axes in panel:
    axes.grid(True, axis="y")


def _line(
  axes: Axes,
  group: Group,
  title: str,
  places: Sequence[tuple[float, Condition]],
  look: dict,
) -> None:
  """Draws a method's points with their intervals; of several seeds, each as a dot."""
  points = [(x, group.get(title, condition)) for x, condition in places]
  points: list[tuple[float, Entry]] = [(x, entry) for x, entry in points if entry]
  if not points:
    return
  values = np.array([entry.value for _, entry in points])
  ends = np.array([(entry.low, entry.high) for _, entry in points])
  reach = np.abs(ends.T - values)
  axes.errorbar(
    [x for x, _ in points],
    values,
    reach,
    elinewidth=0.8,
    capsize=1.5,
    **look,
  )
  for x, entry in points:
    if len(entry.rows) > 1:
      seeds = [row.value for row in entry.rows]
      axes.plot(
        *([x] * len(seeds), seeds),
        ls="none",
        marker="_",
        ms=5,
        color=look["color"],
        alpha=0.7,
      )


def _level(kind: str) -> str:
  if kind == "awgn":
    return "noise level sigma"
  return f"{pictures.name(kind).replace('+', ' + ')}: level"


def _short(condition: Condition) -> str:
  if condition.vary in ("1d", "2d"):
    return condition.vary.upper()
  return pictures.heading(condition.kind).replace(" + ", " +\n")


def _chance(panel: Sequence[Axes], chance: float) -> None:
  if chance < panel[0].get_ylim()[0]:
    return
  for axes in panel:
    axes.axhline(chance, color=pictures.INK, alpha=0.5, lw=0.8, ls=":")
  panel[0].annotate(
    "chance",
    (0.01, chance),
    xycoords=("axes fraction", "data"),
    ha="left",
    va="bottom",
    fontsize=7.5,
    alpha=0.7,
  )


def _caption(field: str, found: Sequence[Group]) -> str:
  what = MEASURES[field].name
  parts = [
    f"{what[0].upper()}{what[1:]} against the level of degradation, with 95 % "
    "intervals; at the side of each panel, levels that vary within the image (1D, 2D)."
  ]
  if any(len(group.titles) > 2 for group in found):
    parts.append("Points are moved sideways a little, so that all can be seen.")
  rows = [e.first for group in found for e in group.entries.values()]
  if any(row.method == "classifier" for row in rows):
    parts.append("Thin lines: classifiers, solid without restoration, dashed with it.")
  elif any(row.method == "restoration" for row in rows):
    parts.append("Solid: without restoration; dashed: with it.")
  if any(row.method in SOURCES for row in rows):
    parts.append(
      "Thick lines: the proposed methods, on restored images; hollow markers: without "
      "ensemble."
    )
  if any(len(group.seeds) > 1 for group in found):
    parts.append("Lines: the mean over seeds of training; dashes: each seed.")
  return " ".join(parts)
