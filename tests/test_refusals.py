"""What a user can get wrong: each ends in one line, what, where and what to do.

The commands run in this process, which takes a fraction of a second each; what belongs
to a process of its own (streams, signals, limits) is in test_process.py.
"""

import json
import os
import pathlib
import pickle
import shutil
import sys

import numpy as np
import pytest
import safetensors.numpy
from conftest import ROOT, TOY, overrides
from test_data_images import encoded, photograph

from fidelity_jax import gallery, main, port
from fidelity_jax.models.calibration import MODULES
from fidelity_jax.port.__main__ import main as port_main

DEMO = "--config=configs/oracle.py:demo"
PRETRAINED = "--config=configs/pretrained.py:demo"
ESTIMATOR = "--config=configs/estimator.py:demo"
BLUR = "--config.degradation.kind=gaussian_blur"
MOTION = "--config.degradation.kind=motion_blur"


@pytest.fixture
def refused(capsys, monkeypatch, tmp_path):
  """Returns a function that runs the command and returns its one line."""
  monkeypatch.chdir(ROOT)
  monkeypatch.setenv("FIDELITY_JAX_CACHE", str(tmp_path / "cache"))

  def run(arguments, status, words, command=main.main):
    capsys.readouterr()
    # A process loads one config; another would find the names of the last in it.
    sys.modules.pop("config_config", None)
    if command is main.main:
      arguments = ["fidelity_jax.main", *map(str, arguments)]
    assert command(list(map(str, arguments))) == status, capsys.readouterr().err
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err
    *before, line = captured.err.splitlines()
    assert line.startswith("fidelity_jax: ")
    assert not any(other.startswith("fidelity_jax: ") for other in before)
    assert "a defect" not in line
    assert 20 < len(line) < 900
    for word in [words] if isinstance(words, str) else words:
      assert word in line
    return line

  return run


# Of one field of the demo's oracle experiment: its path, a value, words of the line.
FIELDS = [
  *(("seed", v, "config.seed") for v in (-1, 2**32, 2**63, 2**70, "1e3", "x", None)),
  ("seed", "", "seed"),
  ("parents.classifier.seed", -1, "config.parents.classifier.seed = -1"),
  ("dataset.split_seed", -1, "config.dataset.split_seed = -1 must be a whole number"),
  ("dataset.split_seed", 2**32, "split_seed"),
  *(("epochs", v, "epochs") for v in (-1, "1e20", 10**9, "many", 2.5)),
  ("warmup_epochs", -1, "warmup_epochs"),
  ("warmup_epochs", 81, "must be at most epochs (80)"),
  ("ensemble.epochs", -1, "config.ensemble.epochs = -1"),
  ("ensemble.warmup_epochs", 7, "must be at most epochs (6)"),
  *(("learning_rate", v, "learning_rate") for v in (0, -1, "inf", "nan", "1e40", "a")),
  ("ensemble.learning_rate", "inf", "config.ensemble.learning_rate = inf"),
  ("parents.restorer.learning_rate", "inf", "parents.restorer.learning_rate = inf"),
  *(("batch_size", v, "batch_size") for v in (0, -3, 2.5, 10**7)),
  ("batch_size", 10_000, "larger than the training set of 447: lower batch_size"),
  ("parents.restorer.batch_size", 3, "use a multiple of 4"),
  ("validation_rounds", 0, "validation_rounds"),
  *(("checkpoint_seconds", v, "checkpoint_seconds") for v in (0, "nan", "inf")),
  *(("model.ratio", v, "model.ratio") for v in (0, -1, "1e30", "nan")),
  ("model.ratio", 1e-9, "hidden units"),
  ("model.channels", 0, "model.channels = 0 must be"),
  ("model.num_convs", 4, "from 2 to 3"),
  ("model.resize", "bilinaer", "did you mean 'bilinear'"),
  ("model.residual", "maybe", "residual"),
  ("model.weights", "torchvision", "torchvision has no weights for it"),
  ("fidelity.map", "l3", "or 'l1'?"),
  ("fidelity.map", None, "config.fidelity.map = None must be"),
  ("fidelity.source", "guess", "fidelity.source"),
  ("fidelity.source", "pretrained", "use configs/pretrained.py"),
  ("fidelity.source", "end_to_end", "use configs/end_to_end.py"),
  ("fidelity.estimator_input", "both", "estimator_input"),
  *(("label_smoothing", v, "label_smoothing") for v in (1, -0.1, "nan")),
  ("precision", "float16", "did you mean 'bfloat16' or 'float32'"),
  ("optimizer", "lamb", "optimizer"),
  ("kind", "calibraton", "did you mean 'calibration'"),
  ("kind", "ensemble", "config.kind = 'ensemble' is not possible"),
  ("kind", None, "config.kind = None is not possible"),
  ("kind", "restorer", "there is no such field"),
  ("rematerialize", 2, "rematerialize"),
  ("model", None, "it has fields; set those"),
  ("model", 3, "config.model"),
  ("parents", None, "it has fields"),
  ("nofield", None, "no field 'nofield'"),
  ("parents.restorer.model.dept", None, "did you mean 'depth'"),
  ("parents.restorer.model.dept", 3, "depth"),
  ("epoch", 3, "epochs"),
  ("degradation.kind", "awng", "did you mean 'awgn'"),
  ("degradation.kind", None, "no kind given"),
  ("degradation.level", -0.1, "-0.1 is negative"),
  *(("degradation.level", v, "level") for v in ("abc", "float('nan')", "[]", "{}")),
  ("degradation.level", "[0.1, 'x']", "'x' is not a number"),
  ("degradation.level", "1e999", "not finite"),
  ("degradation.level", "1e39", "sigma 1e+39 is above 1e+06"),
  ("degradation.mixture", "some", "mixture='some' is unknown"),
  ("degradation.vary", "3d", "vary='3d' is unknown"),
  ("degradation.orientation", 10.0, "orientation belongs to motion_blur"),
  ("parents.restorer.degradation.level", "(0.5, 0.1)", "the wrong way round"),
  ("dataset.name", "demoo", "did you mean demo"),
  ("dataset.name", None, "config.dataset.name = None must be a text"),
  ("dataset.name", "folder", "needs dataset.path"),
  *(("dataset.image_size", v, "image_size") for v in (0, -5, 100_000, "big")),
  ("dataset.image_size", 3, ("3", "at most image_size")),
  *(("dataset.fractions", v, "fractions") for v in ("abc", "(1,1,1)", "(.5,.5)", "7")),
  ("dataset.fractions", "(0.5, -0.1, 0.1)", "fractions"),
  ("dataset.fractions", "(0.5, 0.5, 0.0)", "no usable image for 'test'"),
  ("dataset.fractions", "(0.5, 0.0, 0.5)", "no usable image for 'validation'"),
  ("dataset.fractions", "(0.0, 0.5, 0.5)", "no usable image for 'train'"),
  *(("dataset.counts", v, "counts") for v in ("(1,2)", "(-1,-1,1)", "(-2,1,1)", "x")),
  *(("dataset.crop_area", v, "crop_area") for v in ("(0,1)", "(.5,.1)", "(.5,2)")),
  ("dataset.crop_aspect", "(1,)", "crop_aspect"),
  ("dataset.cache", "tape", "None or one of 'ram', 'disk'"),
  ("dataset.workers", -1, "workers"),
  ("dataset.max_pixels", 0, "max_pixels"),
  ("dataset.max_pixels", 100, "64x64 pixels are more than dataset.max_pixels=100"),
  ("dataset.per_class", -1, "per_class"),
  ("dataset.split_file", "/no/such.json", "cannot read /no/such.json"),
  ("dataset.split_file", "~nosuchuser/x", "no such user"),
  ("dataset.tfds_splits", "('train',)", "tfds_splits"),
  ("parents.classifier.model.name", "resnet51", "did you mean 'resnet50'"),
  *(
    ("parents.classifier.model.stage_sizes", v, "stage_sizes")
    for v in ("(0,)", "(-1,)", "3", "()", "abc", "(1,1,1,1,1,1,1,1,1)", "(1.5,)")
  ),
  ("parents.classifier.model.width", 0, "model.width = 0"),
  ("parents.classifier.model.width", 60_000, "GiB"),
  ("parents.classifier.model.block", "thick", "block"),
  ("parents.classifier.model.transform_input", True, "has no such field"),
  ("parents.classifier.source", "restored", "parents.restorer is missing"),
  ("parents.classifier.source", "noisy", "source"),
  ("parents.classifier.model.weights", "/no/such.pth", "there is no file"),
  ("parents.classifier.model.weights", "", "None or a text that is not empty"),
  ("parents.classifier.model.weights", "x" * 300, "there is no file"),
  ("parents.classifier.model.weights", "~nosuchuser/a.pth", "no such user"),
  ("parents.classifier.model.weights", "torchvision", "no published weights"),
  ("parents.classifier.model.new_head", None, "new_head"),
  ("parents.classifier.batch_size", 9999, "9999"),
  ("parents.restorer.model.depth", 1, "model.depth = 1"),
  ("parents.restorer.model.depth", 100_000, "model.depth"),
  ("parents.restorer.patch_size", 65, "at most image_size (64)"),
  ("parents.restorer.patch_stride", 0, "patch_stride"),
  ("evaluation.rounds", 0, "evaluation.rounds = 0"),
  ("evaluation.batch_size", 0, "evaluation.batch_size = 0"),
  *(("evaluation.examples", v, "evaluation.examples") for v in (0, 100_000)),
]


@pytest.mark.parametrize(("field", "value", "words"), FIELDS)
def test_fields(refused, tmp_path, field, value, words):
  workdir = tmp_path / "w"
  arguments = [DEMO, f"--workdir={workdir}", f"--config.{field}={value}"]
  refused(arguments, 2, words)
  assert not list(workdir.glob("*-*"))


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    ([], "--config is missing"),
    (["--config"], "config"),
    (["--config="], "--config is missing"),
    (["--config=configs/nothing.py"], "'configs/nothing.py' does not exist"),
    (["--config=configs"], "no regular file"),
    (["--config=README.md"], "README.md, line 6"),
    (["--config=configs/oracle.py:tiny"], "no variant 'tiny'"),
    ([DEMO, "more"], "unexpected argument 'more'"),
    ([DEMO, "--workdri=x"], "workdri"),
    ([DEMO, "--config.fidelity"], "fidelity"),
    ([PRETRAINED, "--config.fidelity.source=oracle"], "use configs/oracle.py"),
    (
      [PRETRAINED, "--config.parents.estimator.fidelity.map=l2"],
      "must be that of the method",
    ),
    ([DEMO, *(f"--config.model.{m}=False" for m in MODULES)], "nothing to train"),
    ([DEMO, BLUR, "--config.degradation.kernel_size=2"], "is not odd"),
    ([DEMO, BLUR, "--config.degradation.kernel_size=1000001"], "at most 127"),
    ([DEMO, BLUR, "--config.degradation.level=-1"], "negative"),
    ([DEMO, MOTION, "--config.degradation.level=4"], "is not odd"),
    ([DEMO, MOTION, "--config.degradation.level=100001"], "at most"),
    ([DEMO, MOTION, "--config.degradation.orientation=nan"], "orientation"),
    ([DEMO, "--config.degradation.kind=awgn+blur"], "unknown kind 'blur'"),
    ([ESTIMATOR, "--config.seed=-1"], "config.seed = -1"),
    ([DEMO, "--config.seed=None", "--config.seed=-2"], "config.seed = -2"),
    ([DEMO, "--config.seed=3", "--config.seed", "None"], "config.seed = None"),
    ([DEMO, "--config.dataset.fractions", "3"], "write several values in brackets"),
  ],
)
def test_command_lines(refused, tmp_path, flags, words):
  refused([*flags, f"--workdir={tmp_path / 'w'}"], 2, words)


@pytest.mark.parametrize(
  ("workdir", "words"),
  [
    ("", "--workdir is missing"),
    ("/proc/w", "cannot be written"),
    ("/dev/null/w", "cannot be written"),
    ("~nosuchuser/w", "no such user"),
    ("x" * 300, "File name too long"),
    ("a\0b", "NUL"),
    (os.fsdecode(b"/tmp/caf\xe9"), "not UTF-8"),
  ],
)
def test_workdirs(refused, workdir, words):
  refused([DEMO, f"--workdir={workdir}"], 2, words)


_ORACLE = "from fidelity_jax import defaults\ndef get_config(size=''):\n"
_DEMO = f"{_ORACLE}  c = defaults.method('oracle', 'demo')\n  c.unlock()\n"


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("def get_config(:\n", "line 1"),
    ("import nosuchmodule\n", ("line 1", "nosuchmodule")),
    ("1 / 0\n", ("line 1", "ZeroDivisionError")),
    ("x = 3\n", "get_config"),
    ("def get_config(a, b): pass\n", "get_config"),
    ("def get_config(): pass\n", "returned NoneType"),
    ("def get_config(): return 3\n", "returned int"),
    ("def get_config(a): return a\n", "get_config() missing 1 required"),
    ("import sys; sys.exit('no')\n", "ends the program (no)"),
    ("def get_config(): return {}\n", "returned dict"),
    (f"{_ORACLE}  raise ValueError('dear\\nme')\n", ("line 3", "me")),
    (f"{_ORACLE}  return defaults.method('oracle').x\n", "line 3"),
    (f"{_DEMO}  del c.seed\n  return c\n", "config.seed is missing"),
    (f"{_DEMO}  del c.dataset\n  return c\n", "config.dataset is missing"),
    (f"{_DEMO}  del c.dataset.path\n  return c\n", "config.dataset.path is missing"),
    (f"{_DEMO}  del c.degradation\n  return c\n", "config.degradation is missing"),
    (f"{_DEMO}  del c.kind\n  return c\n", "config.kind = None"),
    (f"{_DEMO}  del c.ensemble\n  return c\n", "config.ensemble is missing"),
    (f"{_DEMO}  del c.parents.restorer\n  return c\n", "parents.restorer is missing"),
    (f"{_DEMO}  del c.parents\n  return c\n", "parents.classifier is missing"),
    (
      f"{_DEMO}  with c.ignore_type(): c.parents = 3\n  return c\n",
      "config.parents = 3",
    ),
    (
      f"{_DEMO}  with c.ignore_type(): c.parents.restorer = 3\n  return c\n",
      "config.parents.restorer",
    ),
    (f"{_DEMO}  c.parents.other = c.parents.restorer\n  return c\n", "parents.other"),
    (
      f"{_DEMO}  c.parents.restorer = c.parents.classifier\n  return c\n",
      "config.parents.restorer.kind = 'classifier' must be 'restorer'",
    ),
    (f"{_DEMO}  c.sede = 3\n  return c\n", "did you mean 'seed'"),
    (f"{_DEMO}  with c.ignore_type(): c.model = 3\n  return c\n", "config.model"),
    (f"{_DEMO}  with c.ignore_type(): c.kind = ['awgn']\n  return c\n", "config.kind"),
    (
      f"{_DEMO}  with c.ignore_type(): c.degradation = 7\n  return c\n",
      "7 is not a degradation",
    ),
    (
      f"{_DEMO}  with c.ignore_type(): c.degradation.kind = ['awgn']\n  return c\n",
      "kind",
    ),
    (
      f"{_DEMO}  with c.ignore_type(): c.dataset.fractions = 'abc'\n  return c\n",
      "fractions",
    ),
    (
      f"{_DEMO}  with c.ignore_type(): c.epochs = 1e20\n  return c\n",
      "config.epochs = 1e+20",
    ),
    (
      f"{_DEMO}  with c.ignore_type(): c.epochs = True\n  return c\n",
      "config.epochs = True",
    ),
    (f"{_DEMO}  del c.experiment\n  return c\n", "config.experiment is missing"),
  ],
)
def test_config_files(refused, tmp_path, text, words):
  path = tmp_path / "mine.py"
  path.write_text(text)
  refused([f"--config={path}", f"--workdir={tmp_path / 'w'}"], 2, words)


def test_a_config_file_of_ones_own_works(tmp_path, monkeypatch):
  """The refusals above are of what is wrong, not of where it stands."""
  path = tmp_path / "mine.py"
  path.write_text(f"{_DEMO}  c.seed = 5\n  return c\n")
  arguments = ["", f"--config={path}", "--workdir=w", "--config.epochs=3"]
  config, workdir = main.parse(arguments)
  assert (config.seed, config.parents.restorer.seed, config.epochs) == (5, 5, 3)
  assert workdir == "w"


def test_none_means_none():
  fields = {
    "parents.classifier.model.weights": "torchvision",
    "dataset.cache": "ram",
    "dataset.split_file": "x",
    "dataset.counts": (1, 2, 3),
    "degradation.mixture": "discrete",
    "degradation.kernel_size": 3,
    "degradation.orientation": 1.0,
    "parents.classifier.model.stage_sizes": (1, 2),
  }
  for form in ("--config.{}={}", "-config.{}={}", "--config.{} {}"):
    flags = [
      part
      for field, value in fields.items()
      for setting in (value, None)
      for part in form.format(field, str(setting).replace(" ", "")).split(" ")
    ]
    config, _ = main.parse(["", "--config=configs/oracle.py", *flags, "--workdir=w"])
    for field in fields:
      value = config
      for name in field.split("."):
        value = value[name]
      assert value is None, field
    # Parents follow; what was set last counts.
    assert config.parents.restorer.dataset.cache is None
  flags = ["--config.dataset.cache=None", "--config.dataset.cache=disk"]
  config, _ = main.parse(["", DEMO, *flags, "--workdir=w"])
  assert config.dataset.cache == "disk"


@pytest.fixture
def photographs(tmp_path):
  """A folder of two classes with 20 images each."""
  root = tmp_path / "photographs"
  for number, name in enumerate(("cat", "dog")):
    (root / name).mkdir(parents=True)
    for i in range(20):
      picture = encoded(photograph(16, 16, seed=100 * number + i))
      (root / name / f"{i:02d}.png").write_bytes(picture)
  return root


def _folder(path, **fields):
  fields = TOY | {"dataset.name": "folder", "dataset.path": path} | fields
  return [DEMO, *overrides(fields)]


def _spoil(root, name="dog"):
  for path in (root / name).iterdir():
    path.write_bytes(b"")


@pytest.mark.parametrize(
  ("prepare", "words"),
  [
    (lambda root: shutil.rmtree(root), "does not exist"),
    (lambda root: [shutil.rmtree(p) for p in root.iterdir()], "no sub-folder"),
    (lambda root: _spoil(root), ("class 'dog'", "the file is empty")),
    (lambda root: [_spoil(root, n) for n in ("cat", "dog")], "no usable image for"),
    (lambda root: (root / "CAT").mkdir(), "the same name but for letter case"),
    (lambda root: shutil.rmtree(root / "dog"), "has one class only, 'cat'"),
    (lambda root: [p.unlink() for p in (root / "dog").iterdir()], "one class only"),
    (lambda root: _spoil(root.rename(root.parent / "a\nb")), "does not exist"),
  ],
)
def test_folders(refused, photographs, tmp_path, prepare, words):
  prepare(photographs)
  refused([*_folder(photographs), f"--workdir={tmp_path / 'w'}"], 2, words)


@pytest.mark.parametrize(
  ("content", "words"),
  [
    (b"", "names no images"),
    (b"path,label\n", "names no images"),
    (b"cat/00.png\n", "line 1"),
    (b"cat/00.png,cat,3\n", "line 1"),
    (b"cat/00.png,cat\ncat/01.png,\n", "line 2"),
    (b"cat/00.png,cat\ncat/00.png,dog\n", "a second label"),
    (b"cat/00.png,cat\ncat/0\x001.png,cat\n", "line 2"),
    (b"cat/00.png,\xff\n", "cannot read"),
    (b'"cat/00.png,cat\n' * 3, "line"),
    (b"no/00.png,cat\nno/01.png,dog\n", "no usable image"),
  ],
)
def test_tables(refused, photographs, tmp_path, content, words):
  table = photographs / "table.csv"
  table.write_bytes(content)
  refused([*_folder(table), f"--workdir={tmp_path / 'w'}"], 2, words)


@pytest.mark.parametrize("header", ["path,label", "image,class", "file name,category"])
def test_a_header_is_no_class(photographs, header):
  from fidelity_jax.data import folder

  table = photographs / "table.csv"
  table.write_text(f"{header}\ncat/00.png,cat\ndog/00.png,dog\n")
  assert folder.build(str(table)).class_names == ("cat", "dog")


@pytest.mark.parametrize(
  ("content", "words"),
  [
    ("", "cannot read"),
    ("[" * 100_000, "cannot read"),
    ("3", "no JSON object"),
    ("[[[]]]", "no JSON object"),
    ('{"validation": {}}', "no JSON object with 'train'"),
    ('{"train": 3}', "neither a list nor"),
    ('{"train": [[1]]}', "[1]"),
    ('{"train": [null]}', "None"),
    ('{"train": {"cat": 3}}', "no list for the class 'cat'"),
    ('{"train": {"cat": [[1]]}}', "[1]"),
    ('{"train": {"cat": [99]}}', "cat: 99"),
    ('{"train": {"cow": [1]}}', "class 'cow'"),
    ('{"train": ["cat/00.png", "cat/00.png"]}', "twice"),
    ('{"train": ["cat/00.png"], "tset": []}', "unknown split 'tset'"),
    ('{"train": ["cat/00.png"], "val": [], "valid": []}', "a validation split twice"),
  ],
)
def test_split_files(refused, photographs, tmp_path, content, words):
  path = tmp_path / "splits.json"
  path.write_text(content)
  arguments = _folder(photographs, **{"dataset.split_file": path})
  refused([*arguments, f"--workdir={tmp_path / 'w'}"], 2, words)


def test_what_is_no_image_is_left_out_and_named(photographs, capsys, tmp_path):
  """Nothing hangs, whatever bears an image's name."""
  from fidelity_jax import data

  dog = photographs / "dog"
  os.mkfifo(dog / "pipe.png")
  (dog / "zero.png").symlink_to("/dev/zero")
  (dog / "tty.png").symlink_to("/dev/tty")
  with open(dog / "sparse.png", "wb") as file:
    file.truncate(2**40)
  (dog / "a\n\x1b[31m.png").write_bytes(b"")
  # Names need not be UTF-8.
  shutil.copy(dog / "00.png", os.fsencode(dog) + b"/\xe9.png")
  (photographs / os.fsdecode(b"caf\xe9")).mkdir()
  shutil.copy(dog / "00.png", photographs / os.fsdecode(b"caf\xe9") / "a.png")
  settings = data.default_config("folder")
  settings.path = str(photographs)
  settings.counts = (-1, 0, 0)
  train = data.load(settings, "train", workdir_cache=tmp_path / "cache")
  assert len(train) == 42
  assert train.class_names == ("caf\\xe9", "cat", "dog")
  assert len(train.fingerprint) == 64
  lines = capsys.readouterr().err.splitlines()
  assert "dog/a\\n\\x1b[31m.png: left out: the file is empty" in lines
  for name in ("pipe", "zero", "tty"):
    assert f"dog/{name}.png: left out: not a regular file" in lines
  assert any("sparse.png: left out" in line and "too many" in line for line in lines)
  assert any("5 left out, 42 images remain" in line for line in lines)


# Weights for the demo's classifier, each with one fault.
def _torch_file(change):
  def make(path):
    import torch

    torch.save(change(torch, {"conv1.weight": torch.ones(8, 3, 7, 7)}), path)

  return make


def _zip_damage(path):
  import torch

  torch.save({"conv1.weight": torch.arange(1000.0)}, path)
  content = bytearray(path.read_bytes())
  content[content.index(np.arange(1000, dtype="<f4").tobytes()) + 100] ^= 1
  path.write_bytes(content)


def _quantized(torch, state):
  tensor = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
  return state | {"a.weight": tensor}


def _nested(torch, state):
  tensors = [torch.ones(2), torch.ones(3)]
  return state | {"a.weight": torch.nested.nested_tensor(tensors)}


@pytest.mark.parametrize(
  ("make", "words"),
  [
    (lambda path: path.write_bytes(b""), "neither a PyTorch checkpoint"),
    (lambda path: path.write_bytes(b"PK\3\4" + b"x" * 50), "neither"),
    (lambda path: path.write_bytes(pickle.dumps({"a": 1}, 2)), "pickle"),
    (lambda path: os.mkfifo(path), "there is no file"),
    (lambda path: path.symlink_to("/dev/zero"), "there is no file"),
    (lambda path: path.mkdir(), "without port.json"),
    (_zip_damage, ("is not what its checksum says", "get the file again")),
    (_torch_file(lambda t, s: [1, 2]), "holds a list"),
    (_torch_file(lambda t, s: {}), "holds a dict"),
    (_torch_file(lambda t, s: {3: t.ones(3)}), "calls a tensor 3"),
    (_torch_file(lambda t, s: s | {"lr": 0.1}), "a float called 'lr'"),
    (_torch_file(lambda t, s: s), "is not recognized"),
    (_torch_file(lambda t, s: {"a": t.ones(3, 3).to_sparse()}), "that is sparse, a"),
    (_torch_file(_quantized), "that is quantized, a.weight"),
    (
      _torch_file(lambda t, s: {"a": t.ones(3, device="meta")}),
      "that is on the device meta",
    ),
    (
      _torch_file(lambda t, s: {"a": t.ones(1).expand(300_000, 300_000)}),
      "that is expanded, a",
    ),
    (_torch_file(lambda t, s: {"a": t.ones(3, dtype=t.complex64)}), "complex"),
    (_torch_file(_nested), "that is nested, a.weight"),
    (
      _torch_file(lambda t, s: {"model.0.weight": t.ones(8, 3, 3, 3, dtype=t.int64)}),
      "int64 (should be floating-point)",
    ),
  ],
)
def test_weights(refused, tmp_path, make, words):
  path = tmp_path / "weights.pth"
  make(path)
  target = tmp_path / "ported"
  refused([path, f"--to={target}"], 2, words, command=port_main)
  assert not target.exists()
  fields = {"parents.classifier.model.weights": path}
  arguments = [DEMO, f"--workdir={tmp_path / 'w'}", *overrides(fields)]
  refused(arguments, 2, words)


def _ported(directory, stage_sizes=(1, 1), width=8, poison=None):
  """Writes a ported toy ResNet."""
  import jax

  from fidelity_jax import models

  config = {"name": "resnet", "block": "basic"}
  config |= {"stage_sizes": stage_sizes, "width": width}
  module = models.create(config, 16)
  images = np.zeros((1, 32, 32, 3), np.float32)
  variables = jax.jit(module.init)(jax.random.key(5), images)
  variables = jax.tree.map(np.array, variables)
  if poison is not None:
    variables["params"]["head"]["logits"]["kernel"][0, 0] = poison
  described = {"model": config, "num_classes": 16, "class_names": None}
  port.save({"classifier": port.Part(variables, described)}, directory, "a test")


@pytest.mark.parametrize(
  ("given", "words"),
  [
    (dict(stage_sizes=(1, 1, 1)), "has no place in it"),
    (dict(stage_sizes=(2, 1)), "layer1_1"),
    (dict(stage_sizes=(1,)), "is missing"),
    (dict(width=16), "is (16,), not (8,)"),
    (dict(poison=np.nan), "not finite, in params/head/logits/kernel"),
    (dict(poison=np.inf), "not finite, in params/head/logits/kernel"),
  ],
)
def test_weights_of_another_network(refused, tmp_path, given, words):
  _ported(tmp_path / "ported", **given)
  fields = TOY | {
    "parents.classifier.model.weights": tmp_path / "ported",
    "parents.classifier.model.new_head": False,
    "parents.classifier.epochs": 0,
  }
  refused([DEMO, f"--workdir={tmp_path / 'w'}", *overrides(fields)], 2, words)
  assert not list((tmp_path / "w").glob("*/finished.json"))


def _edit(change):
  def damage(directory):
    path = directory / "port.json"
    value = json.loads(path.read_text())
    path.write_text(json.dumps(change(value)))

  return damage


def _flip(path, place=-100):
  content = bytearray(path.read_bytes())
  content[place] ^= 1
  path.write_bytes(content)


@pytest.mark.parametrize(
  ("damage", "words"),
  [
    (_edit(lambda v: {}), "port.json is damaged"),
    (_edit(lambda v: []), "port.json is damaged"),
    (_edit(lambda v: None), "port.json is damaged"),
    (_edit(lambda v: v | {"parts": 3}), "port.json is damaged"),
    (_edit(lambda v: v | {"source": "elsewhere"}), "port.json is damaged"),
    (lambda d: (d / "port.json").write_bytes(b"\xff"), "port.json is damaged"),
    (lambda d: (d / "classifier.safetensors").unlink(), "classifier.safetensors"),
    (lambda d: _flip(d / "classifier.safetensors"), "is not what its checksum says"),
    (lambda d: os.truncate(d / "classifier.safetensors", 99), "checksum"),
  ],
)
def test_damaged_ported_directories(refused, tmp_path, damage, words):
  _ported(tmp_path / "ported")
  damage(tmp_path / "ported")
  arguments = [tmp_path / "ported", f"--to={tmp_path / 'again'}"]
  refused(arguments, 1, words, command=port_main)


def test_class_names_of_a_ported_directory_are_used(refused, tmp_path):
  _ported(tmp_path / "ported")
  names = tmp_path / "names.txt"
  names.write_text("\n".join(f"class {i}" for i in range(16)))
  arguments = [tmp_path / "ported", f"--to={tmp_path / 'named'}"]
  assert port_main([*map(str, arguments), f"--class_names={names}"]) == 0
  part = port.load_part(tmp_path / "named", "classifier")
  assert part.config["class_names"][3] == "class 3"
  names.write_text("one\n")
  arguments.append(f"--class_names={names}")
  refused(arguments, 2, "names 1 classes", command=port_main)
  names.unlink()
  refused(arguments, 2, "cannot read class names", command=port_main)


@pytest.mark.parametrize(
  ("arguments", "status", "words"),
  [
    (["--out={tmp}/o", "--size=5"], 2, "--size=5"),
    (["--out={tmp}/o", "--size=x"], 2, "--size"),
    (["--out={tmp}/o", "--seed=-1"], 2, "--seed=-1"),
    (["--out={tmp}/o", "--kind=blurr"], 2, "unknown kind 'blurr'"),
    (["--out={tmp}/o", "{tmp}/absent.png"], 2, "no such file"),
    (["--out={tmp}/o", "~nosuchuser/a.png"], 2, "no such user"),
    (["--out=/proc/o"], 1, "/proc/o"),
    (["--nothing"], 2, "--out"),
  ],
)
def test_gallery(refused, tmp_path, arguments, status, words):
  arguments = [argument.format(tmp=tmp_path) for argument in arguments]
  refused(arguments, status, words, command=gallery.main)


# What can happen to a finished workdir, and what is said of it.
def _stage(workdir, kind):
  (path,) = workdir.glob(f"{kind}-*")
  return path


def _product(workdir, kind):
  stage = _stage(workdir, kind)
  step = json.loads((stage / "finished.json").read_text())["best_step"]
  files = (stage / "checkpoints" / str(step) / "variables").rglob("*")
  return max((p for p in files if p.is_file()), key=lambda p: p.stat().st_size)


def _write(pattern, content):
  def damage(workdir):
    (path,) = workdir.glob(pattern)
    path.write_bytes(content)

  return damage


def _swap(pattern):
  """Puts a directory where a file was, or a file where a directory was."""

  def damage(workdir):
    (path,) = workdir.glob(pattern)
    if path.is_dir():
      shutil.rmtree(path)
      path.write_bytes(b"")
    else:
      path.unlink()
      path.mkdir()

  return damage


def _change_json(pattern, **changes):
  def damage(workdir):
    (path,) = workdir.glob(pattern)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))

  return damage


_MARKER = "restorer-*/finished.json"
_CONDITION = "evaluation-*/awgn-0.3.json"
_EXAMPLES = "evaluation-*/examples.npz"
DAMAGES = [
  *((_write(_MARKER, c), "finished.json is damaged") for c in (b"", b"{", b"\xff")),
  *((_write(_MARKER, c), "finished.json is damaged") for c in (b"{}", b"[]", b"null")),
  (_change_json(_MARKER, score="good"), "finished.json is damaged"),
  (_change_json(_MARKER, score=99.0), "finished.json is damaged"),
  (_change_json(_MARKER, best_step=1), "finished.json is damaged"),
  (_change_json(_MARKER, files={}), "was lost by an earlier version"),
  (_swap(_MARKER), "finished.json is no regular file"),
  (_write("restorer-*/config.json", b"{"), "config.json is damaged"),
  (_write("restorer-*/config.json", b"[]"), "config.json is damaged"),
  (_change_json("restorer-*/config.json", seed=1), "config.json is damaged"),
  (_change_json("restorer-*/config.json", data="x"), "config.json is damaged"),
  (lambda w: next(w.glob("restorer-*/config.json")).unlink(), "config.json is missing"),
  (_swap("restorer-*/config.json"), "config.json is no regular file"),
  (_swap("restorer-*/metrics.jsonl"), "metrics.jsonl is no regular file"),
  (_swap("restorer-*"), "is a file, where a directory belongs"),
  (_swap("restorer-*/checkpoints"), "is a file, where a directory belongs"),
  (lambda w: shutil.rmtree(_stage(w, "restorer") / "checkpoints"), "is missing"),
  (lambda w: _flip(_product(w, "restorer"), 50), "is damaged"),
  (lambda w: _flip(_product(w, "ensemble"), 50), "is damaged"),
  (lambda w: os.truncate(_product(w, "classifier"), 10), "is damaged"),
  (lambda w: _product(w, "calibration").unlink(), "is missing"),
  *((_write(_CONDITION, c), "awgn-0.3.json is damaged") for c in (b"", b"[]", b"{}")),
  *((_write(_CONDITION, c), "awgn-0.3.json is damaged") for c in (b"null", b"[" * 9)),
  (_change_json(_CONDITION, rows=[]), "awgn-0.3.json is damaged"),
  (
    lambda w: shutil.copy(
      next(w.glob("evaluation-*/awgn-0.2.json")), next(w.glob(_CONDITION))
    ),
    "is of another condition",
  ),
  (_swap(_CONDITION), "is no regular file"),
  (_swap("evaluation-*"), "is a file, where a directory belongs"),
  *((_write(_EXAMPLES, c), "examples.npz is damaged") for c in (b"", b"PK\3\4", b"x")),
  (lambda w: _flip(next(w.glob(_EXAMPLES)), 3000), "examples.npz is damaged"),
  (_swap(_EXAMPLES), "is no regular file"),
  *(
    (_swap(name), f"{name} is no regular file")
    for name in ("report.md", "accuracy.png", "examples.png")
  ),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGES)
def test_damaged_workdirs(refused, toy_copy, damage, words):
  (toy_copy / "results.json").unlink()
  damage(toy_copy)
  markers = {p: p.read_bytes() for p in toy_copy.glob("*/finished.json") if p.is_file()}
  arguments = [DEMO, f"--workdir={toy_copy}", *overrides(TOY)]
  line = refused(arguments, 1, words)
  assert str(toy_copy) in line
  assert not (toy_copy / "results.json").exists()
  # Nothing new is called finished, nothing finished is gone.
  after = {p: p.read_bytes() for p in toy_copy.glob("*/finished.json") if p.is_file()}
  assert after == markers


def test_a_bit_flipped_in_a_half_trained_checkpoint(refused, toy_copy):
  for stage in ("ensemble", "evaluation"):
    place = _stage(toy_copy, stage)
    (place / "finished.json").unlink(missing_ok=True)
  path = max(
    (p for p in _stage(toy_copy, "ensemble").glob("checkpoints/*/training/d/*")),
    key=lambda p: p.stat().st_size,
  )
  _flip(path, path.stat().st_size // 2)
  (toy_copy / "results.json").unlink()
  arguments = [DEMO, f"--workdir={toy_copy}", *overrides(TOY)]
  refused(arguments, 1, ("is damaged", "ensemble-", "delete the directory"))
  assert not (_stage(toy_copy, "ensemble") / "finished.json").exists()


def test_a_defect_is_shown_as_such(toy_copy, monkeypatch, capsys):
  from fidelity_jax import report

  def write(*args):
    try:
      raise PermissionError(13, "Permission denied", "innocent")
    except PermissionError:
      return {}["defect"]

  monkeypatch.setattr(report, "write", write)
  arguments = ["", DEMO, f"--workdir={toy_copy}", *overrides(TOY)]
  assert main.main(arguments) == 1
  line = capsys.readouterr().err.splitlines()[-1]
  assert "this is a defect of fidelity_jax at test_refusals.py" in line
  assert "KeyError: 'defect'" in line and "innocent" not in line
  log = line.rpartition("The traceback is in ")[2].rstrip(".")
  assert log == str(toy_copy / "log.txt")
  text = pathlib.Path(log).read_text()
  assert "Traceback" in text and "KeyError: 'defect'" in text


def test_few_test_images_make_a_picture(toy_copy, monkeypatch):
  """One column a condition, of the same image if there is but one."""
  fields = TOY | {"evaluation.batch_size": 1, "evaluation.rounds": 1}
  fields["dataset.counts"] = (6, 2, 1)
  fields |= {f"{k}epochs": 0 for k in ("", "parents.classifier.", "parents.restorer.")}
  fields |= {f"{k}warmup_epochs": 0 for k in ("", "parents.classifier.")}
  fields["ensemble.enabled"] = False
  monkeypatch.chdir(ROOT)
  (toy_copy / "examples.png").unlink()
  arguments = ["", DEMO, f"--workdir={toy_copy}", *overrides(fields)]
  assert main.main(arguments) == 0
  assert (toy_copy / "examples.png").read_bytes().startswith(b"\x89PNG")


def test_results_json_that_is_a_directory(refused, toy_copy):
  (toy_copy / "results.json").unlink()
  (toy_copy / "results.json").mkdir()
  arguments = [DEMO, f"--workdir={toy_copy}", *overrides(TOY)]
  refused(arguments, 1, "results.json is no regular file")


def test_safetensors(refused, tmp_path):
  path = tmp_path / "a.safetensors"
  for content in (b"", b"\xff" * 40, b"\x02\0\0\0\0\0\0\0{}"):
    path.write_bytes(content)
    refused([path, f"--to={tmp_path / 't'}"], 2, "a.safetensors", command=port_main)
  state = {"conv1.weight": np.ones((8, 3, 7, 7), np.complex64)}
  safetensors.numpy.save_file(state, path)
  refused([path, f"--to={tmp_path / 't'}"], 2, "a.safetensors", command=port_main)
