"""Buckets in place of directories: a Google Cloud Storage on loopback, real clients."""

import importlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import bucket_server
import pytest
from conftest import (
  TOY,
  check_same,
  experiment,
  measured,
  overrides,
  results,
  without_privileges,
)
from test_data_images import encoded, photograph
from test_hosts import _begun, _Job, _until

from fidelity_jax import buckets, errors, leases, locations, mirror

pytest.importorskip("gcsfs")


@pytest.fixture
def bucket(monkeypatch, cache_folder):
  with bucket_server.serving(monkeypatch) as bucket:
    yield bucket


def _again(address: str) -> pathlib.Path:
  """Returns the copy that another command would look at."""
  buckets._copy.cache_clear()
  return locations.expand(address)


def test_a_copy_follows_what_is_in_the_bucket(bucket, folder):
  bucket.put_folder(folder, "data/pictures")
  bucket.put("data/pictures/dog/", b"")  # a folder that a console made
  copy = locations.expand(f"{bucket.address}/data/pictures/")
  here = sorted(p.relative_to(copy) for p in copy.rglob("*.jpg"))
  assert here == sorted(p.relative_to(folder) for p in folder.rglob("*.jpg"))
  assert all((copy / p).read_bytes() == (folder / p).read_bytes() for p in here)

  # Nothing is copied twice.
  bucket.requests.clear()
  assert _again(f"{bucket.address}/data/pictures") == copy
  assert not bucket.downloads() and len(bucket.requests) <= 2

  bucket.put("data/pictures/cat/image_0003.jpg", b"new")
  bucket.delete("data/pictures/dog/image_0004.jpg")
  (copy / "cat" / "image_0005.jpg").write_bytes(b"damaged here")
  _again(f"{bucket.address}/data/pictures")
  assert (copy / "cat" / "image_0003.jpg").read_bytes() == b"new"
  assert not (copy / "dog" / "image_0004.jpg").exists()
  name = "cat/image_0005.jpg"
  assert (copy / name).read_bytes() == (folder / name).read_bytes()
  assert sorted(bucket.downloads()) == [
    f"data/pictures/cat/image_000{i}.jpg" for i in (3, 5)
  ]
  # Another object whose name only begins like it is no part of it.
  bucket.put("data/pictures-of-others/x.jpg", b"x")
  assert not list(_again(f"{bucket.address}/data/pictures").rglob("x.jpg"))


def test_a_single_object_and_one_that_is_not_there(bucket):
  bucket.put("weights/net.pth", b"12345")
  assert locations.expand(f"{bucket.address}/weights/net.pth").read_bytes() == b"12345"
  assert not locations.expand(f"{bucket.address}/weights/other.pth").exists()


def test_other_kinds_of_addresses_are_fsspec_s(tmp_path, cache_folder):
  (tmp_path / "there").mkdir()
  (tmp_path / "there" / "a.txt").write_text("a")
  assert (locations.expand(f"file://{tmp_path}/there") / "a.txt").read_text() == "a"


def _write(place: pathlib.Path, content: dict[str, str]) -> None:
  """Makes a directory hold exactly these files."""
  for name, text in _read(place).items():
    if content.get(name) != text:
      (place / name).unlink()
  for name, text in content.items():
    path = place / name
    if not path.exists():
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(text)


def _read(place: pathlib.Path) -> dict[str, str]:
  return {
    str(path.relative_to(place)): path.read_text()
    for path in place.rglob("*")
    if path.is_file()
  }


def _checkpoint(step: int) -> dict[str, str]:
  return {f"net/checkpoints/{step}/{name}": f"{name} {step}" for name in "ab"}


_BEGUN = {"net/config.json": "made of"}
_BEFORE = _BEGUN | _checkpoint(1) | _checkpoint(2) | {"net/metrics.jsonl": "2"}
_AFTER = (
  _BEGUN
  | _checkpoint(2)
  | _checkpoint(3)
  | {"net/metrics.jsonl": "3", "net/finished.json": "2", "index.md": "all"}
)


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_a_bucket_is_whole_wherever_writing_ends(bucket, tmp_path, every):
  """All requests but the first n are refused, for every n, or every seventh."""
  tried, address = 0, f"{bucket.address}/runs"
  while True:
    for name in bucket.names():
      bucket.delete(name)
    place = tmp_path / f"here-{tried}"
    _write(place, _BEFORE)
    here = buckets.Bucket(address, place)
    here.take()
    here.push()
    _write(place, _AFTER)
    bucket.refuses = tried
    done = True
    try:
      here.push()
    except errors.RunError as error:
      assert "may not be used" in str(error)
      done = False
    bucket.refuses = None
    there = tmp_path / f"there-{tried}"
    buckets.Bucket(address, there).pull()
    found = _read(there)
    steps = {name.split("/")[2] for name in found if "checkpoints" in name}
    for step in steps:
      parts = {k: v for k, v in found.items() if f"/{step}/" in k}
      assert parts == _checkpoint(int(step)), (tried, found)
    assert "2" in steps and steps & {"1", "3"}
    if "net/finished.json" in found:
      assert found["net/metrics.jsonl"] == "3" and "3" in steps
    # The same goes on with what it has; another begins with what is whole.
    again = buckets.Bucket(address, place)
    again.pull(workdir=True)
    # What was not removed there yet comes back.
    assert _AFTER == {k: v for k, v in _read(place).items() if k not in _checkpoint(1)}
    again.push()
    buckets.Bucket(address, there).pull()
    assert _read(there) == _read(place)
    if done:
      assert found == _AFTER
      break
    tried += every
  assert tried > 8


def test_what_did_not_come_into_the_bucket_stays_unless_others_wrote(bucket, tmp_path):
  """By stage."""
  address, place = f"{bucket.address}/runs", tmp_path / "here"
  other = {"other/config.json": "made of", "other/finished.json": "1"}
  _write(place, _BEFORE)
  buckets.Bucket(address, place).push()
  _write(place, _AFTER | other)
  # Elsewhere nothing but a third stage was made.
  bucket.put("runs/third/config.json", b"made of")
  there = {"third/config.json": "made of"}
  buckets.Bucket(address, place).pull(workdir=True)
  assert _read(place) == _AFTER | other | there | _checkpoint(1)
  # A checkpoint was removed by hand there, and another run went on.
  for name in [n for n in bucket.names() if "checkpoints/2/" in n]:
    bucket.delete(name)
  bucket.put("runs/net/metrics.jsonl", b"theirs")
  buckets.Bucket(address, place).pull(workdir=True)
  mine = {"index.md": "all"} | other | there
  expected = _BEGUN | _checkpoint(1) | {"net/metrics.jsonl": "theirs"}
  assert _read(place) == mine | expected
  buckets.Bucket(address, place).pull()
  assert _read(place) == there | expected


@pytest.mark.parametrize("lost", ["everything", "a stage", "a directory"])
def test_what_is_lost_here_is_not_removed_there(bucket, tmp_path, monkeypatch, lost):
  address, place = f"{bucket.address}/runs", tmp_path / "here"
  _write(place, _AFTER)
  here = buckets.Bucket(address, place)
  here.push()
  before = bucket.names()
  shutil.rmtree(
    place / {"everything": "", "a stage": "net"}.get(lost, "net/checkpoints")
  )
  here.push()
  assert bucket.names() == before
  again = buckets.Bucket(address, place)
  again.pull(workdir=True)
  again.push()
  assert bucket.names() == before
  assert _read(place) == _AFTER


def test_a_workdir_that_was_copied_there_by_hand_goes_on(bucket, tmp_path):
  """Half trained, without marks, until a run takes it."""
  address, place = f"{bucket.address}/runs", tmp_path / "here"
  for name, text in _BEFORE.items():
    bucket.put(f"runs/{name}", text.encode())
  here = buckets.Bucket(address, place)
  here.pull(workdir=True)
  here.take()
  here.push()
  buckets.Bucket(address, tmp_path / "there").pull()
  assert _read(place) == _read(tmp_path / "there") == _BEFORE


def test_addresses_in_addresses_have_places_of_their_own(bucket, cache_folder):
  places = [
    buckets.place_of("copies", f"{bucket.address}/{name}")
    for name in ("data", "data/train", "data/train/a", "data2")
  ]
  for one in places:
    assert not [p for p in places if p != one and p.is_relative_to(one)]


def test_a_directory_that_cannot_be_read_is_an_error(bucket):
  with tempfile.TemporaryDirectory() as root:
    _check_unreadable(bucket, pathlib.Path(root))


def _check_unreadable(bucket, root):
  address, place = f"{bucket.address}/runs", root / "here"
  root.chmod(0o755)
  _write(place, _BEFORE)
  here = buckets.Bucket(address, place)
  here.push()
  (place / "net" / "checkpoints").chmod(0)
  with without_privileges(), pytest.raises(errors.RunError, match="Permission denied"):
    here.push()
  (place / "net" / "checkpoints").chmod(0o755)


def test_what_users_keep_in_a_workdir_s_bucket_stays_there(bucket, tmp_path):
  address, place = f"{bucket.address}/runs", tmp_path / "here"
  own = [".keep", "notes.tmp", "log-1.txt", "net/.DS_Store", "notes/a.txt"]
  for name in own:
    bucket.put(f"runs/{name}", b"own")
  here = buckets.Bucket(address, place)
  here.pull(workdir=True)
  assert _read(place) == {"notes/a.txt": "own"}
  _write(place, _BEFORE)
  here.push()
  assert {f"runs/{name}" for name in own} <= set(bucket.names())


def test_a_checkpoint_that_vanishes_meanwhile_is_not_whole(bucket, tmp_path):
  """Orbax removes one, file by file, while it is copied; the next is copied."""
  address, place = f"{bucket.address}/runs", tmp_path / "here"
  _write(place, _BEGUN | _checkpoint(1) | _checkpoint(2))
  here = buckets.Bucket(address, place)
  here.take()
  put = here._system.put

  def late(paths, keys):
    put(paths, keys)
    (place / "net" / "checkpoints" / "1" / "a").unlink(missing_ok=True)

  here._system.put = late
  here.push()
  del here._system.put
  there = tmp_path / "there"
  buckets.Bucket(address, there).pull()
  assert _read(there) == _BEGUN | _checkpoint(2)
  # What came of it goes.
  shutil.rmtree(place / "net" / "checkpoints" / "1")
  here.push()
  assert not [name for name in bucket.names() if "checkpoints/1/" in name]


def test_a_copy_that_was_deleted_takes_nothing_with_it(bucket, tmp_path):
  address, place = f"{bucket.address}/runs", tmp_path / "here"
  _write(place, _BEFORE)
  buckets.Bucket(address, place).push()
  shutil.rmtree(place)
  again = buckets.Bucket(address, place)
  again.pull(workdir=True)
  again.push()
  assert _read(place) == _BEFORE


def test_parts_of_another_checkpoint_of_the_same_step_go(bucket, tmp_path):
  """What a killed run left is not taken for a part of what the next one wrote."""
  address, place = f"{bucket.address}/runs", tmp_path / "here"
  bucket.put("runs/net/checkpoints/2/d/left", b"of another")
  _write(place, _BEFORE)
  here = buckets.Bucket(address, place)
  here.push()
  assert "runs/net/checkpoints/2/d/left" not in bucket.names()
  buckets.Bucket(address, tmp_path / "there").pull()
  assert _read(tmp_path / "there") == _BEFORE


def test_temporary_files_stay_here(bucket, tmp_path):
  place = tmp_path / "here"
  tmp = "net/checkpoints/3.orbax-checkpoint-tmp-17/variables/a"
  _write(place, {tmp: "a", ".lock": "", "net/.x.json.vm.1.tmp": "", "log-1.txt": ""})
  buckets.Bucket(f"{bucket.address}/runs", place).push()
  assert not bucket.names()


def test_one_run_at_a_time(bucket, monkeypatch, tmp_path, cache_folder):
  monkeypatch.setattr(leases, "_BEAT", 0.2)
  monkeypatch.setattr(mirror, "_EVERY", 0.1)
  address = f"{bucket.address}/runs"
  with mirror.Mirror(address) as place:
    (place / "a.txt").write_text("a")
    with pytest.raises(errors.RunError, match=r"on this machine.*working in"):
      with mirror.Mirror(address):
        pass
    # Another machine has another copy.
    monkeypatch.setenv("FIDELITY_JAX_CACHE", str(tmp_path / "other"))
    with pytest.raises(errors.RunError, match=f"process {os.getpid()} on .*working in"):
      with mirror.Mirror(address):
        pass
    monkeypatch.setenv("FIDELITY_JAX_CACHE", str(cache_folder))
  assert bucket.names() == ["runs/.owner", "runs/a.txt"]
  with mirror.Mirror(address) as place:
    assert _read(place) == {"a.txt": "a"}


def test_a_lock_without_a_beat_is_nobody_s(bucket, monkeypatch, capsys):
  monkeypatch.setattr(leases, "_LONGEST", 2.0)
  lock = {"host": "gone", "process": 7, "machine": "other", "token": "x", "beat": 3}
  bucket.put("runs/.lock", json.dumps(lock).encode())
  start = time.monotonic()
  with mirror.Mirror(f"{bucket.address}/runs"):
    assert time.monotonic() - start > 2.0
  assert "in use by process 7 on gone: looking for up to 2 s" in capsys.readouterr().err


def test_the_lock_of_a_dead_process_is_nobody_s(bucket, capsys):
  child = subprocess.Popen([sys.executable, "-c", ""])
  child.wait()
  lock = {"host": "here", "process": child.pid, "machine": leases._machine()}
  bucket.put("runs/.lock", json.dumps(lock).encode())
  with mirror.Mirror(f"{bucket.address}/runs"):
    pass
  assert not capsys.readouterr().err


def test_the_lock_s_beat_does_not_wait_for_copies(bucket, monkeypatch):
  monkeypatch.setattr(leases, "_BEAT", 0.1)
  busy = mirror.Mirror(f"{bucket.address}/runs")
  with busy:
    with busy._turn:
      time.sleep(1.0)
      assert json.loads(bucket.get("runs/.lock"))["beat"] > 2


def test_a_run_that_lost_its_lock_writes_no_more(bucket):
  with pytest.raises(errors.RunError, match="taken over by another run"):
    with mirror.Mirror(f"{bucket.address}/runs") as place:
      theirs = json.dumps({"token": "theirs"}).encode()
      bucket.put("runs/.lock", theirs)
      (place / "a.txt").write_text("a")
  assert "runs/a.txt" not in bucket.names() and bucket.get("runs/.lock") == theirs


def test_what_cannot_be_taken_there_is_kept(bucket, monkeypatch):
  # The lock cannot be removed either.
  monkeypatch.setattr(leases, "_LONGEST", 1.0)
  address = f"{bucket.address}/runs"
  with pytest.raises(errors.RunError, match="is kept on this machine"):
    with mirror.Mirror(address) as place:
      (place / "a.txt").write_text("a")
      bucket.refuses = 0
  bucket.refuses = None
  with mirror.Mirror(address):
    pass
  assert bucket.get("runs/a.txt") == b"a"


_DEMO = ["--config=configs/oracle.py:scratch"]


@pytest.mark.parametrize(
  ("arguments", "status", "words"),
  [
    (["--workdir=gs://"], 2, "names nothing"),
    (["--workdir=gs://photos/../x"], 2, "names nothing"),
    (["--workdir=nowhere://photos/x"], 2, "no address that fsspec knows"),
    (["--workdir=gs://forbidden/x"], 1, ["gs://forbidden/x", "may not be used"]),
    (["--workdir=gs://absent/x"], 1, ["gs://absent/x", "there is no such bucket"]),
    (["--workdir=gs://photos/x", "--config.shard=1/2"], 2, "not in gs://photos/x"),
    (
      [
        "--workdir=w",
        "--config.dataset.name=folder",
        "--config.dataset.path=gs://absent/x",
      ],
      1,
      ["gs://absent/x", "there is no such bucket"],
    ),
  ],
)
def test_refusals(refused, bucket, arguments, status, words, tmp_path):
  config = _DEMO
  if any("shard" in argument for argument in arguments):
    config = ["--config=configs/table_6_1.py:scratch"]
  arguments = [
    a.replace("=w", f"={tmp_path / 'w'}") if a == "--workdir=w" else a
    for a in arguments
  ]
  refused([*config, *arguments], status, words)


def test_results_of_other_commands_go_to_disks(refused, bucket, tmp_path):
  words = [tmp_path, tmp_path, "--out", f"{bucket.address}/x"]
  line = refused(["predict", *words], 2, "name a directory on a disk", command=_cli)
  assert f"{bucket.address}/x is an address" in line


def _cli(arguments: list[str]) -> int:
  from fidelity_jax import cli

  return cli.main(arguments)


def test_without_gcsfs(refused, monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, "gcsfs", None)
  for scheme in ("gs", "gcs"):
    monkeypatch.delitem(
      importlib.import_module("fsspec.registry")._registry, scheme, raising=False
    )
  refused([*_DEMO, "--workdir=gs://photos/x"], 2, "pip install 'fidelity_jax[gcs]'")


def _flags(workdir: object) -> list[str]:
  return [*_DEMO, f"--workdir={workdir}", *overrides(TOY)]


@pytest.mark.slow
def test_a_run_in_a_bucket_is_that_on_a_disk(bucket, toy_run, command, cache_folder):
  """From data in a bucket, too; then evaluated and used from there by others."""
  workdir = f"{bucket.address}/runs/toy"
  done = command(*_flags(workdir), check=0)
  assert f"in {workdir}/oracle-" in done.stderr and str(cache_folder) not in done.stderr
  here = buckets.place_of("workdirs", workdir)
  assert _same(here, toy_run)
  # What is there is all that is here, and nobody is in it.
  apart = (".whole", ".owner", "/log.txt")
  names = [n for n in bucket.names() if not n.endswith(apart)]
  kept = [p for p in here.rglob("*") if p.is_file() and p.name[0] != "."]
  kept = [path for path in kept if path.name != "log.txt"]
  assert names == sorted(f"runs/toy/{path.relative_to(here)}" for path in kept)
  # On another machine there is nothing left to do.
  shutil.rmtree(cache_folder)
  planned = command(*_flags(workdir), "--dry_run", check=0)
  assert "About 0s of training are left" in planned.stdout
  done = command(*_flags(workdir), check=0)
  assert "steps/s" not in done.stderr
  assert _same(here, toy_run)


def _same(workdir: pathlib.Path, expected: pathlib.Path) -> bool:
  """Returns whether two runs ended with the same numbers, to the bit."""
  products = [
    {p.parent.name: json.loads(p.read_text()) for p in w.glob("*/finished.json")}
    for w in (workdir, expected)
  ]
  ours, theirs = ({k: v["product"] for k, v in found.items()} for found in products)
  assert len(theirs) == 4 and ours == theirs
  rows = [measured(results(w))["rows"] for w in (workdir, expected)]
  return rows[0] == rows[1]


@pytest.mark.slow
def test_a_run_s_networks_come_from_a_bucket(bucket, toy_run, command, tmp_path):
  bucket.put_folder(toy_run, "runs")
  picture = encoded(photograph(40, 40), format="PNG")
  bucket.put("photos/a.png", picture)
  bucket.put("clean/a.png", picture)
  (tmp_path / "a.png").write_bytes(picture)
  name = experiment(toy_run).name
  predict = ("-m", "fidelity_jax", "predict")
  ours, theirs = (
    command(
      run, image, "--clean", clean, "--format=jsonl", program=predict, check=0
    ).stdout
    for run, image, clean in (
      (
        f"{bucket.address}/runs/{name}",
        f"{bucket.address}/photos/a.png",
        f"{bucket.address}/clean",
      ),
      (toy_run / name, tmp_path / "a.png", tmp_path),
    )
  )
  assert ours.replace("gs://photos/photos", str(tmp_path)) == theirs
  # Nothing but the run itself was copied.
  assert not [n for n in bucket.downloads() if "/measurements/" in n]


@pytest.mark.slow
def test_images_and_weights_in_a_bucket(bucket, folder, command, tmp_path):
  bucket.put_folder(folder, "pictures")
  places = (f"{bucket.address}/pictures", folder)
  sizes = {name: 8 for name in TOY if name.endswith("batch_size")}
  fields = TOY | sizes | {"dataset.name": "folder"}
  plans = []
  for place in places:
    flags = [*_DEMO, f"--workdir={tmp_path / 'w'}", "--dry_run"]
    flags += overrides({k: v for k, v in fields.items() if k != "dataset.per_class"})
    plans.append(command(*flags, f"--config.dataset.path={place}", check=0).stdout)
  # Stages are the same wherever their images lie.
  assert plans[0] == plans[1]


@pytest.mark.slow
def test_two_processes_without_a_common_disk(bucket, toy_run, tmp_path, cache_folder):
  """Stopped, with nothing left but the bucket, and gone on with, by as many."""
  workdirs = [[f"--workdir={bucket.address}/two"]] * 2
  place = buckets.place_of("workdirs", f"{bucket.address}/two").parent
  job = _Job(2, tmp_path / "first", each=workdirs)
  _until(_begun(place / "two", "restorer"))
  time.sleep(1)
  job.processes[1].send_signal(signal.SIGTERM)
  assert job.wait(300) == [143] * 2, job.said()
  shutil.rmtree(cache_folder)
  again = _Job(2, tmp_path / "again", each=workdirs)
  assert again.wait(550) == [0] * 2, again.said()
  assert "resuming at step" in again.said()[0]
  check_same(place / "two", toy_run)
  # The other has what the first has.
  ours, theirs = (
    {p.relative_to(d) for p in d.rglob("*") if p.is_file() and p.name[0] != "."}
    for d in (place / "two", place / ".two.1")
  )
  assert not {p for p in ours ^ theirs if "log" not in p.name and len(p.parts) > 2}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random_and_gone_on_with_elsewhere(
  bucket, toy_run, background, cache_folder, seed
):
  """Nothing of a killed run is left but what came into the bucket."""
  workdir, draws, killed = f"{bucket.address}/runs/toy", random.Random(seed), 0
  while True:
    process = background(*_flags(workdir), "--config.checkpoint_seconds=0.05")
    try:
      _, stderr = process.communicate(
        timeout=300 if killed == 6 else draws.uniform(4, 20)
      )
    except subprocess.TimeoutExpired:
      process.kill()
      process.communicate()
      killed += 1
      shutil.rmtree(cache_folder)
      continue
    assert process.returncode == 0, stderr
    break
  assert killed > 2, "it was over too soon"
  assert _same(buckets.place_of("workdirs", workdir), toy_run)
