"""Networks in a file of the user's own; test_how_to.py runs their page."""

import collections
import importlib
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

from fidelity_jax import errors, main, models, port, schema, study
from fidelity_jax.models import own, registry

torch = pytest.importorskip("torch")
PAGE = (ROOT / "docs" / "own_backbone.md").read_text()
CODE = re.search(r"^```python\n(# my_module.py\n.*?)^```$", PAGE, re.M | re.S)[1]
DEMO = "--config=configs/oracle.py:demo"
MODEL = "--config.parents.classifier.model"


@pytest.fixture
def written(tmp_path, monkeypatch):
  """Writes a module of the user's own, and forgets it when the test is over."""
  monkeypatch.syspath_prepend(tmp_path)
  own.find.cache_clear()

  def write(code=CODE, name="their_module"):
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.delitem(sys.modules, name, raising=False)
    own.find.cache_clear()
    importlib.invalidate_caches()
    return f"{name}:MyNet"

  yield write
  own.find.cache_clear()


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
  config, _, _ = main.parse(["main", *flags, "--workdir=w"])
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
  config = _parsed("--config=configs/table_5_1.py:demo", *flags)
  found = [study_classifier(e).model for e in study.read(config).experiments]
  assert found and {(m.name, m.depth, m.width) for m in found} == {(name, 7, 8)}
  axis = f"--config.backbones=('resnet', '{name}')"
  config = _parsed("--config=configs/table_5_1.py:demo", f"{MODEL}.name={name}", axis)
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
