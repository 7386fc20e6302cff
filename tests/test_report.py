"""The report's own numbers, beside ours where the experiment is the same."""

import importlib.util

import numpy as np
from conftest import ROOT

from fidelity_jax import evaluate, report

_CONDITIONS = ["clean", *(f"awgn-0.{i}" for i in range(1, 6)), "awgn-1d", "awgn-2d"]


def _config(size):
  spec = importlib.util.spec_from_file_location("c", ROOT / "configs" / "oracle.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(size).copy_and_resolve_references()


def _results():
  rows = []
  for i, condition in enumerate(_CONDITIONS):
    for restoration in (False, True):
      accuracy, std = 80.0 - i + 5 * restoration, 0.5 * (i > 0)
      row = ("setup1", restoration, None, condition, accuracy, std, 10 if i else 1)
      rows.append(evaluate.Row(*row))
  examples = {
    "condition": np.array(["awgn-0.3", "awgn-2d"]),
    "label": np.array([[0, 1], [0, 1]]),
    "map": np.full((2, 2, 8, 8, 3), 0.1, np.float32),
    "prediction/oracle/True/False": np.array([[0, 1], [1, 1]]),
    "prediction/setup1/False/None": np.array([[1, 1], [1, 1]]),
    "prediction/setup1/True/None": np.array([[0, 1], [0, 0]]),
  }
  image = np.random.default_rng(0).uniform(size=(2, 2, 8, 8, 3))
  examples |= {name: image for name in ("clean", "degraded", "restored")}
  return evaluate.Results(rows, examples, ["cat", "dog"])


def test_the_reports_numbers_stand_beside_the_same_experiment():
  paper = report.paper_accuracies(_config(""))
  setup1 = evaluate.Compared("setup1", True, None)
  oracle = evaluate.Compared("oracle", True, True)
  assert len(paper) == 12 * 8
  assert paper[setup1, "awgn-0.3"] == 56.05
  assert paper[oracle, "awgn-2d"] == 78.25
  text = report.markdown(_config(""), _results(), [])
  assert "(report: 56.05)" in text


def test_and_not_beside_another():
  assert report.paper_accuracies(_config("demo")) == {}
  config = _config("")
  config.fidelity.map = "l2"
  assert report.paper_accuracies(config) == {}
  text = report.markdown(_config("demo"), _results(), ["`stage`: ok"])
  assert "(report:" not in text
  assert "- `stage`: ok" in text
  # Mean and standard deviation, and the best of each column in bold.
  assert "**84.00** ± 0.50" in text


def test_it_writes_everything(tmp_path):
  report.write(tmp_path, _config("demo"), _results(), [])
  names = {p.name for p in tmp_path.iterdir()}
  assert names == {"accuracy.png", "examples.png", "report.md", "results.json"}


def test_names_are_no_formulas(tmp_path):
  """A class may be called anything."""
  results = _results()
  names = ["$x_{$", "a$b$\\frac{", "\\udce9"]
  results = evaluate.Results(results.rows, results.examples, names)
  assert report.draw_examples(_config("demo"), results).startswith(b"\x89PNG")
