"""Files are whole or absent, and directories belong to one run."""

import pytest

from fidelity_jax import errors, files


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / "a.json"
  files.write_json(path, {"a": 1})
  monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError))
  with pytest.raises(OSError):
    files.write_json(path, {"a": 2})
  assert files.read_json(path) == {"a": 1}


def test_a_damaged_file_is_named(tmp_path):
  path = tmp_path / "a.json"
  path.write_text("{")
  with pytest.raises(errors.RunError, match=r"a\.json is damaged"):
    files.read_json(path)


def test_a_directory_belongs_to_one_run_at_a_time(tmp_path):
  with files.locked(tmp_path / "w"):
    with pytest.raises(errors.RunError, match="another run"):
      with files.locked(tmp_path / "w"):
        pass
  with files.locked(tmp_path / "w"):
    pass
