"""The directory that experiments share: what lies where, and an index of it.

- `KIND-WHAT-DIGEST/`: a stage; see `stages`.
- `NAME-DIGEST/`: results, pictures and report of an experiment or a study, and where
  the time of the runs went that made them; see `timing`.
- `measurements/`: values per image that rows are made of; see `measurements`.
- `index.md`: all of it, in tables.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import msgspec

from fidelity_jax import data, degradations, errors, files, plan, rows, stages, titles
from fidelity_jax.datasets import Datasets


def results_directory(
  workdir: pathlib.Path,
  name: str,
  planned: plan.Plan,
  tests: Mapping[str, data.Dataset],
) -> pathlib.Path:
  """Returns where the results of an experiment or a study belong.

  Args:
    workdir: the shared directory.
    name: the experiment's or the study's.
    planned: its experiments.
    tests: the images that they are evaluated on, by experiment.

  Returns:
    A directory of that name and a digest of all that its results depend on, but for how
    often and how fast it measures.
  """
  of: Any = [
    {
      "stages": sorted(stage.name for stage in one.ends),
      "conditions": [c.steps for c in degradations.conditions(one.config.degradation)],
      "images": tests[one.name].fingerprint if one.name in tests else None,
      "seed": one.config.seed,
      "noise": one.config.get("evaluation", {}).get("seed"),
    }
    for one in planned.experiments
  ]
  return workdir / f"{name}-{files.digest(of[0] if len(of) == 1 else of, 8)}"


class Experiment(msgspec.Struct):
  """What experiment.json holds of an experiment: where its networks are.

  Attributes:
    config: its config, see `stages.as_json`.
    stages: names of all stages behind it.
    last: name of its last stage.
    further: names of those that serve its evaluation alone, by role.
    class_names: of its dataset.
  """

  config: dict[str, Any]
  stages: list[str]
  last: str
  further: dict[str, str]
  class_names: list[str]


class Experiments(msgspec.Struct):
  """What experiment.json holds."""

  experiments: list[Experiment]
  format: int = stages.FORMAT


def write_experiments(
  directory: pathlib.Path, planned: plan.Plan, datasets: Datasets
) -> None:
  """Writes experiment.json: what it takes to find the networks again.

  Args:
    directory: of the results.
    planned: the experiments.
    datasets: what loads their images.
  """
  experiments = [
    Experiment(
      config=stages.as_json(one.config),
      stages=[stage.name for stage in one.stages],
      last=one.last.name,
      further={role: stage.name for role, stage in one.further.items()},
      class_names=list(datasets.encoded(one.config.dataset, "train").class_names),
    )
    for one in planned.experiments
  ]
  files.write_record(directory / "experiment.json", Experiments(experiments))


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
      experiments = content["experiments"]
      measured: list[rows.Row] = []
      if any("evaluation" in one["config"] for one in experiments):
        content = json.loads(files.read_bytes(path.parent / "results.json"))
        measured = [rows.read(row) for row in content["rows"]]
      config = experiments[0]["config"]
      facts = [config["dataset"]["name"], config["seed"]]
      for stage in {s for one in experiments for s in one["stages"]}:
        used.setdefault(stage, []).append(name)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
      # What is damaged is written again by its own experiment.
      continue
    by_title: dict[tuple, list[rows.Row]] = {}
    for row in measured:
      if row.method == "restoration" and measured[0].method != "restoration":
        continue
      if row.method != "estimation":
        key = (titles.title(row), titles.group(row), row.dataset, row.seed)
        by_title.setdefault(key, []).append(row)
    for (title, group, *facts), same in by_title.items():
      value = sum(row.value for row in same) / len(same)
      unit = "dB" if same[0].accuracy is None else "%"
      if len({other for _, other, *_ in by_title}) > 1:
        title = f"{title} ({group})"
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
