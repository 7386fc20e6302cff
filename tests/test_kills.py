"""Killed at any moment and run again, an experiment ends as if nothing had happened."""

import json
import random
import signal
import subprocess

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import TOY, measured, overrides, results

# Rates that rise to the end and ruin what was learned: the best epoch comes early, so
# that its checkpoint has to outlive every later one, and every stop.
BEST_FIRST = TOY | {
  "epochs": 4,
  "warmup_epochs": 4,
  "learning_rate": 0.05,
  "parents.classifier.epochs": 4,
  "parents.classifier.warmup_epochs": 4,
  "parents.classifier.learning_rate": 1.0,
  "parents.restorer.epochs": 4,
  "parents.restorer.warmup_epochs": 4,
  "parents.restorer.learning_rate": 2.0,
  "ensemble.epochs": 4,
  "ensemble.warmup_epochs": 4,
  "ensemble.learning_rate": 2.0,
}
# (signal, moment, which one of its kind), in the order of the experiment. Checkpoints
# are written every fraction of a second, so they fall inside epochs too.
_ENDS = [
  ("SIGKILL", "write", 3),
  ("SIGKILL", "finish", 1),
  ("SIGTERM", "validate", 2),
  ("SIGKILL", "step", 12),
  ("SIGTERM", "evaluate", 3),
]


def _flags(workdir, fields=BEST_FIRST):
  flags = ["--config=configs/oracle.py:scratch", f"--workdir={workdir}"]
  return [*flags, *overrides(fields), "--config.checkpoint_seconds=0.05"]


def _product(workdir):
  """Returns the stages' best variables, and everything reported."""
  arrays = {}
  for marker in sorted(workdir.glob("*/finished.json")):
    step = json.loads(marker.read_text())["best_step"]
    variables = marker.parent / "checkpoints" / str(step) / "variables"
    with ocp.StandardCheckpointer() as checkpointer:
      restored = checkpointer.restore(variables)
    arrays[marker.parent.name, step] = jax.tree.map(np.asarray, restored)
  return arrays, measured(results(workdir))


def _curves(workdir):
  """Returns every stage's metrics.jsonl but for what is about time."""
  curves = {}
  for path in sorted(workdir.glob("*/metrics.jsonl")):
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
      record.pop("steps_per_second", None)
      record.pop("seconds")
    untimed = lambda name: not name.startswith(("speed/", "memory/"))
    curves[path.parent.name] = [
      {name: value for name, value in record.items() if untimed(name)}
      for record in records
    ]
  return curves


def _assert_same(workdir, undisturbed):
  arrays, rows = _product(workdir)
  expected_arrays, expected_rows = _product(undisturbed)
  assert len(arrays) == 4
  assert arrays.keys() == expected_arrays.keys()
  for name in arrays:
    np.testing.assert_equal(arrays[name], expected_arrays[name], err_msg=name)
  assert rows == expected_rows
  assert _curves(workdir) == _curves(undisturbed)


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory):
  """The workdir of a run that nothing disturbed, its best epochs not the last.

  On the author's processor that holds of all four stages; rounding may change it.
  """
  workdir = tmp_path_factory.mktemp("undisturbed")
  command(*_flags(workdir), check=0)
  early = 0
  for marker in workdir.glob("*/finished.json"):
    records = (marker.parent / "metrics.jsonl").read_text().splitlines()
    last = json.loads(records[-1])["step"]
    early += json.loads(marker.read_text())["best_step"] < last
  assert early >= 2
  return workdir


def test_killed_at_chosen_moments(undisturbed, command, tmp_path):
  for trap in _ENDS:
    result = command(*trap, *_flags(tmp_path), program=["tests/killer.py"])
    if trap[0] == "SIGKILL":
      assert result.returncode == -9, (trap, result.stderr)
    else:
      assert result.returncode == 143, (trap, result.stderr)
      last = result.stderr.strip().splitlines()[-1]
      assert "stopped by SIGTERM" in last
      assert "run the same command again" in last
      _assert_it_said_the_truth(last, tmp_path)
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.glob("*/results.json"))
  command(*_flags(tmp_path), check=0)
  _assert_same(tmp_path, undisturbed)


def _assert_it_said_the_truth(line, workdir):
  """That "everything is saved" at a step means that its checkpoint is there."""
  if "everything is saved" not in line or " at step " not in line:
    return
  name = line.split("] ")[1].split(" at step ")[0]
  step = line.split(" at step ")[1].split()[0]
  assert (workdir / name / "checkpoints" / step / "progress").is_dir(), line


def _killed_at_random(seed, kills, background, workdir):
  """Runs the command until it ends by itself; returns how often it was killed."""
  draws = random.Random(seed)
  killed = 0
  while True:
    process = background(*_flags(workdir))
    number = draws.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
    try:
      if killed == kills:
        _, stderr = process.communicate(timeout=300)
      else:
        _, stderr = process.communicate(timeout=draws.uniform(1.0, 11.0))
    except subprocess.TimeoutExpired:
      process.send_signal(number)
      _, stderr = process.communicate(timeout=300)
      assert "Traceback" not in stderr
      if process.returncode:
        killed += 1
        expected = -9 if number == signal.SIGKILL else 143
        assert process.returncode == expected, stderr
        _assert_it_said_the_truth(stderr.strip().rpartition("\n")[2], workdir)
        continue
    assert process.returncode == 0, stderr
    return killed


@pytest.mark.slow
def test_killed_at_random_moments(undisturbed, background, tmp_path):
  killed = 0
  for seed in range(1, 6):
    killed += _killed_at_random(seed, 4, background, tmp_path / str(seed))
    _assert_same(tmp_path / str(seed), undisturbed)
    if killed >= 3:
      return
  pytest.fail(f"only {killed} of 20 moments were in time")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_sixty_times(undisturbed, background, tmp_path):
  killed, seed = 0, 100
  while killed < 60:
    killed += _killed_at_random(seed, 8, background, tmp_path / str(seed))
    _assert_same(tmp_path / str(seed), undisturbed)
    seed += 1
