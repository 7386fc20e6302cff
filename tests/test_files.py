"""Files are whole or absent, and directories belong to one run."""

import errno
import hashlib
import json
import os
import threading
import time

import msgspec
import pytest

from fidelity_jax import errors, experiment, files, hosts


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / "a.json"
  files.write_json(path, {"a": 1})
  monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError))
  with pytest.raises(OSError):
    files.write_json(path, {"a": 2})
  assert files.read_json(path, "") == {"a": 1}


class Record(msgspec.Struct, forbid_unknown_fields=True):
  step: int
  score: float


def test_a_record_is_read_back_as_it_was_or_not_at_all(tmp_path):
  path = tmp_path / "a.json"
  files.write_record(path, Record(3, 0.1 + 0.2))
  read = lambda: files.read_record(path, Record, "delete it.")
  assert read() == Record(3, 0.1 + 0.2)
  whole = path.read_text()
  value = json.loads(whole)
  for content in (
    "{",
    "",
    "null",
    "[]",
    "{}",
    "7",
    "[" * 100_000,
    whole.replace("3", "4", 1),
    whole.replace("0.3", "0.4"),
    json.dumps(value | {"more": 1}),
    json.dumps({k: v for k, v in value.items() if k != "step"}),
  ):
    path.write_text(content)
    with pytest.raises(errors.RunError, match=r"a\.json is damaged.*: delete it\."):
      read()
  # Of another type, with a checksum that fits.
  for record in ({"step": "3", "score": 1.0}, {"step": 3}):
    files.write_json(path, record | {"sha256": files.digest(record)})
    with pytest.raises(errors.RunError, match="of another version"):
      read()
  path.write_bytes(b"\xff\xfe")
  with pytest.raises(errors.RunError, match="damaged"):
    read()
  path.unlink()
  with pytest.raises(errors.RunError, match="missing"):
    read()


def test_a_file_is_hashed_once_while_it_stays_as_it_is(tmp_path, monkeypatch):
  path = tmp_path / "a"
  path.write_bytes(b"one")
  first = files.sha256(path)
  opened = []
  monkeypatch.setattr(
    files.hashlib, "file_digest", lambda *a: opened.append(a) or hashlib.sha256(b"two")
  )
  assert files.sha256(path) == first and not opened
  path.write_bytes(b"two")
  assert files.sha256(path) != first and len(opened) == 1


def test_only_regular_files_are_read(tmp_path):
  os.mkfifo(tmp_path / "pipe")
  (tmp_path / "zero").symlink_to("/dev/zero")
  for name in ("pipe", "zero", "."):
    with pytest.raises(OSError):
      files.read_bytes(tmp_path / name)
  (tmp_path / "large").write_bytes(b"12345")
  assert files.read_bytes(tmp_path / "large", 5) == b"12345"
  with pytest.raises(OSError, match="too many"):
    files.read_bytes(tmp_path / "large", 4)


def test_circumstances_are_told_from_damage(tmp_path):
  full = OSError(errno.ENOSPC, "No space left on device", "x")
  with pytest.raises(errors.RunError, match=r"^writing y failed: x: No space .*room"):
    with errors.while_doing("writing y"):
      raise full
  # As TensorStore says it, and behind another error.
  behind = ValueError("something went wrong")
  behind.__cause__ = ValueError(
    'PERMISSION_DENIED: Error opening [OS error 13: EACCES "x"]'
  )
  assert "Permission denied" in errors.circumstance(behind)
  assert "memory" in errors.circumstance(MemoryError())
  assert "open files" in errors.circumstance(
    OSError(errno.EMFILE, "Too many open files")
  )
  assert errors.circumstance(ValueError("DATA_LOSS: Error decoding")) is None
  assert errors.circumstance(FileNotFoundError(errno.ENOENT, "no", "x")) is None
  # What is merely being handled is no cause; a descriptor is no name.
  defect = KeyError("defect")
  defect.__context__ = full
  assert errors.circumstance(defect) is None
  assert "room" in errors.circumstance(defect, context=True)
  # As TensorStore, Rust and CUDA put it.
  for text in ("... [os_error_code='28']", "No space left on device (os error 28)"):
    assert "room" in errors.circumstance(ValueError(text))
  assert errors.circumstance(RuntimeError("cuBLAS error code 28")) is None
  assert errors.circumstance(OSError(errno.ENOSPC, "No space", 7)).startswith(
    "No space"
  )


def test_a_directory_belongs_to_one_run_at_a_time(tmp_path):
  with files.locked(tmp_path / "w"):
    with pytest.raises(errors.RunError, match="another run"):
      with files.locked(tmp_path / "w"):
        pass
  with files.locked(tmp_path / "w"):
    pass


def test_what_another_host_wrote_is_waited_for(tmp_path, monkeypatch):
  path = tmp_path / "late"
  look = lambda: path.read_text() if path.exists() else None
  late = threading.Timer(0.5, path.write_text, ["there"])
  late.start()
  assert files.seen(look, "late is written", tmp_path) == "there"
  late.join()
  path.unlink()
  monkeypatch.setattr(files, "_LAG", 0.3)
  with pytest.raises(errors.RunError, match="late is written, but process 0 does not"):
    files.seen(look, "late is written", tmp_path)


@pytest.mark.parametrize("what", ["workdir", "stage"])
def test_one_time_holds_for_all_that_is_waited_for(tmp_path, monkeypatch, what):
  """Of a process that does not see what the first one writes."""

  class Unseen:
    name, directory, check = "some-stage", tmp_path / "some-stage", lambda self: None

  monkeypatch.setattr(files, "_LAG", 0.3)
  monkeypatch.setattr(hosts, "_index", 1)
  monkeypatch.setattr(hosts, "several", lambda: True)
  monkeypatch.setattr(hosts, "agree", lambda value: value)
  monkeypatch.setattr(hosts, "wait", lambda place: None)
  begun = time.monotonic()
  if what == "workdir":
    with pytest.raises(errors.UsageError, match="of process 1 is not that of process"):
      files._meet(tmp_path)
  else:
    with pytest.raises(errors.RunError, match="finished, but process 1 does not see"):
      experiment._seen(Unseen())
  assert time.monotonic() - begun < 10
