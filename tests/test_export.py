"""Exported networks give what the run gives, without this package."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import venv

import jax
import jax.export
import msgspec
import numpy as np
import pytest
from conftest import (
  ROOT,
  TOY,
  TOY_ESTIMATOR,
  experiment,
  flip,
  one_line,
  overrides,
  results,
  without_privileges,
)
from test_data_images import encoded, photograph

import fidelity_jax
from fidelity_jax import (
  errors,
  export,
  exported,
  files,
  models,
  port,
  predict,
  restore,
  runs,
)
from fidelity_jax.method import Method

BATCHES = (1, 3, 8)
# Runs .jax files on images, as somebody would who has JAX alone.
ALONE = """
import sys
sys.modules["fidelity_jax"] = None
import jax, numpy as np
from jax import export
for path in sys.argv[1:]:
  with open(path, "rb") as file:
    network = jax.jit(export.deserialize(bytearray(file.read())).call)
  images = np.load(path + ".npz")
  found = {}
  for count in (1, 3, 8):
    outputs = network(*(images[name][:count] for name in images.files))
    found |= {f"{name}{count}": value for name, value in outputs.items()}
  np.savez(path + ".out.npz", **found)
assert not any(name.startswith(("flax", "fidelity_jax.")) for name in sys.modules)
"""


def pictures(run, count=8):
  """Returns the images that a run takes, by name."""
  rng, size = np.random.default_rng(0), run.image_size
  names = ["degraded", *(["clean"] if run.needs_clean else [])]
  shape = (count, size, size, 3)
  return {name: rng.random(shape, np.float32) for name in names}


def expected(run, images):
  return jax.jit(run.method.outputs)(run.variables, *images.values())


@pytest.fixture(scope="module")
def places(toy_run, tmp_path_factory):
  """Runs: a finished experiment's, and of some of its networks, as checkpoints."""
  root, oracle = tmp_path_factory.mktemp("runs"), experiment(toy_run)
  export.export(oracle, root / "all")
  parts = port.load(root / "all")
  # An estimator that was not trained for it is one all the same.
  chosen = {
    "classifier": {"classifier": parts["classifier"]},
    "restorer": {"restorer": parts["restorer"]},
    "estimated": {**parts, "estimator": parts["restorer"]},
  }
  for name, some in chosen.items():
    port.save(some, root / name, "toy")
  return {"oracle": oracle} | {name: root / name for name in chosen}


@pytest.fixture(scope="module")
def jax_files(places, tmp_path_factory):
  """Exports all of them to .jax files, with images beside."""
  root = tmp_path_factory.mktemp("jax")
  for name, place in places.items():
    export.export(place, root / f"{name}.jax")
    np.savez(root / f"{name}.jax.npz", **pictures(runs.find(place)))
  return root


def check_alone(python, places, root):
  names = [str(root / f"{name}.jax") for name in places]
  # Where the package would be found if it were not forbidden.
  quick = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
  result = subprocess.run(
    [python, "-c", ALONE, *names], cwd=root, capture_output=True, text=True, env=quick
  )
  assert result.returncode == 0, result.stderr
  for name, place in places.items():
    run = runs.find(place)
    found, want = np.load(root / f"{name}.jax.out.npz"), expected(run, pictures(run))
    for count in BATCHES:
      outputs = {k.removesuffix(str(count)) for k in found if k.endswith(str(count))}
      assert outputs == set(want) & {"logits", "fidelity_map", "confidence", "restored"}
      for output in outputs:
        np.testing.assert_allclose(
          found[f"{output}{count}"], want[output][:count], rtol=1e-5, atol=1e-5
        )


@pytest.mark.slow
def test_a_jax_file_runs_without_the_package(places, jax_files):
  check_alone(sys.executable, places, jax_files)


@pytest.mark.slow
def test_a_jax_file_runs_where_there_is_jax_alone(places, jax_files, tmp_path):
  venv.create(tmp_path / "venv", with_pip=True)
  python = tmp_path / "venv" / "bin" / "python"
  install = [python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt"]
  subprocess.run([*install, "jax", "flatbuffers"], check=True)
  listed = subprocess.run(
    [python, "-m", "pip", "list", "--format=json"], capture_output=True, check=True
  )
  installed = {one["name"].lower() for one in json.loads(listed.stdout)}
  needed = {"jax", "jaxlib", "ml_dtypes", "numpy", "opt_einsum", "scipy"}
  assert installed - needed <= {"pip", "setuptools", "flatbuffers"}
  check_alone(python, places, jax_files)


def test_a_jax_file_is_for_all_platforms_and_any_batch(places, jax_files):
  content = (jax_files / "estimated.jax").read_bytes()
  network = jax.export.deserialize(bytearray(content))
  assert network.platforms == ("cpu", "cuda", "tpu")
  assert str(network.in_avals[0].shape[0]) == "batch"
  # Nothing in it that JAX does not promise to read later.
  assert not network.disabled_safety_checks
  program = network.mlir_module()
  assert set(re.findall(r"custom_call @(\w+)", program)) == {"shape_assertion"}
  # Weights are there once, not once for each platform.
  variables = runs.find(places["estimated"]).variables
  weights = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
  assert weights < len(content) < 2 * weights + 300_000


def test_accelerators_multiply_float32_as_it_is(places, monkeypatch):
  """Nothing rounds the operands first, as their default would."""
  monkeypatch.setattr(export, "PLATFORMS", ("tpu",))
  content = export.to_jax(export.Program(runs.find(places["estimated"])))
  text = jax.export.deserialize(bytearray(content)).mlir_module()
  products = re.findall(r"stablehlo\.(?:convolution|dot_general)\b.*", text)
  assert len(products) > 20
  for line in products:
    assert line.count("HIGHEST") == 2, line


@pytest.mark.slow
def test_a_loaded_file_is_called_with_arrays(places, jax_files):
  run, network = runs.find(places["oracle"]), exported.load(jax_files / "oracle.jax")
  images = pictures(run, 3)
  found, want = network(**images), expected(run, images)
  np.testing.assert_allclose(found["logits"], want["logits"], atol=1e-5)
  assert network.record.class_names == list(run.class_names)
  assert network.record.products.keys() == run.stages.keys()
  with pytest.raises(errors.UsageError, match="needs the clean images"):
    network(images["degraded"])
  with pytest.raises(errors.UsageError, match="takes images of the shape"):
    network(images["degraded"][:, :16], images["clean"])
  for wrong, words in (
    ((images["degraded"] * 255).astype(np.uint8), "not uint8"),
    (images["degraded"] * 255, r"values in \[0, 1\]"),
    (images["degraded"] * np.nan, r"values in \[0, 1\]"),
    (images["degraded"][:2], "3 and 2"),
  ):
    with pytest.raises(errors.UsageError, match=words):
      network(wrong, images["clean"])


@pytest.mark.slow
def test_a_loaded_file_is_a_model_of_images_of_any_size(places, jax_files):
  """As the run itself is, but for what an export has not."""
  photos = [photograph(40, 50, seed=1), photograph(32, 32, seed=2)]
  for name in ("estimated", "oracle", "classifier"):
    ours = fidelity_jax.load(places[name])
    model = fidelity_jax.load(jax_files / f"{name}.jax")
    clean = photos if ours.needs_clean else None
    found, want = model(photos, clean), ours(photos, clean)
    np.testing.assert_allclose(found.logits, want.logits, atol=1e-5)
    assert found.class_names == want.class_names
    assert model.needs_clean == ours.needs_clean and model.map_name == ours.map_name
    assert found.degraded_logits is None


def chained(places, root):
  """Writes a checkpoint whose map is estimated from the restored image."""
  parts = port.load(places["estimated"])
  part = parts["estimator"]
  part = port.Part(part.variables, part.config | {"estimator_input": "restored"})
  port.save({"restorer": parts["restorer"], "estimator": part}, root / "chained", "toy")
  return root / "chained"


def check_whole(place, path):
  """Checks that a file gives of a whole image what the run gives, and how far it sees.

  Returns:
    The file, and the greatest difference with each radius one pixel smaller, by output.
  """
  ours, model = fidelity_jax.load(place), fidelity_jax.load(path)
  file, size = exported.load(path), ours.image_size
  # As large on one side, and no multiple of the windows on the other.
  pixels = np.random.default_rng(5).random((size, 2 * size + 37, 3), np.float32)
  true = pixels[::-1].copy() if ours.needs_clean else None
  found, want = model.whole(pixels, true), ours.whole(pixels, true)
  near, apart = file.record.radius, {}
  for output in near:
    value = getattr(want, output)
    assert np.ptp(value) > 1e-2
    np.testing.assert_allclose(getattr(found, output), value, atol=1e-5)
    shorter = msgspec.structs.replace(
      file.record, radius={name: radius - 1 for name, radius in near.items()}
    )
    wrong = dataclasses.replace(file, record=shorter).whole([output], pixels, true)
    apart[output] = np.abs(wrong[output] - value[0]).max()
  return file, apart


def test_a_whole_image_in_windows_is_what_the_run_makes_of_it(
  places, jax_files, tmp_path
):
  """Up to its border. Windows that overlap by less show."""
  place = chained(places, tmp_path)
  export.export(place, tmp_path / "chained.jax")
  # The restorer has 3 layers, and so has what stands for an estimator here.
  for path, of_map in (
    (jax_files / "estimated.jax", 3),
    (jax_files / "oracle.jax", 3),
    (tmp_path / "chained.jax", 6),
  ):
    name = path.stem
    file, apart = check_whole(places.get(name, place), path)
    assert file.record.radius == {
      "restored": 3,
      "fidelity_map": of_map,
      "confidence": of_map,
    }
    assert min(apart.values()) > 5e-5, apart


@pytest.mark.slow
def test_a_whole_image_through_an_onnx_file(places, tmp_path):
  pytest.importorskip("jax2onnx")
  place = chained(places, tmp_path)
  export.export(place, tmp_path / "toy.onnx")
  _, apart = check_whole(place, tmp_path / "toy.onnx")
  assert min(apart.values()) > 5e-5, apart


def test_images_that_no_window_covers_are_refused(places, jax_files):
  pixels = photograph(40, 31, seed=5)
  model = fidelity_jax.load(jax_files / "estimated.jax")
  words = "31x40 pixels: estimated is an exported file, which takes 32x32 and larger"
  with pytest.raises(errors.UsageError, match=words):
    model.whole(pixels)
  oracle = fidelity_jax.load(jax_files / "oracle.jax")
  with pytest.raises(errors.UsageError, match="give these too"):
    oracle.whole(pixels)
  with pytest.raises(errors.UsageError, match="31x39 pixels, the degraded one 31x40"):
    oracle.whole(pixels, pixels[1:])
  file, pixels = exported.load(jax_files / "oracle.jax"), np.ones((40, 40, 3), "f")
  with pytest.raises(errors.UsageError, match="needs the clean image, too"):
    file.whole(["confidence"], pixels)
  # For what is restored it makes no difference.
  restored = [file.whole(["restored"], pixels, x)["restored"] for x in (None, pixels)]
  np.testing.assert_array_equal(*restored)


def test_files_that_can_restore_no_whole_image_say_so(
  places, jax_files, tmp_path, refused
):
  """Before any image is read, by both commands."""
  photo = tmp_path / "photo.png"
  photo.write_bytes(encoded(photograph(40, 50, seed=1), format="PNG"))
  record = files.read_record(jax_files / "estimated.jax.json", exported.Record, "")
  shutil.copy(jax_files / "estimated.jax", tmp_path)

  def check(path, words):
    arguments = [path, photo, f"--out={tmp_path / 'out'}"]
    refused(arguments, 2, words, command=restore.main)
    refused([*arguments, "--full"], 2, words, command=predict.main)

  check(jax_files / "classifier.jax", "exported without a denoiser")
  for radius, words in (
    (None, "export it again, or name its run's directory"),
    (dict.fromkeys(record.radius, 16), "see 16 pixels far, for which windows of 32x32"),
  ):
    other = msgspec.structs.replace(record, radius=radius)
    files.write_record(tmp_path / "estimated.jax.json", other)
    check(tmp_path / "estimated.jax", words)
  # As an earlier version wrote it: it is still what it was for images of one size.
  older = {k: v for k, v in msgspec.to_builtins(record).items() if k != "radius"}
  files.write_json(tmp_path / "estimated.jax.json", files.seal(older))
  model = fidelity_jax.load(tmp_path / "estimated.jax")
  assert model(photo).restored is not None
  check(tmp_path / "estimated.jax", "export it again")


@pytest.mark.slow
def test_whole_images_are_drawn_from_a_file(jax_files, tmp_path, capsys):
  """Those that are large enough for it; the others are named."""
  for name, size in (("a", (40, 50)), ("small", (31, 50))):
    pixels = photograph(*size, seed=1)
    (tmp_path / f"{name}.png").write_bytes(encoded(pixels, format="PNG"))
  out = tmp_path / "out"
  given = [tmp_path / "a.png", tmp_path / "small.png", f"--out={out}", "--full"]
  arguments = [str(one) for one in (jax_files / "estimated.jax", *given)]
  assert predict.main(arguments) == 1
  assert "small.png: an image of 50x31 pixels" in one_line(capsys.readouterr().err)
  assert (out / "a.png.png").stat().st_size > 5000
  assert not (out / "small.png.png").exists()


def test_a_damaged_file_is_not_loaded(jax_files, tmp_path):
  for name in ("oracle.jax", "oracle.jax.json"):
    shutil.copy(jax_files / name, tmp_path)
  flip(tmp_path / "oracle.jax")
  with pytest.raises(errors.RunError, match="not what its record says"):
    exported.load(tmp_path / "oracle.jax")
  flip(tmp_path / "oracle.jax.json", -80)
  with pytest.raises(errors.RunError, match="damaged"):
    exported.load(tmp_path / "oracle.jax")
  with pytest.raises(errors.UsageError, match="no exported file"):
    exported.load(tmp_path / "none.jax")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["estimated", "oracle"])
def test_an_onnx_file_gives_the_same(places, tmp_path, name):
  pytest.importorskip("jax2onnx")
  export.export(places[name], tmp_path / "toy.onnx")
  run, network = runs.find(places[name]), exported.load(tmp_path / "toy.onnx")
  images = pictures(run)
  want = expected(run, images)
  for count in BATCHES:
    found = network(**{key: value[:count] for key, value in images.items()})
    assert found.keys() == {"logits", "fidelity_map", "confidence", "restored"}
    for output, value in found.items():
      np.testing.assert_allclose(value, want[output][:count], rtol=1e-4, atol=1e-4)


def drawn(name, size, **fields):
  """Returns a run of untrained networks, pretrained-map method with ensemble."""
  classifier = models.create({"name": name}, 10).folded()
  cosine = fields.get("map_name") == "cosine"
  method = Method(
    classifier,
    models.DnCNN(depth=3, width=8),
    models.Calibration(
      classifier.feature_size,
      classifier.num_taps,
      ratio=0.01,
      channels=4,
      resize=fields.pop("resize", "bilinear"),
    ),
    models.Ensemble(classifier.feature_size, 0.01),
    models.DnCNN(depth=3, width=8, out_channels=1 if cosine else 3),
    **fields,
  )

  def shapes():
    key, image = jax.random.key(0), np.zeros((1, size, size, 3), np.float32)
    given = {
      role: getattr(method, role).init(key, image)
      for role in ("classifier", "restorer", "estimator")
    }
    steering = method.init_calibration(key, (size, size))
    return given | {"calibration": steering, "ensemble": method.init_ensemble(key)}

  rng = np.random.default_rng(0)
  scale = lambda leaf: (2 / max(1, np.prod(leaf.shape[:-1]))) ** 0.5
  draw = lambda leaf: np.float32(scale(leaf)) * rng.standard_normal(leaf.shape, "f")
  variables = jax.tree.map(draw, jax.eval_shape(shapes))
  return runs.Run(name, method, variables, size, tuple("abcdefghij"), "")


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "size", "fields"),
  [
    ("alexnet", 64, {"map_name": "l2"}),
    ("vgg16", 32, {"resize": "nearest"}),
    ("googlenet", 64, {"map_name": "cosine"}),
    ("resnet18", 64, {"resize": "bicubic", "estimator_input": "restored"}),
    ("resnet50", 64, {}),
    ("efficientnet_lite0", 64, {}),
  ],
)
def test_every_backbone_map_and_resizing_has_its_onnx_file(name, size, fields):
  pytest.importorskip("jax2onnx")
  import onnxruntime

  run = drawn(name, size, **fields)
  content = export.to_onnx(export.Program(run, "float32"))
  session = onnxruntime.InferenceSession(content)
  images = pictures(run, 2)
  want = expected(run, images)
  for output, value in zip(
    session.get_outputs(), session.run(None, images), strict=True
  ):
    # Logits of networks that nobody trained are far from 1.
    room = 1e-4 * max(1.0, float(np.ptp(want[output.name])))
    np.testing.assert_allclose(value, want[output.name], rtol=1e-4, atol=room)


def test_bfloat16_networks_are_float32_in_onnx(places):
  method = runs.find(places["estimated"]).method
  half = export.in_precision(method, "bfloat16")
  assert half.classifier.backbone.dtype == half.ensemble.dtype == "bfloat16"
  assert export.in_precision(half, "float32") == method


@pytest.mark.slow
def test_a_directory_is_read_back(places, tmp_path):
  """The classifier unfolded, and what only the experiment's config said beside it."""
  export.export(places["oracle"], tmp_path / "weights")
  run, again = runs.find(places["oracle"]), runs.find(tmp_path / "weights")
  wiring = ("calibration", "ensemble", "classifier", *runs.WIRING)
  for name in wiring:
    assert getattr(again.method, name) == getattr(run.method, name)
  assert (again.class_names, again.image_size) == (run.class_names, run.image_size)
  images = pictures(run)
  want, found = expected(run, images), expected(again, images)
  np.testing.assert_allclose(found["logits"], want["logits"], atol=1e-5)
  assert "batch_stats" in port.load(tmp_path / "weights")["classifier"].variables
  card = (tmp_path / "weights" / "README.md").read_text()
  assert card.startswith("---\nlicense") and "awgn-0.1" in card
  # Once more, from the directory, over the same.
  export.export(tmp_path / "weights", tmp_path / "weights")
  assert runs.find(tmp_path / "weights").method == again.method


@pytest.mark.slow
def test_an_experiment_starts_from_an_exported_directory(places, command, tmp_path):
  export.export(places["oracle"], tmp_path / "w")
  parents = {f"parents.{role}.epochs": 0 for role in ("classifier", "restorer")}
  fields = {name: value for name, value in TOY.items() if "warmup" not in name}
  fields |= parents | {"epochs": 0, "ensemble.epochs": 0}
  fields |= {f"parents.{n}.warmup_epochs": 0 for n in ("classifier", "restorer")}
  fields |= {"warmup_epochs": 0, "ensemble.warmup_epochs": 0}
  for role in ("parents.classifier.model", "parents.restorer.model", "model"):
    fields[f"{role}.weights"] = tmp_path / "w"
  fields |= {"ensemble.weights": tmp_path / "w"}
  fields["parents.classifier.model.new_head"] = False
  config = "--config=configs/oracle.py:scratch"
  command(config, f"--workdir={tmp_path}/again", *overrides(fields), check=0)
  run = runs.find(places["oracle"])
  again = runs.find(experiment(tmp_path / "again"))
  images = pictures(run)
  want, found = expected(run, images), expected(again, images)
  np.testing.assert_allclose(found["logits"], want["logits"], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["pretrained", "end_to_end"])
def test_trained_estimators_travel_along(toy_copy, command, tmp_path, source):
  """End-to-end, the estimator is that which trained along, not the one before."""
  fields = overrides(TOY | TOY_ESTIMATOR)
  command(
    f"--config=configs/{source}.py:scratch", f"--workdir={toy_copy}", *fields, check=0
  )
  place = experiment(toy_copy, source)
  run = runs.find(place)
  images = pictures(run)
  want = expected(run, images)
  export.export(place, tmp_path / "weights")
  export.export(place, tmp_path / "toy.jax")
  again = expected(runs.find(tmp_path / "weights"), images)
  for found in (again, exported.load(tmp_path / "toy.jax")(**images)):
    for output in ("logits", "fidelity_map"):
      np.testing.assert_allclose(found[output], want[output], atol=1e-5)


def test_what_cannot_be_written_is_refused(places, tmp_path, refused):
  place = places["classifier"]
  (tmp_path / "other.jax").write_text("mine")
  (tmp_path / "directory").mkdir()
  for to, words in (
    ("x.txt", "ends in .jax or .onnx"),
    ("other.jax", "something else is there"),
    ("directory", "something else is there"),
    ("none/x.jax", "there is no directory"),
  ):
    arguments = [place, f"--to={tmp_path / to}"]
    refused(arguments, 2, words, command=export.main)
  program = tmp_path / "made.jax"
  export.export(place, program)
  words = ["a program with its weights inside", "name the run", "exported directory"]
  for to in ("x.onnx", "x.jax", "x"):
    refused([program, f"--to={tmp_path / to}"], 2, words, command=export.main)
  words = f"there is no {tmp_path}/absent: name an experiment's directory"
  absent = [tmp_path / "absent", f"--to={tmp_path}/x.jax"]
  refused(absent, 2, words, command=export.main)
  assert (tmp_path / "other.jax").read_text() == "mine"
  closed = tmp_path / "closed"
  closed.mkdir(mode=0o555)
  with without_privileges(), pytest.raises(errors.RunError, match="permissions"):
    export.export(place, closed / "x.jax")
  assert not list(closed.iterdir())


class Odd(export.Program):
  """Computes something that ONNX has not."""

  def __call__(self, degraded):
    restored = super().__call__(degraded)["restored"]
    shape = jax.ShapeDtypeStruct(restored.shape, restored.dtype)
    return {"restored": jax.pure_callback(np.asarray, shape, restored)}


@pytest.mark.slow
def test_what_onnx_has_not_is_named():
  pytest.importorskip("jax2onnx")
  method = Method(None, models.DnCNN(depth=2, width=4))
  image = np.zeros((1, 16, 16, 3), np.float32)
  variables = {"restorer": method.restorer.init(jax.random.key(0), image)}
  program = Odd(runs.Run("odd", method, variables, 16, (), ""), "float32")
  words = r"jax2onnx cannot convert.*'pure_callback'.*export a \.jax file"
  with pytest.raises(errors.RunError, match=words):
    export.to_onnx(program)


def test_networks_too_large_for_a_file_are_refused(places, tmp_path, monkeypatch):
  """Which is said before the work is done."""
  run = runs.find(places["restorer"])
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(run.variables))
  monkeypatch.setattr(export, "LIMIT", size - 1)
  with pytest.raises(errors.UsageError, match="export a directory"):
    export.export(places["restorer"], tmp_path / "x.jax")
  assert not list(tmp_path.iterdir())
  export.export(places["restorer"], tmp_path / "x")
  monkeypatch.setattr(export, "LIMIT", size)
  export.export(places["restorer"], tmp_path / "x.jax")


def test_what_others_put_there_stays(places, tmp_path):
  place = places["restorer"]
  mine = tmp_path / "mine"
  mine.mkdir()
  for name in ("m.jax", "m.jax.json", "n.jax.md", "o.jax.json"):
    (mine / name).write_text("{}")
  shutil.copytree(place, mine / "weights")
  (mine / "weights" / ".env").write_text("{}")
  shutil.copytree(place, mine / "sub")
  (mine / "sub" / ".git").mkdir()
  (mine / "index").mkdir()
  (mine / "index" / "port.json").write_text("{}")
  before = files.digest_tree(mine)
  for name in ("m.jax", "n.jax", "o.jax", "weights", "sub", "index"):
    with pytest.raises(errors.UsageError, match=rf"is there already, {mine}/"):
      export.export(place, mine / name)
  for name in ("weights", "sub", "index"):
    with pytest.raises(errors.UsageError, match="name another directory"):
      port.save(port.load(place), mine / name, "toy")
  assert files.digest_tree(mine) == before
  assert (mine / "sub" / ".git").is_dir()


def test_an_export_that_stopped_is_made_again(places, tmp_path, monkeypatch):
  """After each of its files; what is there until then is not loaded."""
  place, path = places["restorer"], tmp_path / "toy.jax"
  write, left = files.write_bytes, []

  def stopping(*arguments):
    if not left:
      raise KeyboardInterrupt
    left.pop()
    write(*arguments)

  for count in range(3):
    with monkeypatch.context() as patch:
      left[:] = range(count)
      patch.setattr(files, "write_bytes", stopping)
      with pytest.raises(KeyboardInterrupt):
        export.export(place, path)
    assert len(list(tmp_path.iterdir())) == count
    with pytest.raises(errors.UsageError, match="no exported file"):
      exported.load(path)
  export.export(place, path)
  exported.load(path)
  # Its record says that what is beside it is of an export.
  path.write_bytes(b"")
  with pytest.raises(errors.RunError, match="not what its record says"):
    exported.load(path)
  export.export(place, path)
  exported.load(path)


def test_results_that_are_damaged_leave_nothing_behind(toy_copy, tmp_path):
  path = results(toy_copy)
  content = path.read_bytes()
  for to in ("toy.jax", "weights"):
    path.write_bytes(content[:-100])
    with pytest.raises(errors.RunError, match=r"results.json is damaged"):
      export.export(path.parent, tmp_path / to)
    assert [one.name for one in tmp_path.glob(f"{to}*")] == []
    path.write_bytes(content)
    export.export(path.parent, tmp_path / to)
  assert "awgn-0.1" in (tmp_path / "toy.jax.md").read_text()


def test_a_slash_at_the_end_means_a_directory(places, tmp_path, refused):
  to = f"--to={tmp_path}/my-v1.2"
  refused([places["restorer"], to], 2, "a slash at the end", command=export.main)
  # The second replaces the first.
  for end in ("/", ""):
    assert export.main([str(places["restorer"]), f"{to}{end}"]) == 0
  assert runs.find(tmp_path / "my-v1.2").method.restorer is not None


def test_an_estimator_alone_says_what_it_estimates(places, tmp_path):
  """The part's config is all that a directory has of it."""
  parts = port.load(places["estimated"])
  wiring = {"map_name": "l2", "estimator_input": "restored"}
  run = runs.find(places["estimated"])
  method = dataclasses.replace(run.method, calibration=None, ensemble=None, **wiring)
  run = dataclasses.replace(run, method=method)
  config = export._described(run, "estimator", method.estimator)
  estimator = port.Part(parts["estimator"].variables, config)
  port.save(
    {"restorer": parts["restorer"], "estimator": estimator}, tmp_path / "e", "toy"
  )
  again = runs.find(tmp_path / "e").method
  assert {name: getattr(again, name) for name in runs.WIRING} == wiring


@pytest.mark.slow
def test_the_run_of_an_estimator_is_read_back(toy_copy, command, tmp_path):
  own = ("dataset", "parents.restorer")
  fields = {name: value for name, value in TOY.items() if name.startswith(own)}
  fields |= {k.removeprefix("parents.estimator."): v for k, v in TOY_ESTIMATOR.items()}
  fields |= {"fidelity.map": "l2", "fidelity.estimator_input": "restored"}
  config = "--config=configs/estimator.py:scratch"
  command(config, f"--workdir={toy_copy}", *overrides(fields), check=0)
  place = experiment(toy_copy, "estimator")
  export.export(place, tmp_path / "weights")
  run, again = runs.find(place), runs.find(tmp_path / "weights")
  assert (again.method.map_name, again.method.estimator_input) == ("l2", "restored")
  images = pictures(run)
  want, found = expected(run, images), expected(again, images)
  np.testing.assert_allclose(found["fidelity_map"], want["fidelity_map"], atol=1e-5)


def test_without_the_libraries_one_line_says_what_to_install(places, tmp_path):
  hide = "import sys; sys.modules['jax2onnx'] = None; from fidelity_jax import export"
  result = subprocess.run(
    [
      sys.executable,
      "-c",
      f"{hide}; sys.exit(export.main(sys.argv[1:]))",
      places["classifier"],
      f"--to={tmp_path}/x.onnx",
    ],
    capture_output=True,
    text=True,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
  )
  assert result.returncode == 1
  assert "pip install 'fidelity_jax[onnx]'" in one_line(result.stderr)
  assert not list(pathlib.Path(tmp_path).iterdir())
