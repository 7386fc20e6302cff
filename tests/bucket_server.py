"""A Google Cloud Storage on loopback: an emulator from PyPI, in this process.

It keeps objects in memory. Three things it does not have are added: the condition that
an object must not exist yet, without which there are no locks; buckets that may not be
read; and that an upload which breaks off makes no object.
"""

import contextlib
import http
import http.server
import socket
from urllib.parse import unquote

from gcp_storage_emulator import server
from gcp_storage_emulator.handlers import objects

_FORBIDDEN = "forbidden"


class Bucket:
  """One bucket, and what was asked of its server.

  Attributes:
    address: gs:// and the bucket's name.
    endpoint: of the server, for STORAGE_EMULATOR_HOST.
    requests: lines such as "GET /storage/v1/b/photos/o".
    refuses: how many more requests are served before all are forbidden, None: all are.
  """

  def __init__(self, storage, endpoint, name):
    self.address, self.endpoint, self.name = f"gs://{name}", endpoint, name
    self.requests, self.refuses = [], None
    self._storage = storage

  def put(self, name, content):
    """Makes or replaces an object."""
    resource = objects._make_object_resource(
      self.endpoint, self.name, name, "application/octet-stream", str(len(content))
    )
    resource = objects._checksums(content, resource)
    self._storage.create_file(self.name, name, content, resource)

  def put_folder(self, folder, name):
    """Makes objects of all files below a folder."""
    for path in sorted(folder.rglob("*")):
      if path.is_file():
        key = f"{name}/{path.relative_to(folder).as_posix()}"
        self.put(key, path.read_bytes())

  def get(self, name):
    """Returns an object's content."""
    return self._storage.get_file(self.name, name)

  def delete(self, name):
    """Removes an object."""
    self._storage.delete_file(self.name, name)

  def names(self):
    """Returns the names of all objects."""
    return sorted(self._storage.objects.get(self.name, {}))

  def downloads(self):
    """Returns the names of the objects that were read, in order."""
    read = [line for line in self.requests if "alt=media" in line]
    return [unquote(line.split("/o/")[1].split("?")[0]) for line in read]


@contextlib.contextmanager
def serving(monkeypatch, name="photos"):
  """Yields a bucket that gs:// leads to, here and in commands that tests start."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]

  class Handler(server.RequestHandler):
    def handle_one(self, method):
      bucket.requests.append(f"{self.command} {self.path}")
      over = bucket.refuses == 0
      if bucket.refuses:
        bucket.refuses -= 1
      if over or f"/b/{_FORBIDDEN}" in self.path:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_error(http.HTTPStatus.FORBIDDEN)
        return
      server.Router(self).handle(method)

    def do_GET(self):
      self.handle_one(server.GET)

    def do_POST(self):
      self.handle_one(server.POST)

    def do_DELETE(self):
      self.handle_one(server.DELETE)

  def whole(request):
    """Reads a body; of one that breaks off, as where a client is killed, nothing."""
    length = request.headers.get("Content-Length")
    body = read(request)
    if length and len(body) < int(length):
      raise ConnectionAbortedError("the client is gone")
    return body

  read = server._read_raw_data
  monkeypatch.setattr(server, "_read_raw_data", whole)
  upload = objects._multipart_upload

  def unless_there(request, response, storage):
    key = request.data["meta"].get("name")
    there = key in storage.objects.get(request.params["bucket_name"], {})
    if request.query.get("ifGenerationMatch") == ["0"] and there:
      response.status = http.HTTPStatus.PRECONDITION_FAILED
      return
    upload(request, response, storage)

  monkeypatch.setattr(server, "RequestHandler", Handler)
  monkeypatch.setattr(objects, "_multipart_upload", unless_there)
  for variable in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
    monkeypatch.setenv(variable, f"http://127.0.0.1:{port}")
  # Clients open many connections at once.
  monkeypatch.setattr(http.server.HTTPServer, "request_queue_size", 128)
  # Whether buckets are of the hierarchical kind is asked by gRPC, which it has not.
  monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
  running = server.create_server("127.0.0.1", port, in_memory=True, default_bucket=name)
  with running:
    bucket = Bucket(running._storage, f"http://127.0.0.1:{port}", name)
    yield bucket
