"""What rows are called in tables, pictures and comparisons."""

from fidelity_jax.models.calibration import MODULES
from fidelity_jax.rows import Row

_SOURCES = {
  "oracle": "oracle map",
  "pretrained": "pretrained estimator",
  "end_to_end": "end-to-end estimator",
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
  ensemble = f"{'with' if row.ensemble else 'without'} ensemble"
  source = _SOURCES.get(row.method, row.method)
  return ", ".join(["proposed", source, ensemble, *_other(row)])


def _other(row: Row) -> list[str]:
  """Returns what is not as in the paper's main table."""
  other = [] if row.map == "l1" else [f"{row.map} map"]
  if row.resize not in (None, "bilinear"):
    other.append(f"{row.resize} resizing")
  modules = [name for name in (*MODULES, "residual") if name in row.without]
  return other + [f"without {name.replace('_', ' ')}" for name in modules]


def group(row: Row) -> str:
  """Returns what a table's rows share: the images, the backbone, the degradation."""
  parts = [row.dataset, f"{row.image_size} px", row.backbone, row.degradation]
  return ", ".join(part for part in parts if part)
