"""The numbers of a report for programs: results.json and results.csv."""

import csv
import io
from collections.abc import Sequence
from typing import Any

import msgspec

from fidelity_jax import titles
from fidelity_jax.report import groups, text
from fidelity_jax.report.content import Content
from fidelity_jax.rows import Row

_APART = ("condition", "per_class", "stages", "products", "without")


def as_json(content: Content) -> dict[str, Any]:
  """Returns what results.json holds."""
  rows = [msgspec.to_builtins(row) | {"paper": _paper(row)} for row in content.rows]
  return {
    "command": content.command,
    "environment": dict(content.environment),
    "seconds": content.seconds,
    "rows": rows,
    "comparisons": msgspec.to_builtins(content.comparisons),
    "verdicts": msgspec.to_builtins(content.verdicts),
    "missing": list(content.missing),
    "class_names": list(content.class_names),
  }


def as_csv(rows: Sequence[Row]) -> str:
  """Returns what results.csv holds: a line for each row; empty where there is none."""
  scalars = [field for field in Row.__struct_fields__ if field not in _APART]
  columns = ["title", "group", *scalars, "value", "paper", "without", "condition"]
  columns += ["condition_kind", "condition_level", "condition_vary"]
  columns += ["stages", "products"]
  buffer = io.StringIO()
  writer = csv.DictWriter(buffer, columns, lineterminator="\n")
  writer.writeheader()
  for row in rows:
    level = row.condition.level
    values = {field: getattr(row, field) for field in scalars} | {
      "title": titles.title(row),
      "group": titles.group(row),
      "value": row.value,
      "paper": _paper(row),
      "without": "+".join(row.without),
      "condition": row.condition.name,
      "condition_kind": row.condition.kind,
      "condition_level": ";".join(map(repr, level))
      if isinstance(level, list)
      else level,
      "condition_vary": row.condition.vary,
      "stages": text.pairs(row.stages),
      "products": text.pairs(row.products),
    }
    printed = {
      name: text.printable(value) if isinstance(value, str) else value
      for name, value in values.items()
    }
    writer.writerow(printed)
  return buffer.getvalue()


def _paper(row: Row) -> float | None:
  return groups.Entry((row,)).paper
