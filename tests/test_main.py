"""The command: what it leaves behind, and how it refuses."""

import json
import os
import shutil
import time

import pytest
from conftest import TOY, experiment, measured, one_line, overrides, results

DEMO = "--config=configs/oracle.py:scratch"


def test_it_leaves_what_it_promises(toy_run):
  kinds = []
  index = (toy_run / "index.md").read_text()
  for directory in sorted(p for p in toy_run.iterdir() if p.is_dir()):
    kind = directory.name.split("-")[0]
    kinds.append(kind)
    if kind == "measurements":
      continue
    assert f"{directory.name}" in index
    if kind == "oracle":
      continue
    begun = json.loads((directory / "config.json").read_text())
    config = begun["made_of"]
    assert begun["kind"] == config["kind"] == kind
    assert config["precision"] == "float32"
    assert list(directory.glob("events.out.tfevents.*"))
    records = [
      json.loads(line)
      for line in (directory / "metrics.jsonl").read_text().splitlines()
    ]
    assert len(records) == config["epochs"]
    assert records[-1]["learning_rate"] >= 0
    assert any(name.startswith("validation/") for name in records[-1])
    assert json.loads((directory / "finished.json").read_text())["files"]
  stages = ["calibration", "classifier", "ensemble", "restorer"]
  assert sorted(kinds) == sorted([*stages, "measurements", "oracle"])
  place = experiment(toy_run)
  rows = json.loads((place / "results.json").read_text())["rows"]
  conditions = ["clean", *(f"awgn-0.{i}" for i in range(1, 6)), "awgn-1d", "awgn-2d"]
  expected = {
    (method, restorer, the_map, ensemble, condition)
    for method, restorer, the_map, ensemble in (
      ("classifier", None, None, None),
      ("classifier", "dncnn", None, None),
      ("restoration", None, None, None),
      ("restoration", "dncnn", None, None),
      ("oracle", "dncnn", "l1", False),
      ("oracle", "dncnn", "l1", True),
    )
    for condition in conditions
  }
  names = ("method", "restorer", "map", "ensemble")
  found = {(*(row[n] for n in names), row["condition"]["name"]) for row in rows}
  assert found == expected
  behind = {"classifier", "restorer", "calibration", "ensemble"}
  for row in rows:
    assert (row["experiment"], row["dataset"], row["seed"]) == ("oracle", "demo", 0)
    assert (row["image_size"], row["precision"]) == (32, "float32")
    assert row["degradation"] == "awgn"
    if row["method"] == "restoration":
      assert (row["trained_on"], row["backbone"], row["accuracy"]) == (None,) * 3
      assert row["low"] <= row["psnr"] <= row["high"] and row["ssim"] <= 1
    else:
      assert (row["trained_on"], row["backbone"]) == ("clean", "resnet")
      assert 0 <= row["low"] <= row["accuracy"] <= row["high"] <= 100
      assert row["accuracy"] <= row["top5"] <= 100 and row["psnr"] is None
      assert len(row["per_class"]) == 16 and 0 <= row["ece"] <= 100
      # A share of the images, on average over rounds.
      right = row["accuracy"] / 100 * row["images"] * row["rounds"]
      assert abs(right - round(right)) < 1e-6
    condition = row["condition"]
    assert row["rounds"] == (1 if condition["name"] == "clean" else 2)
    assert condition["kind"] == condition["name"].split("-")[0]
    ends = {"awgn-1d": [0.5, 0.0], "awgn-2d": [0.5, 0.0], "awgn-0.3": 0.3}
    if condition["name"] in ends:
      assert condition["level"] == ends[condition["name"]]
    assert row["std"] >= 0
    for role, stage in row["stages"].items():
      assert stage.startswith(f"{role}-") and (toy_run / stage).is_dir()
      assert role in behind
    assert ("ensemble" in row["stages"]) == bool(row["ensemble"])
    assert ("restorer" in row["stages"]) == (row["restorer"] is not None)
  text = (place / "report.md").read_text()
  assert "not the paper's own experiment" in text
  assert "±" in text
  for picture in ("accuracy", "examples", "histories"):
    assert (place / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
  assert "<table" in (place / "report.html").read_text()


def test_a_second_run_only_reports(toy_copy, command):
  path = results(toy_copy)
  before = measured(path)
  path.unlink()
  start = time.monotonic()
  result = command(DEMO, f"--workdir={toy_copy}", *overrides(TOY), check=0)
  assert time.monotonic() - start < 30
  assert result.stderr.count(": finished (") == 4
  assert "steps/s" not in result.stderr
  assert measured(path) == before


@pytest.mark.slow
def test_only_what_is_new_is_measured(toy_copy, command):
  run = lambda **fields: (
    command(DEMO, f"--workdir={toy_copy}", *overrides(TOY | fields), check=0).stderr
  )
  rows = json.loads(results(toy_copy).read_text())["rows"]
  # Another number of examples; then a third round of seven conditions.
  stderr = run(**{"evaluation.examples": 1})
  assert "steps/s" not in stderr
  assert json.loads(results(toy_copy).read_text())["rows"] == rows
  assert "evaluation  14/14 steps" in run(**{"evaluation.rounds": 3})
  again = json.loads(results(toy_copy).read_text())["rows"]
  assert {row["rounds"] for row in again} == {1, 3}
  assert "steps/s" not in run()
  assert json.loads(results(toy_copy).read_text())["rows"] == rows
  # One more method: what was measured of the others is not measured again.
  for path in toy_copy.glob("measurements/oracle-restored-????????"):
    shutil.rmtree(path)
  before = {p: p.stat().st_mtime_ns for p in toy_copy.glob("measurements/*/*")}
  assert "evaluation  30/30 steps" in run()
  assert {p: p.stat().st_mtime_ns for p in before} == before
  assert json.loads(results(toy_copy).read_text())["rows"] == rows


@pytest.mark.slow
def test_a_changed_parent_is_trained_again_and_the_other_shared(toy_copy, command):
  fields = TOY | {"parents.restorer.learning_rate": 0.5, "parents.restorer.epochs": 0}
  fields["evaluation.rounds"] = 1
  before = {p.name for p in toy_copy.iterdir()}
  result = command(DEMO, f"--workdir={toy_copy}", *overrides(fields), check=0)
  new = {p.name.split("-")[0] for p in toy_copy.iterdir() if p.name not in before}
  assert new == {"restorer", "calibration", "ensemble", "oracle"}
  assert result.stderr.count(": finished (") == 1


def test_what_is_missing_is_named_with_a_way_out(command, tmp_path):
  """Data and weights, both at once."""
  env = {"FIDELITY_JAX_CACHE": str(tmp_path / "cache")}
  config = "--config=configs/oracle.py"
  result = command(config, f"--workdir={tmp_path / 'w'}", env=env)
  assert result.returncode == 1, result.stderr
  line = one_line(result.stderr)
  assert "256_ObjectCategories" in line and "resnet50-0676ba61.pth" in line
  assert "':demo'" in line and "':scratch'" in line


def test_configs_are_found_from_any_directory(command, tmp_path):
  """They are installed with the package; a file that is there comes first."""
  refused = command(DEMO, "--workdir=w", "--config.seed=-1", cwd=tmp_path)
  assert refused.returncode == 2
  assert "config.seed = -1" in one_line(refused.stderr)
  own = "from fidelity_jax.configs import common\n"
  own += "def get_config(size):\n  return common.method('nothing', size)\n"
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs" / "oracle.py").write_text(own)
  refused = command(DEMO, "--workdir=w", cwd=tmp_path)
  assert refused.returncode == 2
  assert "fidelity.source = 'nothing'" in one_line(refused.stderr)


def test_two_runs_do_not_share_a_workdir(command, tmp_path):
  from fidelity_jax import files

  with files.locked(tmp_path):
    result = command(DEMO, f"--workdir={tmp_path}", *overrides(TOY))
  assert result.returncode == 1, result.stderr
  assert "another run" in one_line(result.stderr)


def test_a_loss_that_is_not_a_number_stops_the_stage(command, tmp_path):
  fields = TOY | {"parents.restorer.learning_rate": 1e30}
  result = command(DEMO, f"--workdir={tmp_path}", *overrides(fields))
  assert result.returncode == 1, result.stderr
  line = one_line(result.stderr)
  assert "not finite at step" in line
  assert "learning rate" in line
  assert "demo/" in line
  assert not list(tmp_path.glob("restorer-*/finished.json"))


def test_progress_is_a_live_line_on_a_terminal(tmp_path):
  """Runs under a pseudo-terminal, as `script` would."""
  import pty
  import subprocess
  import sys
  import termios

  program = (
    "from fidelity_jax import progress; import time\n"
    "bar = progress.Progress('stage', 3)\n"
    "for i in range(1, 4): time.sleep(0.6); bar.due() and bar.update(i, loss=0.5)\n"
    "bar.close()"
  )
  main, child = pty.openpty()
  termios.tcsetwinsize(child, (24, 100))
  subprocess.run([sys.executable, "-c", program], stderr=child, check=True)
  os.close(child)
  text = b""
  while chunk := _read(main):
    text += chunk
  assert b"\r" in text
  assert b"stage" in text
  assert b"loss 0.5" in text
  plain = subprocess.run(
    [sys.executable, "-c", program], stderr=subprocess.PIPE, check=True
  )
  assert b"\r" not in plain.stderr


def _read(descriptor) -> bytes:
  try:
    return os.read(descriptor, 4096)
  except OSError:
    return b""
