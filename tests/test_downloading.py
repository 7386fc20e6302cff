"""Downloads: once, whole, resumed, checked; from a server on loopback."""

import hashlib
import pathlib
import threading

import numpy as np
import pytest
from file_server import serving

from fidelity_jax import downloading, errors

CONTENT = np.random.default_rng(0).bytes(3 << 20)
NAME = "photographs.tar"


def checksum(content: bytes, algorithm: str = "sha256") -> str:
  """Returns what `fetch` is to expect: eight digits of a SHA-256, or a whole MD5."""
  digits = hashlib.new(algorithm, content).hexdigest()
  return f"{algorithm}:{digits[:8] if algorithm == 'sha256' else digits}"


def fetch(server, folder: pathlib.Path, algorithm: str = "sha256") -> pathlib.Path:
  return downloading.fetch(server.url + NAME, folder, checksum(CONTENT, algorithm))


@pytest.mark.parametrize("algorithm", ["sha256", "md5"])
def test_downloads_once_and_shows_progress(tmp_path, capsys, algorithm):
  folder = tmp_path / "new" / "cache"
  with serving(CONTENT) as server:
    path = fetch(server, folder, algorithm)
    assert path == folder / NAME and path.read_bytes() == CONTENT
    assert fetch(server, folder, algorithm) == path
    assert server.ranges == [None]
  assert f"download {NAME}  3/3" in capsys.readouterr().err
  assert [p.name for p in folder.iterdir() if not p.name.startswith(".")] == [NAME]


def test_resumes_where_a_transfer_broke_off(tmp_path):
  with serving(CONTENT) as server:
    server.break_after = 1 << 20
    with pytest.raises(errors.RunError, match=r"broke off at 1048576 of 3145728 bytes"):
      fetch(server, tmp_path)
    assert not (tmp_path / NAME).exists()
    server.break_after = None
    path = fetch(server, tmp_path)
    assert server.ranges == [None, "bytes=1048576-"]
  assert path.read_bytes() == CONTENT


def test_starts_again_where_the_server_cannot_resume(tmp_path):
  (tmp_path / f"{NAME}.part").write_bytes(CONTENT[:1000])
  with serving(CONTENT) as server:
    server.honour_ranges = False
    path = fetch(server, tmp_path)
    assert server.ranges == ["bytes=1000-"]
  assert path.read_bytes() == CONTENT


def test_takes_a_part_that_was_whole_already(tmp_path):
  (tmp_path / f"{NAME}.part").write_bytes(CONTENT)
  with serving(CONTENT) as server:
    assert fetch(server, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize(
  ("algorithm", "words"),
  [("sha256", r"SHA-256 starts \w{8}, not \w{8};"), ("md5", r"MD5 starts \w{32}, not")],
)
def test_refuses_a_wrong_checksum(tmp_path, algorithm, words):
  with serving(CONTENT[::-1]) as server:
    with pytest.raises(errors.RunError, match=words) as caught:
      fetch(server, tmp_path, algorithm)
    assert server.url + NAME in str(caught.value)
  assert not (tmp_path / NAME).exists()
  assert not (tmp_path / f"{NAME}.part").exists()


def test_names_a_file_that_was_damaged_and_keeps_it(tmp_path):
  """The user may have put it there, so it is not deleted."""
  path = tmp_path / NAME
  path.write_bytes(CONTENT[:-1])
  with serving(CONTENT) as server:
    with pytest.raises(errors.RunError, match=r"is damaged: its SHA-256 .* delete it"):
      fetch(server, tmp_path)
    assert path.exists() and not server.ranges
    path.unlink()
    assert fetch(server, tmp_path).read_bytes() == CONTENT


def test_without_a_network_tells_what_to_put_where(tmp_path):
  with serving(CONTENT) as server:
    url = server.url + NAME  # The port is closed afterwards.
  with pytest.raises(errors.RunError) as caught:
    downloading.fetch(url, tmp_path, "sha256:0676ba61", ", or a copy of it")
  message = str(caught.value)
  for part in (url, "SHA-256 starts 0676ba61", f"into {tmp_path}, or a copy of it"):
    assert part in message
  assert "\n" not in message


def test_a_file_that_the_server_lacks(tmp_path):
  with serving(b"") as server:
    with pytest.raises(errors.RunError, match=r"cannot download .*: get the file on"):
      fetch(server, tmp_path)
  assert not (tmp_path / f"{NAME}.part").exists()


def test_a_file_dropped_into_the_folder_is_used(tmp_path):
  path = tmp_path / NAME
  path.write_bytes(CONTENT)
  url = "http://127.0.0.1:9/"  # No server is needed.
  assert downloading.fetch(url + NAME, tmp_path, checksum(CONTENT)) == path
  # Nor is a folder that can be written.
  assert [p.name for p in tmp_path.iterdir()] == [NAME]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
  (tmp_path / "file").write_text("")
  url, folder = f"http://127.0.0.1:9/{NAME}", tmp_path / "file" / "cache"
  with pytest.raises(errors.RunError, match=r"cannot read or write .*file/cache/"):
    downloading.fetch(url, folder, "md5:00")


def test_those_who_want_the_same_file_take_turns(tmp_path):
  paths = []
  with serving(CONTENT) as server:
    threads = [
      threading.Thread(target=lambda: paths.append(fetch(server, tmp_path)))
      for _ in range(4)
    ]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    assert server.ranges == [None]
  assert paths == [tmp_path / NAME] * 4
  assert paths[0].read_bytes() == CONTENT
