"""launch/run local: real processes, their signals, ends and output."""

import argparse
import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, one_line
from launching import PLACE, launch, nothing_installed, printed, refusal

sys.path.insert(0, str(ROOT))
from launch import local

ENVIRONMENT = os.environ | {"PYTHONPATH": f"{PLACE}:{ROOT}"}
WORDS = ["local", "--module=worker", f"--python={sys.executable}"]


@contextlib.contextmanager
def _running(*words):
  """Starts launch/run; yields it and the workers' process ids once all have said it."""
  count = int(words[0].rpartition("=")[2])
  process = subprocess.Popen(
    [sys.executable, str(ROOT / "launch" / "run"), *WORDS, *words],
    env=ENVIRONMENT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  try:
    found = {}
    while len(found) < count:
      line = process.stdout.readline()
      assert line, process.stderr.read()
      if match := re.match(r"(?:\[(\d+)\] )?cores=\d+ pid=(\d+)", line):
        found[int(match[1] or 0)] = int(match[2])
    yield process, [found[i] for i in range(count)]
  finally:
    process.kill()
    process.communicate()


def _gone(pid: int, seconds: float = 10) -> bool:
  until = time.monotonic() + seconds
  while time.monotonic() < until:
    status = pathlib.Path(f"/proc/{pid}/status")
    try:
      if "State:\tZ" in status.read_text():
        return True
    except OSError:
      return True
    time.sleep(0.05)
  return False


def test_each_process_is_told_who_it_is():
  done = launch(*WORDS, "--processes=3", "--devices=2", "--", "end", env=ENVIRONMENT)
  ports = set()
  for index in range(3):
    lines = [
      line.removeprefix(f"[{index}] ")
      for line in done.stdout.splitlines()
      if line.startswith(f"[{index}] ")
    ]
    given = dict(line.split("=", 1) for line in lines)
    assert given["JAX_PROCESS_ID"] == str(index)
    assert given["JAX_NUM_PROCESSES"] == "3"
    assert given["JAX_PLATFORMS"] == "cpu"
    assert given["XLA_FLAGS"].endswith("--xla_force_host_platform_device_count=2")
    ports.add(given["JAX_COORDINATOR_ADDRESS"])
    # The end of a line that never came is shown, too.
    assert f"[{index}] not a whole line" in done.stderr.splitlines()
  (address,) = ports
  assert re.fullmatch(r"127\.0\.0\.1:\d+", address)
  assert len(printed(done)) == 3
  assert all("worker end" in command for command in printed(done))


def test_one_process_has_no_prefix_and_its_own_gpus_are_named():
  done = launch(*WORDS, "--processes=1", "--gpus=4", "--", "end", env=ENVIRONMENT)
  assert "CUDA_VISIBLE_DEVICES=0,1,2,3" in done.stdout.splitlines()
  done = launch(*WORDS, "--processes=2", "--gpus=2", "--", "end", env=ENVIRONMENT)
  assert "[1] CUDA_VISIBLE_DEVICES=2,3" in done.stdout.splitlines()


def test_gpus_are_dealt_out_from_those_that_are_allowed():
  allowed = ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": "4, 6,GPU-7"}
  words = [*WORDS, "--processes=2", "--gpus=1", "--", "end"]
  done = launch(*words, env=allowed)
  assert "[0] CUDA_VISIBLE_DEVICES=4" in done.stdout.splitlines()
  assert "[1] CUDA_VISIBLE_DEVICES=6" in done.stdout.splitlines()
  words[-3] = "--gpus=2"
  done = launch(*words, check=2, env=allowed)
  said = "are 4 GPUs, but CUDA_VISIBLE_DEVICES=4, 6,GPU-7 lists 3"
  assert said in one_line(done.stderr)


@pytest.mark.parametrize(
  "processes, devices, cores, expected",
  [
    (2, 2, [0, 1, 2, 3], [[0, 1], [2, 3]]),
    (2, 1, [0, 3], [[0], [3]]),
    (2, 2, [0, 1], [None, None]),
    (2, None, [0, 1, 2, 3], [None, None]),
  ],
)
def test_cores_are_shared_out(processes, devices, cores, expected):
  options = argparse.Namespace(processes=processes, devices=devices)
  assert local.shares(options, cores) == expected


@pytest.mark.parametrize(
  "what, status, said",
  [
    ("fail=7", 7, "process 1 ended with status 7."),
    ("killed", 137, "process 1 was killed by SIGKILL."),
  ],
)
def test_one_that_fails_ends_the_others(what, status, said):
  words = [*WORDS, "--processes=3", "--", "wait", what, "wait"]
  begin = time.monotonic()
  done = launch(*words, check=status, env=ENVIRONMENT)
  assert time.monotonic() - begin < 20
  lines = [line for line in done.stderr.splitlines() if line.startswith("fidelity_jax")]
  assert lines[0] == f"fidelity_jax: {said}"
  assert "30 s" in lines[1]
  # The others were asked, not killed.
  assert done.stdout.count("saved") == 2


def test_one_that_does_not_listen_is_killed_in_time():
  words = [*WORDS, "--processes=2", "--grace=1", "--", "deaf", "fail=3"]
  begin = time.monotonic()
  done = launch(*words, check=3, env=ENVIRONMENT)
  assert time.monotonic() - begin < 20
  assert "killing process 0." in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_all(number):
  with _running("--processes=3", "--", "wait") as (process, pids):
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=20)
  # The stand-in listens to SIGTERM; SIGINT ends it as it ends any Python program.
  asked = number == signal.SIGTERM
  assert process.returncode == (143 if asked else 130), stderr
  # Once each: a second signal would have ended one that saves.
  assert stdout.count("saved") == (3 if asked else 0)
  assert all(map(_gone, pids))


def test_who_still_saves_after_a_signal_is_not_killed():
  with _running("--processes=2", "--grace=1", "--", "wait", "slow") as (process, _):
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=20)
  assert process.returncode == 143, stderr
  assert stdout.count("saved") == 2
  assert "killing" not in stderr


def test_none_outlives_a_launcher_that_is_killed():
  with _running("--processes=2", "--", "wait") as (process, pids):
    process.kill()
    assert all(map(_gone, pids))


def test_a_dry_run_starts_nothing_and_needs_nothing():
  words = ["local", "--dry_run", "--processes=2", "--", "--config=c", "--workdir=a b"]
  done = launch(*words, env=nothing_installed())
  assert [line.split()[2] for line in printed(done)] == [
    "JAX_PROCESS_ID=0",
    "JAX_PROCESS_ID=1",
  ]
  assert printed(done)[0].endswith("-m fidelity_jax.main --config=c '--workdir=a b'")


@pytest.mark.parametrize(
  "words, said",
  [
    (["nowhere"], "unknown launcher 'nowhere'"),
    (["--dry_run", "local"], "--dry_run comes after the launcher"),
    (["locl"], "did you mean 'local'?"),
    (["local"], "no arguments of main"),
    (["local", "walk", "--", "x"], "unknown step 'walk'"),
    (["local", "--processes=0", "--", "x"], "'0' is no whole number above 0"),
    (["local", "--process=2", "--", "x"], "unrecognized arguments: --process=2"),
    (["local", "--devices=2", "--gpus=2", "--", "x"], "not allowed with"),
  ],
)
def test_what_is_wrong_is_said_in_one_line(words, said):
  assert said in refusal(*words)


def test_a_program_that_is_not_there_is_named():
  done = launch("local", "--python=/nowhere/python", "--", "x", check=1)
  assert "/nowhere/python cannot be started: No such file" in one_line(done.stderr)


def test_help_names_all_launchers_and_is_executable():
  done = launch("--help", program=[str(ROOT / "launch" / "run")])
  for name in ("local", "tpu-vm", "tpu-slice", "gke", "slurm"):
    assert f"\n{name}" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("processes, devices", [(2, 1), (2, 2), (4, 1)])
def test_jax_joins_them(processes, devices):
  words = ["local", "--module=joined", f"--python={sys.executable}"]
  words += [f"--processes={processes}", f"--devices={devices}", "--", "-"]
  done = launch(*words, env=ENVIRONMENT)
  total = processes * (processes - 1) // 2
  for index in range(processes):
    assert (
      f"[{index}] process={index}/{processes} devices={processes * devices} sum={total}"
      in done.stdout
    )
