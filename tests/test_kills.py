"""Killed at any moment and run again, an experiment ends as if nothing had happened."""

import json

import jax
import numpy as np
import orbax.checkpoint as ocp
from conftest import TOY, overrides

# (signal, moment, which one of its kind), in the order of the experiment. Checkpoints
# are written every fraction of a second, so they fall inside epochs too.
_ENDS = [
  ("SIGKILL", "step", 4),
  ("SIGKILL", "write", 1),
  ("SIGKILL", "write", 3),
  ("SIGKILL", "finish", 1),
  ("SIGTERM", "step", 5),
  ("SIGKILL", "step", 9),
  ("SIGKILL", "finish", 2),
  ("SIGTERM", "evaluate", 3),
  ("SIGKILL", "evaluate", 6),
]


def _product(workdir):
  """Returns the stages' variables by path, and everything reported."""
  arrays = {}
  for marker in sorted(workdir.glob("*/finished.json")):
    step = json.loads(marker.read_text())["best_step"]
    variables = marker.parent / "checkpoints" / str(step) / "variables"
    with ocp.StandardCheckpointer() as checkpointer:
      restored = checkpointer.restore(variables)
    arrays[marker.parent.name] = jax.tree.map(np.asarray, restored)
  return arrays, json.loads((workdir / "results.json").read_text())


def _curves(workdir):
  """Returns every stage's metrics.jsonl but for what is about time."""
  curves = {}
  for path in sorted(workdir.glob("*/metrics.jsonl")):
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
      record.pop("steps_per_second", None)
    curves[path.parent.name] = records
  return curves


def test_killed_and_resumed_equals_uninterrupted(toy_run, command, tmp_path):
  flags = ["--config=configs/oracle.py:demo", f"--workdir={tmp_path}", *overrides(TOY)]
  flags.append("--config.checkpoint_seconds=0.05")
  for name, moment, count in _ENDS:
    trap = (name, moment, count)
    result = command(*trap, *flags, program=["tests/killer.py"])
    if name == "SIGKILL":
      assert result.returncode == -9, (trap, result.stderr)
    else:
      assert result.returncode == 143, (trap, result.stderr)
      last = result.stderr.strip().splitlines()[-1]
      assert "stopped by SIGTERM" in last
      assert "run the same command again" in last
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "results.json").exists()
  result = command(*flags, check=0)
  arrays, results = _product(tmp_path)
  expected_arrays, expected_results = _product(toy_run)
  assert len(arrays) == 4
  assert arrays.keys() == expected_arrays.keys()
  for name in arrays:
    np.testing.assert_equal(arrays[name], expected_arrays[name], err_msg=name)
  assert results == expected_results
  assert _curves(tmp_path) == _curves(toy_run)
