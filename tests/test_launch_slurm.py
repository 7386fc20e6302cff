"""launch/run slurm: its batch script, under a srun that starts real processes here."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, one_line
from launching import StandIns, launch, nothing_installed, printed

SLURM = ["slurm", f"--python={sys.executable}", "--module=worker"]


@pytest.fixture
def standins(tmp_path):
  return StandIns(tmp_path)


def test_every_gpu_gets_a_process_that_knows_its_place(standins):
  words = [*SLURM, "--nodes=2", "--gpus_per_node=2", "--partition=gpu", "--", "end"]
  done = launch(*words, env=standins.environment)
  lines = done.stdout.splitlines()
  assert sorted(line for line in lines if "PROCID" in line) == [
    f"SLURM_PROCID={i}" for i in range(4)
  ]
  assert lines.count("SLURM_LOCALID=0") == lines.count("SLURM_LOCALID=1") == 2
  assert lines.count("SLURM_NTASKS=4") == 4
  assert lines.count("SLURM_GPUS_PER_NODE=2") == 4
  # JAX's own detection has all that it asks for.
  for name in ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_NODES"):
    assert sum(line.startswith(f"{name}=") for line in lines) == 4
  # Unless they are asked for, nothing is said of cores.
  assert "CPUS_PER_TASK" not in done.stdout
  assert not (standins.place / "calls.jsonl").exists()


def test_without_gpus_a_node_has_one_process(standins):
  words = [*SLURM, "--nodes=3", "--gpus_per_node=0", "--", "end"]
  done = launch(*words, env=standins.environment)
  assert done.stdout.splitlines().count("SLURM_LOCALID=0") == 3
  assert "--gpus-per-node" not in done.stdout


def test_every_process_gets_its_cores(standins):
  words = [*SLURM, "--nodes=1", "--gpus_per_node=2", "--cpus_per_task=6", "--", "end"]
  done = launch(*words, env=standins.environment)
  assert done.stdout.splitlines().count("SRUN_CPUS_PER_TASK=6") == 2


def test_a_job_that_failed_is_not_put_back(standins):
  words = [*SLURM, "--nodes=2", "--gpus_per_node=1", "--", "end", "fail=7"]
  done = launch(*words, check=1, env=standins.environment)
  assert not (standins.place / "calls.jsonl").exists()
  assert "sbatch" in one_line(done.stderr.replace("not a whole line", "\n"))


@pytest.mark.parametrize(
  "requeues, restarts, again",
  [("2", "1", True), ("2", "2", False), (None, "19", True)],
)
def test_a_job_that_was_told_to_stop_is_put_back(standins, requeues, restarts, again):
  settings = {"SLURM_RESTART_COUNT": restarts, "SLURM_JOB_ID": "4321"}
  process = subprocess.Popen(
    ["bash", str(ROOT / "launch" / "slurm.sbatch"), "wait", "slow"],
    env=standins.environment
    | settings
    | {
      "FIDELITY_JAX_MODULE": "worker",
      "FIDELITY_JAX_PYTHON": sys.executable,
      **({"FIDELITY_JAX_REQUEUES": requeues} if requeues else {}),
      "SLURM_NODES": "1",
      "SLURM_NTASKS_PER_NODE": "2",
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )
  try:
    ready = 0
    while ready < 2:
      line = process.stdout.readline()
      assert line, process.stderr.read()
      ready += "pid=" in line
    # As SLURM does before the time is up: to the step, not to the script.
    children = _children(process.pid)
    assert len(children) == 1
    os.kill(children[0], signal.SIGTERM)
    stdout, _ = process.communicate(timeout=20)
  finally:
    os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
  assert process.returncode == 143
  # Also by the one that was still at it when the other had ended.
  assert stdout.count("saved") == 2
  path = standins.place / "calls.jsonl"
  assert path.exists() == again
  if again:
    assert standins.calls() == [{"slurm": ["requeue", "4321"]}]


def _children(pid: int) -> list[int]:
  with open(f"/proc/{pid}/task/{pid}/children") as file:
    return list(map(int, file.read().split()))


def test_a_container_takes_the_place_of_the_environment(standins):
  program = standins.place / "bin" / "apptainer"
  program.write_text('#!/bin/sh\necho "apptainer $@"\n')
  program.chmod(0o755)
  words = [
    "slurm",
    "--nodes=1",
    "--gpus_per_node=1",
    "--image=host/name:tag",
    "--",
    "x",
  ]
  done = launch(*words, env=standins.environment)
  line = "apptainer exec --nv docker://host/name:tag python -m fidelity_jax.main x"
  assert line in done.stdout.splitlines()


def test_status_and_stop(standins):
  launch("slurm", "status", env=standins.environment)
  launch("slurm", "stop", "--job=12", env=standins.environment)
  assert standins.calls() == [{"slurm": ["--name=fidelity-jax"]}, {"slurm": ["12"]}]
  done = launch("slurm", "stop", check=2, env=standins.environment)
  assert "stop needs --job=NUMBER" in one_line(done.stderr)
  done = launch("slurm", "--time=long", "--", "x", check=2, env=standins.environment)
  assert "write 24:00:00" in one_line(done.stderr)


def test_a_dry_run_needs_no_cluster():
  done = launch("slurm", "--dry_run", "--", "--config=c", env=nothing_installed())
  (command,) = printed(done)
  assert "sbatch --job-name=fidelity-jax --nodes=2 --ntasks-per-node=8" in command
  assert command.endswith("launch/slurm.sbatch --config=c")


@pytest.mark.slow
def test_jax_joins_the_processes_by_itself(standins):
  words = ["slurm", f"--python={sys.executable}", "--module=joined"]
  words += ["--nodes=2", "--gpus_per_node=1", "--", "-"]
  env = standins.environment | {"JAX_PLATFORMS": "cpu"}
  done = launch(*words, env=env)
  for index in range(2):
    assert f"process={index}/2 devices=2 sum=1" in done.stdout
