"""launch/run tpu-vm and tpu-slice, against a gcloud that knows what is documented."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, one_line
from launching import StandIns, launch, nothing_installed, printed

ZONE = "--zone=us-west4-a"
ARGUMENTS = ["--", "--config=configs/oracle.py:demo", "--workdir=gs://bucket/demo"]
LOOK = "compute tpus queued-resources describe"
JOB = "compute tpus tpu-vm ssh job"
SLICE = ["tpu-slice", ZONE, "--poll=0"]


@pytest.fixture
def standins(tmp_path):
  return StandIns(tmp_path)


def _commands(standins):
  """Returns the last words of the commands that were called."""
  return [call["command"].removeprefix("compute tpus ") for call in standins.calls()]


def test_a_vm_from_first_to_last(standins):
  env = standins.environment
  launch("tpu-vm", ZONE, "--type=v6e-8", "--spot", *ARGUMENTS, env=env)
  launch("tpu-vm", "status", "stop", "fetch", "delete", ZONE, *ARGUMENTS, env=env)
  assert _commands(standins) == [
    "tpu-vm create",
    "tpu-vm scp",
    "tpu-vm ssh",
    "tpu-vm ssh",
    "tpu-vm describe",
    "tpu-vm ssh",
    "storage rsync",
    "tpu-vm delete",
  ]
  create, _, setup, run, *_ = standins.calls()
  assert create["flags"] == {
    "accelerator-type": "v6e-8",
    "quiet": True,
    "spot": True,
    "version": "v2-alpha-tpuv6e",
    "zone": "us-west4-a",
  }
  assert setup["flags"]["command"].endswith("fidelity_jax/launch/setup.sh tpu")
  assert run["flags"]["worker"] == "all"
  assert run["flags"]["command"] == (
    "cd fidelity_jax && launch/job.sh fidelity_jax.main "
    "--config=configs/oracle.py:demo --workdir=gs://bucket/demo"
  )


def test_what_a_vm_has_on_its_disk_is_fetched_from_there(standins):
  words = ["tpu-vm", "fetch", ZONE, "--to=here", "--", "--workdir=runs/demo"]
  launch(*words, env=standins.environment)
  (call,) = standins.calls()
  assert call["command"] == "compute tpus tpu-vm scp"
  assert call["words"] == ["fidelity-jax:fidelity_jax/runs/demo", "here"]
  assert call["flags"]["worker"] == "0"


def test_a_slice_is_waited_for(standins):
  states = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
  standins.answer({LOOK: states})
  done = launch(*SLICE, "create", "--spot", "--project=p", env=standins.environment)
  assert "fidelity-jax: PROVISIONING" in done.stdout
  create, *looks = standins.calls()
  assert len(looks) == 3
  assert create["flags"] == {
    "accelerator-type": "v5litepod-16",
    "node-id": "fidelity-jax",
    "project": "p",
    "quiet": True,
    "runtime-version": "v2-alpha-tpuv5-lite",
    "spot": True,
    "zone": "us-west4-a",
  }


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_a_slice_that_will_not_come_is_not_waited_for(standins, state):
  standins.answer({LOOK: [state]})
  done = launch(*SLICE, "create", check=1, env=standins.environment)
  assert f"is {state}: delete it" in one_line(done.stderr)


def test_a_slice_of_which_nothing_is_known_is_not_waited_for(standins):
  standins.answer({LOOK: [1]})
  done = launch(*SLICE, "wait", check=1, env=standins.environment)
  assert "nothing is known of the queued resource" in one_line(done.stderr)


def test_a_preempted_slice_is_made_anew_and_the_job_goes_on(standins):
  standins.answer(
    {
      JOB: [255, 255, 0],
      LOOK: [
        "ACTIVE",  # create
        "ACTIVE",  # The state is late to say so.
        "SUSPENDING",
        "WAITING_FOR_RESOURCES",
        "ACTIVE",
        "SUSPENDED",
        "ACTIVE",
      ],
    }
  )
  done = launch(*SLICE, "--spot", *ARGUMENTS, env=standins.environment)
  again = ["create", "describe", "scp", "ssh", "ssh"]
  names = [name.split()[-1] for name in _commands(standins)]
  first = [*again, "describe", "describe", "delete"]
  second = ["create", "describe", *again[1:], "describe", "delete"]
  assert names == [*first, *second, *again]
  assert "20 restarts are left" in done.stdout
  jobs = [c for c in standins.calls() if "job.sh" in str(c["flags"].get("command"))]
  assert len(jobs) == 3
  assert jobs[0] == jobs[1] == jobs[2]
  (deleted, _) = [c for c in standins.calls() if c["command"].endswith("delete")]
  assert deleted["flags"]["force"] is True


def test_restarts_end(standins):
  standins.answer(
    {
      JOB: [255],
      LOOK: ["ACTIVE", "SUSPENDED", "ACTIVE"] + ["SUSPENDED"],
    }
  )
  words = [*SLICE, "--restarts=1", *ARGUMENTS]
  done = launch(*words, check=1, env=standins.environment)
  assert "was preempted" in one_line(done.stderr)


def test_a_job_that_fails_is_not_repeated(standins):
  standins.answer(
    {
      JOB: [2],
      LOOK: ["ACTIVE"],
    }
  )
  done = launch(*SLICE, "run", *ARGUMENTS, check=1, env=standins.environment)
  assert "the job ended with status 2" in one_line(done.stderr)
  assert not any("create" in name or "delete" in name for name in _commands(standins))


def test_a_stand_in_refuses_what_is_not_documented(standins):
  # So that the tests above can fail.
  words = [*SLICE, "create", "--create_flag=--accelerator=v6e"]
  done = launch(*words, check=1, env=standins.environment)
  assert "no such flag: --accelerator" in done.stderr
  assert "queued-resources create ... ended with status 1" in done.stderr


@pytest.mark.parametrize("name", ["tpu-vm", "tpu-slice"])
def test_a_dry_run_needs_neither_an_account_nor_tools(name):
  words = [name, "create", "setup", "run", "fetch", "status", "stop", "delete"]
  done = launch(*words, ZONE, "--dry_run", *ARGUMENTS, env=nothing_installed())
  commands = printed(done)
  assert len(commands) >= 9
  assert {shlex.split(command)[0] for command in commands} == {"gcloud", "tar"}


def test_without_gcloud_it_says_where_to_get_it():
  done = launch("tpu-vm", "create", ZONE, check=1, env=nothing_installed())
  assert "https://cloud.google.com/sdk/docs/install" in one_line(done.stderr)


@pytest.mark.parametrize(
  "words, said",
  [
    (["tpu-vm", "create"], "--zone"),
    (["tpu-vm", "create", ZONE, "--type=v9x-8"], "unknown kind of TPU 'v9x'"),
    (["tpu-vm", "create", ZONE, "--type=v6e"], "a type is KIND-SIZE"),
    ([*SLICE, "--", "--workdir=runs"], "share no disk"),
    ([*SLICE, "--", "--config=c"], "share no disk"),
    (["tpu-vm", ZONE, "--restarts=1", "--", "--workdir=runs"], "is lost"),
    ([*SLICE, "fetch", "--", "--workdir=runs"], "fetch needs"),
  ],
)
def test_what_is_wrong_costs_nothing(standins, words, said):
  done = launch(*words, check=2, env=standins.environment)
  assert said in one_line(done.stderr)
  assert not (standins.place / "calls.jsonl").exists()


@pytest.fixture
def host(tmp_path):
  """A host of a slice: launch/, and a .venv whose Python drops the words "-m NAME"."""
  host = tmp_path / "host"
  shutil.copytree(ROOT / "launch", host / "launch")
  python = host / ".venv" / "bin" / "python"
  python.parent.mkdir(parents=True)
  python.write_text(
    f'#!/bin/sh\nshift 2\nexec "{sys.executable}" "$@" --fidelity_jax.main\n'
  )
  python.chmod(0o755)
  return host


def test_a_job_whose_connection_broke_is_stopped_by_the_next(host):
  script = host / "job.py"
  script.write_text(
    "import os, signal, sys, time\n"
    "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True),"
    " os._exit(143)))\n"
    "print('begun', flush=True)\n"
    "time.sleep(float(sys.argv[1]))\n"
  )
  words = [str(host / "launch" / "job.sh"), "fidelity_jax.main", str(script)]
  first = subprocess.Popen([*words, "60"], stdout=subprocess.PIPE, text=True)
  assert first.stdout.readline() == "begun\n"
  assert int((host / "job.pid").read_text()) == first.pid
  second = subprocess.run([*words, "0"], capture_output=True, text=True, timeout=30)
  assert second.returncode == 0
  assert second.stdout == "begun\n"
  assert first.communicate(timeout=10)[0] == "saved\n"
  assert first.returncode == 143


def test_a_stale_number_of_a_process_stops_nobody(host):
  other = subprocess.Popen(["sleep", "30"])
  try:
    (host / "job.pid").write_text(str(other.pid))
    script = host / "job.py"
    script.write_text("print('begun')\n")
    words = [str(host / "launch" / "job.sh"), "fidelity_jax.main", str(script)]
    subprocess.run(words, check=True, capture_output=True, timeout=30)
    assert other.poll() is None
  finally:
    other.kill()
    other.wait()


def test_a_signal_to_the_launcher_stops_the_job(standins):
  gcloud = standins.place / "bin" / "gcloud"
  gcloud.write_text(
    f'#!/bin/sh\necho "$@" >>{standins.place}/calls\n'
    'case "$*" in *job.sh*) exec sleep 60 ;; esac\n'
  )
  process = subprocess.Popen(
    [sys.executable, str(ROOT / "launch" / "run"), *SLICE, "run", *ARGUMENTS],
    env=standins.environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  while not (standins.place / "calls").exists():
    assert process.poll() is None
    time.sleep(0.05)
  process.send_signal(signal.SIGTERM)
  _, stderr = process.communicate(timeout=20)
  assert process.returncode == 143
  assert "stopped by SIGTERM" in one_line(stderr)
  assert "kill -TERM" in (standins.place / "calls").read_text().splitlines()[-1]


def test_setup_refuses_what_is_no_variant(host):
  done = subprocess.run(
    [str(host / "launch" / "setup.sh"), "gpu"], capture_output=True, text=True
  )
  assert done.returncode == 2
  assert "cpu, cuda or tpu" in done.stderr


@pytest.mark.slow
def test_setup_in_a_fresh_environment(tmp_path):
  """What setup sends, unpacked elsewhere, is installed there and runs."""
  from launch import tpu

  archive, place = tmp_path / "sent.tar.gz", tmp_path / "host"
  words = ["tar", "--exclude=__pycache__", "-C", str(ROOT), "-czf", str(archive)]
  subprocess.run([*words, *tpu._FILES], check=True)
  place.mkdir()
  subprocess.run(["tar", "-xzf", str(archive), "-C", str(place)], check=True)
  environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
  done = subprocess.run(
    [str(place / "launch" / "setup.sh"), "cpu"],
    env=environment | {"PYTHON": sys.executable},
    capture_output=True,
    text=True,
    timeout=800,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  assert done.stdout.splitlines()[-1] == "fidelity_jax is set up"
  words = ["fidelity_jax.main", "--config=configs/oracle.py:demo", "--dry_run"]
  done = subprocess.run(
    [str(place / "launch" / "job.sh"), *words, f"--workdir={tmp_path / 'runs'}"],
    env=environment,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
