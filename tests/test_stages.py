"""Directories, digests, and what counts as finished."""

import dataclasses
import importlib.util
import json
import shutil

import jax.numpy as jnp
import pytest
from conftest import ROOT

from fidelity_jax import checkpoints, degradations, errors, stages


def _config(name="oracle", size="demo"):
  path = ROOT / "configs" / f"{name}.py"
  spec = importlib.util.spec_from_file_location(name, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(size)


def _resolve(config, tmp_path):
  return stages.resolve(config.copy_and_resolve_references(), tmp_path)


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
  "field", ["checkpoint_seconds", "evaluation.rounds", "ensemble.epochs"]
)
def test_what_is_immaterial_changes_nothing(tmp_path, field):
  config = _config()
  config.update_from_flattened_dict({field: 3})
  assert _resolve(config, tmp_path).digest == _resolve(_config(), tmp_path).digest


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


@pytest.mark.parametrize("size", ["", "demo"])
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
    names = [s.kind for s in stage.lineage()]
    assert names == ["classifier", "restorer", "estimator", "calibration"]


# METHOD section 6, per kind of stage; the restorer's also hold for the estimator.
_REPORT = {
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
_REPORT["estimator"] = _REPORT["restorer"] | {"fidelity.map": "l1"}
_SIGMAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)


@pytest.mark.parametrize("name", ["oracle", "pretrained", "end_to_end", "estimator"])
def test_reports_numbers(tmp_path, name):
  stage = _resolve(_config(name, ""), tmp_path)
  kinds = {
    "oracle": ["classifier", "restorer", "calibration"],
    "estimator": ["restorer", "estimator"],
  }.get(name, ["classifier", "restorer", "estimator", "calibration"])
  assert [s.kind for s in stage.lineage()] == kinds
  for part in stage.lineage():
    config = part.config
    for field, value in _REPORT[part.kind].items():
      given = config
      for key in field.split("."):
        given = given[key]
      assert given == value and type(given) is type(value), (part.kind, field)
    assert (config.dataset.name, config.dataset.image_size) == ("caltech256", 224)
    (noise,) = degradations.from_config(config.degradation).steps
    patches = part.kind in ("restorer", "estimator")
    assert noise.kind == "awgn"
    assert noise.variation == ("continuous" if patches else "discrete")
    assert noise.levels == ((0.0, 0.5) if patches else _SIGMAS)
  if stage.kind == "calibration":
    assert stage.config.fidelity.source == name


@pytest.fixture
def finished(tmp_path):
  stage = _resolve(_config(), tmp_path).parents["restorer"]
  stage.begin("data")
  saved = checkpoints.Checkpoints(stage.directory / "checkpoints")
  variables = {"params": {"x": jnp.arange(3.0)}}
  progress = checkpoints.Progress(4, 1.5)
  saved.save(4, variables, {"opt_state": jnp.zeros(2)}, progress)
  saved.close()
  stage.finish(4, "psnr_gain", 1.5)
  return stage


def test_a_finished_stage_gives_its_variables(finished):
  record = finished.check("data")
  assert (record.best_step, record.score) == (4, 1.5)
  like = {"params": {"x": jnp.zeros(3)}}
  assert finished.load(like)["params"]["x"].tolist() == [0, 1, 2]


def test_other_data_is_noticed_from_the_first_moment(finished):
  with pytest.raises(errors.RunError, match="trained on other images"):
    finished.check("other data")
  (finished.directory / "finished.json").unlink()
  assert finished.check("data") is None
  with pytest.raises(errors.RunError, match="trained on other images"):
    finished.check("other data")


def test_another_config_under_the_same_name_is_noticed(finished):
  config = finished.config.copy_and_resolve_references()
  config.epochs += 1
  other = dataclasses.replace(finished, config=config)
  with pytest.raises(errors.RunError, match="not the config"):
    other.check("data")
  path = finished.directory / "config.json"
  path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
  with pytest.raises(errors.RunError, match=r"config\.json is damaged"):
    finished.check("data")
  path.unlink()
  with pytest.raises(errors.RunError, match=r"config\.json is missing"):
    finished.check("data")


def test_a_structure_that_does_not_fit_is_an_error(finished):
  with pytest.raises(errors.RunError, match="is damaged"):
    finished.load({"params": {"y": jnp.zeros(5)}})


def test_nothing_is_finished_without_its_product(finished):
  (finished.directory / "finished.json").unlink()
  shutil.rmtree(finished.directory / "checkpoints" / "4" / "variables")
  with pytest.raises(errors.RunError, match="is missing"):
    finished.finish(4, "psnr_gain", 1.5)
  assert finished.finished() is None


def test_what_earlier_versions_left_is_named_for_what_it_is(finished):
  """As they wrote it: no checksums, and no data in config.json."""
  marker = finished.directory / "finished.json"
  (finished.directory / "config.json").write_text(json.dumps(finished.record()))
  old = {"best_step": 4, "metric": "psnr_gain", "score": 1.5, "data": "data"}
  marker.write_text(json.dumps(old | {"files": {}}))
  with pytest.raises(errors.RunError, match="best checkpoint was lost by an earlier"):
    finished.check("data")
  marker.write_text(json.dumps(old | {"files": {"a": "b"}}))
  with pytest.raises(errors.RunError, match=r"begun by an earlier version.*delete"):
    finished.check("data")
  marker.unlink()
  with pytest.raises(errors.RunError, match=r"begun by an earlier version.*delete"):
    finished.check("data")
