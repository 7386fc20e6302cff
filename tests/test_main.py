"""The command: what it leaves behind, and how it refuses."""

import json
import os
import time

from conftest import TOY, one_line, overrides

DEMO = "--config=configs/oracle.py:demo"


def test_it_leaves_what_it_promises(toy_run):
  kinds = []
  for directory in sorted(p for p in toy_run.iterdir() if p.is_dir()):
    kind = directory.name.split("-")[0]
    kinds.append(kind)
    if kind == "evaluation":
      continue
    config = json.loads((directory / "config.json").read_text())
    assert config["kind"] == kind
    assert list(directory.glob("events.out.tfevents.*"))
    records = [
      json.loads(line)
      for line in (directory / "metrics.jsonl").read_text().splitlines()
    ]
    assert len(records) == config["epochs"]
    assert records[-1]["learning_rate"] >= 0
    assert any(name.startswith("validation/") for name in records[-1])
    assert json.loads((directory / "finished.json").read_text())["files"]
  assert kinds == ["calibration", "classifier", "ensemble", "evaluation", "restorer"]
  results = json.loads((toy_run / "results.json").read_text())
  assert (results["experiment"], results["dataset"]) == ("oracle", "demo")
  conditions = ["clean", *(f"awgn-0.{i}" for i in range(1, 6)), "awgn-1d", "awgn-2d"]
  expected = {
    (method, restoration, ensemble, condition)
    for method, restoration, ensemble in (
      ("setup1", False, None),
      ("setup1", True, None),
      ("oracle", True, False),
      ("oracle", True, True),
    )
    for condition in conditions
  }
  names = ("method", "restoration", "ensemble", "condition")
  assert {tuple(row[n] for n in names) for row in results["rows"]} == expected
  for row in results["rows"]:
    assert 0 <= row["accuracy"] <= 100
    assert row["rounds"] == (1 if row["condition"] == "clean" else 2)
    assert row["std"] >= 0
  text = (toy_run / "report.md").read_text()
  assert "not the report's own experiment" in text
  assert "±" in text
  for picture in ("accuracy.png", "examples.png"):
    assert (toy_run / picture).read_bytes().startswith(b"\x89PNG")


def test_a_second_run_only_reports(toy_copy, command):
  before = json.loads((toy_copy / "results.json").read_text())
  (toy_copy / "results.json").unlink()
  start = time.monotonic()
  result = command(DEMO, f"--workdir={toy_copy}", *overrides(TOY), check=0)
  assert time.monotonic() - start < 30
  assert result.stderr.count(": finished (") == 4
  assert "steps/s" not in result.stderr
  assert json.loads((toy_copy / "results.json").read_text()) == before


def test_a_changed_parent_is_trained_again_and_the_other_shared(toy_copy, command):
  fields = TOY | {"parents.restorer.learning_rate": 0.5, "parents.restorer.epochs": 0}
  fields["evaluation.rounds"] = 1
  before = {p.name for p in toy_copy.iterdir()}
  result = command(DEMO, f"--workdir={toy_copy}", *overrides(fields), check=0)
  new = {p.name.split("-")[0] for p in toy_copy.iterdir() if p.name not in before}
  assert new == {"restorer", "calibration", "ensemble", "evaluation"}
  assert result.stderr.count(": finished (") == 1


def test_what_is_missing_is_named_with_a_way_out(command, tmp_path):
  """Data and weights, both at once."""
  env = {"FIDELITY_JAX_CACHE": str(tmp_path / "cache")}
  config = "--config=configs/oracle.py"
  result = command(config, f"--workdir={tmp_path / 'w'}", env=env)
  assert result.returncode == 1, result.stderr
  line = one_line(result.stderr)
  assert "256_ObjectCategories" in line and "resnet50-0676ba61.pth" in line
  assert ":demo" in line


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
