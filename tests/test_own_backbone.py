"""Networks in a file of the user's own; test_how_to.py runs their page."""

import collections
import importlib
import os
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch_reference
from conftest import ROOT
from flax import traverse_util
from ml_collections import ConfigDict

from fidelity_jax import (
  assembly,
  errors,
  files,
  main,
  models,
  port,
  runs,
  schema,
  stages,
  study,
  workdirs,
)
from fidelity_jax.models import registry, users
from fidelity_jax.port import __main__ as port_main
from fidelity_jax.port import layouts, parts

torch = pytest.importorskip("torch")
PAGE = (ROOT / "docs" / "own_backbone.md").read_text()
CODE = re.search(r"^```python\n(# my_module.py\n.*?)^```$", PAGE, re.M | re.S)[1]
DEMO = "--config=configs/oracle.py:scratch"
MODEL = "--config.parents.classifier.model"


@pytest.fixture
def written(tmp_path, monkeypatch):
  """Writes a module of the user's own, and forgets it when the test is over."""
  monkeypatch.syspath_prepend(tmp_path)
  users.find.cache_clear()

  def write(code=CODE, name="their_module"):
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.delitem(sys.modules, name, raising=False)
    users.find.cache_clear()
    importlib.invalidate_caches()
    return f"{name}:MyNet"

  yield write
  users.find.cache_clear()


def mynet():
  """Returns the page's network as PyTorch users have it, with the demo's classes."""
  layers = {}
  for i, (before, after) in enumerate([(3, 16), (16, 32), (32, 64)]):
    layers[f"conv{i}"] = torch.nn.Conv2d(before, after, 3, 2, 1, bias=False)
    layers[f"bn{i}"] = torch.nn.BatchNorm2d(after)
    layers[f"relu{i}"] = torch.nn.ReLU()
  layers["pool"] = torch.nn.AdaptiveAvgPool2d(1)
  layers["flat"] = torch.nn.Flatten()
  layers["fc"] = torch.nn.Linear(64, 16)
  network = torch.nn.Sequential(collections.OrderedDict(layers))
  torch_reference.randomize(network)
  return network.eval()


FOLDED = "  def folded(self):\n    return self.clone(norm=False)\n"
DICT = "nn.module.dataclasses.field(default_factory=dict)"
PROPERTY = "  @property\n  def feature_size(self):\n    return 4 * self.width\n"


@pytest.mark.parametrize(
  ("old", "new", "words"),
  [
    ("class MyNet", "class MyNett", "has no MyNet; did you mean 'MyNett'?"),
    ("(Backbone)", "(nn.Module)", "is no Backbone"),
    ("  num_taps: ClassVar[int] = 2\n", "", "has no num_taps"),
    (PROPERTY, "", "has no feature_size"),
    ("  dtype: Any = jnp.float32\n", "  dtype = jnp.float32\n", "no field dtype"),
    ("width: int = 16", "width: int = 16\n  weights: int = 1", "a field weights"),
    ("= 2\n", "= 0\n", "num_taps of their_module:MyNet is 0"),
    ("4 * self.width", "4.5", "feature_size of their_module:MyNet is 4.5"),
    ("= 2\n", "= 3\n", "has num_taps 3, and calls the taps [0, 1]"),
    ("(tap, 1, x)", "(tap, 1, x[0])", "is given (8, 8, 64)"),
    ("4 * self.width", "5 * self.width", "((2, 64), ()); by its feature_size they"),
    ("x.mean((1, 2)), ()", "x.mean((1, 2))", "shapes (2, 64); by its"),
    (FOLDED, "", "let folded() return self.clone(norm=False)"),
    ("x = nn.relu", "x = nn.rely", "line 32: AttributeError"),
    ("class MyNet(", "class MyNet((", "their_module.py, line 10: SyntaxError"),
    ("jax.numpy", "jax.nunpy", "line 4: ModuleNotFoundError: No module named"),
    ("width: int = 16", "width: int", "missing 1 required positional argument"),
    ("4 * self.width", "4 * self.widht", "AttributeError"),
    ("self.norm, dtype", "self.norm, epsilon=0.1, dtype", "epsilon 0.1, and the class"),
    (
      "return x.mean",
      'x = layers.BatchNorm(name="bn")(x)\n    return x.mean',
      "ConvNorm",
    ),
    ("width: int = 16", f"width: int = 16\n  more: Any = {DICT}", "cannot be hashed"),
  ],
)
def test_what_is_wrong_is_one_line(refused, written, tmp_path, old, new, words):
  assert CODE.count(old) >= 1
  name = written(CODE.replace(old, new, 1))
  flags = [f"{MODEL}.name={name}", "--dry_run"]
  refused([DEMO, *flags, f"--workdir={tmp_path}/w"], 2, words)
  assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
  ("name", "field", "words"),
  [
    ("nowhere:MyNet", "width=1", "no module 'nowhere' for 'nowhere:MyNet' in"),
    ("their_module.sub:MyNet", "width=1", "their_module.sub"),
    ("their_module:", "width=1", "'my_module:MyNet' for one of your own"),
    ("json:loads", "width=1", "is no Backbone"),
    ("sys:path", "width=1", "is in no file"),
    ("their_module:MyNet", "width=many", "must be a whole number"),
    ("their_module:MyNet", "depth=3", "no such field"),
    ("their_module:MyNet", "stage_sizes=(1,)", "no such field"),
  ],
)
def test_names_and_fields_that_are_wrong(
  refused, written, tmp_path, name, field, words
):
  written()
  flags = [f"{MODEL}.name={name}", f"{MODEL}.{field}", "--dry_run"]
  refused([DEMO, *flags, f"--workdir={tmp_path}/w"], 2, words)


MORE = """  depth: int = 3
  slope: float | None = None
  rates: tuple[float, ...] = (0.5, 0.25)
  how: str = "plain"
  act: Any = nn.relu
"""


def _parsed(*flags):
  sys.modules.pop("config_config", None)
  config, *_ = main.parse(["main", *flags, "--workdir=w"])
  return config


def test_its_fields_are_the_configs(written, monkeypatch):
  monkeypatch.chdir(ROOT)
  name = written(CODE.replace("  width: int = 16\n", f"  width: int = 16\n{MORE}"))
  flags = ["depth=5", "slope=0.5", "rates=(0.1, 0.2)", "norm=False", f"name={name}"]
  config = _parsed(DEMO, *(f"{MODEL}.{flag}" for flag in flags))
  schema.check(config)
  full = registry.complete(config.parents.classifier.model)
  code = full.pop("code")
  assert full == {
    "name": name,
    "width": 16,
    "depth": 5,
    "slope": 0.5,
    "rates": (0.1, 0.2),
    "how": "plain",
    "norm": False,
  }
  backbone = models.create(full, 5).backbone
  assert (backbone.depth, backbone.norm, backbone.width) == (5, False, 16)
  # A study's experiments follow, and its other backbones have no such field.
  flags = [f"{MODEL}.name={name}", f"{MODEL}.depth=7", f"{MODEL}.width=8"]
  config = _parsed("--config=configs/table_5_1.py:scratch", *flags)
  found = [study_classifier(e).model for e in study.read(config).experiments]
  assert found and {(m.name, m.depth, m.width) for m in found} == {(name, 7, 8)}
  axis = f"--config.backbones=('resnet', '{name}')"
  config = _parsed(
    "--config=configs/table_5_1.py:scratch", f"{MODEL}.name={name}", axis
  )
  of = {e.experiment: study_classifier(e) for e in study.read(config).experiments}
  assert {m.model.name for m in of.values()} == {"resnet", name}
  assert any("their_module.MyNet" in one for one in of)
  # Its file is part of what it is.
  assert registry.complete({"name": name, "code": code})["code"] == code
  written(CODE)
  with pytest.raises(errors.UsageError, match="is not the file that"):
    models.create({"name": name, "code": code}, 5)


def study_classifier(experiment):
  """Returns the config of an experiment's classifier."""
  return experiment.get("parents", {}).get("classifier", experiment)


def test_its_weights(written, tmp_path):
  name = written()
  network, model = mynet(), {"name": name}
  torch.save(network.state_dict(), tmp_path / "net.pth")
  part = port.load_part(tmp_path / "net.pth", "classifier", model)
  module = models.create(model, 16)
  x = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype("f4")
  with torch.no_grad():
    want = network(torch.from_numpy(x).permute(0, 3, 1, 2)).numpy()
  for one, variables in ((module, part.variables), models.fold(module, part.variables)):
    logits, _ = one.apply(variables, x)
    np.testing.assert_allclose(logits, want, atol=1e-4)
  # In our own names, and from a directory.
  flat = traverse_util.flatten_dict(part.variables, sep="/")
  safetensors.numpy.save_file(flat, tmp_path / "ours.safetensors")
  port.save({"classifier": part}, tmp_path / "ported", "net.pth")
  for place in ("ours.safetensors", "ported"):
    found = port.load_part(tmp_path / place, "classifier", model)
    jax.tree.map(np.testing.assert_array_equal, found.variables, part.variables)
  # What does not fit is told.
  narrow = {"name": name, "width": 8}
  with pytest.raises(errors.UsageError, match=r"misshapen bn0\.bias \(16,\)"):
    port.load_part(tmp_path / "net.pth", "classifier", narrow)
  name = written(re.sub(r"  table = .*\n", "", CODE))
  with pytest.raises(errors.UsageError, match="give its class a table"):
    port.load_part(tmp_path / "net.pth", "classifier", model)
  with pytest.raises(errors.UsageError, match="is not recognized"):
    port.load_part(tmp_path / "net.pth", "classifier")


SPY = f"import pathlib\npathlib.Path(__file__ + '.ran').touch()\n{CODE}"


def test_code_runs_only_if_it_is_what_a_directory_says(written, tmp_path, monkeypatch):
  written(SPY)
  (tmp_path / "box").mkdir()
  for name in ("__init__", "inner"):
    (tmp_path / "box" / f"{name}.py").write_text(SPY)
  code = files.sha256(tmp_path / "their_module.py")
  there = tmp_path / "ported"
  for name in ("their_module:MyNet", "box.inner:MyNet"):
    for said, words in (
      ({}, "is without the SHA-256"),
      ({"code": "0" * 64}, "not 0000"),
    ):
      model = {"name": name, **said}
      described = {"model": model, "num_classes": 2, "class_names": None}
      variables = {"params": {"x": np.zeros(1, "f4")}}
      port.save({"classifier": port.Part(variables, described)}, there, "x")
      with pytest.raises(errors.UsageError, match=words):
        runs.find(there)
      experiment = {"kind": "toy", "experiment": "toy"}
      parents = {"classifier": {"kind": "classifier", "model": model}}
      config = stages.as_json(ConfigDict(experiment | {"parents": parents}))
      record = workdirs.Experiment(config, [], "toy", {}, ["a", "b"])
      (tmp_path / "toy").mkdir(exist_ok=True)
      path = tmp_path / "toy" / "experiment.json"
      files.write_record(path, workdirs.Experiments([record]))
      with pytest.raises(errors.UsageError, match=words):
        runs.find(tmp_path / "toy")
    registry.check_code({"name": name, "code": code})
  with pytest.raises(errors.UsageError, match=r"no module 'box\.other'"):
    registry.check_code({"name": "box.other:MyNet", "code": code})
  assert not list(tmp_path.rglob("*.ran"))
  registry.complete({"name": "their_module:MyNet", "code": code})
  assert [path.name for path in tmp_path.rglob("*.ran")] == ["their_module.py.ran"]


def test_the_code_that_runs_is_the_file_s(written, tmp_path, monkeypatch):
  name = written()
  (tmp_path / "their_front.py").write_text("from their_module import MyNet\n")
  with pytest.raises(errors.UsageError, match=f"write '{name}'"):
    users.find("their_front:MyNet")
  # Imported before, as in a notebook, and edited since, or perhaps not.
  name = written(f"{CODE}OTHER = MyNet\n", "their_notebook")
  file = tmp_path / "their_notebook.py"
  importlib.import_module("their_notebook")
  with pytest.raises(errors.UsageError, match="start Python again"):
    users.find(name)
  os.utime(file, (1e9, 1e9))
  code = files.sha256(file)
  assert users.find(name).code == code
  # Edited while it runs: what runs is as it was, and nothing is taken for what it is.
  file.write_text("")
  with pytest.raises(errors.UsageError, match="start Python again"):
    users.find("their_notebook:OTHER")
  assert registry.complete({"name": name, "code": code})["code"] == code


def test_where_modules_are_looked_for(written, tmp_path, monkeypatch):
  name = written()
  beside = tmp_path / "beside"
  beside.mkdir()
  for module in ("their_module", "their_other"):
    (beside / f"{module}.py").write_text(CODE)
  monkeypatch.setattr(users, "PLACES", [])
  (beside / "config.py").write_text((ROOT / "configs" / "oracle.py").read_text())
  monkeypatch.chdir(ROOT)
  _parsed(f"--config={beside}/config.py:scratch")
  assert users.PLACES == [str(beside)]
  assert users.find(name).file == tmp_path / "their_module.py"
  assert users.find("their_other:MyNet").file == beside / "their_other.py"
  _parsed("--config=oracle.py:demo")
  assert users.PLACES == []


TABLE = re.search(r"  table = .*\n", CODE)[0]
FLAT = ("x.mean((1, 2))", "nn.Dense(self.feature_size)(x.reshape(len(x), -1))")


@pytest.mark.parametrize(
  ("old", "new", "flags", "words"),
  [
    ("(conv|bn)", "(conv)", [], ["table has no PyTorch name", "backbone/layer0/bn"]),
    ("(conv|bn)", "(conv|bn", [], ["table has", "missing ), unterminated", "layer0"]),
    ("\\2\\1", "\\3", [], ["table has", "invalid group reference"]),
    (', ("head/logits", "fc")', ",", [], "table lacks the head"),
    (
      "x = layers.apply_tap(tap, 0",
      "len(x, 0)\n    x = layers.apply_tap(tap, 0",
      [],
      ["their_module.py, line 27", "TypeError"],
    ),
    (*FLAT, [], ["table has no PyTorch name", "Dense_0"]),
    ("16", "16", ["--image_size=0"], "--image_size is a number of pixels"),
  ],
)
def test_what_is_wrong_with_porting_is_one_line(
  refused, written, tmp_path, old, new, flags, words
):
  assert CODE.count(old) >= 1
  name = written(CODE.replace(old, new, 1))
  torch.save(mynet().state_dict(), tmp_path / "net.pth")
  command = [tmp_path / "net.pth", f"--to={tmp_path}/to", f"--network={name}", *flags]
  refused(command, 2, words, port_main.main)
  assert not (tmp_path / "to").exists()


def test_weights_in_our_names(refused, written, tmp_path, capsys):
  # Its variables depend on the size of its images, and it takes no others.
  name = written(CODE.replace(*FLAT))
  module = models.create({"name": name}, 3)
  shapes = layouts.variable_shapes(module, parts.image(32))
  variables = jax.tree.map(lambda leaf: np.ones(leaf.shape, "f4"), shapes)
  flat = traverse_util.flatten_dict(variables, sep="/")
  path = tmp_path / "ours.safetensors"
  safetensors.numpy.save_file(flat, path)
  (tmp_path / "names.txt").write_text("a\nb\nc\n")
  command = [path, f"--to={tmp_path}/to", f"--network={name}"]
  refused(command, 2, ["misshapen", "Dense_0/kernel (1024, 64)"], port_main.main)
  command += ["--image_size=32", f"--class_names={tmp_path}/names.txt"]
  assert port_main.main(list(map(str, command))) == 0, capsys.readouterr().err
  run = runs.find(tmp_path / "to")
  assert (run.image_size, run.class_names) == (32, ("a", "b", "c"))
  part = port.load_part(path, "classifier", {"name": name}, 32)
  assert (part.config["num_classes"], part.config["class_names"]) == (3, None)
  # A stage knows the size of its images.
  model = {"name": name, "weights": str(path)}
  stage = {"kind": "classifier", "model": model, "dataset": {"image_size": 32}}
  assert assembly.given_part(ConfigDict(stage)).config["image_size"] == 32
  safetensors.numpy.save_file({k: v for k, v in flat.items() if "head" not in k}, path)
  refused(command, 2, "is no classifier: it has no head", port_main.main)


FAMILY = """
from fidelity_jax.models import Classifier, Family


def build(num_classes, dtype, *, width):
  head = layers.Head(num_classes, (7,), (0.0, 0.0), dtype=dtype)
  return Classifier(MyNet(width, dtype=dtype), head)


FAMILY = Family({"any": {"width": 4}}, build, (), fields={"width": WIDTH})
"""


def test_a_family_of_ones_own(written):
  name = written(f"from fidelity_jax.models.backbone import WIDTH\n{CODE}{FAMILY}")
  name = name.replace("MyNet", "FAMILY")
  registry.check({"name": name}, 32)
  module = models.create({"name": name}, 5, jnp.bfloat16)
  assert (module.backbone.width, module.head.hidden) == (4, (7,))
  assert registry.complete({"name": name})["width"] == 4
  # It may have auxiliary heads, or go without those that the backbone is for.
  code = CODE.replace("x.mean((1, 2)), ()", "x.mean((1, 2)), (x,)")
  written(f"from fidelity_jax.models.backbone import WIDTH\n{code}{FAMILY}")
  registry.check({"name": name}, 32)
  with pytest.raises(errors.UsageError, match="nothing for auxiliary heads"):
    registry.check({"name": name.replace("FAMILY", "MyNet")}, 32)
