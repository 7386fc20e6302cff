"""What training steps hold and send, told before anything runs."""

import math
import re

import pytest
from conftest import TOY, TOY_ESTIMATOR, overrides

PLAN = ("--dry_run", "--memory")
EIGHT = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}


def _table(stdout: str) -> dict[str, dict[str, float]]:
  """Returns the rows of the table by kind of stage."""
  _, found, table = stdout.partition("Training steps: MiB per device")
  assert found
  head, *rows = (
    re.split(r"\s{2,}", line) for line in table.split("\n\n")[1].split("\n")
  )
  named = [dict(zip(head, row, strict=True)) for row in rows if row != [""]]
  return {
    row.pop("stage").partition("-")[0]: {k: float(v) for k, v in row.items()}
    for row in named
  }


@pytest.mark.slow
def test_a_plan_says_what_steps_need_on_each_device(command, tmp_path):
  # Large enough for a tenth of a MiB to be seen.
  fields = TOY | {"parents.classifier.model.width": 64, "batch_size": 16}
  arguments = [
    "--config=configs/oracle.py:scratch",
    f"--workdir={tmp_path / 'w'}",
    *PLAN,
  ]
  arguments += overrides(fields)
  one = _table(command(*arguments, check=0).stdout)
  eight = _table(command(*arguments, env=EIGHT, check=0).stdout)
  assert not (tmp_path / "w").exists()
  assert (
    list(one) == list(eight) == ["classifier", "restorer", "calibration", "ensemble"]
  )
  for kind, alone in one.items():
    shared = eight[kind]
    assert (alone["devices"], shared["devices"]) == (1, 8)
    assert alone["exchanged"] == alone["operations"] == 0 < shared["operations"]
    for same in ("parameters", "optimizer", "frozen"):
      assert alone[same] == shared[same]
    parts = ("parameters", "optimizer", "frozen", "batch", "activations")
    assert math.isclose(sum(alone[p] for p in parts), alone["in all"], abs_tol=0.3)
  trained = one["classifier"]
  # Momentum is of every parameter; gradients of all are reduced.
  assert trained["optimizer"] == pytest.approx(trained["parameters"], rel=0.05)
  reduced = eight["classifier"]["exchanged"]
  assert reduced == pytest.approx(trained["parameters"], rel=0.05) and reduced > 0.3
  assert one["calibration"]["frozen"] == pytest.approx(trained["parameters"], rel=0.2)
  # An eighth of the images.
  assert eight["classifier"]["activations"] < one["classifier"]["activations"]


def test_a_finished_experiment_needs_nothing(toy_run, command):
  arguments = ["--config=configs/oracle.py:scratch", f"--workdir={toy_run}", *PLAN]
  result = command(*arguments, *overrides(TOY), check=0)
  assert "Nothing is left to train." in result.stdout


@pytest.mark.slow
def test_estimated_maps_are_planned_too(command, tmp_path):
  fields = overrides(TOY | TOY_ESTIMATOR)
  arguments = ["--config=configs/end_to_end.py:scratch", f"--workdir={tmp_path}", *PLAN]
  stages = _table(command(*arguments, *fields, check=0).stdout)
  assert {"estimator", "calibration"} < set(stages)


def test_memory_without_a_dry_run_is_refused(refused, tmp_path):
  arguments = [
    "--config=configs/oracle.py:scratch",
    f"--workdir={tmp_path}",
    "--memory",
  ]
  refused(arguments, 2, "add --dry_run")
