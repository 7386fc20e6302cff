"""The numbers of the paper that this package implements.

X. Lin, Learning degraded image classification with restoration data fidelity,
IVRL/EPFL 2021; its Tables 5.1 and 6.1.
"""

import functools
import importlib.resources
import json
from collections.abc import Sequence
from typing import Any

from fidelity_jax.rows import Row

_SETUPS = {"clean": "setup1", "degraded": "setup2", "restored": "setup3"}


@functools.cache
def tables() -> dict[str, Any]:
  """Returns the paper's Tables 5.1 and 6.1, accuracies in percent."""
  path = importlib.resources.files("fidelity_jax") / "paper_tables.json"
  return json.loads(path.read_text())


@functools.cache
def _table_5_1() -> dict[tuple[str, bool, bool | None, str], float]:
  """Returns Table 5.1 by (setup or method, restored, ensemble, condition)."""
  table = tables()["table_5_1"]
  names = [c if c == "clean" else f"awgn-{c}" for c in table["columns"]]
  return {
    (
      row["classifier_or_method"],
      row["restoration_at_test"] != "none",
      row["ensemble"],
      name,
    ): accuracy
    for row in table["rows"]
    for name, accuracy in zip(names, row["accuracy"], strict=True)
  }


def accuracies(rows: Sequence[Row]) -> list[float | None]:
  """Returns the accuracy in percent that Table 5.1 has for each row.

  None where the row is of another experiment: the paper's is about Caltech-256,
  ResNet-50, DnCNN, AWGN, the l1 map and 224 px, and classifiers that it trained.
  """
  return [_accuracy(row) for row in rows]


def _accuracy(row: Row) -> float | None:
  same = (
    row.dataset == "caltech256"
    and row.image_size == 224
    and row.backbone == "resnet50"
    and row.restorer in (None, "dncnn")
    and row.map in (None, "l1")
    and row.trained_on in _SETUPS
    and (row.method == "classifier" or row.trained_on == "clean")
  )
  if not same:
    return None
  method = _SETUPS[row.trained_on] if row.method == "classifier" else row.method
  key = (method, row.restorer is not None, row.ensemble, row.condition.name)
  return _table_5_1().get(key)
