"""The paper's own numbers, beside ours where the experiment is the same."""

import importlib

import msgspec
import numpy as np
import pytest

from fidelity_jax import degradations, evaluate, paper, report
from fidelity_jax.rows import Compared, Condition, Row

_LEVELS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)


def _config(name="oracle", size="demo"):
  module = importlib.import_module(f"fidelity_jax.configs.{name}")
  return module.get_config(size).copy_and_resolve_references()


def _conditions():
  for level in _LEVELS:
    kind = "awgn" if level else "clean"
    yield Condition(f"awgn-{level}" if level else "clean", kind, level, None, [])
  for vary in ("1d", "2d"):
    yield Condition(f"awgn-{vary}", "awgn", [0.5, 0.0], vary, [])


def _row(condition, **changes):
  row = Row(
    experiment="oracle",
    method="classifier",
    trained_on="clean",
    backbone="resnet50",
    restorer="dncnn",
    map=None,
    ensemble=None,
    dataset="caltech256",
    image_size=224,
    condition=condition,
    seed=0,
    precision="float32",
    accuracy=80.0,
    std=0.5,
    rounds=10,
    images=100,
    fingerprint="",
    stages={},
    products={},
  )
  return msgspec.structs.replace(row, **changes)


def _results(**changes):
  rows = []
  for i, condition in enumerate(_conditions()):
    for restorer in (None, "dncnn"):
      accuracy = 80.0 - i + 5 * (restorer is not None)
      facts = {"accuracy": accuracy, "std": 0.5 * (i > 0), "rounds": 10 if i else 1}
      rows.append(_row(condition, restorer=restorer, **facts | changes))
  keys = [Compared("oracle", True, False), *map(_plain, (False, True))]
  predicted = ([[0, 1], [1, 1]], [[1, 1], [1, 1]], [[0, 1], [0, 0]])
  examples = {
    "condition": np.array(["awgn-0.3", "awgn-2d"]),
    "label": np.array([[0, 1], [0, 1]]),
    "map": np.full((2, 2, 8, 8, 3), 0.1, np.float32),
    **{f"value/{k.key}": np.array(p) for k, p in zip(keys, predicted, strict=True)},
  }
  image = np.random.default_rng(0).uniform(size=(2, 2, 8, 8, 3))
  examples |= {name: image for name in ("clean", "degraded", "restored")}
  return evaluate.Results(rows, examples, ["cat", "dog"])


def _plain(restored):
  return Compared("classifier", restored)


def test_the_papers_numbers_stand_beside_the_same_experiment():
  noise = Condition("awgn-0.3", "awgn", 0.3, None, [])
  varying = Condition("awgn-2d", "awgn", [0.5, 0.0], "2d", [])
  proposed = {"method": "oracle", "map": "l1", "ensemble": True}
  known = paper.accuracies(
    [
      _row(noise),
      _row(noise, trained_on="degraded", restorer=None),
      _row(noise, trained_on="restored"),
      _row(varying, **proposed),
    ]
  )
  assert known == [56.05, 72.23, 73.97, 78.25]
  text = report.markdown(_config(size=""), _results(), [])
  assert "(paper: 56.05)" in text and "(paper: 10.44)" in text


def test_a_table_without_them():
  text = report.markdown(_config(), _results(dataset="demo"), ["`stage`: ok"])
  assert "(paper:" not in text
  assert "- `stage`: ok" in text
  # Mean and standard deviation, and the best of each column in bold.
  assert "**84.00** ± 0.50" in text


def test_it_writes_everything(tmp_path):
  report.write(tmp_path, _config(), _results(), [])
  names = {"results.json", "report.md", "accuracy.png", "examples.png"}
  assert {p.name for p in tmp_path.iterdir()} == names


@pytest.mark.parametrize(
  "spec",
  [
    "clean",
    "motion_blur",
    "gaussian_blur+awgn",
    [{"kind": "awgn", "level": 0.1}, {"kind": "motion_blur", "level": 5}],
    {"kind": "salt_and_pepper", "level": 0.2},
  ],
  ids=str,
)
@pytest.mark.parametrize("measured", ["accuracy", "psnr"])
def test_any_degradation_has_its_pictures(spec, measured):
  rows = []
  for condition in degradations.conditions(spec):
    facts = {"accuracy": None} | {measured: 30.0}
    rows.append(_row(Condition.of(condition), **facts))
  config = _config("clean")
  image = np.zeros((1, 2, 8, 8, 3))
  examples = {name: image for name in ("clean", "degraded", "restored")}
  examples["condition"] = np.array([rows[-1].condition.name])
  examples["label"] = np.zeros((1, 2), int)
  keys = ("classifier", "classifier-restored")
  if measured == "psnr":
    keys = ("restoration", "restoration-restored")
  examples |= {f"value/{k}": np.zeros((1, 2), np.float32) for k in keys}
  if measured == "accuracy":
    examples |= {f"value/{k}": np.zeros((1, 2), np.int32) for k in keys}
  results = evaluate.Results(rows, examples, ["cat", "dog"])
  for draw in (report.draw_accuracy, report.draw_examples):
    assert draw(config, results).startswith(b"\x89PNG")
  assert rows[-1].condition.name in report.markdown(config, results, [])


def test_names_are_no_formulas():
  """A class may be called anything."""
  results = _results()
  names = ["$x_{$", "a$b$\\frac{", "\\udce9"]
  results = evaluate.Results(results.rows, results.examples, names)
  assert report.draw_examples(_config(), results).startswith(b"\x89PNG")
