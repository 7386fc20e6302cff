"""Finished workdirs that something happened to: each ends in one line, or goes on."""

import json
import os
import pathlib
import shutil

import pytest
from conftest import ROOT, TOY, experiment, flip, overrides, results

from fidelity_jax import main

DEMO = "--config=configs/oracle.py:scratch"


def _stage(workdir, kind):
  (path,) = workdir.glob(f"{kind}-*")
  return path


def _product(workdir, kind):
  stage = _stage(workdir, kind)
  step = json.loads((stage / "finished.json").read_text())["best_step"]
  files = (stage / "checkpoints" / str(step) / "variables").rglob("*")
  return max((p for p in files if p.is_file()), key=lambda p: p.stat().st_size)


def _write(pattern, content):
  def damage(workdir):
    (path,) = workdir.glob(pattern)
    path.write_bytes(content)

  return damage


def _swap(pattern):
  """Puts a directory where a file was, or a file where a directory was."""

  def damage(workdir):
    (path,) = workdir.glob(pattern)
    if path.is_dir():
      shutil.rmtree(path)
      path.write_bytes(b"")
    else:
      path.unlink()
      path.mkdir()

  return damage


def _change_json(pattern, **changes):
  def damage(workdir):
    (path,) = workdir.glob(pattern)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))

  return damage


_MARKER = "restorer-*/finished.json"
_CONDITION = "measurements/oracle-restored-ensemble-*/awgn-0.3-*.npz"
_EXAMPLES = "oracle-*/examples-oracle.npz"
# What can happen to a finished workdir, and what is said of it.
DAMAGES = [
  *((_write(_MARKER, c), "finished.json is damaged") for c in (b"", b"{", b"\xff")),
  *((_write(_MARKER, c), "finished.json is damaged") for c in (b"{}", b"[]", b"null")),
  (_change_json(_MARKER, score="good"), "finished.json is damaged"),
  (_change_json(_MARKER, score=99.0), "finished.json is damaged"),
  (_change_json(_MARKER, best_step=1), "finished.json is damaged"),
  (_change_json(_MARKER, files={}), "finished.json is damaged"),
  (_swap(_MARKER), "finished.json is no regular file"),
  (_write("restorer-*/config.json", b"{"), "config.json is damaged"),
  (_write("restorer-*/config.json", b"[]"), "config.json is damaged"),
  (
    _change_json("restorer-*/config.json", parents={"a": "b"}),
    "config.json is damaged",
  ),
  (_change_json("restorer-*/config.json", places={}), "config.json is damaged"),
  (lambda w: next(w.glob("restorer-*/config.json")).unlink(), "config.json is missing"),
  (_swap("restorer-*/config.json"), "config.json is no regular file"),
  (_swap("restorer-*/metrics.jsonl"), "metrics.jsonl is no regular file"),
  (_swap("restorer-*/intervals.jsonl"), "intervals.jsonl is no regular file"),
  (_swap("restorer-*"), "is a file, where a directory belongs"),
  (_swap("restorer-*/checkpoints"), "is a file, where a directory belongs"),
  (lambda w: shutil.rmtree(_stage(w, "restorer") / "checkpoints"), "is missing"),
  (lambda w: flip(_product(w, "restorer"), 50), "is damaged"),
  (lambda w: flip(_product(w, "ensemble"), 50), "is damaged"),
  (lambda w: os.truncate(_product(w, "classifier"), 10), "is damaged"),
  (lambda w: _product(w, "calibration").unlink(), "is missing"),
  *((_write(_CONDITION, c), ".npz is damaged") for c in (b"", b"PK\3\4", b"[]")),
  (lambda w: flip(next(w.glob(_CONDITION)), 300), ".npz is damaged"),
  (
    lambda w: shutil.copy(
      next(w.glob(_CONDITION.replace("0.3", "0.2"))), next(w.glob(_CONDITION))
    ),
    "is of something else",
  ),
  (
    lambda w: shutil.copy(
      next(w.glob(_CONDITION.replace("-ensemble", "").replace("d-*/", "d-????????/"))),
      next(w.glob(_CONDITION)),
    ),
    "is of something else",
  ),
  (_swap(_CONDITION), "is no regular file"),
  (_swap("measurements"), "is a file, where a directory belongs"),
  (_swap("measurements/classifier-restored-*"), "is a file, where a directory"),
  (_swap("oracle-*"), "is a file, where a directory belongs"),
  (_swap("index.md"), "index.md is no regular file"),
  *(
    (_write(_EXAMPLES, c), "examples-oracle.npz is damaged")
    for c in (b"", b"PK\3\4", b"x")
  ),
  (lambda w: flip(next(w.glob(_EXAMPLES)), 3000), "examples-oracle.npz is damaged"),
  (_swap(_EXAMPLES), "is no regular file"),
  *(
    (_swap(f"oracle-*/{name}"), f"{name} is no regular file")
    for name in ("report.md", "report.html", "results.csv", "accuracy.png")
  ),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGES)
def test_damaged_workdirs(refused, toy_copy, damage, words):
  path = results(toy_copy)
  path.unlink()
  damage(toy_copy)
  markers = {p: p.read_bytes() for p in toy_copy.glob("*/finished.json") if p.is_file()}
  arguments = [DEMO, f"--workdir={toy_copy}", *overrides(TOY)]
  line = refused(arguments, 1, words)
  assert str(toy_copy) in line
  assert not path.exists()
  # Nothing new is called finished, nothing finished is gone.
  after = {p: p.read_bytes() for p in toy_copy.glob("*/finished.json") if p.is_file()}
  assert after == markers


def test_a_bit_flipped_in_a_half_trained_checkpoint(refused, toy_copy):
  (_stage(toy_copy, "ensemble") / "finished.json").unlink()
  path = max(
    (p for p in _stage(toy_copy, "ensemble").glob("checkpoints/*/training/d/*")),
    key=lambda p: p.stat().st_size,
  )
  flip(path, path.stat().st_size // 2)
  arguments = [DEMO, f"--workdir={toy_copy}", *overrides(TOY)]
  refused(arguments, 1, ("is damaged", "ensemble-", "delete the directory"))
  assert not (_stage(toy_copy, "ensemble") / "finished.json").exists()


def test_a_defect_is_shown_as_such(toy_copy, monkeypatch, capsys):
  from fidelity_jax import report

  def write(*args):
    try:
      raise PermissionError(13, "Permission denied", "innocent")
    except PermissionError:
      return {}["defect"]

  monkeypatch.setattr(report, "write", write)
  arguments = ["", DEMO, f"--workdir={toy_copy}", *overrides(TOY)]
  assert main.main(arguments) == 1
  line = capsys.readouterr().err.splitlines()[-1]
  assert "this is a defect of fidelity_jax at test_workdirs.py" in line
  assert "KeyError: 'defect'" in line and "innocent" not in line
  log = line.rpartition("The traceback is in ")[2].rstrip(".")
  assert log == str(toy_copy / "log.txt")
  text = pathlib.Path(log).read_text()
  assert "Traceback" in text and "KeyError: 'defect'" in text


@pytest.mark.slow
def test_few_test_images_make_a_picture(toy_copy, monkeypatch):
  """One column a condition, of the same image if there is but one."""
  fields = TOY | {"evaluation.batch_size": 1, "evaluation.rounds": 1}
  fields["dataset.counts"] = (6, 2, 1)
  fields |= {f"{k}epochs": 0 for k in ("", "parents.classifier.", "parents.restorer.")}
  fields |= {f"{k}warmup_epochs": 0 for k in ("", "parents.classifier.")}
  fields["ensemble.enabled"] = False
  monkeypatch.chdir(ROOT)
  before = experiment(toy_copy)
  shutil.rmtree(before)
  arguments = ["", DEMO, f"--workdir={toy_copy}", *overrides(fields)]
  assert main.main(arguments) == 0
  assert (experiment(toy_copy) / "examples.png").read_bytes().startswith(b"\x89PNG")


def test_results_json_that_is_a_directory(refused, toy_copy):
  path = results(toy_copy)
  path.unlink()
  path.mkdir()
  arguments = [DEMO, f"--workdir={toy_copy}", *overrides(TOY)]
  refused(arguments, 1, "results.json is no regular file")
