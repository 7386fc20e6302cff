"""launch/run tpu-vm and tpu-slice, against a gcloud that knows what is documented."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, one_line
from launching import StandIns, launch, nothing_installed, printed, refusal

ZONE = "--zone=us-west4-a"
ARGUMENTS = ["--", "--config=configs/oracle.py:demo", "--workdir=gs://bucket/demo"]
LOOK = "compute tpus queued-resources describe"
JOB = "compute tpus tpu-vm ssh job"
SLICE = ["tpu-slice", ZONE, "--poll=0"]
DELETE = (
  "What was made stays and costs until: launch/run tpu-vm delete --name=fidelity-jax "
  "--zone=us-west4-a\n"
)


def _found(*states, spot=True, kind="v5litepod-32"):
  """Returns what gcloud describes of queued resources in these states."""
  node = {"acceleratorType": kind, "runtimeVersion": "v2-alpha-tpuv5-lite"}
  return [
    json.dumps(
      {"state": {"state": state}, "tpu": {"nodeSpec": [{"node": node}]}}
      | ({"spot": {}} if spot else {})
    )
    for state in states
  ]


@pytest.fixture
def standins(tmp_path):
  return StandIns(tmp_path)


def _commands(standins):
  """Returns the last words of the commands that were called."""
  return [call["command"].removeprefix("compute tpus ") for call in standins.calls()]


def test_a_vm_from_first_to_last(standins):
  env = standins.environment
  standins.answer({"compute tpus tpu-vm describe": ['{"state": "READY"}']})
  done = launch("tpu-vm", ZONE, "--type=v6e-8", "--spot", *ARGUMENTS, env=env)
  words = ["tpu-vm", "status", "stop", "fetch", "delete", ZONE, "--to=here"]
  last = launch(*words, *ARGUMENTS, env=env, cwd=standins.place)
  assert "READY" in last.stdout.splitlines()
  assert "costs until" not in last.stdout
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
  assert DELETE in done.stdout
  create, _, setup, run, *_ = standins.calls()
  assert create["flags"] == {
    "accelerator-type": "v6e-8",
    "quiet": True,
    "spot": True,
    "version": "v2-alpha-tpuv6e",
    "zone": "us-west4-a",
  }
  setup = setup["flags"]["command"]
  assert setup.endswith("fidelity_jax/launch/setup.sh tpu")
  # Modules that are gone here are gone there.
  assert setup.index("rm -rf fidelity_jax/configs fidelity_jax/fidelity_jax ") < (
    setup.index("tar -xzf")
  )
  assert run["flags"]["worker"] == "all"
  assert run["flags"]["command"] == (
    "cd fidelity_jax && launch/job.sh run fidelity_jax.main "
    "--config=configs/oracle.py:demo --workdir=gs://bucket/demo"
  )


def test_what_a_vm_has_on_its_disk_is_fetched_from_there(standins):
  words = ["tpu-vm", "fetch", ZONE, "--to=here", "--", "--workdir=runs/demo"]
  launch(*words, env=standins.environment, cwd=standins.place)
  # So that scp, too, writes here/demo.
  assert (standins.place / "here").is_dir()
  (call,) = standins.calls()
  assert call["command"] == "compute tpus tpu-vm scp"
  assert call["words"] == ["fidelity-jax:fidelity_jax/runs/demo", "here"]
  assert call["flags"]["worker"] == "0"


def test_a_workdir_in_a_bucket_is_fetched_under_its_name(standins):
  words = ["tpu-vm", "fetch", ZONE, "--to=here", *ARGUMENTS]
  launch(*words, env=standins.environment, cwd=standins.place)
  (call,) = standins.calls()
  assert call["words"] == ["gs://bucket/demo", "here/demo"]
  assert (standins.place / "here" / "demo").is_dir()


def test_a_slice_is_waited_for(standins):
  states = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
  standins.answer({LOOK: _found(*states)})
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
  standins.answer({LOOK: _found(state)})
  done = launch(*SLICE, "create", check=1, env=standins.environment)
  assert f"is {state}: delete it" in one_line(done.stderr)


def test_a_slice_of_which_nothing_is_known_is_not_waited_for(standins):
  standins.answer({LOOK: [1]})
  done = launch(*SLICE, "wait", check=1, env=standins.environment)
  assert "nothing is known of the queued resource" in one_line(done.stderr)


def test_what_failed_is_not_taken_for_nothing(standins):
  standins.answer({LOOK: [1]})
  done = launch(*SLICE, "status", check=1, env=standins.environment)
  assert "the state of fidelity-jax is not known" in one_line(done.stderr)


def test_a_preempted_slice_is_made_anew_and_the_job_goes_on(standins):
  standins.answer(
    {
      JOB: [255, 1, 0],
      LOOK: _found(
        "ACTIVE",  # create
        "ACTIVE",  # The state is late to say so.
        "SUSPENDING",
        "SUSPENDED",
        "WAITING_FOR_RESOURCES",
        "ACTIVE",
        "SUSPENDED",
        "ACTIVE",
      ),
    }
  )
  words = [*SLICE, "--spot", "--type=v5litepod-32", *ARGUMENTS]
  done = launch(*words, env=standins.environment)
  again = ["create", "describe", "scp", "ssh", "ssh"]
  names = [name.split()[-1] for name in _commands(standins)]
  # What is still being suspended cannot be deleted.
  first = [*again, "describe", "describe", "describe", "delete"]
  second = ["create", "describe", *again[1:], "describe", "delete"]
  assert names == [*first, *second, *again]
  assert "20 restarts are left" in done.stdout
  jobs = [c for c in standins.calls() if "job.sh" in str(c["flags"].get("command"))]
  assert len(jobs) == 3
  assert jobs[0] == jobs[1] == jobs[2]
  (deleted, _) = [c for c in standins.calls() if c["command"].endswith("delete")]
  assert deleted["flags"]["force"] is True


def test_another_slice_is_like_the_one_that_was_preempted(standins):
  standins.answer({JOB: [255, 0], LOOK: _found("SUSPENDED", "ACTIVE")})
  launch(*SLICE, "run", *ARGUMENTS, env=standins.environment)
  (create,) = [c for c in standins.calls() if c["command"].endswith("create")]
  assert create["flags"]["accelerator-type"] == "v5litepod-32"
  assert create["flags"]["spot"] is True


def test_another_vm_is_like_the_one_that_was_preempted(standins):
  found = {
    "state": "PREEMPTED",
    "acceleratorType": "v6e-4",
    "runtimeVersion": "v2-alpha-tpuv6e",
    "schedulingConfig": {"spot": True},
  }
  look = "compute tpus tpu-vm describe"
  standins.answer({JOB: [255, 0], look: [json.dumps(found)]})
  words = ["tpu-vm", "run", ZONE, "--poll=0", "--restarts=1", *ARGUMENTS]
  launch(*words, env=standins.environment)
  (create,) = [c for c in standins.calls() if c["command"].endswith("create")]
  assert create["flags"]["accelerator-type"] == "v6e-4"
  assert create["flags"]["version"] == "v2-alpha-tpuv6e"
  assert create["flags"]["spot"] is True


def test_set_up_is_tried_again(standins):
  copy = "compute tpus tpu-vm scp"
  standins.answer({copy: [1, 1, 0]})
  words = ["tpu-vm", ZONE, "--poll=0", *ARGUMENTS]
  done = launch(*words, env=standins.environment)
  assert done.stdout.count("set-up failed") == 2
  standins.answer({copy: [1]})
  done = launch(*words, check=1, env=standins.environment)
  assert "tpu-vm scp" in one_line(done.stderr)
  assert done.stdout.endswith(DELETE)


def test_a_slice_preempted_during_set_up_is_made_anew(standins):
  standins.answer(
    {
      JOB: [255, 0],
      "compute tpus tpu-vm scp": [1, 1, 1, 0, 1, 1, 1, 0],
      LOOK: _found(
        "ACTIVE",
        # At the first set-up, after it, at the second: three times.
        *["SUSPENDED", "ACTIVE"] * 3,
      ),
    }
  )
  done = launch(*SLICE, *ARGUMENTS, env=standins.environment)
  assert "18 restarts are left" in done.stdout
  names = [name.split()[-1] for name in _commands(standins)]
  assert names.count("create") == names.count("delete") + 1 == 4
  assert names[:6] == ["create", "describe", "scp", "scp", "scp", "describe"]


def test_restarts_end(standins):
  standins.answer({JOB: [255], LOOK: _found("ACTIVE", "SUSPENDED", "ACTIVE", "FAILED")})
  words = [*SLICE, "--restarts=1", *ARGUMENTS]
  done = launch(*words, check=1, env=standins.environment)
  assert "was preempted" in one_line(done.stderr)


@pytest.mark.parametrize("status", [2, 3])
def test_a_job_that_fails_is_not_repeated(standins, status):
  standins.answer({JOB: [status], LOOK: _found("ACTIVE")})
  done = launch(*SLICE, "run", *ARGUMENTS, check=status, env=standins.environment)
  assert f"the job ended with status {status}" in one_line(done.stderr)
  assert _commands(standins) == ["tpu-vm ssh"]


def test_a_connection_that_broke_is_not_the_end(standins):
  standins.answer({JOB: [255], LOOK: _found("ACTIVE")})
  done = launch(*SLICE, "run", *ARGUMENTS, check=1, env=standins.environment)
  assert "the connection broke: the step run goes on" in one_line(done.stderr)
  assert "costs until: launch/run tpu-slice delete" in done.stdout


def test_stop_says_if_it_stopped_nothing(standins):
  standins.answer({JOB: [1]})
  done = launch(*SLICE, "stop", "delete", check=1, env=standins.environment)
  assert "ended with status 1" in one_line(done.stderr)
  assert len(standins.calls()) == 1
  assert "costs until" in done.stdout


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
    (["tpu-vm", "create", "--zone=us-west4"], "'us-west4' is no zone"),
    (["tpu-vm", "create", ZONE, "--type=v5litepod-16"], "has several hosts"),
    (["tpu-vm", "create", ZONE, "--type=v4-16"], "has several hosts"),
    ([*SLICE, "--", "--workdir=runs"], "share no disk"),
    ([*SLICE, "--", "--workdir=s3://bucket/demo"], "share no disk"),
    (["tpu-vm", "create", "fetch", ZONE], "fetch needs"),
    ([*SLICE, "--", "--config=c"], "share no disk"),
    (["tpu-vm", ZONE, "--restarts=1", "--", "--workdir=runs"], "is lost"),
    ([*SLICE, "fetch", "--", "--workdir=runs"], "fetch needs"),
  ],
)
def test_what_is_wrong_costs_nothing(standins, monkeypatch, words, said):
  for name in ("PATH", "STANDIN"):
    monkeypatch.setenv(name, standins.environment[name])
  assert said in refusal(*words)
  assert not (standins.place / "calls.jsonl").exists()


@pytest.fixture
def host(tmp_path):
  """A host of a slice: launch/, a Python in .venv, and the module `job`."""
  host = tmp_path / "host"
  shutil.copytree(ROOT / "launch", host / "launch")
  python = host / ".venv" / "bin" / "python"
  python.parent.mkdir(parents=True)
  python.symlink_to(sys.executable)
  (host / "job.py").write_text(
    "import os, signal, sys, time\n"
    "def leave(*_):\n"
    "  time.sleep(1)\n"
    "  print('saved', flush=True)\n"
    "  os._exit(143)\n"
    "signal.signal(signal.SIGTERM, leave)\n"
    "print('begun', flush=True)\n"
    "time.sleep(float(sys.argv[1]))\n"
  )
  return host


def _job(host, *words):
  """Runs job.sh to its end."""
  return subprocess.run(
    [str(host / "launch" / "job.sh"), *words],
    capture_output=True,
    text=True,
    timeout=30,
  )


def _begun(host):
  """Starts a job that waits; returns its process once it has begun."""
  words = [str(host / "launch" / "job.sh"), "run", "job", "60"]
  process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
  assert process.stdout.readline() == "begun\n"
  assert int((host / "job.pid").read_text()) == process.pid
  return process


def test_a_job_whose_connection_broke_is_stopped_by_the_next(host):
  first = _begun(host)
  second = _job(host, "run", "job", "0")
  assert second.returncode == 0
  assert second.stdout == "begun\n"
  assert first.communicate(timeout=10)[0] == "saved\n"
  assert first.returncode == 143


def test_to_stop_is_to_wait_for_the_save(host):
  done = _job(host, "stop")
  assert done.returncode == 1
  assert "no job was started here" in done.stderr
  job = _begun(host)
  done = _job(host, "stop")
  assert done.returncode == 0, done.stderr
  # It is gone by now, though it took its time.
  assert job.wait(timeout=0.5) == 143
  assert job.stdout.read() == "saved\n"
  assert "has ended already" in _job(host, "stop").stdout


def test_a_stale_number_of_a_process_stops_nobody(host):
  other = subprocess.Popen(["sleep", "30"])
  # One of ours, but no job.
  words = [sys.executable, "-c", "import time; time.sleep(30)", "fidelity_jax.main"]
  ours = subprocess.Popen(words)
  try:
    for process in (other, ours):
      (host / "job.pid").write_text(str(process.pid))
      assert "has ended already" in _job(host, "stop").stdout
      (host / "job.pid").write_text(str(process.pid))
      assert _job(host, "run", "job", "0").returncode == 0
      assert process.poll() is None
  finally:
    for process in (other, ours):
      process.kill()
      process.wait()


def _signalled(standins, hanging, *words):
  """Stops a launcher while a call of gcloud hangs.

  Args:
    standins: whose gcloud only says what it was called with.
    hanging: what the call that hangs has in it.
    words: of the command line.

  Returns:
    Its status and output, and the calls.
  """
  calls = standins.place / "calls"
  (standins.place / "bin" / "gcloud").write_text(
    f'#!/bin/sh\necho "$@" >>{calls}\n'
    f'case "$*" in *"{hanging}"*) exec sleep 60 ;; *"job.sh run"*) exit 255 ;; esac\n'
  )
  process = subprocess.Popen(
    [sys.executable, "-S", "-E", str(ROOT / "launch" / "run"), *words],
    env=standins.environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  while not (calls.exists() and hanging in calls.read_text()):
    assert process.poll() is None
    time.sleep(0.05)
  process.send_signal(signal.SIGTERM)
  stdout, stderr = process.communicate(timeout=20)
  return process.returncode, stdout, stderr, calls.read_text().splitlines()


# While it runs; and while it is looked at whether its machines are gone.
@pytest.mark.parametrize("hanging", ["job.sh run", "describe"])
def test_a_signal_to_the_launcher_stops_the_job(standins, hanging):
  words = [*SLICE, "run", *ARGUMENTS]
  status, stdout, stderr, calls = _signalled(standins, hanging, *words)
  assert status == 143
  assert "stopped by SIGTERM" in one_line(stderr)
  assert "launch/job.sh stop" in calls[-1]
  assert "costs until" in stdout


@pytest.mark.parametrize("hanging", ["resources create", "describe"])
def test_a_request_that_was_left_is_told(standins, hanging):
  status, stdout, stderr, _ = _signalled(standins, hanging, *SLICE, "create")
  assert status == 143
  line = one_line(stderr)
  assert "the request stands and costs once granted" in line
  assert "run the same command" not in line
  assert "costs until: launch/run tpu-slice delete" in stdout


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
    [str(place / "launch" / "job.sh"), "run", *words, f"--workdir={tmp_path / 'runs'}"],
    env=environment,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
