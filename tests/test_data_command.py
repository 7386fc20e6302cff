"""Datasets through the command: anyone's folder, worker processes, refusals."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from conftest import ROOT, TOY, one_line, overrides
from test_data_images import encoded, photograph

from fidelity_jax import checkpoints, models, port

DEMO = "--config=configs/oracle.py:scratch"
CALTECH101 = ROOT.parent / "shared" / "caltech101"
CLASSIFIER = {
  k.removeprefix("parents.classifier.model."): v
  for k, v in TOY.items()
  if k.startswith("parents.classifier.model.")
}
# No training, one round: does it fit, not what it gives.
UNTRAINED = TOY | {
  **{f"{stage}epochs": 0 for stage in ("", "parents.classifier.")},
  **{f"{stage}warmup_epochs": 0 for stage in ("", "parents.classifier.")},
  "ensemble.enabled": False,
  "evaluation.rounds": 1,
}


def refusal(command, *arguments, env=None):
  """Returns the one line with which a command line is refused."""
  return one_line(command(*arguments, env=env, check=2).stderr)


def save_classifier(directory: pathlib.Path, num_classes: int) -> dict:
  """Writes a ported toy classifier and returns its variables."""
  config = {"name": "resnet", "block": "basic", **CLASSIFIER}
  module = models.create(config, num_classes)
  images = np.zeros((1, 32, 32, 3), np.float32)
  variables = jax.tree.map(np.array, jax.jit(module.init)(jax.random.key(5), images))
  described = {"model": config, "num_classes": num_classes, "class_names": None}
  port.save({"classifier": port.Part(variables, described)}, directory, "a test")
  return variables


def metrics(stage: pathlib.Path) -> list[dict]:
  """Returns what a stage measured, epoch by epoch, but for its speed."""
  lines = (stage / "metrics.jsonl").read_text().splitlines()
  timed = ("steps_per_second", "seconds", "speed/", "memory/")
  return [
    {k: v for k, v in json.loads(line).items() if not k.startswith(timed)}
    for line in lines
  ]


@pytest.mark.slow
def test_worker_processes_change_nothing(toy_copy, command):
  (stage,) = toy_copy.glob("ensemble-*")
  before = metrics(stage)
  shutil.rmtree(stage)
  fields = TOY | {"dataset.workers": 2}
  result = command(DEMO, f"--workdir={toy_copy}", *overrides(fields), check=0)
  assert result.stderr.count(": finished (") == 3
  assert metrics(stage) == before


def test_a_classifier_for_other_classes_is_refused(tmp_path, command):
  save_classifier(tmp_path / "ported", 5)
  fields = TOY | {
    "parents.classifier.model.weights": tmp_path / "ported",
    "parents.classifier.model.new_head": False,
  }
  line = refusal(command, DEMO, f"--workdir={tmp_path / 'run'}", *overrides(fields))
  assert "the head of the weights has 5 classes, and the dataset 16" in line
  assert "model.new_head=True" in line
  assert not list((tmp_path / "run").glob("*-*"))


def test_a_parent_trained_on_other_classes_is_refused(tmp_path, command):
  for name in ("cat", "dog"):
    (tmp_path / "pets" / name).mkdir(parents=True)
    for i in range(40):
      picture = encoded(photograph(16, 16, seed=i))
      (tmp_path / "pets" / name / f"{i:02d}.png").write_bytes(picture)
  fields = TOY | {
    "parents.classifier.dataset.name": "folder",
    "parents.classifier.dataset.path": tmp_path / "pets",
  }
  env = {"FIDELITY_JAX_CACHE": str(tmp_path / "cache")}
  workdir = f"--workdir={tmp_path / 'run'}"
  line = refusal(command, DEMO, workdir, *overrides(fields), env=env)
  assert "has 16 classes" in line and "classifier was trained on 2 classes" in line
  # A strict run stops at the first bad image, before anything is trained.
  bad = tmp_path / "pets" / "cat" / "empty.png"
  bad.write_bytes(b"")
  fields["parents.classifier.dataset.strict"] = True
  line = refusal(command, DEMO, workdir, *overrides(fields), env=env)
  assert "cat/empty.png: the file is empty" in line
  assert not list((tmp_path / "run").glob("*-*"))


@pytest.mark.slow
def test_a_ported_classifier_is_used_as_it_is(toy_copy, tmp_path, command):
  variables = save_classifier(tmp_path / "ported", 16)
  fields = UNTRAINED | {
    "parents.classifier.model.weights": tmp_path / "ported",
    "parents.classifier.model.new_head": False,
  }
  old = set(toy_copy.glob("classifier-*"))
  command(DEMO, f"--workdir={toy_copy}", *overrides(fields), check=0)
  (stage,) = set(toy_copy.glob("classifier-*")) - old
  directory = checkpoints.variables_directory(stage / "checkpoints", 0)
  kept = checkpoints.load_variables(directory, variables)
  jax.tree.map(np.testing.assert_array_equal, kept, variables)


@pytest.mark.skipif(not CALTECH101.exists(), reason="needs ../shared/caltech101")
@pytest.mark.slow
def test_a_folder_of_photographs(tmp_path, command):
  for name in ("ant", "crab", "lotus", "yin_yang"):
    (tmp_path / "photographs" / name).mkdir(parents=True)
    (tmp_path / "photographs" / name / "all").symlink_to(CALTECH101 / name)
  fields = UNTRAINED | {
    "parents.restorer.epochs": 0,
    "dataset.name": "folder",
    "dataset.path": tmp_path / "photographs",
  }
  env = {"FIDELITY_JAX_CACHE": str(tmp_path / "cache")}
  workdir = tmp_path / "run"
  command(DEMO, f"--workdir={workdir}", *overrides(fields), env=env, check=0)
  rows = json.loads(next(workdir.glob("*/results.json")).read_text())["rows"]
  rows = [row for row in rows if row["accuracy"] is not None]
  assert len(rows) == 24 and {row["dataset"] for row in rows} == {"folder"}
