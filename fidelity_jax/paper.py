"""The numbers of the paper that this package implements.

X. Lin, Learning degraded image classification with restoration data fidelity,
IVRL/EPFL 2021; its Tables 5.1 and 6.1.
"""

import functools
import importlib.resources
import json
from typing import Any

from fidelity_jax.rows import Row

_SETUPS = {"clean": "setup1", "degraded": "setup2", "restored": "setup3"}


@functools.cache
def tables() -> dict[str, Any]:
  """Returns the paper's Tables 5.1 and 6.1, accuracies in percent."""
  path = importlib.resources.files("fidelity_jax") / "paper_tables.json"
  return json.loads(path.read_text())


def accuracy(row: Row) -> float | None:
  """Returns the accuracy in percent that the paper has for a row's method.

  It is on Caltech-256 with ResNet-50 and DnCNN, whatever the row's dataset, restorer
  and ResNet are: see `same_experiment`. None where Tables 5.1 and 6.1 have no such
  number: a network that is no ResNet, another degradation or level than theirs, a
  classifier that was not trained, more than one thing that is not as in the paper's
  main method.

  Args:
    row: any.
  """
  column = _column(row)
  if column is None or not (row.backbone or "").startswith("resnet"):
    return None
  if row.method == "classifier":
    setup = _SETUPS.get(row.trained_on)
    return _table_5_1().get((setup, row.restorer is not None, None, column))
  if row.trained_on != "clean":
    return None
  other = _other(row)
  if not other:
    return _table_5_1().get((row.method, True, row.ensemble, column))
  if len(other) > 1 or row.method != "oracle" or row.ensemble:
    return None
  return _table_6_1().get((other[0], column))


def same_experiment(row: Row) -> bool:
  """Returns whether the paper has a row's number for the very same experiment.

  That is its dataset, Caltech-256 at 224 pixels, its backbone, ResNet-50, and its
  restorer, DnCNN, if there is one.

  Args:
    row: any.
  """
  return (
    accuracy(row) is not None
    and row.dataset == "caltech256"
    and row.image_size == 224
    and row.backbone == "resnet50"
    and row.restorer in (None, "dncnn")
  )


def _column(row: Row) -> str | None:
  """Returns the column of a row's condition, None if the tables have no such one."""
  condition = row.condition
  if row.degradation != "awgn":
    return None
  if condition.kind == "clean":
    return "clean"
  if condition.kind != "awgn":
    return None
  if condition.vary is None:
    return f"{condition.level:g}"
  if condition.vary in ("1d", "2d") and sorted(condition.level) == [0.0, 0.5]:
    return condition.vary
  return None


def _other(row: Row) -> list[str]:
  """Returns what is not as in the paper's main method, as Table 6.1 calls it."""
  other = [] if row.map == "l1" else [f"fidelity map: {row.map}"]
  if row.resize not in (None, "bilinear"):
    other.append(f"downsampling: {row.resize}")
  for name in row.without:
    words = "residual mechanism" if name == "residual" else name.replace("_", " ")
    other.append(f"without {words}")
  return other


@functools.cache
def _table_5_1() -> dict[tuple[str | None, bool, bool | None, str], float]:
  """Returns Table 5.1 by (setup or method, restored, ensemble, column)."""
  table = tables()["table_5_1"]
  return {
    (
      row["classifier_or_method"],
      row["restoration_at_test"] != "none",
      row["ensemble"],
      column,
    ): value
    for row in table["rows"]
    for column, value in zip(table["columns"], row["accuracy"], strict=True)
  }


@functools.cache
def _table_6_1() -> dict[tuple[str, str], float]:
  """Returns Table 6.1 by (row, column)."""
  table = tables()["table_6_1"]
  return {
    (row["row"], column): value
    for row in table["rows"]
    for column, value in zip(table["columns"], row["accuracy"], strict=True)
  }
