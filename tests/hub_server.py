"""A stand-in for Hugging Face's hub on loopback: what pushing and pulling speaks to."""

import base64
import contextlib
import hashlib
import http.server
import json
import threading
import urllib.parse

import yaml

TOKEN = "hf_" + "x" * 34


class Hub:
  """Repositories in memory; files of 1 kB and more travel by LFS.

  Attributes:
    repos: by name, whether it is private, or asks for permission ("gated"), and its
      files by name, of each branch.
    requests: lines such as "POST /api/repos/create".
  """

  def __init__(self):
    self.repos, self.blobs, self.requests = {}, {}, []
    outer = self

    class Handler(http.server.BaseHTTPRequestHandler):
      protocol_version = "HTTP/1.1"

      def do_GET(self):
        outer.answer(self, "GET")

      def do_HEAD(self):
        outer.answer(self, "HEAD")

      def do_POST(self):
        outer.answer(self, "POST")

      def do_PUT(self):
        outer.answer(self, "PUT")

      def log_message(self, *args):
        del args

    self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

  def answer(self, handler, method):
    path = urllib.parse.unquote(urllib.parse.urlparse(handler.path).path)
    self.requests.append(f"{method} {path}")
    length = int(handler.headers.get("Content-Length") or 0)
    body = handler.rfile.read(length)
    allowed = handler.headers.get("Authorization") == f"Bearer {TOKEN}"
    status, headers, content = self.found(method, path, body, allowed)
    if not isinstance(content, bytes):
      content = json.dumps(content).encode()
      headers = {"Content-Type": "application/json"} | headers
    handler.send_response(status)
    for name, value in headers.items():
      handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    if method != "HEAD":
      handler.wfile.write(content)

  def found(self, method, path, body, allowed):
    """Returns status, headers and content."""
    parts = path.strip("/").split("/")
    if parts[0] == "lfs":
      self.blobs[parts[1]] = body
      return 200, {}, b""
    if method == "POST" and not allowed:
      return 401, {}, {"error": "Invalid username or password."}
    if path == "/api/repos/create":
      asked = json.loads(body)
      name = f"{asked['organization']}/{asked['name']}"
      if name in self.repos:
        url = f"{self.url}/{name}"
        return 409, {}, {"error": "You already created this repo", "url": url}
      private = asked.get("visibility") == "private"
      self.repos[name] = {"private": private, "branches": {"main": {}}}
      return 200, {}, {"url": f"{self.url}/{name}"}
    if path == "/api/validate-yaml":
      _, told, _ = json.loads(body)["content"].split("---\n", 2)
      complaints = [] if isinstance(yaml.safe_load(told), dict) else [{"message": "no"}]
      return 200, {}, {"errors": complaints, "warnings": []}
    if path.endswith("/info/lfs/objects/batch"):
      return 200, {}, self.lfs(json.loads(body))
    api = parts[:2] == ["api", "models"]
    name = "/".join(parts[2:4] if api else parts[:2])
    repo, rest = self.repos.get(name), parts[4 if api else 2 :]
    if repo is None or (repo["private"] and not allowed):
      code = {"X-Error-Code": "RepoNotFound"}
      return 404, code, {"error": "Repository not found"}
    if repo.get("gated"):
      return 403, {"X-Error-Code": "GatedRepo"}, {"error": "Access is restricted"}
    if rest[:1] == ["branch"]:
      repo["branches"].setdefault("/".join(rest[1:]), {})
      return 200, {}, {}
    revision = rest[1] if len(rest) > 1 else "main"
    commits = {self.commit(name, b): b for b in repo["branches"]}
    branch = commits.get(revision, revision)
    if branch not in repo["branches"]:
      code = {"X-Error-Code": "RevisionNotFound"}
      return 404, code, {"error": "Invalid rev id"}
    held, commit = repo["branches"][branch], self.commit(name, branch)
    if rest[:1] == ["preupload"]:
      return 200, {}, self.preupload(json.loads(body), commit)
    if rest[:1] == ["commit"]:
      self.take(held, body)
      commit = self.commit(name, branch)
      url = f"{self.url}/{name}/commit/{commit}"
      return 200, {}, {"commitUrl": url, "commitOid": commit, "success": True}
    if rest[:1] == ["tree"]:
      return 200, {}, [self.described(k, v) for k, v in held.items()]
    if rest[:1] == ["resolve"]:
      content = held.get("/".join(rest[2:]))
      if content is None:
        return 404, {"X-Error-Code": "EntryNotFound"}, {"error": "Entry not found"}
      etag = hashlib.sha256(content).hexdigest()
      headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit}
      return 200, headers | {"Accept-Ranges": "bytes"}, content
    siblings = [{"rfilename": k, "size": len(v)} for k, v in held.items()]
    told = {"id": name, "modelId": name, "sha": commit, "siblings": siblings}
    return 200, {}, told | {"private": repo["private"], "tags": [], "downloads": 0}

  def commit(self, name, branch):
    held = self.repos[name]["branches"][branch]
    content = repr([name, branch, sorted(held.items())]).encode()
    return hashlib.sha1(content).hexdigest()

  def described(self, name, content):
    oid = hashlib.sha1(content).hexdigest()
    return {"type": "file", "oid": oid, "size": len(content), "path": name}

  def preupload(self, asked, commit):
    mode = lambda size: "lfs" if size >= 1000 else "regular"
    return {
      "commitOid": commit,
      "files": [
        {
          "path": one["path"],
          "uploadMode": mode(one["size"]),
          "shouldIgnore": False,
          "oid": None,
        }
        for one in asked["files"]
      ],
    }

  def lfs(self, asked):
    upload = lambda oid: {"upload": {"href": f"{self.url}/lfs/{oid}", "header": {}}}
    return {
      "transfer": "basic",
      "objects": [
        {"oid": o["oid"], "size": o["size"], "actions": upload(o["oid"])}
        for o in asked["objects"]
      ],
    }

  def take(self, held, body):
    """Takes a commit: a JSON object a line."""
    for line in body.splitlines():
      one = json.loads(line)
      value = one["value"]
      if one["key"] == "file":
        assert value["encoding"] == "base64"
        held[value["path"]] = base64.b64decode(value["content"])
      elif one["key"] == "lfsFile":
        blob = self.blobs[value["oid"]]
        assert hashlib.sha256(blob).hexdigest() == value["oid"]
        held[value["path"]] = blob


@contextlib.contextmanager
def serving():
  hub = Hub()
  thread = threading.Thread(target=hub.server.serve_forever, daemon=True)
  thread.start()
  try:
    yield hub
  finally:
    hub.server.shutdown()
    hub.server.server_close()
    thread.join()
