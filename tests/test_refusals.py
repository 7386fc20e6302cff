"""What a user can get wrong: each ends in one line, what, where and what to do.

The commands run in this process, which takes a fraction of a second each. Weights are
in test_refused_weights.py, damaged workdirs in test_workdirs.py, and what belongs to a
process of its own (streams, signals, limits) in test_process.py.
"""

import os
import shutil

import pytest
from conftest import TOY, overrides
from test_data_images import encoded, photograph

from fidelity_jax import gallery, main
from fidelity_jax.models.calibration import MODULES

DEMO = "--config=configs/oracle.py:scratch"
PRETRAINED = "--config=configs/pretrained.py:scratch"
ESTIMATOR = "--config=configs/estimator.py:scratch"
BLUR = "--config.degradation.kind=gaussian_blur"
MOTION = "--config.degradation.kind=motion_blur"


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
  *(
    ("profile.steps", v, "config.profile.steps = ")
    for v in ("(0,3)", "(5,4)", "(1,)", "(1,2,3)", "(1,2.5)", "(1,1001)", "()")
  ),
  ("profile.steps", "100,110", 'write values in brackets, as "(100, 110)"'),
  ("profile.step", "(1,2)", "steps"),
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
  *(("experiment", v, "a name of letters") for v in ("", "a/b", "..", "ä")),
  *(("experiment", v, "no stage's") for v in ("restorer-x", "measurements")),
  ("parents.restorer.model.name", "dnccn", "did you mean 'dncnn'"),
  ("model", None, "it has fields; set those"),
  ("model", 3, "config.model"),
  ("parents", None, "it has fields"),
  ("nofield", None, "no such field: 'nofield'"),
  ("parents.restorer.model.dept", None, "depth"),
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
  ("dataset.name", "caltech257", "did you mean caltech256"),
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
    ([DEMO, "--config.dataset.fractions", "3"], 'write values in brackets, as "(3,)"'),
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


_ORACLE = "from fidelity_jax.configs import common\ndef get_config(size=''):\n"
_DEMO = f"{_ORACLE}  c = common.method('oracle', 'demo')\n  c.unlock()\n"


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
    (f"{_ORACLE}  return common.method('oracle', '').x\n", "line 3"),
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
    (
      f"{_DEMO}  with c.parents.ignore_type(): c.parents.restorer.model = 3\n"
      "  return c\n",
      "config.parents.restorer.model = 3 must be a ConfigDict",
    ),
    (
      f"{_DEMO}  with c.ignore_type(): c.parents.classifier.parents = 3\n  return c\n",
      "config.parents.classifier.parents = 3 must be a ConfigDict",
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
  config, workdir, *_ = main.parse(arguments)
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
    config, *_ = main.parse(["", "--config=configs/oracle.py", *flags, "--workdir=w"])
    for field in fields:
      value = config
      for name in field.split("."):
        value = value[name]
      assert value is None, field
    # Parents follow; what was set last counts.
    assert config.parents.restorer.dataset.cache is None
  flags = ["--config.dataset.cache=None", "--config.dataset.cache=disk"]
  config, *_ = main.parse(["", DEMO, *flags, "--workdir=w"])
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
    (lambda root: [shutil.rmtree(root), root.write_text("")], "is a file"),
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
  assert folder.build(str(table))[0].class_names == ("cat", "dog")


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
    ('{"train": ["cat/x.jpg"]}', "'cat/x.jpg'"),
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
  """No file with an image's name makes the command hang."""
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
