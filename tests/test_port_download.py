"""Published weights: downloaded once, whole, checked; from a server on loopback."""

import contextlib
import hashlib
import http.server
import os
import threading

import numpy as np
import pytest
import safetensors.numpy

from fidelity_jax import errors, port
from fidelity_jax.port import downloading

CONTENT = np.random.default_rng(0).bytes(3 << 20)


def named(content: bytes, suffix: str = "pth") -> str:
  return f"net-{hashlib.sha256(content).hexdigest()[:8]}.{suffix}"


class Server:
  """Serves one file; counts requests and can misbehave."""

  def __init__(self, content: bytes):
    self.content, self.ranges = content, []
    self.break_after = None
    self.honour_ranges = True
    outer = self

    class Handler(http.server.BaseHTTPRequestHandler):
      def do_GET(self):
        wanted = self.headers.get("Range")
        outer.ranges.append(wanted)
        start = 0
        if wanted and outer.honour_ranges:
          start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        if start >= len(outer.content):
          self.send_error(416)
          return
        self.send_response(206 if start else 200)
        body = outer.content[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: outer.break_after])

      def log_message(self, *args):
        del args

    self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    self.url = f"http://127.0.0.1:{self.server.server_address[1]}/"


@contextlib.contextmanager
def serving(content: bytes):
  server = Server(content)
  thread = threading.Thread(target=server.server.serve_forever, daemon=True)
  thread.start()
  try:
    yield server
  finally:
    server.server.shutdown()
    server.server.server_close()
    thread.join()


def test_downloads_once_and_shows_progress(tmp_path, capsys):
  name, folder = named(CONTENT), tmp_path / "cache"
  with serving(CONTENT) as server:
    path = downloading.fetch(server.url + name, folder)
    assert path == folder / name and path.read_bytes() == CONTENT
    assert downloading.fetch(server.url + name, folder) == path
    assert server.ranges == [None]
  assert f"download {name}  3/3" in capsys.readouterr().err
  assert [p.name for p in folder.iterdir() if not p.name.startswith(".")] == [name]


def test_resumes_where_a_transfer_broke_off(tmp_path):
  name = named(CONTENT)
  with serving(CONTENT) as server:
    server.break_after = 1 << 20
    with pytest.raises(errors.RunError, match=r"broke off at 1048576 of 3145728 bytes"):
      downloading.fetch(server.url + name, tmp_path)
    assert not (tmp_path / name).exists()
    server.break_after = None
    path = downloading.fetch(server.url + name, tmp_path)
    assert server.ranges == [None, "bytes=1048576-"]
  assert path.read_bytes() == CONTENT


def test_starts_again_where_the_server_cannot_resume(tmp_path):
  name = named(CONTENT)
  (tmp_path / f"{name}.part").write_bytes(CONTENT[:1000])
  with serving(CONTENT) as server:
    server.honour_ranges = False
    path = downloading.fetch(server.url + name, tmp_path)
    assert server.ranges == ["bytes=1000-"]
  assert path.read_bytes() == CONTENT


def test_takes_a_part_that_was_whole_already(tmp_path):
  name = named(CONTENT)
  (tmp_path / f"{name}.part").write_bytes(CONTENT)
  with serving(CONTENT) as server:
    assert downloading.fetch(server.url + name, tmp_path).read_bytes() == CONTENT


def test_refuses_a_wrong_checksum(tmp_path):
  name = named(CONTENT)
  with serving(CONTENT[::-1]) as server:
    with pytest.raises(errors.RunError, match=r"SHA-256 starts \w{8}, that of http.*"):
      downloading.fetch(server.url + name, tmp_path)
  assert not (tmp_path / name).exists()
  assert not (tmp_path / f"{name}.part").exists()


def test_notices_a_cached_file_that_was_damaged(tmp_path):
  name = named(CONTENT)
  (tmp_path / name).write_bytes(CONTENT[:-1])
  with serving(CONTENT) as server:
    with pytest.raises(errors.RunError, match="was damaged and is deleted"):
      downloading.fetch(server.url + name, tmp_path)
    assert downloading.fetch(server.url + name, tmp_path).read_bytes() == CONTENT


def test_without_a_network_tells_what_to_put_where(tmp_path, monkeypatch):
  with serving(CONTENT) as server:
    url = server.url  # Nobody listens there any more afterwards.
  monkeypatch.setattr(downloading, "BASE_URL", url)
  monkeypatch.setenv("FIDELITY_JAX_CACHE", str(tmp_path))
  with pytest.raises(errors.RunError) as caught:
    port.load("torchvision/resnet50")
  message = str(caught.value)
  for part in (f"{url}resnet50-0676ba61.pth", "starts 0676ba61", str(tmp_path)):
    assert part in message
  assert "\n" not in message


def test_a_file_that_the_server_lacks(tmp_path):
  with serving(b"") as server:
    with pytest.raises(errors.RunError, match=r"cannot download .*: get the file on"):
      downloading.fetch(server.url + named(CONTENT), tmp_path)
  assert not (tmp_path / f"{named(CONTENT)}.part").exists()


def test_a_file_dropped_into_the_cache_is_used(tmp_path):
  path = tmp_path / named(CONTENT)
  path.write_bytes(CONTENT)
  url = "http://127.0.0.1:9/"  # No server is needed.
  assert downloading.fetch(url + path.name, tmp_path) == path


def test_a_name_becomes_a_network(tmp_path, monkeypatch):
  rng = np.random.default_rng(0)
  state = {"model.0.weight": rng.normal(size=(4, 1, 3, 3)).astype(np.float32)}
  state["model.2.weight"] = rng.normal(size=(1, 4, 3, 3)).astype(np.float32)
  content = safetensors.numpy.save(state)
  name = named(content, "safetensors")
  monkeypatch.setenv("FIDELITY_JAX_CACHE", str(tmp_path / "cache"))
  monkeypatch.setitem(downloading.FILES, "torchvision/resnet50", name)
  with serving(content) as server:
    monkeypatch.setattr(downloading, "BASE_URL", server.url)
    part = port.load_part("torchvision/resnet50", "restorer")
  assert part.config["depth"] == 2
  assert os.listdir(tmp_path / "cache") != []


def test_names():
  with pytest.raises(errors.UsageError, match=r"mean 'torchvision/resnet50'"):
    port.load("torchvision/resnet5O")
  for file in downloading.FILES.values():
    assert len(downloading.expected_checksum(file)) == 8
