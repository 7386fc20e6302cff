"""The directory that experiments share: what lies where, and an index of it.

- `KIND-WHAT-DIGEST/`: a stage; see `stages`.
- `EXPERIMENT-DIGEST/`: an experiment's results, pictures and report.
- `measurements/`: values per image that rows are made of; see `rows`.
- `index.md`: all of it, in tables.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import msgspec
from ml_collections import ConfigDict

from fidelity_jax import data, degradations, errors, files, report, rows, stages


def experiment_directory(
  workdir: pathlib.Path,
  config: ConfigDict,
  ends: Sequence[stages.Stage],
  test: data.Dataset | None,
) -> pathlib.Path:
  """Returns where an experiment's results belong.

  Args:
    workdir: the shared directory.
    config: the experiment's.
    ends: its last stages.
    test: the images that it is evaluated on, None for none.

  Returns:
    A directory named by the experiment and a digest of all that its results depend on,
    but for how often and how fast it measures.
  """
  of = {
    "stages": sorted(stage.name for stage in ends),
    "conditions": [c.steps for c in degradations.conditions(config.degradation)],
    "images": test.fingerprint if test else None,
    "seed": config.seed,
  }
  return workdir / f"{config.experiment}-{files.digest(of, 8)}"


def write_experiment(
  directory: pathlib.Path, config: ConfigDict, plan: Sequence[stages.Stage]
) -> None:
  """Writes experiment.json: what it takes to find an experiment's networks again.

  Args:
    directory: the experiment's.
    config: its config.
    plan: its stages.
  """
  names = [stage.name for stage in plan]
  record = {"format": stages.FORMAT, "config": stages.as_json(config), "stages": names}
  files.write_json(directory / "experiment.json", files.seal(record))


def write_index(workdir: pathlib.Path) -> None:
  """Writes index.md, which says what is in the directory, from what is there.

  Raises:
    RunError: it cannot be written.
  """
  experiments, used = _experiments(workdir)
  lines = ["# What is in this directory", "", "## Experiments", ""]
  lines += ["| directory | method | dataset | seed | mean over conditions |"]
  lines += ["|---|---|---|---|---|", *experiments, "", "## Stages", ""]
  lines += ["| directory | state | behind |", "|---|---|---|"]
  lines += [*_stages(workdir, used), ""]
  lines += [
    "`measurements/` has the values per image that the experiments' rows are made of.",
    "",
  ]
  files.write_bytes(workdir / "index.md", "\n".join(lines).encode())


def _experiments(workdir: pathlib.Path) -> tuple[list[str], dict[str, list[str]]]:
  """Returns the lines of all experiments, and which experiments use each stage."""
  lines, used = [], {}
  for path in sorted(workdir.glob("*/experiment.json")):
    name = path.parent.name
    try:
      content = json.loads(files.read_bytes(path))
      config, names = content["config"], content["stages"]
      measured: list[rows.Row] = []
      if "evaluation" in config:
        content = json.loads(files.read_bytes(path.parent / "results.json"))
        measured = msgspec.convert(content["rows"], list[rows.Row])
      facts = [config["dataset"]["name"], config["seed"]]
      for stage in names:
        used.setdefault(stage, []).append(name)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
      # What is damaged is written again by its own experiment.
      continue
    by_title: dict[str, list[rows.Row]] = {}
    for row in measured:
      by_title.setdefault(report.title(row), []).append(row)
    for title, same in by_title.items():
      value = sum(row.value for row in same) / len(same)
      unit = "dB" if same[0].accuracy is None else "%"
      cells = [f"[{name}]({name}/report.md)", title, *facts, f"{value:.1f} {unit}"]
      lines.append(f"| {' | '.join(map(str, cells))} |")
    if not measured:
      lines.append(f"| {name} | | {facts[0]} | {facts[1]} | not evaluated |")
  return lines, used


def _stages(workdir: pathlib.Path, used: dict[str, list[str]]) -> list[str]:
  lines = []
  for path in sorted(workdir.glob("*/config.json")):
    state: Any = "not finished"
    marker = path.parent / "finished.json"
    if marker.exists():
      try:
        record = files.read_record(marker, stages.Finished, "")
        state = f"finished, validation {record.metric} {record.score:.4g}"
      except errors.RunError:
        state = "damaged"
    name = path.parent.name
    lines.append(f"| {name} | {state} | {', '.join(used.get(name, []))} |")
  return lines
