"""Studies: which experiments there are, and what becomes of them together."""

import csv
import importlib
import json
import signal

import pytest
from conftest import TOY, TOY_ESTIMATOR, experiment, one_line, overrides

from fidelity_jax import errors, main, study

STUDIES = (
  *("setups", "table_5_1", "table_6_1", "figure_3_4"),
  *("figure_7_1", "figure_a_2", "figure_c_1"),
)
_LONE = ("clean", "degraded", "restored", "oracle", "pretrained", "end_to_end")
# One epoch and one round: does it run, not what it gives.
_QUICK = TOY | {"evaluation.rounds": 1, "parents.classifier.epochs": 1}
_QUICK |= {"parents.classifier.warmup_epochs": 0}


def _config(name, *fields, size=":demo"):
  arguments = [f"--config=configs/{name}.py{size}", "--workdir=unused"]
  flags = [f"--config.{field}" for field in fields]
  return main.parse(["", *arguments, *flags])[0]


def _experiments(*arguments, **kwargs):
  found = study.read(_config(*arguments, **kwargs)).experiments
  return {e.experiment: e for e in found}


@pytest.mark.parametrize("size", ["", ":demo"])
def test_experiments_of_a_study_are_those_that_run_alone(size):
  """The same fields, hence the same stages."""
  together = _experiments("table_5_1", size=size)
  assert tuple(together) == _LONE
  for name, config in together.items():
    module = importlib.import_module(f"fidelity_jax.configs.{name}")
    alone = module.get_config(size.removeprefix(":")).copy_and_resolve_references()
    assert config.to_dict() == alone.to_dict()


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("size", ["", ":demo"])
def test_every_study_can_be_read(name, size):
  found = study.read(_config(name, size=size))
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
  arguments = [f"--config=configs/{name}.py:demo", f"--workdir={workdir}", *flags]
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
  name, state, users, left, *rest = cells("restorer-")
  assert name in _trained(toy_copy) and state.startswith("finished, psnr_gain")
  assert users.startswith("classifier-resnet-restored-") and (left, rest) == ("0", [])
  name, state, users, left, estimate = cells("classifier-resnet-degraded-")
  assert (state, users, left) == ("to do", "degraded", "12")
  # From the rate of the classifier that is there.
  assert estimate.startswith("~")
  assert "Experiments: clean, degraded, restored." in result.stdout
  assert "of training are left" in lines[-1]


def test_processes_share_a_study(toy_copy, background):
  """Two at once: each stage trained by one, the same results by both."""
  runs = [
    _run(background, toy_copy, TOY | {"shard": f"{number}/2"}) for number in (1, 2)
  ]
  ends = [run.communicate(timeout=600) for run in runs]
  assert [run.returncode for run in runs] == [0, 0], ends
  texts = [stderr for _, stderr in ends]
  for kind in ("degraded", "restored"):
    trained = [f"classifier-resnet-{kind}" in t and "steps/s" in t for t in texts]
    assert any(trained)
    last = [text.count("epoch 2/2") for text in texts]
  # Two classifiers, trained once each.
  assert sum(last) >= 2
  assert sum(text.count("[3/4]") + text.count("[4/4]") for text in texts) >= 2
  place = experiment(toy_copy, "setups")
  found = json.loads((place / "results.json").read_text())
  kinds = {(r["trained_on"], r["restorer"]) for r in found["rows"] if r["trained_on"]}
  assert len(kinds) == 6
  with open(place / "results.csv", newline="") as file:
    assert len(list(csv.DictReader(file))) == len(found["rows"])
  # A process that works alone waits for neither.
  assert not list(toy_copy.glob("*/.tmp"))


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


def test_an_evaluation_goes_on_where_it_was(toy_copy, background, command):
  """Stopped in mid-evaluation: what was measured is kept, and nothing changes."""
  (place,) = toy_copy.glob("oracle-*")
  before = json.loads((place / "results.json").read_text())["rows"]
  kept = list(toy_copy.glob("measurements/*/*.npz"))
  for path in kept:
    path.unlink()
  fields = TOY | {"evaluation.batch_size": 8, "evaluation.rounds": 6}
  arguments = ["--config=configs/oracle.py:demo", f"--workdir={toy_copy}"]
  run = background(*arguments, *overrides(fields))
  # The first batch is past.
  for line in run.stderr:
    if line.startswith("evaluation") and int(line.rpartition("images ")[2]) > 8:
      break
  run.send_signal(signal.SIGTERM)
  stderr = run.communicate(timeout=600)[1]
  assert run.returncode == 143, stderr
  assert "evaluating" in one_line(stderr)
  # Batches of another size take up what is there.
  result = command(*arguments, *overrides(TOY | {"evaluation.batch_size": 4}), check=0)
  total = int(result.stderr.rpartition(" steps  ")[0].rpartition("/")[2])
  assert total <= 15 * (64 - 8) // 4
  again = json.loads((place / "results.json").read_text())["rows"]
  for old, new in zip(before, again, strict=True):
    assert new["accuracy"] == old["accuracy"]
    assert new["psnr"] == pytest.approx(old["psnr"]) if old["psnr"] else True


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
