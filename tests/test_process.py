"""The command as a process: signals, streams, limits, disks, changed data."""

import importlib
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import pytest
from conftest import (
  ROOT,
  TOY,
  measured,
  one_line,
  overrides,
  results,
  without_privileges,
)
from test_data_images import encoded, photograph

from fidelity_jax import main

DEMO = "--config=configs/oracle.py:scratch"


def _listens(pid):
  """Returns whether a process has a handler for SIGTERM."""
  for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
    if line.startswith("SigCgt:"):
      # Python itself has one for SIGINT; this is ours alone, and set last.
      return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
  return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("seconds", [0.0, 0.8, 1.5, 2.5])
def test_a_signal_in_the_first_seconds(background, tmp_path, number, seconds):
  process = background(DEMO, f"--workdir={tmp_path}", *overrides(TOY))
  # Before its first line runs, Python itself answers.
  while not _listens(process.pid):
    time.sleep(0.005)
    assert process.poll() is None
  time.sleep(seconds)
  process.send_signal(number)
  _, stderr = process.communicate(timeout=60)
  assert process.returncode == 128 + number, stderr
  assert f"stopped by {number.name}" in one_line(stderr)
  assert not list(tmp_path.glob("*/finished.json"))


@pytest.mark.slow
def test_its_output_need_not_be_read(background, toy_copy):
  """As with `2>&1 | head -1`, and with standard error closed."""
  path = results(toy_copy)
  before = measured(path)
  arguments = [DEMO, f"--workdir={toy_copy}", *overrides(TOY)]
  shutil.rmtree(next(toy_copy.glob("ensemble-*")))
  shutil.rmtree(toy_copy / "measurements")
  path.unlink()
  process = background(*arguments)
  assert "finished" in process.stderr.readline()
  process.stderr.close()
  assert process.wait(300) == 0
  assert measured(path) == before
  path.unlink()
  shell = 'exec "$@" >&- 2>&-'
  command = ["sh", "-c", shell, "sh", sys.executable, "-m", "fidelity_jax.main"]
  result = subprocess.run([*command, *arguments], cwd=ROOT, timeout=300)
  assert result.returncode == 0
  assert measured(path) == before


def _limited(limit, *arguments):
  shell = f'ulimit {limit}; exec "$@"'
  command = ["sh", "-c", shell, "sh", sys.executable, "-m", "fidelity_jax.main"]
  return subprocess.run(
    [*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
  )


def test_too_few_open_files(toy_copy):
  arguments = [DEMO, f"--workdir={toy_copy}", *overrides(TOY)]
  for limit in (16, 64):
    result = _limited(f"-n {limit}", *arguments)
    assert result.returncode == 1
    assert f"only {limit} files may be open" in one_line(result.stderr)
  # A soft limit is raised.
  assert _limited("-S -n 100", *arguments).returncode == 0


def test_a_platform_that_is_not_there(command, tmp_path):
  result = command(DEMO, f"--workdir={tmp_path}", env={"JAX_PLATFORMS": "cuda"})
  assert result.returncode == 2
  line = one_line(result.stderr)
  assert "cuda" in line and "JAX_PLATFORMS" in line


def test_another_locale(command, tmp_path):
  env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
  fields = {"dataset.name": "folder", "dataset.path": f"{tmp_path}/Bäume"}
  result = command(DEMO, f"--workdir={tmp_path}/w", *overrides(fields), env=env)
  assert result.returncode == 2
  assert "does not exist" in one_line(result.stderr)
  result = command(DEMO, f"--workdir={tmp_path}/Bäume", env=env)
  assert result.returncode == 2
  assert "PYTHONUTF8=1" in one_line(result.stderr)


@pytest.fixture
def small_disk(tmp_path):
  """A function that mounts, or resizes, a file system of some size."""
  place = tmp_path / "disk"
  place.mkdir()
  mounted = []

  def resize(size):
    options = f"remount,size={size}" if mounted else f"size={size}"
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
      pytest.skip(f"cannot mount a tmpfs: {result.stderr.strip()}")
    mounted.append(size)
    return place

  yield resize
  if mounted:
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.slow
def test_a_full_disk(command, small_disk, toy_run):
  """It fills while the last stage is trained, and while it is evaluated."""
  place = small_disk("100m") / "w"
  shutil.copytree(toy_run, place)
  shutil.rmtree(next(place.glob("ensemble-*")))
  shutil.rmtree(place / "measurements")
  path = results(place)
  path.unlink()
  flags = [DEMO, f"--workdir={place}", *overrides(TOY)]
  flags.append("--config.checkpoint_seconds=0.05")
  for room in (60_000, 260_000):
    used = shutil.disk_usage(place.parent).used
    small_disk(used + room)
    result = command(*flags)
    assert result.returncode == 1, result.stderr
    line = one_line(result.stderr)
    assert "No space left on device: make room and run the same command again" in line
    # The line names a log file that is there.
    log = line.rpartition("The traceback is in ")[2].rstrip(".")
    assert "Traceback" in pathlib.Path(log).read_text()
    assert not path.exists()
  small_disk("100m")
  command(*flags, check=0)
  assert measured(path) == measured(results(toy_run))


def test_a_workdir_that_is_removed(background, tmp_path):
  workdir = tmp_path / "w"
  flags = [DEMO, f"--workdir={workdir}", *overrides(TOY)]
  process = background(*flags, "--config.checkpoint_seconds=0.05")
  while not list(workdir.glob("*/checkpoints/*/variables")):
    time.sleep(0.05)
    assert process.poll() is None
  shutil.rmtree(workdir, ignore_errors=True)
  shutil.rmtree(workdir, ignore_errors=True)
  _, stderr = process.communicate(timeout=300)
  assert process.returncode == 1, stderr
  assert "was removed while the run was working in it" in one_line(stderr)
  assert not list(workdir.glob("*/finished.json"))


@pytest.mark.parametrize("what", ["product", "stage"])
def test_missing_permissions_are_told_from_damage(toy_run, tmp_path, capsys, what):
  """What cannot be read is not called damaged; it is used once it can be read."""
  # Without privileges it could not be imported.
  importlib.import_module("fidelity_jax.experiment")
  # Others may not look into pytest's own directories.
  place = pathlib.Path(tempfile.mkdtemp())
  shutil.copytree(toy_run, place, dirs_exist_ok=True)
  try:
    for path in [place, *place.rglob("*")]:
      path.chmod(0o777 if path.is_dir() else 0o666)
    (stage,) = place.glob("ensemble-*")
    if what == "product":
      step = json.loads((stage / "finished.json").read_text())["best_step"]
      closed = stage / "checkpoints" / str(step) / "variables" / "manifest.ocdbt"
      closed.chmod(0)
    else:
      (stage / "finished.json").unlink()
      stage.chmod(0o555)
    arguments = ["", DEMO, f"--workdir={place}", *overrides(TOY)]
    with without_privileges():
      assert main.main(arguments) == 1
    line = one_line(capsys.readouterr().err)
    assert "permissions" in line
    assert "damaged" not in line and "delete" not in line
  finally:
    shutil.rmtree(place)


def _pictures(root, seed):
  """Writes two classes of 20 images; all files have the same size."""
  for number, name in enumerate(("cat", "dog")):
    (root / name).mkdir(parents=True, exist_ok=True)
    for i in range(20):
      picture = photograph(16, 16, seed=seed + 100 * number + i)
      (root / name / f"{i:02d}.bmp").write_bytes(encoded(picture, format="BMP"))


@pytest.mark.slow
def test_other_images_are_noticed(command, tmp_path):
  """Of equal size, before a stage is finished, after it, and in the test set."""
  _pictures(tmp_path / "pets", seed=0)
  fields = TOY | {"dataset.name": "folder", "dataset.path": tmp_path / "pets"}
  fields |= {"batch_size": 8, "parents.classifier.batch_size": 8}
  fields |= {"parents.restorer.batch_size": 32, "ensemble.enabled": False}
  fields |= {"epochs": 0, "warmup_epochs": 0, "parents.restorer.epochs": 0}
  fields |= {"evaluation.rounds": 1}
  workdir = tmp_path / "w"
  env = {"FIDELITY_JAX_CACHE": str(tmp_path / "cache")}
  fields |= {"parents.classifier.epochs": 8, "checkpoint_seconds": 0.05}
  flags = [DEMO, f"--workdir={workdir}", *overrides(fields)]
  trap = ["SIGKILL", "step", 14]
  killed = command(*trap, *flags, program=["tests/killer.py"], env=env)
  assert killed.returncode == -9
  assert not list(workdir.glob("*/finished.json"))
  _pictures(tmp_path / "pets", seed=7)
  result = command(*flags, env=env)
  assert result.returncode == 1
  line = one_line(result.stderr)
  assert "half trained on other images" in line and "classifier-" in line
  # The same images again, written anew and elsewhere: it goes on.
  _pictures(tmp_path / "moved", seed=0)
  moved = f"--config.dataset.path={tmp_path / 'moved'}"
  done = command(*flags, moved, env=env, check=0)
  assert "resuming at step" in done.stderr
  stages = {path.parent for path in workdir.glob("*/finished.json")}
  assert len(stages) == 3
  # Other training images make other stages; those finished stay.
  _pictures(tmp_path / "pets", seed=7)
  command(*flags, env=env, check=0)
  assert len(list(workdir.glob("*/finished.json"))) == 6
  assert len(list(workdir.glob("oracle-*/results.json"))) == 2
  # Other test images are measured anew.
  for i, key in enumerate(_test_images(tmp_path / "moved", tmp_path / "cache")):
    picture = photograph(16, 16, seed=900 + i)
    (tmp_path / "moved" / key).write_bytes(encoded(picture, format="BMP"))
  again = command(*flags, moved, env=env, check=0)
  assert again.stderr.count(": finished (") == 3 and "evaluation  " in again.stderr
  assert len(list(workdir.glob("oracle-*/results.json"))) == 3


def _test_images(root, cache):
  from fidelity_jax import data

  settings = data.default_config("folder")
  settings.path = str(root)
  settings.fractions = (0.5, 0.15, 0.35)
  return data.load(settings, "test", workdir_cache=cache).keys
