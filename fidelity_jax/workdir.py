"""The directory that experiments share: what lies where, and an index of it.

DIR/KIND-WHAT-DIGEST/     a stage; see `stages`
DIR/EXPERIMENT-DIGEST/    an experiment's results, pictures and report
DIR/measurements/         values per image that rows are made of; see `results`
DIR/index.md              all of it, in a table
"""

import json
import pathlib
from typing import Any

import msgspec

from fidelity_jax import errors, files, report, results, stages


def experiment_directory(
  workdir: pathlib.Path, name: str, stage: stages.Stage
) -> pathlib.Path:
  """Returns where an experiment's results belong.

  Args:
    workdir: the shared directory.
    name: the experiment's name.
    stage: its last stage; its digest tells experiments of one name apart.
  """
  return workdir / f"{name}-{stage.digest}"


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
  """Returns the lines of all experiments, and who uses which stage."""
  lines, used = [], {}
  for path in sorted(workdir.glob("*/results.json")):
    try:
      content = json.loads(files.read_bytes(path))
      rows = msgspec.convert(content["rows"], list[results.Row])
    except (OSError, ValueError, LookupError, TypeError, msgspec.ValidationError):
      # What is damaged is written again by its own experiment.
      continue
    name = path.parent.name
    by_title: dict[str, list[results.Row]] = {}
    for row in rows:
      by_title.setdefault(report.title(row), []).append(row)
      for stage in row.stages.values():
        if name not in used.setdefault(stage, []):
          used[stage].append(name)
    for title, same in by_title.items():
      value = sum(row.value for row in same) / len(same)
      unit = "dB" if same[0].accuracy is None else "%"
      link = f"[{name}]({name}/report.md)"
      facts = [link, title, same[0].dataset, same[0].seed, f"{value:.1f} {unit}"]
      lines.append(f"| {' | '.join(map(str, facts))} |")
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
