"""Results -> results.json, report.md and pictures."""

import pathlib
from typing import Any

from ml_collections import ConfigDict


def write(directory: pathlib.Path, config: ConfigDict, results: Any) -> None:
  from fidelity_jax import files
  files.write_json(directory / "results.json", {"experiment": config.experiment, "dataset": config.dataset.name, "rows": results.rows})
  for r in results.rows:
    print(r)
