"""What the how-to pages tell users to type, typed: from top to bottom of each page.

Each page has a directory of its own, with real files of the names that it uses. A
command that names anything else fails, as it does for users.
"""

import contextlib
import gzip
import http.server
import importlib
import io
import json
import re
import shlex
import shutil
import subprocess
import threading
import urllib.request

import hub_server
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import skimage.data
from conftest import ROOT, TOY, TOY_ESTIMATOR, one_line, overrides
from jax.experimental.compilation_cache import compilation_cache as compiler
from PIL import Image

from fidelity_jax import cli, data, export, files, runs

# What the classifier's page trains, small. The classifier itself is what it is.
_SMALL = {
  **{k: v for k, v in (TOY | TOY_ESTIMATOR).items() if "classifier" not in k},
  "batch_size": 8,
  "epochs": 1,
  "warmup_epochs": 0,
  "model.ratio": 0.1,
  "ensemble.warmup_epochs": 0,
  "evaluation.rounds": 1,
  **{f"parents.{x}.batch_size": 8 for x in ("classifier", "restorer", "estimator")},
  "parents.classifier.warmup_epochs": 0,
}
del _SMALL["dataset.per_class"]

# What that of one's own does, but for the classifier's fields.
_OWN = {k: v for k, v in TOY.items() if "classifier.model" not in k}


@pytest.fixture(autouse=True)
def cached(compilation_cache):
  """Compiles once what several commands use, as the commands are in one process."""
  fields = {
    "jax_enable_compilation_cache": True,
    "jax_compilation_cache_dir": str(compilation_cache),
    "jax_persistent_cache_min_compile_time_secs": 0.2,
  }
  before = {name: getattr(jax.config, name) for name in fields}
  for settings in (fields, before):
    compiler.reset_cache()
    for name, value in settings.items():
      jax.config.update(name, value)
    if settings is fields:
      yield


def _save(path, pixels):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(pixels).save(path)


def _noisy(pixels, seed=0):
  noise = np.random.default_rng(seed).normal(0, 50, pixels.shape)
  return np.clip(pixels + noise, 0, 255).astype(np.uint8)


def _photograph(height, width):
  return skimage.data.astronaut()[:height, 60 : 60 + width]


def _labelled(root):
  """Makes a labelled folder of the demo's tiles of two classes, clean and noisy."""
  test = data.load(data.default_config("demo"), "test")
  for name in ("brick", "moon"):
    own = np.flatnonzero(test.labels == test.class_names.index(name))
    for i in own[:16]:
      pixels = test.picture(i).pixels()
      _save(root / "labelled" / name / f"{i}.png", pixels)
      _save(root / "labelled_noisy" / name / f"{i}.png", _noisy(pixels))


def _images(root, toy_estimated):
  """Makes what docs/images.md names; the workdir has an oracle's run, too."""
  from test_parity import TinyResNet, reference
  from test_port import save_torch
  from torch_reference import state_dict

  options = dict(num_convs=2, channels=4, ratio=2.0, ensemble=True, source="degraded")
  network = reference(TinyResNet(num_classes=2), 8, **options)
  save_torch(state_dict(network), root / "fgnic.pth")
  export.export(toy_estimated / "pretrained", root / "pretrained.onnx")
  (root / "runs").mkdir()
  (root / "runs" / "demo").symlink_to(toy_estimated)
  _save(root / "photo.png", _photograph(90, 120))
  _save(root / "photos" / "a.jpg", _photograph(64, 70))
  _save(root / "photos" / "more" / "b.png", _photograph(50, 50))
  _save(root / "clean" / "a.png", _photograph(60, 64))
  _save(root / "noisy" / "a.png", _noisy(_photograph(60, 64)))
  _labelled(root)


def _classifiers(root):
  """Makes what docs/classifiers.md names."""
  import torch
  from torch_reference import torchvision

  torch.manual_seed(0)
  network = torchvision().models.resnet18(num_classes=2)
  torch.save(network.state_dict(), root / "classifier.pth")
  (root / "names.txt").write_text("brick\nmoon\n")
  _save(root / "photo.png", _photograph(90, 120))
  _save(root / "photos" / "a.jpg", _photograph(64, 70))
  _labelled(root)
  (root / "unlabelled").mkdir()
  for path in (root / "labelled").glob("*/*"):
    shutil.copy(path, root / "unlabelled")


def _restore(root):
  """Makes what docs/restore.md names."""
  from test_port import prefixed, save_torch, sequential
  from torch_reference import state_dict

  for name, channels in (("denoiser.pth", 3), ("dncnn_25.pth", 1)):
    network = sequential(4, channels, False, True)
    save_torch(prefixed("model.", state_dict(network)), root / name)
  _save(root / "photos" / "colour.png", _photograph(40, 50))
  (root / "photos" / "inner").mkdir()
  deep = _photograph(30, 40)[..., 0].astype(np.uint16) * 257
  Image.fromarray(deep).save(root / "photos" / "inner" / "deep.tif")
  _save(root / "photos" / "inner" / "grey.png", _photograph(30, 40)[..., 0])
  _save(root / "clean" / "a.png", _photograph(60, 64))
  _save(root / "noisy" / "a.png", _noisy(_photograph(60, 64)))
  _save(root / "bsd68" / "1.png", _photograph(40, 50)[..., 0])


def _own(root):
  """Makes what docs/own_backbone.md names."""
  import torch
  from test_own_backbone import mynet

  _save(root / "clean" / "a.png", _photograph(60, 64))
  _save(root / "noisy" / "a.png", _noisy(_photograph(60, 64)))
  torch.save(mynet().state_dict(), root / "mynet.pth")


def _blocks(page):
  """Yields the kind of each block of code in a page, and its text."""
  text = (ROOT / "docs" / page).read_text()
  pattern = r"^```(\w+)\n(.*?)^```$|((?:^    \S[^\n]*\n)+)"
  for kind, fenced, indented in re.findall(pattern, text, re.MULTILINE | re.DOTALL):
    yield kind or "indented", fenced or indented


def _commands(block):
  """Yields the commands in a block, and what the page says that each prints."""
  block = block.replace("\\\n", " ")
  prompted = "$ " in block
  for part in re.split(r"^\$ ", block, flags=re.MULTILINE) if prompted else [block]:
    lines = [line.strip() for line in part.splitlines() if line.strip()]
    if prompted:
      yield from ((line, lines[1:]) for line in lines[:1])
    else:
      yield from ((line, []) for line in lines if not line.startswith("#"))


def _typed(line, monkeypatch, apart, small):
  """Runs a command in this process, or in one of its own; returns its exit status."""
  before, piped, line = line.rpartition("|")
  if piped:
    given = subprocess.run(before, shell=True, check=True, capture_output=True)
    assert given.stdout, before
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given.stdout)))
  words = shlex.split(line)
  if words[0] == "fidelity_jax":
    if words[1] in ("push", "pull"):
      return apart(*words[1:], program=("-m", "fidelity_jax"))
    return cli.main(words[1:])
  assert words[:2] == ["python", "-m"], line
  package, _, name = words[2].partition(".")
  assert package == "fidelity_jax", line
  if name == "main":
    # What the page sets comes last, and holds.
    return apart(words[3], *overrides(small), *words[4:])
  if name == "port":
    name = "port.__main__"
  module = importlib.import_module(f"fidelity_jax.{name or 'cli'}")
  return module.main(words[3:])


def _follow(
  page,
  root,
  monkeypatch,
  command,
  dry_run=False,
  small=_SMALL,
  before=None,
  env=None,
):
  """Runs everything in a page, from top to bottom, in a directory.

  Args:
    page: its name.
    root: the directory.
    monkeypatch: the fixture.
    command: the fixture; training is a process of its own, at toy size, and so is what
      speaks to the hub.
    dry_run: stop at the training, which is only planned.
    small: the fields that make training small.
    before: stop before the first command that has this in it.
    env: for those processes.

  Returns:
    Pairs of a command, or "python", and what it printed.
  """
  monkeypatch.chdir(root)
  monkeypatch.syspath_prepend(ROOT)

  def apart(*arguments, **kwargs):
    arguments += ("--dry_run",) * dry_run
    print(command(*arguments, cwd=root, check=0, env=env, **kwargs).stdout, end="")
    return 0

  done = []
  for kind, block in _blocks(page):
    if file := re.match(r"# (\w+\.py)\n", block):
      (root / file[1]).write_text(block)
      continue
    if kind == "python":
      printed = io.StringIO()
      with contextlib.redirect_stdout(printed):
        exec(compile(block, page, "exec"), {})
      done.append(("python", printed.getvalue()))
      continue
    for line, shown in _commands(block):
      if "fidelity_jax" not in line:
        continue
      if before is not None and before in line:
        return done
      printed, problems = io.StringIO(), io.StringIO()
      with (
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(problems),
      ):
        status = _typed(line, monkeypatch, apart, small)
      assert status == 0, f"{page}: {line}\n{problems.getvalue()}"
      assert not shown or printed.getvalue().split("\n")[:-1] == shown, line
      done.append((line, printed.getvalue()))
      if dry_run and "fidelity_jax.main" in line:
        return done
  return done


@pytest.mark.slow
def test_images(toy_estimated, tmp_path, monkeypatch, command):
  _images(tmp_path, toy_estimated)
  done = _follow("images.md", tmp_path, monkeypatch, command)
  commands = [line for line, _ in done if line != "python"]
  assert len(commands) == 10 and len(done) == 13
  for name in ("--out=", "--full", "| fid", "--clean=", "--as_is", "--format=csv"):
    assert any(name in line for line in commands), name
  # Where the page says that things are.
  for name in ("seen/photo.png.png", "seen_whole/more/b.png.png"):
    assert (tmp_path / name).stat().st_size > 5000
  for name in ("seen_oracle/predictions.jsonl", "runs/labelled_noisy/report.html"):
    assert (tmp_path / name).stat().st_size > 100
  printed = dict(done)
  (rows,) = [text for line, text in done if "--format=csv" in line]
  assert [row.split(",")[0] for row in rows.splitlines()] == [
    "file",
    "photos/a.jpg",
    "photos/more/b.png",
  ]
  assert "(1, 96, 96, 3) (1, 96, 96, 1)" in printed["python"]


def test_classifiers_up_to_the_training(tmp_path, monkeypatch, command):
  _classifiers(tmp_path)
  done = _follow("classifiers.md", tmp_path, monkeypatch, command, dry_run=True)
  assert len(done) == 3
  assert "classifier-resnet18" in done[2][1] and "calibration-pretrained" in done[2][1]


@pytest.mark.slow
def test_classifiers(tmp_path, monkeypatch, command):
  _classifiers(tmp_path)
  done = _follow("classifiers.md", tmp_path, monkeypatch, command)
  assert len(done) == 5
  # The network that was ported names its own classes, before and after.
  assert "brick" in done[1][1] or "moon" in done[1][1]
  (header, line) = done[4][1].splitlines()
  assert header.startswith("image") and line.startswith("photos/a.jpg")
  assert len(re.findall(r"brick|moon", line)) == 3
  assert (tmp_path / "seen_mine" / "a.jpg.png").stat().st_size > 5000


@pytest.mark.slow
def test_observing(tmp_path, monkeypatch, command):
  """What the page has trained has the records and the trace that it speaks of."""
  small = {
    "dataset.per_class": 12,
    "dataset.image_size": 32,
    "batch_size": 8,
    "model.depth": 2,
    "model.width": 4,
    "patch_size": 16,
    "patch_stride": 16,
    "evaluation.rounds": 1,
  }
  done = _follow("observing.md", tmp_path, monkeypatch, command, small=small)
  assert len(done) == 1
  (marker,) = (tmp_path / "runs" / "demo").glob("restorer-*/finished.json")
  stage = marker.parent
  records = files.read_json_lines(stage / "metrics.jsonl")
  intervals = files.read_json_lines(stage / "intervals.jsonl")
  assert len(records) == 2 and intervals[-1]["step"] == records[-1]["step"] >= 64
  page = (ROOT / "docs" / "observing.md").read_text()
  (shown,) = re.findall(r"^```json\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
  assert set(json.loads(shown)) <= set(records[1])
  named = re.findall(r"(?<=`)(?:speed|memory)/\w+(?=`)", page)
  # A CPU's peak and memory are not known.
  unknown = {name for name in named if name not in records[1]}
  assert unknown == {
    "speed/share_of_peak",
    "memory/device_bytes",
    "memory/device_peak_bytes",
  }
  assert set(named) - unknown < set(intervals[-1])
  (trace,) = stage.glob("plugins/profile/*/*.trace.json.gz")
  events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
  traced = [event["args"] for event in events if event.get("name") == "train"]
  assert sorted(int(args["step_num"]) for args in traced) == list(range(60, 65))


def test_restore(toy_run, tmp_path, monkeypatch, command):
  _restore(tmp_path)
  (tmp_path / "runs").mkdir()
  (tmp_path / "runs" / "demo").symlink_to(toy_run)
  done = _follow("restore.md", tmp_path, monkeypatch, command)
  assert len(done) == 6
  for name in ("restored/inner/deep.tif", "noisy25/colour.png", "runs/bsd68/1.png"):
    assert (tmp_path / name).is_file()


def _export(root, toy_estimated):
  """Makes what docs/export.md names."""
  (root / "runs").mkdir()
  (root / "runs" / "demo").symlink_to(toy_estimated)
  _save(root / "photo.png", _photograph(90, 120))
  _save(root / "photos" / "a.png", _photograph(64, 70))
  _save(root / "photos" / "grey.png", _photograph(40, 50)[..., 0])


def _served(monkeypatch):
  """Has servers answer one request, at a port that is free; returns the answers."""
  answers = []

  class Server(http.server.ThreadingHTTPServer):
    def __init__(self, address, handler):
      super().__init__((address[0], 0), handler)

    def serve_forever(self):
      thread = threading.Thread(target=super().serve_forever)
      thread.start()
      np.save(images := io.BytesIO(), np.full((2, 32, 32, 3), 0.5, np.float32))
      url = "http://{}:{}".format(*self.server_address)
      try:
        reply = urllib.request.urlopen(url, images.getvalue(), timeout=60).read()
      finally:
        self.shutdown()
        self.server_close()
        thread.join()
      answers.append(np.load(io.BytesIO(reply)))

  monkeypatch.setattr(http.server, "ThreadingHTTPServer", Server)
  return answers


def _check_files(root):
  """Checks what was made with the .jax file."""
  assert (root / "seen" / "photo.png.png").stat().st_size > 5000
  for name in ("a.png", "grey.png"):
    given, made = (
      np.asarray(Image.open(root / k / name)) for k in ("photos", "restored")
    )
    assert given.shape == made.shape and not np.array_equal(given, made)


@pytest.mark.slow
def test_export_up_to_directories(toy_estimated, tmp_path, monkeypatch, command):
  _export(tmp_path, toy_estimated)
  again = "export pretrained "
  done = _follow("export.md", tmp_path, monkeypatch, command, before=again)
  commands = [line.split()[1] for line, _ in done if line != "python"]
  assert commands == ["export", "predict", "restore", "export"] and len(done) == 5
  _check_files(tmp_path)


@pytest.mark.slow
def test_export(toy_estimated, tmp_path, monkeypatch, command):
  for name in ("jax2onnx", "onnxruntime", "huggingface_hub"):
    pytest.importorskip(name)
  _export(tmp_path, toy_estimated)
  with hub_server.serving() as hub:
    env = {
      "HF_ENDPOINT": hub.url,
      "HF_HOME": str(tmp_path / "hf"),
      "HF_HUB_DISABLE_XET": "1",
      "HF_TOKEN": hub_server.TOKEN,
    }
    answers = _served(monkeypatch)
    done = _follow("export.md", tmp_path, monkeypatch, command, env=env)
  commands = [line.split()[1] for line, _ in done if line != "python"]
  assert commands[4:] == ["export", "export", "push", "push", "pull"]
  assert len(done) == 12
  _check_files(tmp_path)
  (logits,) = answers
  assert logits.shape == (2, 16) and np.ptp(logits) > 0
  card = (tmp_path / "again.jax.md").read_text()
  assert card.startswith("---\nlicense: apache-2.0") and "awgn-0.5" in card
  branches = hub.repos["OWNER/NAME"]["branches"]
  assert hub.repos["OWNER/NAME"]["private"]
  assert "port.json" in branches["weights"] and "pretrained.jax" in branches["main"]
  pulled = tmp_path / "pulled" / "pretrained.jax"
  assert pulled.read_bytes() == (tmp_path / "pretrained.jax").read_bytes()
  assert done[-1][1].strip() == str(pulled)


def test_a_backbone_of_ones_own_up_to_the_training(tmp_path, monkeypatch, command):
  _own(tmp_path)
  monkeypatch.chdir(tmp_path)
  page = "own_backbone.md"
  done = _follow(page, tmp_path, monkeypatch, command, dry_run=True, small=_OWN)
  assert len(done) == 1 and "classifier-my_module.MyNet-clean-" in done[0][1]


@pytest.mark.slow
def test_a_backbone_of_ones_own(tmp_path, monkeypatch, command):
  import torch
  from test_own_backbone import mynet

  _own(tmp_path)
  done = _follow("own_backbone.md", tmp_path, monkeypatch, command, small=_OWN)
  assert len(done) == 8
  of_run, of_file, of_directory = (done[i][1] for i in (1, 3, 5))
  assert of_run == of_directory and "noisy/a.png" in of_run
  # A file does not say what the classifier alone answers.
  name, share, answer = of_file.splitlines()[1].split()[:3]
  assert of_run.splitlines()[1].split()[:3] == [name, share, answer]
  # Everything that the demo's networks get.
  (marker,) = (tmp_path / "runs" / "own").glob("oracle-*/results.json")
  rows = json.loads(marker.read_text())["rows"]
  assert {row["backbone"] for row in rows} == {None, "my_module:MyNet"}
  assert any(row["method"] == "oracle" and row["ensemble"] for row in rows)
  assert "my_module:MyNet" in (marker.parent / "report.html").read_text()
  begun = {
    p.parent.name: p.read_text() for p in marker.parents[1].glob("*/config.json")
  }
  (classifier,) = [text for name, text in begun.items() if "classifier-" in name]
  code = files.sha256(tmp_path / "my_module.py")
  made_of = json.loads(classifier)["made_of"]["model"]
  assert (made_of["code"], made_of["width"]) == (code, 24)
  # The network that was ported is PyTorch's.
  run = runs.find(tmp_path / "ported")
  images = np.random.default_rng(0).random((2, 32, 32, 3), np.float32)
  network = run.method.classifier
  x = network.normalize(jnp.asarray(images))
  found, _ = network.apply(run.variables["classifier"], x)
  with torch.no_grad():
    want = mynet()(torch.from_numpy(np.array(x)).permute(0, 3, 1, 2))
  np.testing.assert_allclose(found, want, atol=1e-4)
  # Edited, it is another network.
  with open(tmp_path / "my_module.py", "a") as file:
    file.write("# Edited.\n")
  first, *rest = shlex.split(done[0][0])[3:]
  flags = [first, *overrides(_OWN), *rest, "--dry_run"]
  again = command(*flags, cwd=tmp_path, check=0).stdout
  states = {line.split("-")[0]: line.split()[1] for line in again.splitlines()[1:5]}
  assert states == {
    "classifier": "to",
    "restorer": "finished,",
    "calibration": "to",
    "ensemble": "to",
  }
  arguments = ["predict", "runs/own/oracle", "noisy", "--clean=clean"]
  refused = command(*arguments, program=("-m", "fidelity_jax"), cwd=tmp_path)
  assert refused.returncode == 2
  assert "is not the file that 'my_module:MyNet'" in one_line(refused.stderr)
