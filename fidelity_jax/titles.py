"""What rows are called in tables, pictures and comparisons."""

import collections
from collections.abc import Sequence

from fidelity_jax.models.calibration import MODULES
from fidelity_jax.rows import Condition, Row

_SOURCES = {
  "oracle": "oracle map",
  "pretrained": "pretrained estimator",
  "end_to_end": "end-to-end estimator",
  "estimated": "estimator",
}
_TRAINED = {"given": "given weights", "none": "not trained"}


def title(row: Row) -> str:
  """Returns what a row's method is called, unique in its `group` and condition.

  What is as in the paper's main table goes without saying: the l1 map, bilinear
  resizing, all modules.
  """
  restoration = f"{'with' if row.restorer else 'without'} restoration"
  if row.method == "restoration":
    return restoration
  if row.method == "estimation":
    return ", ".join([f"map of the {_SOURCES[row.source]}", *_other(row)])
  if row.method == "classifier":
    trained = _TRAINED.get(row.trained_on, f"trained on {row.trained_on}")
    return f"{trained}, {restoration}"
  source = _SOURCES.get(row.method, row.method)
  ensemble = f"{'with' if row.ensemble else 'without'} ensemble"
  told = [] if row.ensemble is None else [ensemble]
  return ", ".join(["proposed", source, *told, *_other(row)])


def _other(row: Row) -> list[str]:
  """Returns what is not as in the paper's main table."""
  other = [] if row.map == "l1" else [f"{row.map} map"]
  if row.resize not in (None, "bilinear"):
    other.append(f"{row.resize} resizing")
  modules = [name for name in (*MODULES, "residual") if name in row.without]
  return other + [f"without {name.replace('_', ' ')}" for name in modules]


def unique(rows: Sequence[Row]) -> list[str]:
  """Returns the rows' titles, with the experiment where one title means two things.

  It does where rows of one title, condition and seed are of different stages or test
  images. Rows that are the same but for the experiment keep one title.

  Args:
    rows: all of one `group`, and about the same measure.
  """
  meanings = collections.defaultdict(set)
  for row in rows:
    meaning = (row.fingerprint, *sorted(row.stages.items()))
    meanings[title(row), row.condition.name, row.seed].add(meaning)
  several = {shown for (shown, *_), found in meanings.items() if len(found) > 1}
  return [
    of_experiment(title(row), row) if title(row) in several else title(row)
    for row in rows
  ]


def of_experiment(shown: str, row: Row) -> str:
  """Returns what a method is called where its title alone means two things."""
  return f"{shown} ({row.experiment})"


def is_uniform(condition: Condition) -> bool:
  """Returns whether a condition has one level, the same everywhere in the image."""
  return condition.vary is None and condition.level is not None


def group(row: Row) -> str:
  """Returns what a table's rows share: the images, the backbone, the degradation."""
  parts = [row.dataset, f"{row.image_size} px", row.backbone, row.degradation]
  return ", ".join(part for part in parts if part)
