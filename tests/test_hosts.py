"""Several processes that work as one, over loopback."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import TOY, overrides, results

from fidelity_jax import errors, hosts

_NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


@pytest.mark.parametrize(
  ("values", "said"),
  [
    (("localhost:1", "2", None), "JAX_PROCESS_ID must be set"),
    ((None, "2", "0"), "JAX_COORDINATOR_ADDRESS must be set"),
    (("localhost", "2", "0"), "not HOST:PORT"),
    (("localhost:1", "two", "0"), "'two' is no whole number"),
    (("localhost:1", "2", "2"), "must be below JAX_NUM_PROCESSES=2"),
  ],
)
def test_what_names_processes_wrongly_is_refused(monkeypatch, values, said):
  for name, value in zip(_NAMES, values, strict=True):
    monkeypatch.delenv(name, raising=False)
    if value is not None:
      monkeypatch.setenv(name, value)
  with pytest.raises(errors.UsageError, match=said):
    hosts.join()


def test_patience_is_a_time(monkeypatch):
  for name, value in zip(_NAMES, ("localhost:1", "2", "0"), strict=True):
    monkeypatch.setenv(name, value)
  monkeypatch.setenv("FIDELITY_JAX_PATIENCE", "soon")
  with pytest.raises(errors.UsageError, match="'soon' is no number of seconds"):
    hosts.join()


def test_one_process_agrees_with_itself(monkeypatch):
  for name in (*_NAMES, "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
    monkeypatch.delenv(name, raising=False)
  hosts.join()
  assert not hosts.several() and hosts.first()
  assert hosts.agree({"a": [1, None]}) == {"a": [1, None]}
  hosts.wait("here")


class _Job:
  """Processes that train the toy together."""

  def __init__(self, count: int, workdir: pathlib.Path, patience: float = 60.0):
    with socket.socket() as listening:
      listening.bind(("127.0.0.1", 0))
      port = listening.getsockname()[1]
    self.logs = [workdir.with_name(f"{workdir.name}-{i}.txt") for i in range(count)]
    self.processes = []
    for i, log in enumerate(self.logs):
      own = (f"127.0.0.1:{port}", str(count), str(i))
      variables = dict(zip(_NAMES, own, strict=True)) if count > 1 else {}
      variables |= {"FIDELITY_JAX_PATIENCE": str(patience), "JAX_PLATFORMS": "cpu"}
      words = [sys.executable, "-m", "fidelity_jax.main", f"--workdir={workdir}"]
      words += ["--config=configs/oracle.py:demo", *overrides(TOY)]
      with open(log, "wb") as file:
        process = subprocess.Popen(
          words, stdout=file, stderr=file, env=os.environ | variables
        )
      self.processes.append(process)

  def wait(self, seconds: float) -> list[int]:
    """Returns the exit statuses; fails if it takes longer."""
    until = time.monotonic() + seconds
    try:
      return [p.wait(max(until - time.monotonic(), 0)) for p in self.processes]
    finally:
      for process in self.processes:
        process.kill()

  def said(self) -> list[str]:
    """Returns what each said."""
    return [log.read_text() for log in self.logs]


def _until(condition, seconds: float = 240.0) -> None:
  until = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < until, "it did not begin"
    time.sleep(0.05)


def _begun(workdir: pathlib.Path, kind: str):
  """Returns whether a stage has a checkpoint, or soon will."""
  return lambda: bool(list(workdir.glob(f"{kind}-*/metrics.jsonl")))


def _check_same(workdir: pathlib.Path, expected: pathlib.Path) -> None:
  """Checks losses and results, to what the order of sums changes."""
  paths = sorted(expected.glob("*/metrics.jsonl"))
  assert len(paths) == 4
  for path in paths:
    other = workdir / path.relative_to(expected)
    for name in ("train/loss", "validation/loss"):
      values = [
        [json.loads(line)[name] for line in p.read_text().splitlines()]
        for p in (path, other)
      ]
      np.testing.assert_allclose(*values, rtol=1e-5)
  ours, theirs = (
    json.loads(results(w).read_text())["rows"] for w in (workdir, expected)
  )
  assert [r["accuracy"] for r in ours] == [r["accuracy"] for r in theirs]


@pytest.mark.slow
def test_two_processes_do_what_one_does(toy_run, tmp_path):
  workdir = tmp_path / "two"
  job = _Job(2, workdir)
  assert job.wait(550) == [0, 0], job.said()
  first, second = job.said()
  _check_same(workdir, toy_run)
  # One of them speaks, and writes.
  assert "report.html" in first and "steps/s" in first
  assert "fidelity_jax" not in second and "steps" not in second
  assert (next(workdir.glob("oracle-*")) / "report.html").exists()


@pytest.mark.slow
def test_a_signal_at_any_stops_all_and_one_goes_on(toy_run, tmp_path):
  workdir = tmp_path / "stopped"
  job = _Job(2, workdir)
  _until(_begun(workdir, "restorer"))
  time.sleep(1)
  job.processes[1].send_signal(signal.SIGTERM)
  assert job.wait(120) == [143, 143], job.said()
  first, second = job.said()
  assert "stopped by SIGTERM" in first and "everything is saved" in first
  assert "stopped" not in second
  # As one process, in mid-stage.
  alone = _Job(1, workdir)
  assert alone.wait(300) == [0], alone.said()
  _check_same(workdir, toy_run)


@pytest.mark.slow
def test_a_process_that_vanishes_ends_all(toy_run, tmp_path):
  workdir = tmp_path / "killed"
  job = _Job(2, workdir, patience=5)
  _until(_begun(workdir, "restorer"))
  time.sleep(1)
  job.processes[1].kill()
  assert job.wait(60) == [1, -signal.SIGKILL], job.said()
  (line,) = [x for x in job.said()[0].splitlines() if x.startswith("fidelity_jax: ")]
  assert "process 1 has given no sign of life" in line
  again = _Job(2, workdir)
  assert again.wait(550) == [0, 0], again.said()
  _check_same(workdir, toy_run)


@pytest.mark.slow
def test_a_coordinator_that_vanishes_ends_all(tmp_path):
  workdir = tmp_path / "killed"
  job = _Job(2, workdir, patience=5)
  _until(_begun(workdir, "classifier"))
  job.processes[0].kill()
  assert job.wait(60) == [-signal.SIGKILL, 1], job.said()
  (line,) = [x for x in job.said()[1].splitlines() if x.startswith("fidelity_jax: ")]
  assert "process 0, which coordinates all, cannot be reached" in line


@pytest.mark.slow
def test_a_failure_of_one_is_told_by_all(tmp_path):
  workdir = tmp_path / "failed"
  job = _Job(2, workdir)
  _until(_begun(workdir, "classifier"))
  # The first finds it missing when it marks the stage finished; the other waits then.
  next(workdir.glob("classifier-*/config.json")).unlink()
  assert job.wait(200) == [1, 1], job.said()
  first, second = (
    [x for x in text.splitlines() if x.startswith("fidelity_jax: ")]
    for text in job.said()
  )
  assert len(first) == len(second) == 1
  assert "config.json is missing" in first[0] and "process" not in first[0]
  assert second[0].startswith("fidelity_jax: process 0 failed: ")
  assert "config.json is missing" in second[0]
