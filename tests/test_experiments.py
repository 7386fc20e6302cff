"""Every kind of experiment, whole, at toy size, through the command."""

import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
import torch
import torch_reference
from conftest import TOY, TOY_ESTIMATOR, experiment, overrides, results
from PIL import Image
from test_parity import TinyResNet, reference

import fidelity_jax
from fidelity_jax import data, export

_ORACLE = "--config=configs/oracle.py:scratch"
# One epoch and one round: does it run, not what it gives.
_QUICK = TOY | {
  "epochs": 1,
  "warmup_epochs": 0,
  "evaluation.rounds": 1,
  "parents.classifier.epochs": 1,
  "parents.classifier.warmup_epochs": 0,
  "parents.restorer.epochs": 1,
}


def _rows(workdir, name="oracle"):
  return json.loads(results(workdir, name).read_text())["rows"]


def _methods(workdir, name="oracle"):
  classified = [row for row in _rows(workdir, name) if row["accuracy"] is not None]
  return {(row["method"], row["ensemble"]) for row in classified}


def _variables(stage):
  step = json.loads((stage / "finished.json").read_text())["best_step"]
  with ocp.StandardCheckpointer() as checkpointer:
    variables = checkpointer.restore(stage / "checkpoints" / str(step) / "variables")
  return jax.tree.map(np.asarray, variables)


def _assert_the_best_epoch_was_kept(workdir):
  """By loss for an estimator, by PSNR gain for a restorer, by accuracy otherwise."""
  names = {"estimator": ("loss", -1), "restorer": ("psnr_gain", 1)}
  stages = [path.parent for path in workdir.glob("*/metrics.jsonl")]
  for stage in stages:
    name, sign = names.get(stage.name.split("-")[0], ("accuracy", 1))
    lines = (stage / "metrics.jsonl").read_text().splitlines()
    scores = {r["step"]: r[f"validation/{name}"] for r in map(json.loads, lines)}
    record = json.loads((stage / "finished.json").read_text())
    assert record["metric"] == name
    assert record["score"] == pytest.approx(scores[record["best_step"]])
    assert sign * record["score"] == max(sign * score for score in scores.values())
  return {stage.name.split("-")[0] for stage in stages}


@pytest.mark.slow
def test_estimated_maps(toy_copy, command):
  """Pretrained, then end-to-end, in the workdir where the oracle's parents are."""
  fields = TOY | TOY_ESTIMATOR
  workdir = f"--workdir={toy_copy}"
  for source in ("pretrained", "end_to_end"):
    config = f"--config=configs/{source}.py:scratch"
    result = command(config, workdir, *overrides(fields), check=0)
    finished = 2 if source == "pretrained" else 3
    assert result.stderr.count(": finished (") == finished
    expected = {("classifier", None), (source, False), (source, True)}
    assert _methods(toy_copy, source) == expected
    # What another experiment has measured of the classifier is not measured again.
    assert len(list(toy_copy.glob("measurements/classifier-*"))) == 2
  estimator = _variables(next(toy_copy.glob("estimator-*")))
  before = estimator["params"]
  (stage,) = toy_copy.glob("calibration-end_to_end-*")
  trained = _variables(stage)["params"]
  assert set(trained) == {"calibration", "estimator"}
  # End-to-end starts from the pretrained estimator and moves it.
  moved = jax.tree.map(
    lambda a, b: float(np.abs(a - b).max()), trained["estimator"], before
  )
  assert all(0 < m < 0.5 for m in jax.tree.leaves(moved))
  (stage,) = toy_copy.glob("calibration-pretrained-*")
  assert set(_variables(stage)["params"]) == {"calibration"}
  (stage,) = toy_copy.glob("ensemble-end_to_end-*")
  assert set(_variables(stage)["params"]) == {"ensemble"}
  kinds = {"classifier", "restorer", "estimator", "calibration", "ensemble"}
  assert _assert_the_best_epoch_was_kept(toy_copy) == kinds
  # The estimator's own config is the same stage: nothing is left to do.
  alone = {
    k: v for k, v in TOY.items() if k.startswith(("dataset", "parents.restorer"))
  }
  alone |= {k.removeprefix("parents.estimator."): v for k, v in TOY_ESTIMATOR.items()}
  config = "--config=configs/estimator.py:scratch"
  result = command(config, workdir, *overrides(alone), check=0)
  assert result.stderr.count(": finished (") == 2


@pytest.mark.slow
def test_the_demo_s_classifier_is_pretrained(command, tmp_path):
  """The README's first command, of one epoch: its head alone is trained, and knows."""
  trained = ("", "ensemble.", "parents.classifier.", "parents.restorer.")
  fields = {f"{stage}epochs": 1 for stage in trained} | {"evaluation.rounds": 1}
  arguments = ["--config=configs/oracle.py:demo", f"--workdir={tmp_path}"]
  result = command(*arguments, *overrides(fields), check=0)
  assert "where the time went" in result.stderr
  (path,) = tmp_path.glob("oracle-*/results.json")
  rows = json.loads(path.read_text())["rows"]
  plain = [row for row in rows if row["method"] == "classifier" and not row["restorer"]]
  (clean,) = (r["accuracy"] for r in plain if r["condition"]["name"] == "clean")
  # One of sixteen is right by chance.
  assert clean > 50


def _at_the_top(role, chosen=("dataset", "evaluation")):
  """Returns the toy's fields for an experiment that ends in a stage of this role."""
  own = {k: v for k, v in TOY.items() if k.startswith(f"parents.{role}.")}
  fields = {k: v for k, v in TOY.items() if k.startswith(chosen)}
  return fields | {k.removeprefix(f"parents.{role}."): v for k, v in own.items()}


@pytest.mark.slow
def test_a_classifier_alone_and_a_restorer_alone(toy_copy, command):
  """Where the oracle's experiment was: nothing is trained, only new is measured."""
  workdir = f"--workdir={toy_copy}"
  run = lambda name, fields: command(
    f"--config=configs/{name}.py:scratch", workdir, *overrides(fields), check=0
  )
  fields = _at_the_top("classifier", ("dataset", "evaluation", "parents.restorer"))
  result = run("clean", fields)
  assert result.stderr.count(": finished (") == 2
  assert "steps/s" not in result.stderr
  rows = [row for row in _rows(toy_copy, "clean") if row["method"] == "classifier"]
  assert {row["restorer"] for row in rows} == {None, "dncnn"}
  assert {row["trained_on"] for row in rows} == {"clean"}
  # Of another level only what is new is measured: two rounds of 0.25 and of 1D and 2D
  # that end there, in two batches each.
  before = {p: p.read_bytes() for p in toy_copy.glob("measurements/*/*.npz")}
  result = run("clean", fields | {"degradation.level": 0.25})
  assert result.stderr.count(": finished (") == 2
  assert "evaluation  12/12 steps" in result.stderr
  assert len(list(toy_copy.glob("clean-*/report.md"))) == 2
  assert {p: p.read_bytes() for p in before} == before
  # The restorer alone: PSNR and SSIM with and without it.
  result = run("restorer", _at_the_top("restorer"))
  assert result.stderr.count(": finished (") == 1
  assert "steps/s" not in result.stderr
  rows = _rows(toy_copy, "restorer")
  psnr = {(row["restorer"], row["condition"]["name"]): row["psnr"] for row in rows}
  # Noise of 0.1 has 20 dB, and more where clipping takes some of it.
  assert 20 < psnr[None, "awgn-0.1"] < 21
  assert psnr[None, "clean"] == pytest.approx(100)
  assert psnr["dncnn", "awgn-0.1"] != psnr[None, "awgn-0.1"]
  assert all(row["low"] <= row["psnr"] <= row["high"] for row in rows)
  ssim = {(row["restorer"], row["condition"]["name"]): row["ssim"] for row in rows}
  assert ssim[None, "clean"] == pytest.approx(1)
  assert 0 < ssim[None, "awgn-0.5"] < ssim[None, "awgn-0.1"] < 1
  index = (toy_copy / "index.md").read_text()
  assert all(f"[{name}-" in index for name in ("clean", "oracle", "restorer"))


@pytest.mark.slow
def test_an_authors_checkpoint_as_it_is(command, tmp_path):
  """All networks from one file, nothing trained: predictions are the reference's."""
  options = dict(num_convs=2, channels=4, ratio=2.0, ensemble=True)
  theirs = reference(TinyResNet(num_classes=16), 8, **options)
  path = tmp_path / "given.safetensors"
  state = torch_reference.state_dict(theirs)
  safetensors.numpy.save_file(state, path)
  fields = {k: v for k, v in _QUICK.items() if k.startswith(("dataset", "evaluation"))}
  for stage in ("", "parents.classifier.", "parents.restorer."):
    fields |= {f"{stage}model.weights": path.name, f"{stage}epochs": 0}
  fields |= {"ensemble.weights": path.name, "ensemble.epochs": 0, "model.ratio": 2.0}
  fields |= {"parents.classifier.model.new_head": False}
  fields |= {"parents.classifier.model.stage_sizes": (1,)}
  fields |= {"parents.classifier.model.width": 8, "parents.restorer.model.depth": 3}
  fields |= {"parents.restorer.model.width": 4, "evaluation.examples": 8}
  run = lambda workdir, fields, status: command(
    _ORACLE, f"--workdir={workdir}", *overrides(fields), check=status, cwd=tmp_path
  )
  # What does not fit is told before anything runs.
  refused = run("refused", fields | {"model.num_convs": 3}, 2).stderr.splitlines()[-1]
  assert "model.num_convs 2 (the config's is 3)" in refused
  refused = run("refused", fields | {"parents.restorer.model.depth": 4}, 2)
  assert "model.depth 3 (the config's is 4)" in refused.stderr.splitlines()[-1]
  assert not list((tmp_path / "refused").glob("*/"))
  run("run", fields, 0)
  with np.load(experiment(tmp_path / "run") / "examples-oracle.npz") as examples:
    clean, degraded = (_nchw(examples[name]) for name in ("clean", "degraded"))
    predicted = examples["value/oracle-restored-ensemble"].ravel()
    at_clean = examples["value/clean"][0]
  with torch.no_grad():
    logits = theirs(degraded, clean)
  assert len(set(predicted)) > 1
  np.testing.assert_array_equal(predicted, logits.argmax(1))
  mean, std = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
  normalized = (clean[: len(at_clean)] - torch.tensor(mean).view(3, 1, 1)) / (
    torch.tensor(std).view(3, 1, 1)
  )
  with torch.no_grad():
    frozen = theirs.classifier(theirs.plain_features(normalized))
  np.testing.assert_array_equal(at_clean, frozen.argmax(1))
  # Finished stages need the file no longer.
  path.unlink()
  assert run("run", fields, 0).stderr.count(": finished (") == 4
  trained_on = {row["trained_on"] for row in _rows(tmp_path / "run")}
  assert trained_on == {"given", None}
  # Other weights under the same name make other stages.
  name = next(name for name in state if name.endswith("conv1.weight"))
  safetensors.numpy.save_file(state | {name: state[name] * 1.5}, path)
  assert run("run", fields, 0).stderr.count(": finished (") == 0
  assert len(list((tmp_path / "run").glob("oracle-*/results.json"))) == 2


@pytest.mark.slow
def test_photographs_without_labels(toy_run, command, tmp_path):
  """A classifier as it is, calibrated on its own answers to unlabelled photographs."""
  tiles = data.load(data.default_config("demo"), "test")
  folder = tmp_path / "photographs"
  folder.mkdir()
  for i in range(0, len(tiles), 8):
    Image.fromarray(tiles.picture(i).pixels()).save(folder / f"{i}.png")
  model = fidelity_jax.load(toy_run / "oracle")
  given = tmp_path / "given"
  export.export(toy_run / "oracle", given)
  (tmp_path / "names.txt").write_text("\n".join(model.class_names))
  fields = {k: v for k, v in _QUICK.items() if "per_class" not in k}
  fields |= {"labels": "self", "dataset.name": "folder", "dataset.path": folder.name}
  fields |= {"dataset.classes": "names.txt", "dataset.fractions": (0.4, 0.2, 0.4)}
  fields |= {"batch_size": 4, "parents.restorer.batch_size": 8}
  weights = {"weights": given.name, "new_head": False}
  fields |= {f"parents.classifier.model.{k}": v for k, v in weights.items()}
  run = lambda fields, status: command(
    _ORACLE, "--workdir=run", *overrides(fields), check=status, cwd=tmp_path
  )
  refused = run(fields, 2).stderr.splitlines()[-1]
  assert "parents.classifier.epochs = 1 cannot be trained on its own" in refused
  none = {"parents.classifier.epochs": 0, "evaluation.keep": "predictions"}
  run(fields | none, 0)
  found = {
    (row["method"], row["restorer"], row["condition"]["name"]): row
    for row in _rows(tmp_path / "run")
  }
  # It agrees with itself, and with noise not always.
  assert found["classifier", None, "clean"]["accuracy"] == 100
  assert found["classifier", None, "awgn-0.5"]["accuracy"] < 100
  (kept,) = experiment(tmp_path / "run").glob("predictions-*.npz")
  with np.load(kept) as arrays:
    files = [folder / name for name in arrays["images"]]
    said = model(files, clean=files).degraded_logits.argmax(-1)
    np.testing.assert_array_equal(arrays["labels"], said)
  assert len(set(said)) > 1
  stages = {path.name.split("-")[0] for path in (tmp_path / "run").glob("*-*")}
  assert {"classifier", "calibration", "ensemble"} <= stages
  assert run(fields | none, 0).stderr.count(": finished (") == 4


def _nchw(images):
  """Returns [M, N, H, W, 3] as float64 [M N, 3, H, W]."""
  images = images.reshape(-1, *images.shape[2:])
  return torch.tensor(images, dtype=torch.float64).permute(0, 3, 1, 2)


@pytest.mark.slow
def test_bfloat16(toy_copy, command):
  """What accelerators compute in by default, through a whole experiment."""
  fields = _QUICK | TOY_ESTIMATOR | {"precision": "bfloat16"}
  fields |= {"parents.estimator.epochs": 1, "parents.classifier.precision": "float32"}
  config = "--config=configs/end_to_end.py:scratch"
  command(config, f"--workdir={toy_copy}", *overrides(fields), check=0)
  (stage,) = toy_copy.glob("calibration-end_to_end-*")
  dtypes = {leaf.dtype for leaf in jax.tree.leaves(_variables(stage)["params"])}
  assert dtypes == {np.dtype("float32")}
  assert _methods(toy_copy, "end_to_end") >= {
    ("end_to_end", False),
    ("end_to_end", True),
  }


@pytest.mark.slow
@pytest.mark.parametrize(
  "module",
  [
    "spatial_multiplication",
    "spatial_addition",
    "residual",
    "channel_multiplication",
    "channel_concatenation",
  ],
)
def test_each_module_can_be_left_out(toy_copy, command, module):
  fields = TOY | {f"model.{module}": False, "epochs": 1, "warmup_epochs": 0}
  fields["ensemble.enabled"] = False
  shutil.rmtree(experiment(toy_copy))
  result = command(_ORACLE, f"--workdir={toy_copy}", *overrides(fields), check=0)
  assert result.stderr.count(": finished (") == 2
  assert _methods(toy_copy) == {("classifier", None), ("oracle", False)}


@pytest.mark.slow
@pytest.mark.parametrize(
  "fields",
  [
    {"fidelity.map": "l2"},
    {"fidelity.map": "cosine"},
    {"model.resize": "bicubic"},
    {"model.resize": "nearest"},
    {"model.num_convs": 2},
  ],
  ids=str,
)
def test_maps_and_resizing(toy_copy, command, fields):
  fields = TOY | fields | {"epochs": 1, "warmup_epochs": 0, "ensemble.enabled": False}
  command(_ORACLE, f"--workdir={toy_copy}", *overrides(fields), check=0)


@pytest.mark.slow
def test_an_estimator_of_the_cosine_map_on_restored_images(toy_copy, command):
  fields = TOY | TOY_ESTIMATOR
  fields |= {"fidelity.map": "cosine", "fidelity.estimator_input": "restored"}
  config = "--config=configs/end_to_end.py:scratch"
  command(config, f"--workdir={toy_copy}", *overrides(fields), check=0)


@pytest.mark.slow
@pytest.mark.parametrize(
  "kind",
  [
    "salt_and_pepper",
    "gaussian_blur",
    "motion_blur",
    "rectangular_crop",
    "gaussian_blur+awgn",
  ],
)
def test_every_degradation(tmp_path, command, kind):
  fields = _QUICK | {"degradation.kind": kind}
  command(_ORACLE, f"--workdir={tmp_path}", *overrides(fields), check=0)
  conditions = {row["condition"]["name"] for row in _rows(tmp_path)}
  if "+" in kind:
    assert conditions == {"clean", "gaussian_blur-mixture+awgn-mixture"}
  else:
    assert {"clean", f"{kind}-1d", f"{kind}-2d"} < conditions


@pytest.mark.slow
@pytest.mark.parametrize(
  "name", ["alexnet", "vgg16", "googlenet", "resnet18", "resnet50"]
)
def test_every_backbone(tmp_path, command, name):
  free = ("parents.classifier.model.stage_sizes", "parents.classifier.model.width")
  fields = {k: v for k, v in _QUICK.items() if k not in free}
  fields |= {
    "dataset.image_size": 64,
    "parents.classifier.model.name": name,
    # Steps enough for batch statistics to follow: deep networks explode with the old.
    "parents.classifier.batch_size": 4,
    "parents.classifier.epochs": 2,
    "parents.classifier.learning_rate": 1e-3,
    "learning_rate": 1e-4,
    "ensemble.learning_rate": 1e-4,
    # Narrow hidden layers: VGG-16's calibration has 1.57 billion parameters at 0.5.
    "model.ratio": 0.002 if name == "vgg16" else 0.02,
  }
  command(_ORACLE, f"--workdir={tmp_path}", *overrides(fields), check=0)
  assert _methods(tmp_path) == {
    ("classifier", None),
    ("oracle", False),
    ("oracle", True),
  }
