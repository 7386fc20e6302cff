"""Studies: which experiments there are, and what becomes of them together."""

import csv
import importlib
import json
import re
import signal
import sys

import numpy as np
import pytest
from conftest import ROOT, TOY, TOY_ESTIMATOR, experiment, one_line, overrides

from fidelity_jax import errors, main, platform, study

STUDIES = (
  *("setups", "table_5_1", "table_6_1", "figure_3_4"),
  *("figure_7_1", "figure_a_2", "figure_c_1"),
)
_LONE = ("clean", "degraded", "restored", "oracle", "pretrained", "end_to_end")
# One epoch and one round: does it run, not what it gives.
_QUICK = TOY | {"evaluation.rounds": 1, "parents.classifier.epochs": 1}
_QUICK |= {"parents.classifier.warmup_epochs": 0}


def _config(name, *fields, size=":scratch"):
  arguments = [f"--config=configs/{name}.py{size}", "--workdir=unused"]
  flags = [f"--config.{field}" for field in fields]
  return main.parse(["", *arguments, *flags])[0]


def _experiments(*arguments, **kwargs):
  found = study.read(_config(*arguments, **kwargs)).experiments
  return {e.experiment: e for e in found}


# Which images they are is not said by the configs of this size.
_PATHS = {":lite": ["dataset.path=there"]}
_SIZES = ("", ":lite", ":demo", ":scratch")


@pytest.mark.parametrize("size", _SIZES)
def test_experiments_of_a_study_are_those_that_run_alone(size):
  """The same fields, hence the same stages."""
  together = _experiments("table_5_1", *_PATHS.get(size, ()), size=size)
  assert tuple(together) == _LONE
  for name, config in together.items():
    module = importlib.import_module(f"fidelity_jax.configs.{name}")
    alone = module.get_config(size.removeprefix(":"))
    if size in _PATHS:
      alone.dataset.path = "there"
    alone = alone.copy_and_resolve_references()
    assert config.to_dict() == alone.to_dict()


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("size", _SIZES)
def test_every_study_can_be_read(name, size):
  found = study.read(_config(name, *_PATHS.get(size, ()), size=size))
  assert found.name == name and found.shows and not found.lone
  assert len({e.experiment for e in found.experiments}) == len(found.experiments)


def test_what_is_set_at_the_top_holds_for_all():
  fields = (
    *("dataset.path=there", "parents.classifier.epochs=7", "epochs=9"),
    *("parents.restorer.model.depth=4", "degradation.level=[0.1,0.2]"),
  )
  for name, config in _experiments("table_5_1", *fields).items():
    classifier = config.parents.get("classifier", config)
    assert classifier.epochs == 7 and classifier.dataset.path == "there"
    restorer = config.parents.restorer
    assert (restorer.model.depth, restorer.dataset.path) == (4, "there")
    # The restorer learns from the whole range, whatever is tested.
    assert restorer.degradation.level is None
    assert tuple(config.degradation.level) == (0.1, 0.2)
    if config.kind == "calibration":
      assert config.epochs == 9
    if "estimator" in config.parents:
      assert config.parents.estimator.parents.restorer.model.depth == 4
    assert name == config.experiment


def test_an_experiment_has_fields_of_its_own():
  fields = ("experiments.oracle.epochs=30", "epochs=90")
  found = _experiments("table_5_1", *fields)
  assert {n: e.epochs for n, e in found.items() if e.kind == "calibration"} == {
    "oracle": 30,
    "pretrained": 90,
    "end_to_end": 90,
  }
  # Where the estimator is trained along, the demo takes smaller steps.
  found = _experiments("table_5_1", "learning_rate=0.01")
  rates = [found[name].learning_rate for name in ("oracle", "end_to_end")]
  assert rates == pytest.approx([0.01, 0.008])


def test_axes():
  fields = (
    *("seeds=(3,4)", "backbones=('resnet','alexnet')"),
    "degradations=('awgn','gaussian_blur+awgn')",
  )
  found = _experiments("figure_a_2", *fields)
  # The method runs on the config's own network alone.
  assert len(found) == 2 * 2 * (2 + 1)
  one = found["clean-seed4-alexnet-gaussian_blur_awgn"]
  assert (one.seed, one.model.name) == (4, "alexnet")
  assert one.degradation.kind == "gaussian_blur+awgn"
  parents = found["end_to_end-seed3-awgn"].parents
  for parent in (parents.classifier, parents.estimator.parents.restorer):
    assert (parent.seed, parent.degradation.kind) == (3, "awgn")
  assert parents.classifier.model.name == "resnet"
  # One value makes no name longer.
  assert "clean" in _experiments("setups", "seeds=(5,)")
  assert _experiments("setups", "seeds=(5,)")["clean"].parents.restorer.seed == 5


def test_the_ablations_of_table_6_1():
  found = _experiments("table_6_1")
  differing = {
    name: (
      e.fidelity.map,
      e.model.resize,
      [k for k, v in e.model.items() if v is False],
    )
    for name, e in found.items()
    if name != "clean"
  }
  assert len(differing) == 10
  assert not any(e.ensemble.enabled for n, e in found.items() if n != "clean")
  assert differing["oracle"] == ("l1", "bilinear", [])
  assert differing["cosine"] == ("cosine", "bilinear", [])
  assert differing["nearest"] == ("l1", "nearest", [])
  assert differing["without_residual"] == ("l1", "bilinear", ["residual"])
  assert len({str(v) for v in differing.values()}) == 10


@pytest.mark.parametrize(
  ("field", "words"),
  [
    ("only=orcale", "did you mean 'oracle'"),
    ("shard=3/2", '"i/n"'),
    ("shard=0/2", '"i/n"'),
    ("seeds=(-1,)", "config.seeds"),
    ("backbones=('resnet51',)", "config.backbones"),
    ("degradations=('fog',)", "unknown kind 'fog'"),
    ("sections=('poems',)", "config.sections"),
    ("one_backbone=('other',)", "config.one_backbone"),
    ("seed=-1", "config.seed = -1"),
    ("parents.restorer.epochs=-1", "restorer.epochs = -1 must be a whole number"),
    ("experiments.oracle.epochs=-1", "config.experiments.oracle.epochs = -1"),
  ],
)
def test_what_is_impossible_is_refused(field, words):
  with pytest.raises(errors.UsageError) as refused:
    study.read(_config("table_5_1", field))
  assert words in str(refused.value)


def test_only():
  assert list(_experiments("table_6_1", "only=oracle,without_sp*")) == [
    "oracle",
    "without_spatial_multiplication",
    "without_spatial_addition",
  ]


def _run(command, workdir, fields, *flags, name="setups", **kwargs):
  arguments = [f"--config=configs/{name}.py:scratch", f"--workdir={workdir}", *flags]
  return command(*arguments, *overrides(fields), **kwargs)


def _trained(workdir):
  return {p.parent.name for p in workdir.glob("*/finished.json")}


def test_a_plan_is_printed_and_nothing_done(toy_copy, command):
  before = {p: p.stat().st_mtime_ns for p in toy_copy.rglob("*")}
  result = _run(command, toy_copy, _QUICK | TOY, "--dry_run", check=0)
  assert {p: p.stat().st_mtime_ns for p in toy_copy.rglob("*")} == before
  lines = result.stdout.splitlines()
  row = lambda start: next(line.split("  ") for line in lines if line.startswith(start))
  cells = lambda start: [cell.strip() for cell in row(start) if cell]
  name, state, left, *users = cells("restorer-")
  assert name in _trained(toy_copy) and state.startswith("finished, psnr_gain")
  assert left == "0" and users[-1].startswith("classifier-resnet-restored-")
  assert users[-1].endswith("clean, degraded and 1 more")
  name, state, left, estimate, users = cells("classifier-resnet-degraded-")
  assert (state, users, left) == ("to do", "degraded", "12")
  # From the rate of the classifier that is there.
  assert estimate.startswith("~")
  assert "Experiments: clean, degraded, restored." in result.stdout
  assert "of training are left" in lines[-1]


@pytest.mark.slow
def test_processes_share_a_study(toy_copy, background):
  """Two at once: each stage trained by one, the same results by both."""
  runs = [
    _run(background, toy_copy, TOY | {"shard": f"{number}/2"}) for number in (1, 2)
  ]
  ends = [run.communicate(timeout=600) for run in runs]
  assert [run.returncode for run in runs] == [0, 0], ends
  texts = [stderr for _, stderr in ends]
  for kind in ("degraded", "restored"):
    # One of them says how training ended.
    ended = re.compile(rf"classifier-resnet-{kind}-\w+  12/12 steps")
    assert sum(bool(ended.search(text)) for text in texts) == 1
  assert not list(toy_copy.rglob(".*.tmp"))
  place = experiment(toy_copy, "setups")
  found = json.loads((place / "results.json").read_text())
  kinds = {(r["trained_on"], r["restorer"]) for r in found["rows"] if r["trained_on"]}
  assert len(kinds) == 6
  with open(place / "results.csv", newline="") as file:
    assert len(list(csv.DictReader(file))) == len(found["rows"])


@pytest.mark.slow
def test_what_fails_does_not_stop_the_rest(toy_copy, command):
  fields = TOY | {"experiments.degraded.learning_rate": 1e30}
  result = _run(command, toy_copy, fields)
  assert result.returncode == 1, result.stderr
  line = one_line(result.stderr)
  assert "classifier-resnet-degraded-" in line and "not finite" in line
  trained = {name.rsplit("-", 1)[0] for name in _trained(toy_copy)}
  assert "classifier-resnet-restored" in trained
  assert "classifier-resnet-degraded" not in trained
  place = experiment(toy_copy, "setups")
  found = json.loads((place / "results.json").read_text())
  kinds = {r["trained_on"] for r in found["rows"]} - {None}
  assert kinds == {"clean", "restored"}
  assert len(found["missing"]) == 1 and "degraded" in found["missing"][0]
  assert "classifier-resnet-degraded-" in (place / "report.html").read_text()


@pytest.mark.slow
def test_an_evaluation_goes_on_where_it_was(toy_copy, background, command):
  """Stopped in mid-evaluation: what was measured is kept, and nothing changes."""
  (place,) = toy_copy.glob("oracle-*")
  before = json.loads((place / "results.json").read_text())["rows"]
  kept = list(toy_copy.glob("measurements/*/*.npz"))
  for path in kept:
    path.unlink()
  fields = TOY | {"evaluation.batch_size": 4, "evaluation.rounds": 60}
  arguments = ["--config=configs/oracle.py:scratch", f"--workdir={toy_copy}"]
  run = background(*arguments, *overrides(fields))
  # The first batch is past.
  for line in run.stderr:
    if line.startswith("evaluation") and int(line.rpartition("images ")[2]) > 4:
      break
  run.send_signal(signal.SIGTERM)
  stderr = run.communicate(timeout=600)[1]
  assert run.returncode == 143, stderr
  assert "evaluating" in one_line(stderr)
  # Batches of another size take up what is there.
  result = command(*arguments, *overrides(TOY | {"evaluation.batch_size": 2}), check=0)
  total = int(result.stderr.rpartition(" steps  ")[0].rpartition("/")[2])
  assert total <= 15 * (64 - 4) // 2
  again = json.loads((place / "results.json").read_text())["rows"]
  for old, new in zip(before, again, strict=True):
    assert new["accuracy"] == old["accuracy"]
    assert new["psnr"] == pytest.approx(old["psnr"]) if old["psnr"] else True


@pytest.mark.slow
def test_logits_that_one_experiment_keeps(toy_copy, command):
  """Where another measures the same and does not keep them."""
  fields = TOY | TOY_ESTIMATOR | {"only": "clean,oracle"}
  keep = "--config.experiments.clean.evaluation.keep=predictions"
  result = _run(command, toy_copy, fields, keep, name="table_5_1", check=0)
  assert "evaluation  30/30 steps" in result.stderr
  place = experiment(toy_copy, "table_5_1")
  assert [p.name for p in place.glob("predictions-*")] == ["predictions-clean.npz"]
  rows = json.loads((place / "results.json").read_text())["rows"]
  with np.load(place / "predictions-clean.npz") as kept:
    for row in rows:
      if row["method"] == "classifier":
        key = "classifier-restored" if row["restorer"] else "classifier"
        logits = kept[f"{key}/{row['condition']['name']}"]
        assert logits.shape == (row["rounds"], row["images"], 16)
        right = logits.argmax(-1) == kept["labels"]
        assert row["accuracy"] == pytest.approx(100 * right.mean())
  # Where they are not asked for any more, those of before are gone.
  _run(command, toy_copy, fields, name="table_5_1", check=0)
  assert not list(place.glob("predictions-*"))


@pytest.mark.slow
def test_networks_that_do_not_fit_together(toy_copy, monkeypatch):
  """They are evaluated one after the other, and what they share has one row."""
  arguments = ["", "--config=configs/table_5_1.py:scratch", f"--workdir={toy_copy}"]
  arguments += overrides(TOY | TOY_ESTIMATOR | {"only": "clean,oracle"})
  monkeypatch.chdir(ROOT)
  found = []
  for memory in (2**40, 1):
    monkeypatch.setattr(platform, "memory", lambda size=memory: size)
    sys.modules.pop("config_config", None)
    assert main.main(arguments) == 0
    path = experiment(toy_copy, "table_5_1") / "results.json"
    found.append(json.loads(path.read_text())["rows"])
  assert len(found[0]) == 6 * 8
  key = lambda row: json.dumps(row, sort_keys=True)
  assert sorted(found[0], key=key) == sorted(found[1], key=key)


def test_logits_that_are_not_finite_are_wrong():
  from fidelity_jax import tensors

  logits = np.array([[1, 2, 2], [np.nan] * 3, [3, np.inf, 1], [2, 2, 1]], np.float32)
  label = np.array([2, 0, 1, 0])
  values = tensors._answers(False, logits, label)
  # Of equal logits the first counts.
  assert list(values["rank"]) == [1, 3, 3, 0]
  assert values["confidence"][1] == 0


def test_a_field_that_stands_against_an_axis_is_refused():
  fields = ("backbones=('resnet','resnet18')", "experiments.clean.model.name=resnet")
  with pytest.raises(errors.UsageError, match=r"experiments\.clean: its model\.name"):
    study.read(_config("setups", *fields))


def test_a_class_that_is_not_there_is_refused_before_anything_runs(refused, tmp_path):
  arguments = ["--config=configs/figure_3_4.py:scratch", f"--workdir={tmp_path}"]
  refused([*arguments, "--config.class_name=astronat"], 2, "'astronaut")
  assert not list(tmp_path.glob("*-*"))


@pytest.mark.slow
@pytest.mark.parametrize("size", ["demo", "scratch"])
@pytest.mark.parametrize("name", STUDIES)
def test_every_demo_can_be_planned(name, size, monkeypatch, tmp_path, capsys):
  """At its own size, not at the tests'."""
  monkeypatch.chdir(ROOT)
  sys.modules.pop("config_config", None)
  place = f"--workdir={tmp_path / 'w'}"
  assert main.main(["", f"--config=configs/{name}.py:{size}", place, "--dry_run"]) == 0
  assert "Experiments: " in capsys.readouterr().out
  assert not (tmp_path / "w").exists()


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_its_stage_to_others(toy_copy, background):
  """Two share a study, one is killed in mid-stage: the other trains that stage too."""
  fields = TOY | {"parents.classifier.epochs": 3}
  first = _run(background, toy_copy, fields | {"shard": "1/2"})
  for line in first.stderr:
    if "steps/s" in line:
      break
  second = _run(background, toy_copy, fields | {"shard": "2/2"})
  first.kill()
  first.communicate()
  stderr = second.communicate(timeout=600)[1]
  assert second.returncode == 0, stderr
  rows = json.loads((experiment(toy_copy, "setups") / "results.json").read_text())
  assert {r["trained_on"] for r in rows["rows"]} == {
    *("clean", "degraded", "restored", None)
  }


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_every_study_runs(tmp_path, command, name):
  """Whole, at toy size, on toy-sized networks."""
  fields = _QUICK | TOY_ESTIMATOR | {"parents.restorer.epochs": 1, "epochs": 2}
  fields |= {"parents.estimator.epochs": 1}
  if name in ("figure_7_1", "figure_a_2"):
    fields["backbones"] = "('resnet',)"
  result = _run(command, tmp_path, fields, name=name, check=0)
  assert "report.html" in result.stderr
  place = experiment(tmp_path, name)
  found = json.loads((place / "results.json").read_text())
  assert found["rows"] and not found["missing"]
  counts = {"table_5_1": 12, "table_6_1": 12, "setups": 6}
  if name in counts:
    methods = {json.dumps(r["stages"]) + r["method"] for r in found["rows"]}
    assert len(methods) >= counts[name]
  pictures = {"figure_3_4": "activations", "figure_c_1": "histories"}
  assert (place / f"{pictures.get(name, 'accuracy')}.svg").exists()
