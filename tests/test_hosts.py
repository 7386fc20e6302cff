"""Several processes that work as one, over loopback."""

import http.server
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

import pytest
from conftest import STEADY, TOY, check_same, overrides

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
    (("localhost:1", "1", "1"), "must be below JAX_NUM_PROCESSES=1"),
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
  for name in (*_NAMES, "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES"):
    monkeypatch.delenv(name, raising=False)
  hosts.join()
  assert not hosts.several() and hosts.first()
  assert hosts.agree({"a": [1, None]}) == {"a": [1, None]}
  hosts.wait("here")


@pytest.mark.parametrize(("endpoints", "count"), [("a:1:b,c:2:d", 2), ("a:1:b", 1)])
def test_a_slice_of_tpus_tells_its_hosts(monkeypatch, endpoints, count):
  asked = []

  class Metadata(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      asked.append((self.path, self.headers["Metadata-Flavor"]))
      self.send_response(200)
      self.end_headers()
      self.wfile.write(endpoints.encode())

    def log_message(self, *args):
      pass

  with http.server.HTTPServer(("127.0.0.1", 0), Metadata) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
    assert hosts.slice_hosts() == count
    server.shutdown()
  (request,) = asked
  place = "/computeMetadata/v1/instance/attributes/worker-network-endpoints"
  assert request == (place, "Google")
  # Elsewhere nobody answers.
  assert hosts.slice_hosts() == 1


class _Job:
  """Processes that train the toy together."""

  def __init__(
    self,
    count: int,
    workdir: pathlib.Path,
    patience: float = 60.0,
    joined: bool | None = None,
    devices: int = 1,
    each: Sequence[Sequence[str]] = (),
    **fields,
  ):
    with socket.socket() as listening:
      listening.bind(("127.0.0.1", 0))
      port = listening.getsockname()[1]
    self.logs = [workdir.with_name(f"{workdir.name}-{i}.txt") for i in range(count)]
    self.processes = []
    for i, log in enumerate(self.logs):
      own = (f"127.0.0.1:{port}", str(count), str(i))
      joined = count > 1 if joined is None else joined
      variables = dict(zip(_NAMES, own, strict=True)) if joined else {}
      variables |= {"FIDELITY_JAX_PATIENCE": str(patience), "JAX_PLATFORMS": "cpu"}
      flags = f"--xla_force_host_platform_device_count={devices}"
      variables["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false"
      words = [sys.executable, "-m", "fidelity_jax.main", f"--workdir={workdir}"]
      words += ["--config=configs/oracle.py:scratch", *overrides(TOY | fields)]
      words += each[i] if each else []
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
    except subprocess.TimeoutExpired as error:
      raise AssertionError(self.said()) from error
    finally:
      for process in self.processes:
        process.kill()

  def said(self) -> list[str]:
    """Returns what each said."""
    return [log.read_text() for log in self.logs]

  def lines(self) -> list[list[str]]:
    """Returns what each said of its end."""
    mark = "fidelity_jax: "
    return [
      [x.removeprefix(mark) for x in text.splitlines() if x.startswith(mark)]
      for text in self.said()
    ]


def _until(condition, seconds: float = 300.0) -> None:
  until = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < until, "it did not begin"
    time.sleep(0.05)


def _begun(workdir: pathlib.Path, kind: str):
  """Returns whether a stage trains, or is about to."""
  return lambda: bool(list(workdir.glob(f"{kind}-*/metrics.jsonl")))


@pytest.mark.slow
def test_two_processes_do_what_one_does(toy_run, tmp_path):
  workdir = tmp_path / "two"
  job = _Job(2, workdir)
  assert job.wait(550) == [0, 0], job.said()
  first, second = job.said()
  check_same(workdir, toy_run)
  # One of them speaks, and writes.
  assert "report.html" in first and "steps/s" in first
  assert "fidelity_jax" not in second and "steps" not in second
  assert (next(workdir.glob("oracle-*")) / "report.html").exists()
  assert not list(workdir.glob(".*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (4, 2), (1, 2)])
def test_a_signal_at_any_stops_all_and_others_go_on(toy_run, tmp_path, before, after):
  """In mid-stage, as another number of processes."""
  workdir = tmp_path / "stopped"
  job = _Job(before, workdir)
  _until(_begun(workdir, "restorer"))
  time.sleep(1)
  job.processes[-1].send_signal(signal.SIGTERM)
  assert job.wait(120) == [143] * before, job.said()
  first, *others = job.lines()
  assert len(first) == 1 and not any(others), job.said()
  assert "stopped by SIGTERM" in first[0] and "everything is saved" in first[0]
  stopped = re.search(r"at step (\d+) of", first[0])
  again = _Job(after, workdir)
  assert again.wait(550) == [0] * after, again.said()
  if stopped is not None:
    assert f"resuming at step {stopped[1]} of" in again.said()[0]
  check_same(workdir, toy_run)


# Two processes share every kernel, or have two devices each that do.
_SPLIT = {"across": (1, {"mesh.model": 2}), "within": (2, {"mesh.model": 2})}


@pytest.mark.slow
@pytest.mark.parametrize("name", _SPLIT)
def test_kernels_that_are_split_go_on_elsewhere(steady_run, tmp_path, name):
  """Stopped, gone on with by the same, finished by one that has them whole."""
  devices, fields = _SPLIT[name]
  fields = STEADY | fields | {"mesh.min_size": 64}
  workdir = tmp_path / "split"
  first = _Job(2, workdir, devices=devices, **fields)
  _until(_begun(workdir, "classifier"))
  time.sleep(1)
  first.processes[1].send_signal(signal.SIGTERM)
  assert first.wait(300) == [143] * 2, first.said()
  again = _Job(2, workdir, devices=devices, **fields)
  _until(lambda: "resuming at step" in again.said()[0])
  again.processes[0].send_signal(signal.SIGTERM)
  assert again.wait(300) == [143] * 2, again.said()
  alone = _Job(1, workdir, **STEADY)
  assert alone.wait(550) == [0], alone.said()
  check_same(workdir, steady_run)


@pytest.mark.slow
def test_kernels_that_are_split_to_the_end(steady_run, tmp_path):
  """Four processes, of which each two share the kernels and read the same images."""
  fields = STEADY | {"mesh.model": 2, "mesh.min_size": 64}
  job = _Job(4, tmp_path / "split", **fields)
  assert job.wait(550) == [0] * 4, job.said()
  check_same(tmp_path / "split", steady_run)


@pytest.mark.slow
def test_a_job_of_one_process_stops_too(tmp_path):
  workdir = tmp_path / "one"
  job = _Job(1, workdir, joined=True)
  _until(_begun(workdir, "classifier"))
  job.processes[0].send_signal(signal.SIGTERM)
  assert job.wait(120) == [143], job.said()
  assert "everything is saved" in job.said()[0]


@pytest.mark.slow
def test_interrupted_at_the_terminal(tmp_path):
  """^C reaches all of them."""
  workdir = tmp_path / "interrupted"
  job = _Job(2, workdir)
  _until(_begun(workdir, "restorer"))
  for process in job.processes:
    process.send_signal(signal.SIGINT)
  assert job.wait(120) == [130, 130], job.said()
  assert "stopped by SIGINT" in job.lines()[0][0] and not job.lines()[1]


@pytest.mark.slow
def test_a_process_that_vanishes_ends_all(toy_run, tmp_path):
  workdir = tmp_path / "killed"
  job = _Job(2, workdir, patience=20)
  _until(_begun(workdir, "restorer"))
  time.sleep(1)
  job.processes[1].kill()
  assert job.wait(60) == [1, -signal.SIGKILL], job.said()
  ((line,), _) = job.lines()
  assert "process 1 has given no sign of life" in line
  again = _Job(2, workdir)
  assert again.wait(550) == [0, 0], again.said()
  check_same(workdir, toy_run)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_coordinator_that_vanishes_or_hangs_ends_all(tmp_path, how):
  workdir = tmp_path / "killed"
  job = _Job(2, workdir, patience=5)
  _until(_begun(workdir, "classifier"))
  job.processes[0].send_signal(how)
  status = job.processes[1].wait(60)
  job.processes[0].kill()
  if how == signal.SIGKILL:
    # JAX itself aborts a process whose coordinator's connections are closed.
    assert status in (1, -signal.SIGABRT), job.said()
    return
  assert status == 1, job.said()
  (line,) = job.lines()[1]
  assert "process 0, which coordinates all, has not answered" in line


@pytest.mark.slow
def test_a_failure_of_one_is_told_by_all(tmp_path):
  workdir = tmp_path / "failed"
  job = _Job(2, workdir)
  _until(_begun(workdir, "classifier"))
  # The first finds it missing when it marks the stage finished; the other waits then.
  next(workdir.glob("classifier-*/config.json")).unlink()
  assert job.wait(200) == [1, 1], job.said()
  for said in job.lines():
    assert len(said) == 1 and "config.json is missing" in said[0]


@pytest.mark.slow
def test_another_command_is_refused(tmp_path):
  workdir = tmp_path / "other"
  job = _Job(2, workdir, each=[[], ["--config.seed=1"]])
  assert 2 in job.wait(120), job.said()
  assert any("another command than process 0" in text for text in job.said())


@pytest.mark.slow
def test_what_is_wrong_for_all_is_said_once(tmp_path):
  fields = {"batch_size": 15}
  job = _Job(2, tmp_path / "wrong", **fields)
  assert job.wait(120) == [2, 2], job.said()
  first, second = job.lines()
  assert len(first) == 1 and "does not split evenly over 2 devices" in first[0]
  assert not second
