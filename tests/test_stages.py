"""Directories, digests, and what counts as finished."""

import dataclasses
import importlib
import json
import shutil

import jax.numpy as jnp
import pytest

from fidelity_jax import checkpoints, degradations, errors, stages, tasks


def _config(name="oracle", size="scratch"):
  module = importlib.import_module(f"fidelity_jax.configs.{name}")
  config = module.get_config(size)
  _set(config, {"precision": "float32"})
  return config


def _set(config, fields):
  """Sets fields by their paths, of any type."""
  with config.ignore_type():
    config.update_from_flattened_dict(fields)


def _content(images="some", weights=None, place="there"):
  places = {"images": place, "weights": place}
  return lambda config: stages.Content(images, weights, places)


def _resolve(config, tmp_path, content=None):
  content = content or _content()
  return stages.resolve(config.copy_and_resolve_references(), tmp_path, content)


def test_directories_tell_kind_and_content(tmp_path):
  stage = _resolve(_config(), tmp_path)
  names = [s.name.rsplit("-", 1)[0] for s in stage.lineage()]
  assert names == ["classifier-resnet-clean", "restorer-dncnn5", "calibration-oracle"]
  assert all(len(s.digest) == 8 for s in stage.lineage())


def test_a_change_reaches_the_stages_it_matters_to(tmp_path):
  before = _resolve(_config(), tmp_path)
  config = _config()
  config.parents.restorer.epochs = 1
  after = _resolve(config, tmp_path)
  assert after.digest != before.digest
  assert after.parents["restorer"].digest != before.parents["restorer"].digest
  assert after.parents["classifier"].digest == before.parents["classifier"].digest


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("checkpoint_seconds", 3.0),
    ("profile.steps", (1, 2)),
    ("mesh.model", 2),
    ("mesh.rules", ((".*", "data"),)),
    ("degradation.level", [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]),
    ("evaluation.rounds", 3),
    ("ensemble.epochs", 3),
    ("experiment", "mine"),
    ("rematerialize", True),
    ("fidelity.estimator_input", "restored"),
    ("dataset.path", "elsewhere"),
    ("dataset.cache", None),
    ("dataset.workers", 2),
    ("dataset.name", "folder"),
    ("dataset.fractions", (0.6, 0.2, 0.2)),
    ("model.weights", "elsewhere"),
    # Clean training images are not degraded ...
    ("parents.classifier.degradation.kind", "gaussian_blur"),
    ("parents.classifier.validation_rounds", 5),
    # ... and these are what the network has anyway.
    ("parents.classifier.model.width", 24),
    ("parents.classifier.model.stage_sizes", (1, 1, 1, 1)),
    ("parents.classifier.model.new_head", False),
  ],
)
def test_what_is_immaterial_changes_nothing(tmp_path, field, value):
  config = _config()
  _set(config, {field: value})
  assert _resolve(config, tmp_path).name == _resolve(_config(), tmp_path).name


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("precision", "bfloat16"),
    ("seed", 1),
    ("degradation.kind", "gaussian_blur"),
    ("dataset.image_size", 32),
    ("dataset.crop_area", (0.5, 1.0)),
    ("parents.classifier.source", "degraded"),
    ("parents.classifier.model.width", 8),
    ("parents.restorer.model.depth", 4),
    ("fidelity.map", "l2"),
    ("model.ratio", 1.0),
  ],
)
def test_what_is_material_changes_the_stage(tmp_path, field, value):
  config = _config()
  _set(config, {field: value})
  assert _resolve(config, tmp_path).digest != _resolve(_config(), tmp_path).digest


def test_images_and_weights_count_by_content(tmp_path):
  resolve = lambda *content: _resolve(_config(), tmp_path, _content(*content)).digest
  digests = [resolve(*c) for c in (("a", "w"), ("b", "w"), ("a", "v"), ("a", None))]
  assert len(set(digests)) == 4
  assert resolve("a", "w") == digests[0]


def test_a_cache_counts_where_it_changes_what_is_decoded(tmp_path):
  names = set()
  for cache in ("ram", None):
    config = _config()
    config.dataset.reduced_decode, config.dataset.cache = True, cache
    names.add(_resolve(config, tmp_path).name)
  assert len(names) == 2


def test_how_a_classifier_is_steered_is_no_part_of_it(tmp_path):
  """But it is a part of the calibration."""
  found = []
  for steered in (True, False):
    config = _config()
    config.parents.classifier.model.name = "googlenet"
    config.parents.classifier.model.transform_steered = steered
    found.append(_resolve(config, tmp_path))
  assert found[0].parents["classifier"].name == found[1].parents["classifier"].name
  assert found[0].name != found[1].name


def test_other_networks_at_the_lite_size(tmp_path):
  """Only EfficientNet-Lite0 is fine-tuned with a momentum that is not its own."""
  model = "parents.classifier.model."

  def classifier(**fields):
    config = _config(size="lite")
    _set(config, {model + name: value for name, value in fields.items()})
    return _resolve(config, tmp_path).parents["classifier"]

  own = classifier()
  assert own.made_of["model"]["bn_momentum"] == 0.9
  assert classifier(bn_momentum=0.9).digest == own.digest
  assert classifier(bn_momentum=0.99).digest != own.digest
  assert classifier(weights=None).made_of["model"]["bn_momentum"] == 0.99
  other = classifier(name="resnet18", weights="torchvision")
  assert other.made_of["model"]["name"] == "resnet18"
  # A field that would do nothing is refused.
  with pytest.raises(errors.UsageError, match="'resnet18' has no such field"):
    classifier(name="resnet18", weights="torchvision", bn_momentum=0.9)


def test_a_classifier_of_restored_images_has_the_restorer_as_a_parent(tmp_path):
  config = _config()
  config.parents.classifier.source = "restored"
  stage = _resolve(config, tmp_path)
  assert list(stage.parents["classifier"].parents) == ["restorer"]
  kinds = [s.kind.name for s in stage.lineage()]
  assert kinds == ["restorer", "classifier", "calibration"]
  assert "-resnet-restored-" in stage.parents["classifier"].name
  # Not so of clean ones, whatever its config has.
  assert _resolve(_config(), tmp_path).parents["classifier"].parents == {}


def test_lists_and_tuples_of_levels_are_different_stages(tmp_path):
  digests = set()
  for level in ([0.0, 0.5], (0.0, 0.5)):
    config = _config()
    config.degradation.mixture = None
    config.degradation.level = level
    digests.add(_resolve(config, tmp_path).digest)
  assert len(digests) == 2


def test_parents_follow_the_top_until_overridden():
  config = _config()
  config.seed = 7
  config.dataset.split_seed = 5
  config.degradation.kind = "gaussian_blur"
  config.parents.classifier.seed = 8
  assert config.parents.restorer.seed == 7
  assert config.parents.classifier.dataset.split_seed == 5
  assert config.parents.restorer.degradation.kind == "gaussian_blur"
  assert (config.parents.classifier.seed, config.seed) == (8, 7)


@pytest.mark.parametrize("size", ["", "demo", "scratch"])
def test_experiments_share_parents(tmp_path, size):
  oracle = _resolve(_config("oracle", size), tmp_path)
  for name in ("pretrained", "end_to_end"):
    stage = _resolve(_config(name, size), tmp_path)
    for role in ("classifier", "restorer"):
      assert stage.parents[role].digest == oracle.parents[role].digest
    estimator = stage.parents["estimator"]
    assert estimator.parents["restorer"].digest == oracle.parents["restorer"].digest
    alone = _resolve(_config("estimator", size), tmp_path)
    assert alone.digest == estimator.digest
    names = [s.kind.name for s in stage.lineage()]
    assert names == ["classifier", "restorer", "estimator", "calibration"]


# docs/method.md, section 6, by kind; the restorer's also hold for the estimator.
_PAPER = {
  "classifier": {
    "source": "clean",
    "model.name": "resnet50",
    "model.weights": "torchvision",
    "optimizer": "sgd",
    "learning_rate": 1e-3,
    "batch_size": 64,
    "epochs": 120,
    "warmup_epochs": 5,
    "label_smoothing": 0.1,
  },
  "restorer": {
    "model.depth": 20,
    "model.width": 64,
    "model.batch_norm": False,
    "model.weights": None,
    "optimizer": "adam",
    "learning_rate": 1e-4,
    "batch_size": 128,
    "patch_size": 50,
    "patch_stride": 25,
    "epochs": 120,
    "warmup_epochs": 5,
  },
  "calibration": {
    "model.num_convs": 3,
    "model.channels": 16,
    "model.ratio": 0.5,
    "model.resize": "bilinear",
    "model.spatial_multiplication": True,
    "model.spatial_addition": True,
    "model.residual": True,
    "model.channel_multiplication": True,
    "model.channel_concatenation": True,
    "fidelity.map": "l1",
    "optimizer": "sgd",
    "learning_rate": 1e-3,
    "batch_size": 64,
    "epochs": 50,
    "warmup_epochs": 5,
    "label_smoothing": 0.1,
    "ensemble.enabled": True,
    "ensemble.learning_rate": 1e-3,
    "ensemble.epochs": 25,
    "ensemble.warmup_epochs": 5,
    "evaluation.rounds": 10,
  },
}
_PAPER["estimator"] = _PAPER["restorer"] | {"fidelity.map": "l1"}
_SIGMAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)


@pytest.mark.parametrize(
  "name",
  [
    *("oracle", "pretrained", "end_to_end", "estimator"),
    *("clean", "degraded", "restored", "restorer"),
  ],
)
def test_papers_numbers(tmp_path, name):
  stage = _resolve(_config(name, ""), tmp_path)
  kinds = {
    "oracle": ["classifier", "restorer", "calibration"],
    "estimator": ["restorer", "estimator"],
    "clean": ["classifier"],
    "degraded": ["classifier"],
    "restored": ["restorer", "classifier"],
    "restorer": ["restorer"],
  }.get(name, ["classifier", "restorer", "estimator", "calibration"])
  assert [s.kind.name for s in stage.lineage()] == kinds
  for part in stage.lineage():
    config = part.config
    expected = dict(_PAPER[part.kind.name])
    if part.kind.name == "classifier" and name in ("degraded", "restored"):
      expected["source"] = name
    for field, value in expected.items():
      given = config
      for key in field.split("."):
        given = given[key]
      assert given == value and type(given) is type(value), (part.name, field)
    assert (config.dataset.name, config.dataset.image_size) == ("caltech256", 224)
    (noise,) = degradations.from_config(config.degradation).steps
    patches = part.kind.name in ("restorer", "estimator")
    assert noise.kind == "awgn"
    assert noise.variation == ("continuous" if patches else "discrete")
    assert noise.levels == ((0.0, 0.5) if patches else _SIGMAS)
  if stage.kind.name == "calibration":
    assert stage.config.fidelity.source == name


def _train(stage, value=1.0):
  """Writes a stage's directory as its training would."""
  for parent in stage.parents.values():
    if not parent.finished():
      _train(parent)
  stage.begin()
  saved = checkpoints.Checkpoints(stage.directory / "checkpoints")
  variables = {"params": {"x": value * jnp.arange(3.0)}}
  progress = checkpoints.Progress(4, 1.5)
  saved.save(4, variables, {"opt_state": jnp.zeros(2)}, progress)
  saved.wait()
  product = saved.check_product(4, variables)
  saved.close()
  stage.finish(4, "psnr_gain", 1.5, product)
  return stage


@pytest.fixture
def finished(tmp_path):
  return _train(_resolve(_config(), tmp_path).parents["restorer"])


def test_a_finished_stage_gives_its_variables(finished):
  record = finished.check()
  assert (record.best_step, record.score) == (4, 1.5)
  like = {"params": {"x": jnp.zeros(3)}}
  assert finished.load(like)["params"]["x"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("what", ["images", "weights"])
def test_a_half_trained_stage_refuses_other_content(finished, tmp_path, what):
  other = _content("others") if what == "images" else _content("some", "others")
  beside = _resolve(_config(), tmp_path, other).parents["restorer"]
  # Finished, it is another stage.
  assert beside.check() is None
  (finished.directory / "finished.json").unlink()
  assert finished.check() is None
  with pytest.raises(errors.RunError, match=f"half trained on other {what}") as caught:
    beside.check()
  assert finished.name in str(caught.value)
  # From elsewhere they are others' on purpose.
  content = ("others", None) if what == "images" else ("some", "others")
  other = _content(*content, place="elsewhere")
  assert _resolve(_config(), tmp_path, other).parents["restorer"].check() is None
  # Stages of another config have nothing to do with it.
  config = _config()
  config.parents.restorer.epochs += 1
  assert _resolve(config, tmp_path, other).parents["restorer"].check() is None


def test_a_parent_that_was_trained_again_is_noticed(tmp_path):
  stage = _train(_resolve(_config(), tmp_path))
  assert stage.check()
  restorer = stage.parents["restorer"]
  shutil.rmtree(restorer.directory)
  # The same again is as good as the first.
  _train(restorer)
  assert stage.check()
  shutil.rmtree(restorer.directory)
  _train(restorer, value=2.0)
  with pytest.raises(errors.RunError, match="trained on another restorer than"):
    stage.check()


def test_another_config_under_the_same_name_is_noticed(finished):
  made_of = finished.made_of | {"epochs": 1000}
  other = dataclasses.replace(finished, made_of=made_of)
  with pytest.raises(errors.RunError, match="not the config"):
    other.check()
  path = finished.directory / "config.json"
  path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
  with pytest.raises(errors.RunError, match=r"config\.json is damaged"):
    finished.check()
  path.unlink()
  with pytest.raises(errors.RunError, match=r"config\.json is missing"):
    finished.check()


def test_a_structure_that_does_not_fit_is_an_error(finished):
  with pytest.raises(errors.RunError, match="is what was written, but holds another"):
    finished.load({"params": {"y": jnp.zeros(5)}})


def test_nothing_is_finished_without_its_product(finished):
  (finished.directory / "finished.json").unlink()
  shutil.rmtree(finished.directory / "checkpoints" / "4" / "variables")
  with pytest.raises(errors.RunError, match="is missing"):
    finished.finish(4, "psnr_gain", 1.5, "")
  assert finished.finished() is None


def test_a_workdir_of_an_earlier_version_is_named_for_what_it_is(finished, tmp_path):
  # Neither stages of this version nor what is none of ours.
  (tmp_path / "bert").mkdir()
  (tmp_path / "bert" / "config.json").write_text('{"kind": "model", "layers": 12}')
  stages.check_workdir(tmp_path)
  old = {"kind": "restorer", "seed": 0, "parents": {}, "data": "x", "sha256": "y"}
  (tmp_path / "restorer-dncnn5-00000000").mkdir()
  (tmp_path / "restorer-dncnn5-00000000" / "config.json").write_text(json.dumps(old))
  with pytest.raises(errors.RunError, match="another version of fidelity_jax"):
    stages.check_workdir(tmp_path)


def test_weights_that_are_gone_are_remembered(tmp_path):
  place = {"images": "", "weights": "/some/file.pth"}
  content = lambda config: stages.Content("some", "abcd", place)
  assert stages.remembered_weights(tmp_path, "/some/file.pth") is None
  _train(_resolve(_config(), tmp_path, content).parents["restorer"])
  assert stages.remembered_weights(tmp_path, "/some/file.pth") == "abcd"
  assert stages.remembered_weights(tmp_path, "/some/other.pth") is None


def test_a_stored_config_may_lack_fields_that_were_added_since():
  config = _config()
  with config.unlocked():
    del config.profile
  last = tasks.calibration.last_config(config)
  assert last.kind == "ensemble" and "profile" not in last
