"""The whole method against its PyTorch reference, and against the released code.

Weights go through the port, as the authors' checkpoints do.
"""

import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import torch_method
import torch_reference
from torch import nn

from fidelity_jax import fidelity, models, port
from fidelity_jax.method import Method

NUM_CLASSES = 7
PARITY = pathlib.Path(__file__).parents[2] / "shared" / "parity"


class TinyResNet(nn.Module):
  """One residual block in torchvision's names, with a ResNet's three taps."""

  def __init__(self, width=8, num_classes=NUM_CLASSES):
    super().__init__()
    block = torch_reference.torchvision().models.resnet.BasicBlock
    self.conv1 = nn.Conv2d(3, width, 7, 2, padding=3, bias=False)
    self.bn1 = nn.BatchNorm2d(width)
    self.relu = nn.ReLU()
    self.maxpool = nn.MaxPool2d(3, 2, padding=1)
    self.layer1 = nn.Sequential(block(width, width))
    self.avgpool = nn.AdaptiveAvgPool2d(1)
    self.fc = nn.Linear(width, num_classes)

  def forward(self, x):
    x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
    return self.fc(self.avgpool(self.layer1(x)).flatten(1))


def reference(network, feature_size, **options):
  """The method around a torchvision network, seeded, in float64."""
  backbone, head = torch_method.split(network)
  options = {"channels": 4, "dncnn": dict(depth=3, width=4)} | options
  method = torch_method.Method(backbone, head, feature_size, **options)
  torch_reference.randomize(method)
  # Signals of about the same size from layer to layer, residual branches and maps of a
  # realistic size: otherwise logits hardly depend on the input, but on what the
  # additive maps and biases of the last layers are.
  for module in backbone.modules():
    if isinstance(module, nn.BatchNorm2d):
      module.weight.data.mul_(2)
    last = getattr(module, "bn3", getattr(module, "bn2", None))
    if last is not None:
      last.weight.data.mul_(0.3)
  for stack in {"restoration", "fidelity"} & dict(method.named_children()).keys():
    getattr(method, stack).model[-1].weight.data.mul_(0.1)
  for stacks in ("cnn_layers_weight", "cnn_layers_bias"):
    for stack in getattr(method, stacks, ()):
      for parameter in stack[-1].parameters():
        parameter.data.mul_(0.1)
  return method.double().eval()


def from_file(path, transform_input=False, transform_steered=None, **options):
  """(Method, variables); of `options`, what tensors do not tell matters."""
  kind, source = options.get("kind", "l1"), options.get("source", "oracle")
  parts = port.load(path, transform_input=transform_input)
  config = parts["classifier"].config
  model = config["model"] | {"transform_steered": transform_steered}
  classifier = models.create(model, config["num_classes"])
  classifier, frozen = models.fold(classifier, parts["classifier"].variables)
  dncnn = lambda part: models.DnCNN(**parts[part].config)
  told = parts["calibration"].config if "calibration" in parts else {}
  calibration = models.Calibration(
    **{"feature_size": classifier.feature_size, "num_taps": classifier.num_taps} | told,
    resize=options.get("resize", "bilinear"),
    residual=options.get("residual", True),
  )
  method = Method(
    classifier=classifier,
    restorer=dncnn("restorer"),
    calibration=calibration,
    ensemble=models.Ensemble(**parts["ensemble"].config)
    if "ensemble" in parts
    else None,
    estimator=dncnn("estimator") if source != "oracle" else None,
    map_name=kind,
    estimator_input="degraded" if source == "oracle" else source,
  )
  names = ("restorer", "estimator", "calibration", "ensemble")
  variables = {name: parts[name].variables for name in names if name in parts}
  return method, variables | {"classifier": frozen}


def images(height, width, batch=2):
  """(degraded, clean), float32 [batch, height, width, 3] in [0, 1]."""
  rng = np.random.default_rng(0)
  coarse = rng.uniform(size=(batch, 8, 8, 3))
  rows, columns = (-(-length // 8) for length in (height, width))
  clean = coarse.repeat(rows, 1).repeat(columns, 2)[:, :height, :width]
  degraded = np.clip(clean + 0.2 * rng.normal(size=clean.shape), 0, 1)
  return degraded.astype(np.float32), clean.astype(np.float32)


def nchw(x):
  return torch.tensor(x, dtype=torch.float64).permute(0, 3, 1, 2)


def relative_error(value, expected):
  """The largest error, in standard deviations of what is expected."""
  return np.abs(np.asarray(value) - expected).max() / expected.std()


def single_and_blended(method, variables, degraded, clean):
  """Restored image, plain feature, logits of the calibrated and the blended one.

  `method` is a Method with an ensemble and the oracle l1 map.
  """
  restored = method.restore(variables, degraded)
  confidence = fidelity.confidence(fidelity.oracle_map(restored, clean))
  single = method.calibrated(variables, restored, confidence)
  plain = method.plain(variables, restored)
  blended = method.ensemble.apply(variables["ensemble"], single, plain, confidence)
  return {
    "restored": restored,
    "plain": plain,
    "single": method.classify(variables, single),
    "blended": method.classify(variables, blended),
  }


def compare(
  network,
  feature_size,
  path,
  size,
  gradients=1e-3,
  transform_input=False,
  jit=jax.jit,
  **options,
):
  """Logits, and gradients with respect to every network that the method trains.

  `size` is the images', (height, width). `gradients` is their tolerance relative to
  the largest element of each tensor, or None, which leaves them out. `jit` is how
  functions are compiled.
  """
  theirs = reference(network, feature_size, **options)
  safetensors.numpy.save_file(torch_reference.state_dict(theirs), path)
  ours, variables = from_file(path, transform_input, **options)
  degraded, clean = images(*size)
  weights = np.random.default_rng(1).normal(size=(2, NUM_CLASSES)).astype(np.float32)

  trains = ("calibration", "ensemble", "estimator")
  trained = {name: variables[name] for name in trains if name in variables}
  frozen = {name: variables[name] for name in variables if name not in trains}

  def loss(trained, frozen):
    logits = ours.logits(trained | frozen, degraded, clean)
    return jnp.sum(logits * weights), logits

  if gradients is None:
    _, logits = jit(loss)(trained, frozen)
  else:
    step = jit(jax.value_and_grad(loss, has_aux=True))
    (_, logits), grads = step(trained, frozen)

  logits_torch = theirs(nchw(degraded), nchw(clean))
  expected = logits_torch.detach().numpy()
  np.testing.assert_allclose(logits, expected, atol=1e-4 * expected.std())
  if gradients is None:
    return
  (logits_torch * torch.tensor(weights)).sum().backward()

  # The gradients travel the way the weights did.
  state = torch_reference.state_dict(theirs)
  for name, parameter in theirs.named_parameters():
    if parameter.grad is not None:
      state[name] = parameter.grad.numpy().astype(np.float32)
  safetensors.numpy.save_file(state, path)
  _, expected_variables = from_file(path, transform_input, **options)
  assert jax.tree.structure(grads) == jax.tree.structure(
    {name: expected_variables[name] for name in grads}
  )
  for keys, gradient in jax.tree.leaves_with_path(grads):
    other = expected_variables
    for key in keys:
      other = other[key.key]
    scale = np.abs(other).max()
    np.testing.assert_allclose(
      gradient, other, atol=gradients * scale, err_msg=jax.tree_util.keystr(keys)
    )


# Any two of map, source, resize method, number of convolutions and ensemble meet with
# every pair of their values; each ablation is in one.
COMBINATIONS = [
  dict(kind="l1", source="oracle", resize="bilinear", num_convs=2),
  dict(kind="l1", source="degraded", resize="nearest", channel_multiplication=False),
  dict(kind="l1", source="restored", resize="bicubic", ensemble=True),
  dict(
    kind="l2",
    source="oracle",
    resize="nearest",
    ensemble=True,
    spatial_multiplication=False,
  ),
  dict(
    kind="l2",
    source="degraded",
    resize="bicubic",
    num_convs=2,
    spatial_addition=False,
  ),
  dict(kind="l2", source="restored", resize="bilinear", residual=False),
  dict(kind="cosine", source="oracle", resize="bicubic", channel_concatenation=False),
  dict(kind="cosine", source="degraded", resize="bilinear", ensemble=True),
  dict(kind="cosine", source="restored", resize="nearest", num_convs=2, ensemble=True),
]

# Not square, and nothing is halved exactly: maps go from 33x25 by 17x13 to 9x7, and the
# channel modules take 825 values to 4. The lengths of each pair have no common factor,
# so that i n_in / n_out is never a whole number but at i = 0: only there may PyTorch's
# nearest differ from the exact floor.
SIZE = (33, 25)


@pytest.mark.parametrize("options", COMBINATIONS, ids=str)
def test_combinations(options, tmp_path):
  # One by one, operations are compiled once for all combinations, which takes a quarter
  # of the time; the backbones below are compiled whole.
  compare(
    TinyResNet(),
    8,
    tmp_path / "weights.safetensors",
    SIZE,
    jit=lambda function: function,
    **options,
  )


def torchvision_network(name):
  """A torchvision network with few classes, and its feature length."""
  make = getattr(torch_reference.torchvision().models, name)
  extra = dict(init_weights=False, transform_input=True) if name == "googlenet" else {}
  sizes = dict(alexnet=9216, vgg16=25088, googlenet=1024, resnet18=512, resnet50=2048)
  return make(num_classes=NUM_CLASSES, **extra), sizes[name]


# At a rounding's distance from a kink (ReLU, max pool) a gradient may jump: these
# networks have enough of them to need some room. At 32 pixels VGG-16 has one whose jump
# no room would hold, in PyTorch's float32 as well; at 33 it has none.
ROOM = 5e-3


@pytest.mark.parametrize(
  "name,size,gradients",
  [
    pytest.param("alexnet", 63, ROOM, marks=pytest.mark.slow),
    ("resnet50", 33, None),
    pytest.param("googlenet", 32, None, marks=pytest.mark.slow),
    pytest.param("vgg16", 33, None, marks=pytest.mark.slow),
    pytest.param("googlenet", 32, ROOM, marks=pytest.mark.slow),
    pytest.param("resnet18", 32, ROOM, marks=pytest.mark.slow),
    pytest.param("resnet50", 33, ROOM, marks=pytest.mark.slow),
    pytest.param("vgg16", 33, ROOM, marks=pytest.mark.slow),
  ],
)
def test_backbones(name, size, gradients, tmp_path):
  network, feature_size = torchvision_network(name)
  compare(
    network,
    feature_size,
    tmp_path / "weights.safetensors",
    (size, size),
    gradients,
    source="degraded",
    ensemble=True,
    ratio=16 / feature_size,
    transform_input=name == "googlenet",
  )


@pytest.mark.slow
@pytest.mark.parametrize("transform_steered", [True, False])
def test_googlenet_rescales_its_input(transform_steered, tmp_path):
  """Plain features, and logits with and without ensemble, in either reading."""
  network, feature_size = torchvision_network("googlenet")
  options = dict(ratio=16 / feature_size, ensemble=True)
  theirs = reference(
    network, feature_size, transform_steered=transform_steered, **options
  )
  path = tmp_path / "weights.safetensors"
  safetensors.numpy.save_file(torch_reference.state_dict(theirs), path)
  ours, variables = from_file(path, True, transform_steered, **options)
  degraded, clean = images(33, 32)
  # Not compiled whole: the second reading finds every operation of the first compiled.
  results = single_and_blended(ours, variables, degraded, clean)

  def single(images, confidence):
    return theirs.channel(theirs.steered_features(images, confidence), confidence)

  with torch.no_grad():
    restored, confidence = theirs.inputs(nchw(degraded), nchw(clean))
    steered, plain = single(restored, confidence), theirs.plain_features(restored)
    expected = {
      "plain": plain,
      "single": theirs.classifier(steered),
      "blended": theirs.classifier(theirs.blend(steered, plain, confidence)),
    }
    # The two readings are far apart, so that one cannot pass for the other.
    theirs.transform_steered = not transform_steered
    other = theirs.classifier(single(restored, confidence))
  assert relative_error(other, expected["single"].numpy()) > 0.05
  for name, value in expected.items():
    assert relative_error(results[name], value.numpy()) < 1e-4, name


@pytest.fixture(scope="module")
def released():
  """The recorded case: (state dict, expected outputs, degraded and clean images)."""
  if not PARITY.exists():
    pytest.skip("no ../shared/parity")
  spec = importlib.util.spec_from_file_location("parity", PARITY / "parity_weights.py")
  weights = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(weights)
  state = weights.state_dict(PARITY / "resnet50_oracle_l1.manifest.json")
  expected = dict(np.load(PARITY / "resnet50_oracle_l1.expected.npz"))
  return state, expected, *weights.images()


@pytest.mark.slow
def test_reference_reproduces_released_code(released):
  """The reference of this file, in float64, against what that code computed."""
  state, expected, degraded, clean = released
  network = torch_reference.torchvision().models.resnet50(num_classes=257)
  backbone, head = torch_method.split(network)
  method = torch_method.Method(backbone, head, 2048, num_convs=2, ensemble=True)
  method.load_state_dict({name: torch.tensor(value) for name, value in state.items()})
  method = method.double().eval()
  with torch.no_grad():
    images, confidence = method.inputs(nchw(degraded), nchw(clean))
    steered = method.steered_features(images, confidence)
    single = method.channel(steered, confidence)
    blended = method.blend(single, method.plain_features(images), confidence)
    results = {
      "logits_single": method.classifier(single),
      "logits_ensemble": method.classifier(blended),
    }
    restored = method.restore(nchw(degraded)).permute(0, 2, 3, 1)
  results["restored_mean"] = restored.mean((1, 2))
  results["restored_patch"] = restored[:, 100:108, 100:108]
  assert results.keys() == expected.keys()
  for name, value in results.items():
    error = relative_error(value.numpy(), expected[name])
    assert error < 1e-11, (name, error)


def test_released_code(released, tmp_path):
  state, expected, degraded, clean = released
  path = tmp_path / "weights.safetensors"
  safetensors.numpy.save_file(state, path)
  method, variables = from_file(path)
  compute = jax.jit(functools.partial(single_and_blended, method))
  results = compute(variables, degraded, clean)
  restored = results["restored"]
  np.testing.assert_allclose(
    restored.mean((1, 2)), expected["restored_mean"], atol=1e-5
  )
  np.testing.assert_allclose(
    restored[:, 100:108, 100:108], expected["restored_patch"], atol=1e-5
  )
  for name in ("single", "blended"):
    recorded = {"single": "logits_single", "blended": "logits_ensemble"}[name]
    error = relative_error(results[name], expected[recorded])
    assert error < 1e-4, (name, error)
  whole = jax.jit(method.logits)(variables, degraded, clean)
  assert relative_error(whole, results["blended"]) < 1e-5
