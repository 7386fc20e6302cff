"""`fidelity_jax evaluate`: a run on other labelled images."""

import json
import shutil

import msgspec
import numpy as np
import pytest
import safetensors.numpy
import torch
import torch_reference
from conftest import experiment
from PIL import Image
from test_data_images import photograph
from test_parity import TinyResNet, reference

import fidelity_jax
from fidelity_jax import (
  data,
  errors,
  evaluate_run,
  export,
  exported,
  files,
  given,
  runs,
)

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


@pytest.mark.slow
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


def _measures(path):
  """Returns what results.json has for each method and condition."""
  rows = json.loads((path / "results.json").read_text())["rows"]
  measures = ("accuracy", "top5", "ece", "psnr", "ssim", "map_error", "ause")
  return {
    (_same(row["method"]), bool(row["restorer"]), row["ensemble"], name): {
      measure: row[measure] for measure in measures if row[measure] is not None
    }
    for row in rows
    for name in [row["condition"]["name"]]
  }


def _same(method):
  # A directory of weights does not say how its estimator was trained.
  return "pretrained" if method == "estimated" else method


# Evaluates a run's export to each of some places, in one process.
EXPORTS = """
import pathlib, sys, fidelity_jax
from fidelity_jax import evaluate_run, export
run, folder, *places = sys.argv[1:]
for place in map(pathlib.Path, places):
  export.export(run, place)
  out = place.with_name(f"{place.name}-out")
  evaluate_run.evaluate(fidelity_jax.load(place), folder, out, rounds=2)
"""


def _check_exports(toy_estimated, tiles, command, directory, names):
  """Evaluates exports on the experiment's own images, and compares the results.

  What the experiment gives when it is evaluated on them is tested above.
  """
  places = [directory / name for name in names]
  run = toy_estimated / "pretrained"
  command(run, tiles, *places, program=("-c", EXPORTS), check=0)
  itself = _measures(experiment(toy_estimated, "pretrained"))
  for place in places:
    out = place.with_name(f"{place.name}-out")
    found = _measures(out)
    assert ("pretrained", True, True, "awgn-0.3") in found
    # A file answers by its whole method alone.
    assert found.keys() == {
      key
      for key in itself
      if not place.suffix or key[0] in ("restoration", "estimation") or key[2]
    }
    for key, measures in found.items():
      assert measures == pytest.approx(itself[key], abs=1e-4), key
    rows = json.loads((out / "results.json").read_text())["rows"]
    facts = {(r["trained_on"], r["backbone"], r["map"], r["seed"]) for r in rows}
    if place.suffix:
      assert facts >= {("clean", "resnet", "l1", 0), (None, None, "l1", 0)}
      digest = exported.read_record(place).digest
      assert {r["products"]["given"] for r in rows} == {digest[:16]}
    else:
      assert facts >= {("given", "resnet", "l1", None), ("given", "resnet", None, None)}
      # Of weights that nobody told of, the paper has no numbers.
      assert {r["paper"] for r in rows} == {None}
      assert "seed" not in (out / "report.md").read_text()


@pytest.mark.slow
def test_exports_are_as_good_as_their_experiment(
  toy_estimated, tiles, command, tmp_path
):
  names = ("weights", "run.jax")
  _check_exports(toy_estimated, tiles, command, tmp_path, names)


@pytest.mark.slow
def test_an_onnx_file_is_as_good_as_its_experiment(
  toy_estimated, tiles, command, tmp_path
):
  pytest.importorskip("jax2onnx")
  _check_exports(toy_estimated, tiles, command, tmp_path, ("run.onnx",))


@pytest.fixture(scope="module")
def exports(toy_estimated, tmp_path_factory):
  """The run, and one on the true map, as .jax files."""
  root = tmp_path_factory.mktemp("exports")
  for name in ("pretrained", "oracle"):
    export.export(toy_estimated / name, root / f"{name}.jax")
  return root


def _noted(exports, to, without=(), **changed):
  """Copies an exported file, with another record; returns its path."""
  path = shutil.copy(exports / "pretrained.jax", to)
  record = json.loads((exports / "pretrained.jax.json").read_text()) | changed
  kept = {k: v for k, v in record.items() if k not in ("sha256", *without)}
  files.write_json(exported.record_path(path), files.seal(kept))
  return path


def test_an_exported_file_notes_what_it_is_for(toy_estimated, exports, tmp_path):
  run = runs.find(toy_estimated / "pretrained")
  record = exported.read_record(exports / "pretrained.jax")
  evaluation = run.planned.config.evaluation
  assert (record.about.rounds, record.about.seed) == (evaluation.rounds, 0)
  blur = {"kind": "motion_blur", "level": {"tuple": [1, 5]}}
  about = msgspec.to_builtins(record.about) | {"degradation": blur, "seed": 7}
  model = fidelity_jax.load(_noted(exports, tmp_path / "o.jax", about=about))
  config = given.config_for(model, data.default_config("folder"))
  assert (config.evaluation.rounds, config.evaluation.seed) == (evaluation.rounds, 7)
  whole, *_ = given.of_model(model, config)
  names = ["clean", "motion_blur-5", "motion_blur-1d", "motion_blur-2d"]
  assert [condition.name for condition in whole.conditions] == names
  # What is known of them is what the experiment's own rows say.
  path = experiment(toy_estimated, "pretrained") / "results.json"
  rows = json.loads(path.read_text())["rows"]
  own = next(r for r in rows if r["method"] == "pretrained" and r["ensemble"])
  told = msgspec.to_builtins(whole.facts)
  assert told == {name: own[name] for name in told} and len(told) == 11
  # By way of a directory, whose card knows it.
  export.export(toy_estimated / "pretrained", tmp_path / "weights")
  export.export(tmp_path / "weights", tmp_path / "again.jax")
  assert exported.read_record(tmp_path / "again.jax").about == record.about
  # Of an earlier version.
  old = _noted(exports, tmp_path / "old.jax", ["about"])
  model = fidelity_jax.load(old)
  config = given.config_for(model, data.default_config("folder"))
  found = given.of_model(model, config)
  methods = ["estimated", "restoration", "restoration", "estimation"]
  assert [subject.compared.method for subject in found] == methods
  assert config.degradation.kind == "awgn"


@pytest.mark.slow
def test_an_earlier_versions_file_is_taken_as_it_is(exports, tiles, tmp_path, capsys):
  path = _noted(exports, tmp_path / "old.jax", ["about"])
  out = tmp_path / "out"
  arguments = [path, tiles, f"--out={out}", "--as_is"]
  assert evaluate_run.main(list(map(str, arguments))) == 0
  captured = capsys.readouterr()
  assert "| proposed, estimator |" in captured.out
  assert "does not say what degradation" not in captured.err
  (row,) = json.loads((out / "results.json").read_text())["rows"]
  model = fidelity_jax.load(path)
  paths = sorted(tiles.rglob("*.png"))
  labels = [model.class_names.index(path.parent.name) for path in paths]
  right = np.mean(model(paths).logits.argmax(-1) == labels)
  assert (row["accuracy"], row["images"]) == (pytest.approx(100 * right), len(paths))


@pytest.fixture(scope="module")
def theirs():
  """A network of the authors' code, with three classes."""
  options = dict(num_convs=2, channels=4, ratio=2.0, ensemble=True, source="degraded")
  return reference(TinyResNet(num_classes=3), 8, **options)


@pytest.fixture(scope="module")
def checkpoint(theirs, tmp_path_factory):
  """Its checkpoint, and beside it that of the restorer alone."""
  state = torch_reference.state_dict(theirs)
  root = tmp_path_factory.mktemp("authors")
  safetensors.numpy.save_file(state, root / "given.safetensors")
  restorer = {k: v for k, v in state.items() if k.startswith("restoration.")}
  safetensors.numpy.save_file(restorer, root / "restorer.safetensors")
  return root / "given.safetensors"


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
  """As many folders; images of 1, 2 and 3 in those of class 0, 1 and 2."""
  root = tmp_path_factory.mktemp("numbered")
  for number, name in enumerate(("10.dog", "2.cat", "b")):
    (root / name).mkdir()
    for i in range(number + 1):
      pixels = photograph(224, 224, seed=10 * number + i)
      Image.fromarray(pixels).save(root / name / f"{i}.png")
  return root


@pytest.mark.parametrize(
  "kind", ["clean", pytest.param("gaussian_blur", marks=pytest.mark.slow)]
)
def test_an_authors_checkpoint_is_evaluated(
  theirs, checkpoint, numbered, tmp_path, capsys, kind
):
  """All its methods, on classes in the folders' order; it answers as PyTorch does."""
  out = tmp_path / "out"
  arguments = [checkpoint, numbered, f"--out={out}", f"--degradation={kind}"]
  assert evaluate_run.main(list(map(str, arguments))) == 0
  captured = capsys.readouterr()
  # The order is that of torchvision's ImageFolder.
  assert "0 is '10.dog', 1 is '2.cat', 2 is 'b'." in captured.err
  assert "--map_name=l1 and --estimator_input=degraded is taken" in captured.err
  assert "does not say what degradation" not in captured.err
  results = json.loads((out / "results.json").read_text())
  assert results["class_names"] == ["10.dog", "2.cat", "b"]
  rows = results["rows"]
  assert {row["degradation"] for row in rows} == {kind}
  assert {(row["seed"], row["paper"]) for row in rows} == {(None, None)}
  assert all(row["stages"] == {} for row in rows)
  found = _measures(out)
  folders = [numbered / name for name in results["class_names"]]
  paths = [path for folder in folders for path in sorted(folder.iterdir())]
  pixels = np.stack([np.asarray(Image.open(path)) for path in paths])
  images = torch.tensor(pixels.transpose(0, 3, 1, 2) / 255)
  with torch.no_grad():
    said = theirs(images, images).numpy().argmax(-1)
  right = np.mean(said == [0, 1, 1, 2, 2, 2])
  whole = found["pretrained", True, True, "clean"]
  assert whole["accuracy"] == pytest.approx(100 * right)
  methods = {key[:3] for key in found}
  assert ("pretrained", True, False) in methods and len(methods) == 7


def test_an_experiment_is_asked_of_another_degradation(toy_estimated, tiles):
  model = fidelity_jax.load(toy_estimated / "pretrained")
  planned = evaluate_run._planned(model, str(tiles), "rectangular_crop", False)
  names = [[c.name for c in one.conditions] for one in planned.subjects()]
  assert len(names) == 7
  assert {one[0] for one in names} == {"clean"}
  assert {one[5] for one in names} == {"rectangular_crop-0.5"}


def test_what_does_not_classify_or_fit_is_refused(
  toy_estimated, checkpoint, exports, numbered, tiles, tmp_path, refused
):
  out = f"--out={tmp_path / 'out'}"
  two = tmp_path / "two"
  for name in ("2.cat", "b"):
    shutil.copytree(numbered / name, two / name)
  clean = "leave --as_is out, or name a run on an estimated map"
  denoiser = checkpoint.with_name("restorer.safetensors")
  for arguments, words in (
    ([denoiser, tiles, out], "restorer does not classify"),
    ([checkpoint, numbered, out, "--degradation=awgm"], "did you mean 'awgn'?"),
    ([checkpoint, numbered, out, "--degradation=awgn+snow"], "'snow'"),
    ([checkpoint, numbered, out, "--degradation="], "unknown kind"),
    ([checkpoint, numbered, out, "--degradation=awgn", "--as_is"], "not allowed with"),
    ([checkpoint, two, out], "nobody named the 3 classes of given"),
    ([exports / "pretrained.jax", numbered, out], "is no class of pretrained"),
    ([exports / "pretrained.jax", tiles, out, "--map_name=l2"], "leave map_name out"),
    ([toy_estimated / "oracle", tiles, out, "--map_name=l2"], "knows how its map"),
    ([exports / "oracle.jax", tiles, out, "--as_is"], clean),
    ([exports / "none.jax", tiles, out], "there is no exported file"),
  ):
    refused(arguments, 2, words, command=evaluate_run.main)


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
