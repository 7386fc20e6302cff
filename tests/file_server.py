"""A web server on loopback that serves one file, with faults on request."""

import contextlib
import http.server
import threading


class Server:
  """Serves one file, counts requests, and can fail in chosen ways."""

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
