"""Rows -> results.json, report.md, accuracy.png and examples.png of an experiment."""

import io
import pathlib
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import msgspec
import numpy as np
from ml_collections import ConfigDict

from fidelity_jax import files, paper
from fidelity_jax.evaluate import Results
from fidelity_jax.rows import Compared, Condition, Row

# What an experiment's directory has in it.
NAMES = (
  *("results.json", "report.md", "accuracy.png", "examples.png"),
  *("examples.npz", "experiment.json"),
)
_SOURCES = {
  "oracle": "oracle map",
  "pretrained": "pretrained estimator",
  "end_to_end": "end-to-end estimator",
}


def title(row: Row) -> str:
  """Returns what a row's method is called in tables and pictures."""
  restoration = f"{'with' if row.restorer else 'without'} restoration"
  if row.method == "restoration":
    return restoration
  if row.method == "classifier":
    other = {"given": "given weights", "none": "not trained"}
    trained = other.get(row.trained_on, f"trained on {row.trained_on}")
    return f"{trained}, {restoration}"
  ensemble = "with" if row.ensemble else "without"
  return f"proposed, {_SOURCES.get(row.method, row.method)}, {ensemble} ensemble"


def check(directory: pathlib.Path) -> None:
  """Raises RunError if what `write` writes could not be written there."""
  files.check_directory(directory, write=True)
  for name in NAMES:
    files.check_file(directory / name)


def write(
  directory: pathlib.Path, config: ConfigDict, results: Results, stages: list[str]
) -> None:
  """Writes everything a reader of the experiment needs.

  Args:
    directory: the experiment's.
    config: the experiment's config.
    results: from `evaluate.Evaluation.run`.
    stages: a line for each stage, for the record.
  """
  files.write_bytes(directory / "accuracy.png", draw_accuracy(config, results))
  files.write_bytes(directory / "examples.png", draw_examples(config, results))
  text = markdown(config, results, stages)
  files.write_bytes(directory / "report.md", text.encode())
  # Last: where it is, all else is.
  rows = msgspec.to_builtins(results.rows)
  files.write_json(directory / "results.json", {"rows": rows})


class _Grid(NamedTuple):
  """Rows by title and condition, in the order in which they were measured."""

  titles: list[str]
  conditions: list[Condition]
  rows: dict[tuple[str, str], Row]


def _grid(results: Results) -> _Grid:
  rows = {(title(row), row.condition.name): row for row in results.rows}
  conditions = {row.condition.name: row.condition for row in results.rows}
  titles = list(dict.fromkeys(name for name, _ in rows))
  return _Grid(titles, list(conditions.values()), rows)


def markdown(config: ConfigDict, results: Results, stages: list[str]) -> str:
  """Returns report.md's text."""
  titles, conditions, rows = _grid(results)
  names = [c.name for c in conditions]
  known = dict(zip(rows, paper.accuracies(list(rows.values())), strict=True))
  best = {c: max(rows[t, c].value for t in titles) for c in names}
  first = results.rows[0]
  what = "Test accuracy in percent" if first.psnr is None else "PSNR in dB"
  lines = [
    f"# {config.experiment}, {config.dataset.name}",
    "",
    f"{what}: mean ± standard deviation over rounds of noise. All methods see the same "
    "noise. Best of a column in bold.",
    "",
    "| method | " + " | ".join(names) + " |",
    "|---|" + "---|" * len(names),
  ]
  for name in titles:
    cells = []
    for condition in names:
      row = rows[name, condition]
      cell = f"{row.value:.2f}"
      if row.value == best[condition]:
        cell = f"**{cell}**"
      if row.rounds > 1:
        cell += f" ± {row.std:.2f}"
      if known[name, condition] is not None:
        cell += f" (paper: {known[name, condition]:.2f})"
      cells.append(cell)
    lines.append(f"| {name} | " + " | ".join(cells) + " |")
  rounds = max(row.rounds for row in results.rows)
  lines += [
    "",
    f"{first.images} images. Rounds: {rounds} (1 where nothing is random). Seed: "
    f"{config.seed}. Computed in {first.precision}.",
  ]
  if any(value is not None for value in known.values()):
    lines += ["", f"In brackets, Table 5.1 of: {paper.tables()['source']}."]
  else:
    lines += [
      "",
      "This is not the paper's own experiment (Caltech-256, ResNet-50, 224 px, AWGN, "
      "l1 map), so its numbers do not stand beside these.",
    ]
  lines += ["", "![accuracy](accuracy.png)", "", "![examples](examples.png)", ""]
  lines += ["Stages:", "", *[f"- {stage}" for stage in stages], ""]
  return "\n".join(lines)


def _spaced(name: str) -> str:
  """Returns a name for a picture, where "$" would begin a formula."""
  return name.replace("_", " ").replace("$", r"\$")


def _heading(condition: Condition) -> str:
  """Returns e.g. "noise, sigma 0.3", "noise, 2D", "gaussian blur + noise"."""
  kind = _spaced(condition.kind).replace("awgn", "noise").replace("+", " + ")
  if condition.vary in ("1d", "2d"):
    return f"{kind}, {condition.vary.upper()}"
  if condition.level is None or condition.kind == "clean":
    return kind
  return f"{kind}, {'sigma ' * (kind == 'noise')}{condition.level:g}"


def _png(figure: plt.Figure) -> bytes:
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png", dpi=110)
  plt.close(figure)
  return buffer.getvalue()


def draw_accuracy(config: ConfigDict, results: Results) -> bytes:
  """Returns the picture of accuracy, or PSNR, against level, a line a method (PNG)."""
  titles, conditions, rows = _grid(results)
  kind = next((c.kind for c in conditions if c.name != "clean"), "clean")
  classified = results.rows[0].accuracy is not None
  # The PSNR of identical images, counted as 100 dB, would flatten all others.
  shown = [c for c in conditions if classified or c.name != "clean"]
  uniform = sorted((c for c in shown if c.vary is None), key=lambda c: c.level)
  varying = [c for c in shown if c.vary is not None]
  figure, (left, right) = plt.subplots(
    1, 2, figsize=(10, 4.8), sharey=True, width_ratios=(3, 1), layout="constrained"
  )
  for number, name in enumerate(titles):
    proposed = name.startswith("proposed")
    kwargs = {"color": f"C{number}", "marker": "o", "capsize": 3}
    along = [rows[name, c.name] for c in uniform]
    left.errorbar(
      [c.level for c in uniform],
      [row.value for row in along],
      [row.std for row in along],
      ls="-" if proposed else "--",
      label=name,
      **kwargs,
    )
    along = [rows[name, c.name] for c in varying]
    spread = (number - (len(titles) - 1) / 2) * 0.08
    right.errorbar(
      np.arange(len(varying)) + spread,
      [row.value for row in along],
      [row.std for row in along],
      ls="none",
      **kwargs,
    )
  if classified:
    chance = 100 / len(results.class_names)
    left.axhline(chance, color="gray", lw=0.8, ls=":")
    last = uniform[-1].level
    left.text(last, chance, "chance", color="gray", va="bottom", ha="right")
    left.set(ylabel="test accuracy (%)", ylim=(0, 100))
  else:
    left.set(ylabel="PSNR of test images (dB)")
  level = "noise level sigma (images in [0, 1])" if kind == "awgn" else f"{kind} level"
  left.set(xlabel=level)
  left.set_xticks([c.level for c in uniform])
  left.set_title("one level everywhere")
  right.set(xticks=range(len(varying)), xlim=(-0.5, max(len(varying), 1) - 0.5))
  right.set_xticklabels([_heading(c) for c in varying])
  right.set_title("varying levels")
  for axes in (left, right):
    axes.grid(alpha=0.3)
  what = "noisy (AWGN)" if kind == "awgn" else f"degraded ({_spaced(kind)})"
  doing = "Classifying" if classified else "Restoring"
  name = _spaced(config.experiment)
  figure.suptitle(f"{doing} {what} images: {name}, {_spaced(config.dataset.name)}")
  figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2)
  return _png(figure)


_MEANINGS = {
  "l1": "|restored - clean|",
  "l2": "(restored - clean)²",
  "cosine": "1 - cosine similarity",
}


def _example_rows(config: ConfigDict, results: Results) -> list[tuple[str, str, str]]:
  """Returns (label, array of images, array of values below them or "") from above."""
  plain = "classifier" if results.rows[0].accuracy is not None else "restoration"
  rows = [
    ("clean", "clean", ""),
    ("degraded", "degraded", Compared(plain, False).key),
    ("restored", "restored", Compared(plain, True).key),
  ]
  if "map" in results.examples:
    source = config.fidelity.source
    keys = [Compared(source, True, ensemble).key for ensemble in (True, False)]
    best = next(key for key in keys if f"value/{key}" in results.examples)
    rows.append(("fidelity map\n(bright: error)", "map", best))
  return [row for row in rows if row[1] in results.examples]


def draw_examples(config: ConfigDict, results: Results) -> bytes:
  """Returns the picture of clean, degraded and restored images and maps (PNG)."""
  examples, names = results.examples, results.class_names
  known = {row.condition.name: row.condition for row in results.rows}
  conditions = [known[str(name)] for name in examples["condition"]]
  # Each condition shows images of its own, as long as there are enough.
  total = examples["clean"].shape[1]
  count = max(total // len(conditions), 1)
  columns = [
    (m, (m * count + n) % total) for m in range(len(conditions)) for n in range(count)
  ]
  rows = _example_rows(config, results)
  figure, grid = plt.subplots(
    len(rows),
    len(columns),
    figsize=(1.75 * len(columns) + 0.9, 2.0 * len(rows) + 0.6),
    layout="constrained",
    squeeze=False,
  )
  for i, (name, key, values) in enumerate(rows):
    for j, (m, n) in enumerate(columns):
      axes = grid[i, j]
      axes.set(xticks=[], yticks=[])
      label = int(examples["label"][m, n])
      if key == "map":
        maps = examples["map"].mean(-1)
        maps = 1 - maps if config.fidelity.map == "cosine" else maps
        vmax = float(np.quantile(maps, 0.995)) or 1.0
        drawn = axes.imshow(maps[m, n], cmap="magma", vmin=0, vmax=vmax)
      else:
        axes.imshow(np.clip(examples[key][m, n], 0, 1))
      if i == 0:
        text = f"{_heading(conditions[m])}\n{_spaced(names[label])}"
        axes.set_title(text, fontsize=9)
      if j == 0:
        axes.set_ylabel(name, fontsize=10)
      if values:
        _write_below(axes, examples[f"value/{values}"][m, n], label, names)
  if "map" in examples:
    meaning = _MEANINGS[config.fidelity.map]
    figure.colorbar(drawn, ax=grid[-1, :].tolist(), shrink=0.9, label=meaning)
  figure.suptitle(_caption(results), fontsize=9)
  return _png(figure)


def _write_below(axes, value: np.generic, label: int, names: list[str]) -> None:
  """Writes a predicted class, right or wrong, or a PSNR below an image."""
  if value.dtype.kind == "f":
    axes.set_xlabel(f"{value:.1f} dB", fontsize=8)
    return
  right = int(value) == label
  axes.set_xlabel(
    f"{'✓' if right else '✗'} {_spaced(names[int(value)])}",
    fontsize=8,
    color="green" if right else "red",
  )


def _caption(results: Results) -> str:
  first = results.rows[0]
  if first.accuracy is None:
    return "Below each image, its PSNR to the clean one"
  other = {"given": "as given", "none": "as it started"}
  which = other.get(first.trained_on, f"trained on {first.trained_on} images")
  text = (
    "Below each image, what is predicted from it: the classifier "
    f"{which} sees the\ndegraded, then the restored image"
  )
  if "map" in results.examples:
    text += "; the proposed method sees the restored image and the map"
  return text
