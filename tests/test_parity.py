"""The whole method against its PyTorch reference, and against the released code.

Weights go through the port, as the authors' checkpoints do.
"""

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

from fidelity_jax import fidelity, models, pipeline, port

NUM_CLASSES = 7
PARITY = pathlib.Path(__file__).parents[2] / "shared" / "parity"


class TinyResNet(nn.Module):
  """One residual block in torchvision's names, with a ResNet's three taps."""

  def __init__(self, width=8):
    super().__init__()
    block = torch_reference.torchvision().models.resnet.BasicBlock
    self.conv1 = nn.Conv2d(3, width, 7, 2, padding=3, bias=False)
    self.bn1 = nn.BatchNorm2d(width)
    self.relu = nn.ReLU()
    self.maxpool = nn.MaxPool2d(3, 2, padding=1)
    self.layer1 = nn.Sequential(block(width, width))
    self.avgpool = nn.AdaptiveAvgPool2d(1)
    self.fc = nn.Linear(width, NUM_CLASSES)

  def forward(self, x):
    x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
    return self.fc(self.avgpool(self.layer1(x)).flatten(1))


def reference(network, feature_size, **options):
  """The method around a torchvision network, seeded, in float64."""
  backbone, head = torch_method.split(network)
  options = {"channels": 4, "dncnn": dict(depth=3, width=4)} | options
  method = torch_method.Method(backbone, head, feature_size, **options)
  torch_reference.randomize(method)
  # Residual branches and maps of a realistic size.
  for module in backbone.modules():
    last = getattr(module, "bn3", getattr(module, "bn2", None))
    if last is not None:
      last.weight.data.mul_(0.3)
  for stack in {"restoration", "fidelity"} & dict(method.named_children()).keys():
    getattr(method, stack).model[-1].weight.data.mul_(0.1)
  return method.double().eval()


def from_file(path, transform_input=False, **options):
  """(pipeline.Method, variables); of `options`, what tensors do not tell matters."""
  kind, source = options.get("kind", "l1"), options.get("source", "oracle")
  parts = port.load(path, transform_input=transform_input)
  config = parts["classifier"].config
  classifier = models.create(config["model"], config["num_classes"])
  classifier, frozen = models.fold(classifier, parts["classifier"].variables)
  dncnn = lambda part: models.DnCNN(**parts[part].config)
  told = parts["calibration"].config if "calibration" in parts else {}
  calibration = models.Calibration(
    **{"feature_size": classifier.feature_size, "num_taps": classifier.num_taps} | told,
    resize=options.get("resize", "bilinear"),
    residual=options.get("residual", True),
  )
  method = pipeline.Method(
    classifier=classifier,
    restorer=dncnn("restorer"),
    calibration=calibration,
    ensemble=models.Ensemble(**parts["ensemble"].config)
    if "ensemble" in parts
    else None,
    estimator=dncnn("estimator") if source != "oracle" else None,
    map_kind=kind,
    estimator_input="degraded" if source == "oracle" else source,
  )
  names = ("restorer", "estimator", "calibration", "ensemble")
  variables = {name: parts[name].variables for name in names if name in parts}
  return method, variables | {"classifier": frozen}


def images(size, batch=2):
  """(degraded, clean), float32 [batch, size, size, 3] in [0, 1]."""
  rng = np.random.default_rng(0)
  coarse = rng.uniform(size=(batch, 8, 8, 3))
  repeats = -(-size // 8)
  clean = coarse.repeat(repeats, 1).repeat(repeats, 2)[:, :size, :size]
  degraded = np.clip(clean + 0.2 * rng.normal(size=clean.shape), 0, 1)
  return degraded.astype(np.float32), clean.astype(np.float32)


def nchw(x):
  return torch.tensor(x, dtype=torch.float64).permute(0, 3, 1, 2)


def compare(
  network,
  feature_size,
  path,
  size,
  gradients=1e-3,
  transform_input=False,
  **options,
):
  """Logits, and gradients with respect to every network that the method trains.

  `gradients` is their tolerance relative to the largest element of each tensor, or
  None, which leaves them out.
  """
  theirs = reference(network, feature_size, **options)
  safetensors.numpy.save_file(torch_reference.state_dict(theirs), path)
  ours, variables = from_file(path, transform_input, **options)
  degraded, clean = images(size)
  weights = np.random.default_rng(1).normal(size=(2, NUM_CLASSES)).astype(np.float32)

  trains = ("calibration", "ensemble", "estimator")
  trained = {name: variables[name] for name in trains if name in variables}
  frozen = {name: variables[name] for name in variables if name not in trains}

  def loss(trained, frozen):
    logits = ours.logits(trained | frozen, degraded, clean)
    return jnp.sum(logits * weights), logits

  if gradients is None:
    _, logits = jax.jit(loss)(trained, frozen)
  else:
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
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


# Every map, source, resize method and ablation, each beside different others.
COMBINATIONS = [
  dict(kind="l1", source="oracle", num_convs=2),
  dict(kind="l1", source="degraded", ensemble=True),
  dict(kind="l1", source="degraded", channel_multiplication=False),
  dict(kind="l2", source="oracle", resize="bicubic", spatial_multiplication=False),
  dict(kind="l2", source="restored", resize="nearest", residual=False),
  dict(kind="cosine", source="oracle", resize="nearest", channel_concatenation=False),
  dict(kind="cosine", source="degraded", resize="bicubic", spatial_addition=False),
]


@pytest.mark.parametrize("options", COMBINATIONS, ids=str)
def test_combinations(options, tmp_path):
  compare(TinyResNet(), 8, tmp_path / "weights.safetensors", 24, **options)


def torchvision_network(name):
  """A torchvision network with few classes, and its feature length."""
  make = getattr(torch_reference.torchvision().models, name)
  extra = dict(init_weights=False, transform_input=True) if name == "googlenet" else {}
  sizes = dict(alexnet=9216, vgg16=25088, googlenet=1024, resnet18=512, resnet50=2048)
  return make(num_classes=NUM_CLASSES, **extra), sizes[name]


# At a rounding's distance from a kink (ReLU, max pool) a gradient may jump: these
# networks have enough of them to need some room.
ROOM = 5e-3


@pytest.mark.parametrize(
  "name,size,gradients",
  [
    ("alexnet", 63, ROOM),
    ("googlenet", 32, None),
    ("resnet50", 33, None),
    pytest.param("googlenet", 32, ROOM, marks=pytest.mark.slow),
    pytest.param("resnet18", 32, ROOM, marks=pytest.mark.slow),
    pytest.param("resnet50", 33, ROOM, marks=pytest.mark.slow),
    pytest.param("vgg16", 32, ROOM, marks=pytest.mark.slow),
  ],
)
def test_backbones(name, size, gradients, tmp_path):
  network, feature_size = torchvision_network(name)
  compare(
    network,
    feature_size,
    tmp_path / "weights.safetensors",
    size,
    gradients,
    source="degraded",
    ensemble=True,
    ratio=16 / feature_size,
    transform_input=name == "googlenet",
  )


@pytest.mark.skipif(not PARITY.exists(), reason="no ../shared/parity")
def test_released_code(tmp_path):
  spec = importlib.util.spec_from_file_location("parity", PARITY / "parity_weights.py")
  weights = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(weights)
  state = weights.state_dict(PARITY / "resnet50_oracle_l1.manifest.json")
  expected = np.load(PARITY / "resnet50_oracle_l1.expected.npz")
  degraded, clean = weights.images()
  path = tmp_path / "weights.safetensors"
  safetensors.numpy.save_file(state, path)
  method, variables = from_file(path)

  @jax.jit
  def run(variables, degraded, clean):
    restored = method.restore(variables, degraded)
    confidence = fidelity.confidence(fidelity.oracle_map(restored, clean))
    single = method.calibrated(variables, restored, confidence)
    plain = method.plain(variables, restored)
    blended = method.ensemble.apply(variables["ensemble"], single, plain, confidence)
    classify = lambda features: method.classify(variables, features)
    return restored, classify(single), classify(blended)

  restored, single, blended = run(variables, degraded, clean)
  np.testing.assert_allclose(
    restored.mean((1, 2)), expected["restored_mean"], atol=1e-5
  )
  np.testing.assert_allclose(
    restored[:, 100:108, 100:108], expected["restored_patch"], atol=1e-5
  )
  for ours, name in ((single, "logits_single"), (blended, "logits_ensemble")):
    error = np.abs(ours - expected[name]).max() / expected[name].std()
    assert error < 1e-4, (name, error)
  np.testing.assert_array_equal(
    blended, jax.jit(method.logits)(variables, degraded, clean)
  )
