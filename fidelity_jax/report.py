"""Results -> results.json, report.md, accuracy.png and examples.png."""

import functools
import importlib.resources
import io
import json
import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import msgspec
import numpy as np
from ml_collections import ConfigDict

from fidelity_jax import files
from fidelity_jax.evaluate import Compared, Results

_TITLES = {
  "oracle": "oracle map",
  "pretrained": "pretrained estimator",
  "end_to_end": "end-to-end estimator",
}


def title(method: Compared) -> str:
  """Returns what a method is called in tables and pictures."""
  if method.method.startswith("setup"):
    training = {"setup1": "clean", "setup2": "degraded", "setup3": "restored"}
    restored = "with" if method.restoration else "without"
    return f"trained on {training[method.method]}, {restored} restoration"
  ensemble = "with" if method.ensemble else "without"
  return f"proposed, {_TITLES[method.method]}, {ensemble} ensemble"


@functools.cache
def paper_tables() -> dict[str, Any]:
  """Returns the report's Tables 5.1 and 6.1, accuracies in percent."""
  path = importlib.resources.files("fidelity_jax") / "paper_tables.json"
  return json.loads(path.read_text())


def paper_accuracies(config: ConfigDict) -> dict[tuple[Compared, str], float]:
  """Returns Table 5.1 by (method, condition), or {} for another experiment.

  Args:
    config: the experiment's config. It is the report's if it is about Caltech-256,
      ResNet-50, AWGN, the l1 map and 224 px.
  """
  same = (
    config.dataset.name == "caltech256"
    and config.dataset.image_size == 224
    and config.parents.classifier.model.name == "resnet50"
    and config.degradation.kind == "awgn"
    and config.fidelity.map == "l1"
  )
  if not same:
    return {}
  table = paper_tables()["table_5_1"]
  names = [c if c == "clean" else f"awgn-{c}" for c in table["columns"]]
  accuracies = {}
  for row in table["rows"]:
    restoration = row["restoration_at_test"] != "none"
    method = Compared(row["classifier_or_method"], restoration, row["ensemble"])
    for name, accuracy in zip(names, row["accuracy"], strict=True):
      accuracies[method, name] = accuracy
  return accuracies


def check(directory: pathlib.Path) -> None:
  """Raises RunError if what `write` writes could not be written there."""
  for name in ("results.json", "accuracy.png", "examples.png", "report.md"):
    files.check_file(directory / name)


def write(
  directory: pathlib.Path, config: ConfigDict, results: Results, stages: list[str]
) -> None:
  """Writes everything a reader of the experiment needs.

  Args:
    directory: the workdir.
    config: the experiment's config.
    results: from `evaluate.Evaluation.run`.
    stages: a line for each stage, for the record.
  """
  table = {
    "experiment": config.experiment,
    "dataset": config.dataset.name,
    "rows": msgspec.to_builtins(results.rows),
  }
  files.write_json(directory / "results.json", table)
  files.write_bytes(directory / "accuracy.png", draw_accuracy(config, results))
  files.write_bytes(directory / "examples.png", draw_examples(config, results))
  text = markdown(config, results, stages)
  files.write_bytes(directory / "report.md", text.encode())


def _grid(results: Results) -> tuple[list[Compared], list[str], dict]:
  """Returns the methods, the conditions, and rows by (method, condition)."""
  rows = {}
  for row in results.rows:
    rows[Compared(row.method, row.restoration, row.ensemble), row.condition] = row
  methods = sorted({m for m, _ in rows}, key=lambda m: (m[0] != "setup1", *m[1:]))
  conditions = list(dict.fromkeys(c for _, c in rows))
  return methods, conditions, rows


def markdown(config: ConfigDict, results: Results, stages: list[str]) -> str:
  """Returns report.md's text."""
  methods, conditions, rows = _grid(results)
  paper = paper_accuracies(config)
  best = {c: max(rows[m, c].accuracy for m in methods) for c in conditions}
  lines = [
    f"# {config.experiment}, {config.dataset.name}",
    "",
    "Test accuracy in percent: mean ± standard deviation over rounds of noise. All "
    "methods see the same noise. Best of a column in bold.",
    "",
    "| method | " + " | ".join(conditions) + " |",
    "|---|" + "---|" * len(conditions),
  ]
  for method in methods:
    cells = []
    for condition in conditions:
      row = rows[method, condition]
      cell = f"{row.accuracy:.2f}"
      if row.accuracy == best[condition]:
        cell = f"**{cell}**"
      if row.rounds > 1:
        cell += f" ± {row.std:.2f}"
      if (method, condition) in paper:
        cell += f" (report: {paper[method, condition]:.2f})"
      cells.append(cell)
    lines.append(f"| {title(method)} | " + " | ".join(cells) + " |")
  rounds = max(row.rounds for row in results.rows)
  lines += ["", f"Rounds: {rounds} (1 where nothing is random). Seed: {config.seed}."]
  if paper:
    lines += ["", f"In brackets, Table 5.1 of: {paper_tables()['source']}."]
  else:
    lines += [
      "",
      "This is not the report's own experiment (Caltech-256, ResNet-50, 224 px, AWGN, "
      "l1 map), so its numbers do not stand beside these.",
    ]
  lines += ["", "![accuracy](accuracy.png)", "", "![examples](examples.png)", ""]
  lines += ["Stages:", "", *[f"- {stage}" for stage in stages], ""]
  return "\n".join(lines)


def _spaced(name: str) -> str:
  """Returns a name for a picture, where "$" would begin a formula."""
  return name.replace("_", " ").replace("$", r"\$")


def _heading(condition: str) -> str:
  """Returns "noise, sigma 0.3" for "awgn-0.3", "noise, 2D" for "awgn-2d", ..."""
  kind, _, level = condition.rpartition("-")
  kind = "noise" if kind == "awgn" else _spaced(kind)
  if level in ("1d", "2d"):
    return f"{kind}, {level.upper()}"
  return f"{kind}, sigma {level}" if kind == "noise" else f"{kind} {level}"


def _level(condition: str) -> float | None:
  """Returns the one level of a condition, None if there is not one."""
  if condition == "clean":
    return 0.0
  try:
    return float(condition.rpartition("-")[2])
  except ValueError:
    return None


def _png(figure: plt.Figure) -> bytes:
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png", dpi=110)
  plt.close(figure)
  return buffer.getvalue()


def draw_accuracy(config: ConfigDict, results: Results) -> bytes:
  """Returns the picture of accuracy against level, a line per method (PNG)."""
  methods, conditions, rows = _grid(results)
  kind = config.degradation.kind
  levels = {c: level for c in conditions if (level := _level(c)) is not None}
  uniform = sorted(levels, key=levels.get)
  varying = [c for c in conditions if c not in levels]
  figure, (left, right) = plt.subplots(
    1, 2, figsize=(10, 4.8), sharey=True, width_ratios=(3, 1), layout="constrained"
  )
  for number, method in enumerate(methods):
    style = "--" if method.method == "setup1" else "-"
    kwargs = {"color": f"C{number}", "marker": "o", "capsize": 3}
    y = [rows[method, c].accuracy for c in uniform]
    error = [rows[method, c].std for c in uniform]
    left.errorbar(
      [levels[c] for c in uniform], y, error, ls=style, label=title(method), **kwargs
    )
    y = [rows[method, c].accuracy for c in varying]
    error = [rows[method, c].std for c in varying]
    spread = (number - (len(methods) - 1) / 2) * 0.08
    right.errorbar(np.arange(len(varying)) + spread, y, error, ls="none", **kwargs)
  chance = 100 / len(results.class_names)
  left.axhline(chance, color="gray", lw=0.8, ls=":")
  left.text(
    levels[uniform[-1]], chance, "chance", color="gray", va="bottom", ha="right"
  )
  level = "noise level sigma (images in [0, 1])" if kind == "awgn" else f"{kind} level"
  left.set(xlabel=level, ylabel="test accuracy (%)", ylim=(0, 100))
  left.set_xticks(list(levels.values()))
  left.set_title("one level everywhere")
  right.set(xticks=range(len(varying)), xlim=(-0.5, len(varying) - 0.5))
  right.set_xticklabels([_heading(c) for c in varying])
  right.set_title("varying levels")
  for axes in (left, right):
    axes.grid(alpha=0.3)
  what = "noisy (AWGN)" if kind == "awgn" else f"degraded ({_spaced(kind)})"
  figure.suptitle(
    f"Classifying {what} images: {config.experiment}, {config.dataset.name}"
  )
  figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2)
  return _png(figure)


def draw_examples(config: ConfigDict, results: Results) -> bytes:
  """Returns the picture of clean, degraded and restored images and maps (PNG)."""
  examples, names = results.examples, results.class_names
  conditions = [str(c) for c in examples["condition"]]
  # Each condition shows images of its own, as long as there are enough.
  total = examples["clean"].shape[1]
  count = max(total // len(conditions), 1)
  columns = [
    (m, (m * count + n) % total) for m in range(len(conditions)) for n in range(count)
  ]
  source = config.fidelity.source
  ensemble = "True" if f"prediction/{source}/True/True" in examples else "False"
  rows = [
    ("clean", "clean", None),
    ("degraded", "degraded", "prediction/setup1/False/None"),
    ("restored", "restored", "prediction/setup1/True/None"),
    ("fidelity map\n(bright: error)", "map", f"prediction/{source}/True/{ensemble}"),
  ]
  maps = examples["map"].mean(-1)
  meaning = {"l1": "|restored - clean|", "l2": "(restored - clean)²"}
  meaning = meaning.get(config.fidelity.map, "1 - cosine similarity")
  if config.fidelity.map == "cosine":
    maps = 1 - maps
  vmax = float(np.quantile(maps, 0.995)) or 1.0
  figure, grid = plt.subplots(
    4, len(columns), figsize=(1.75 * len(columns) + 0.9, 8.6), layout="constrained"
  )
  for i, (name, key, prediction) in enumerate(rows):
    for j, (m, n) in enumerate(columns):
      axes = grid[i, j]
      axes.set(xticks=[], yticks=[])
      label = int(examples["label"][m, n])
      if key == "map":
        drawn = axes.imshow(maps[m, n], cmap="magma", vmin=0, vmax=vmax)
      else:
        axes.imshow(np.clip(examples[key][m, n], 0, 1))
      if i == 0:
        text = f"{_heading(conditions[m])}\n{_spaced(names[label])}"
        axes.set_title(text, fontsize=9)
      if j == 0:
        axes.set_ylabel(name, fontsize=10)
      if prediction:
        predicted = int(examples[prediction][m, n])
        right = predicted == label
        sign = "✓" if right else "✗"
        axes.set_xlabel(
          f"{sign} {_spaced(names[predicted])}",
          fontsize=8,
          color="green" if right else "red",
        )
  figure.colorbar(drawn, ax=grid[3, :].tolist(), shrink=0.9, label=meaning)
  figure.suptitle(
    "Below each image, what is predicted from it: the classifier trained on clean "
    "images sees the\ndegraded, then the restored image; the proposed method sees the "
    "restored image and the map",
    fontsize=9,
  )
  return _png(figure)
