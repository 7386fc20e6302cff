"""`fidelity_jax evaluate`: a finished run on other labelled images."""

import json
import shutil

import numpy as np
import pytest
from conftest import experiment
from PIL import Image

import fidelity_jax
from fidelity_jax import data, errors, evaluate_run, runs

_PROGRAM = ("-m", "fidelity_jax", "evaluate")


@pytest.fixture(scope="module")
def tiles(toy_estimated, tmp_path_factory):
  """The experiment's own test images, as a labelled folder."""
  run = runs.find(toy_estimated / "pretrained")
  test = data.load(run.planned.config.dataset, "test")
  root = tmp_path_factory.mktemp("tiles")
  for i, label in enumerate(test.labels):
    folder = root / test.class_names[label]
    folder.mkdir(exist_ok=True)
    Image.fromarray(test.picture(i).pixels()).save(folder / f"{i:04d}.png")
  return root


def _values(path):
  rows = json.loads(path.read_text())["rows"]
  names = ("method", "restorer", "ensemble")
  return {
    (*(row[n] for n in names), row["condition"]["name"]): row["accuracy"] or row["psnr"]
    for row in rows
  }


def test_its_own_images_give_its_own_results(toy_estimated, tiles, command, tmp_path):
  out, run = tmp_path / "out", toy_estimated / "pretrained"
  result = command(run, tiles, f"--out={out}", program=_PROGRAM, check=0)
  assert "trained on clean, without restoration |" in result.stdout
  own = experiment(toy_estimated, "pretrained") / "results.json"
  found, expected = _values(out / "results.json"), _values(own)
  assert found.keys() == expected.keys() and len(found) > 40
  for key, value in expected.items():
    # In the same order, degraded by the same draws.
    assert found[key] == pytest.approx(value, abs=1e-3), key
  assert (out / "report.html").stat().st_size > 10_000
  # Again, nothing is measured; with more rounds, only these: one of 7 conditions.
  again = command(run, tiles, f"--out={out}", program=_PROGRAM, check=0)
  assert "steps/s" not in again.stderr
  assert _values(out / "results.json") == found
  more = command(run, tiles, f"--out={out}", "--rounds=3", program=_PROGRAM, check=0)
  assert "14/14 steps" in more.stderr


@pytest.mark.slow
def test_as_they_are(toy_estimated, tiles, command, tmp_path):
  """Degraded images count as they are: accuracies are those of the model's labels."""
  root, rng = tmp_path / "noisy", np.random.default_rng(0)
  for path in sorted(tiles.rglob("*.png"))[::3]:
    pixels = np.asarray(Image.open(path)).astype(float)
    degraded = np.clip(pixels + rng.normal(0, 50, pixels.shape), 0, 255)
    target = root / path.relative_to(tiles)
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(degraded.astype(np.uint8)).save(target)
  out, run = tmp_path / "out", toy_estimated / "pretrained"
  arguments = (run, root, f"--out={out}", "--as_is")
  result = command(*arguments, program=_PROGRAM, check=0)
  found = _values(out / "results.json")
  assert {key[0] for key in found} == {"classifier", "pretrained"}
  assert {key[-1] for key in found} == {"as_is"}
  rows = json.loads((out / "results.json").read_text())["rows"]
  assert {row["degradation"] for row in rows} == {"as_is"}
  assert "| method | as is |" in result.stdout
  model = fidelity_jax.load(run)
  paths = sorted(root.rglob("*.png"))
  told = model(paths)
  labels = np.array([model.class_names.index(path.parent.name) for path in paths])
  right = lambda logits: 100 * np.mean(logits.argmax(-1) == labels)
  expected = {
    ("classifier", None, None, "as_is"): right(told.degraded_logits),
    ("classifier", "dncnn", None, "as_is"): right(told.restored_logits),
    ("pretrained", "dncnn", True, "as_is"): right(told.logits),
  }
  assert {k: found[k] for k in expected} == pytest.approx(expected)


def test_what_does_not_fit_is_refused(toy_estimated, tiles, tmp_path):
  model = fidelity_jax.load(toy_estimated / "pretrained")
  other = tmp_path / "other"
  shutil.copytree(tiles / "moon", other / "mooon")
  with pytest.raises(
    errors.UsageError, match=r"'mooon' is no class .*did you mean 'mo"
  ):
    evaluate_run.evaluate(model, str(other), tmp_path / "out")
  with pytest.raises(errors.UsageError, match="there is no such folder"):
    evaluate_run.evaluate(model, str(tmp_path / "no"), tmp_path / "none")
  assert not (tmp_path / "none").exists()
  for out in (experiment(toy_estimated, "pretrained"), toy_estimated):
    with pytest.raises(errors.UsageError, match="other experiments in it"):
      evaluate_run.evaluate(model, str(tiles), out)
