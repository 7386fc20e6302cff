"""The whole method in plain PyTorch, written from its description, for comparison.

Modules carry the names of the authors' released checkpoints, so that one state dict
serves this reference, the port and the recorded parity case. Tensors are NCHW.
"""

import functools
import math

import torch
from torch import nn
from torch.nn import functional


class Stack(nn.Module):
  """DnCNN's convolutions: the predicted residual, or the estimated map."""

  def __init__(self, depth: int = 20, width: int = 64, out_channels: int = 3):
    super().__init__()
    layers = [nn.Conv2d(3, width, 3, padding=1), nn.ReLU()]
    for _ in range(depth - 2):
      layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
    self.model = nn.Sequential(*layers, nn.Conv2d(width, out_channels, 3, padding=1))

  def forward(self, x):
    return self.model(x)


def conv_stack(num_convs: int, channels: int) -> nn.Sequential:
  """Conv ReLU ... Conv from one channel to one, reflect padding."""
  widths = [1] + [channels] * (num_convs - 1) + [1]
  layers = []
  for i in range(num_convs):
    conv = nn.Conv2d(widths[i], widths[i + 1], 3, padding=1, padding_mode="reflect")
    layers += [conv, nn.ReLU()]
  return nn.Sequential(*layers[:-1])


def two_layers(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
  """FC ReLU FC."""
  return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def interpolate(x, size, method):
  """PyTorch's resizing without aligned corners."""
  corners = {} if method == "nearest" else {"align_corners": False}
  return functional.interpolate(x, size=size, mode=method, **corners)


class Method(nn.Module):
  """Restorer, map, confidence, steered backbone, channel modules, ensemble, head.

  Args:
    backbone: a torchvision network whose last part has been replaced by nn.Identity.
    head: the part that was replaced.
    feature_size: F.
    kind: "l1", "l2" or "cosine".
    source: "oracle", "degraded" or "restored": the true map, or what the estimator
      sees.
    ensemble: whether the ensemble module takes part.
    dncnn: keyword arguments of restorer and estimator.
    transform_steered: a GoogLeNet that re-scales its input does so when steered, too;
      False: the released code's reading.
    The others are the calibration's options.
  """

  def __init__(
    self,
    backbone,
    head,
    feature_size,
    *,
    kind="l1",
    source="oracle",
    resize="bilinear",
    num_convs=3,
    channels=16,
    ratio=0.5,
    spatial_multiplication=True,
    spatial_addition=True,
    residual=True,
    channel_multiplication=True,
    channel_concatenation=True,
    ensemble=False,
    dncnn=None,
    transform_steered=True,
  ):
    super().__init__()
    self.kind, self.source, self.resize = kind, source, resize
    self.transform_steered = transform_steered
    self.residual = residual
    self.feature_size = feature_size
    self.restoration = Stack(**(dncnn or {}))
    if source != "oracle":
      outputs = 1 if kind == "cosine" else 3
      self.fidelity = Stack(**(dncnn or {}), out_channels=outputs)
    self.feature_extractor, self.classifier = backbone, head
    self.pools = [
      module
      for name, module in backbone.named_modules()
      if isinstance(module, nn.MaxPool2d | nn.AdaptiveAvgPool2d)
      and "inception" not in name
      and "aux" not in name
    ]
    # Once and for all: `torch.compile` cannot follow hooks that come and go.
    self._chains = None
    for i, pool in enumerate(self.pools, 1):
      pool.register_forward_pre_hook(functools.partial(self._steer_pooled, i))
    taps = 1 + len(self.pools)
    stacks = lambda: nn.ModuleList(conv_stack(num_convs, channels) for _ in range(taps))
    hidden = int(feature_size * ratio)
    if spatial_multiplication:
      self.cnn_layers_weight = stacks()
    if spatial_addition:
      self.cnn_layers_bias = stacks()
    if channel_multiplication:
      self.mul_fc = two_layers(feature_size, hidden, feature_size)
    if channel_concatenation:
      self.cat_fc = two_layers(2 * feature_size, hidden, feature_size)
    if ensemble:
      self.ensemble = two_layers(1, hidden, feature_size)

  def restore(self, degraded):
    return (degraded - self.restoration(degraded)).clamp(0, 1)

  def fidelity_map(self, degraded, restored, clean):
    if self.source == "degraded":
      return self.fidelity(degraded)
    if self.source == "restored":
      return self.fidelity(restored)
    if self.kind == "l1":
      return (restored - clean).abs()
    if self.kind == "l2":
      return (restored - clean) ** 2
    return nn.CosineSimilarity(dim=1, eps=1e-6)(restored, clean)[:, None]

  def confidence(self, fidelity_map):
    if self.kind == "cosine":
      return fidelity_map.mean(1, keepdim=True)
    variance = (0.1**2 + 0.2**2 + 0.3**2 + 0.4**2 + 0.5**2) / (2 * 6**2)
    if self.kind == "l1":
      mean = math.sqrt(variance) * math.sqrt(2 / math.pi)
      std = math.sqrt(variance) * math.sqrt(1 - 2 / math.pi)
    else:
      mean, std = variance, math.sqrt(2) * variance
    return (1 - (fidelity_map - mean) / std).mean(1, keepdim=True)

  def chain(self, name, index, previous, size):
    """The next map of a chain, at tap `index`; None where the module is off."""
    if not hasattr(self, name):
      return None
    following = getattr(self, name)[index](previous)
    if index == 0:
      return following
    if self.residual:
      following = following + previous
    return interpolate(following, size, self.resize)

  def _steer(self, index, feature):
    size = feature.shape[-2:]
    weight, bias = self._chains
    weight = self.chain("cnn_layers_weight", index, weight, size)
    bias = self.chain("cnn_layers_bias", index, bias, size)
    self._chains = weight, bias
    if weight is not None:
      feature = 2 * torch.sigmoid(weight) * feature
    if bias is not None:
      feature = feature + bias
    return feature

  def _steer_pooled(self, index, _, args):
    """A pool's hook; the backbone also runs unsteered, and for other methods."""
    return None if self._chains is None else (self._steer(index, args[0]),)

  def steered_features(self, images, confidence):
    rescales = getattr(self.feature_extractor, "transform_input", False)
    if rescales and not self.transform_steered:
      # The released code calls the network's children one by one; torchvision's
      # `_transform_input` is none of them.
      self.feature_extractor.transform_input = False
    self._chains = confidence, confidence
    try:
      return self.feature_extractor(self._steer(0, images)).flatten(1)
    finally:
      self._chains = None
      if rescales:
        self.feature_extractor.transform_input = True

  def plain_features(self, images):
    return self.feature_extractor(images).flatten(1)

  def channel(self, features, confidence):
    half = self.feature_size // 2
    halves = [
      interpolate(image.reshape(len(image), 1, 1, -1), (1, half), self.resize)
      for image in (confidence, confidence.transpose(2, 3))
    ]
    phi = torch.cat(halves, -1).flatten(1)
    if hasattr(self, "mul_fc"):
      features = features * 2 * torch.sigmoid(self.mul_fc(phi))
    if hasattr(self, "cat_fc"):
      features = self.cat_fc(torch.cat([features, phi], 1))
    return features

  def blend(self, features, plain, confidence):
    v = torch.sigmoid(self.ensemble(confidence.mean((2, 3))))
    return (1 - v) * features + v * plain

  def inputs(self, degraded, clean=None):
    """(normalized restored images, confidence map); the former detached."""
    with torch.no_grad():
      restored = self.restore(degraded)
    confidence = self.confidence(self.fidelity_map(degraded, restored, clean))
    mean = restored.new_tensor([0.485, 0.456, 0.406])[:, None, None]
    std = restored.new_tensor([0.229, 0.224, 0.225])[:, None, None]
    return (restored - mean) / std, confidence

  def forward(self, degraded, clean=None):
    """Logits of images [N, 3, H, W] in [0, 1]."""
    images, confidence = self.inputs(degraded, clean)
    features = self.channel(self.steered_features(images, confidence), confidence)
    if hasattr(self, "ensemble"):
      features = self.blend(features, self.plain_features(images), confidence)
    return self.classifier(features)


def split(network: nn.Module) -> tuple[nn.Module, nn.Module]:
  """Takes the final fully connected part off a torchvision network.

  Returns (network without it, the part).
  """
  name = "fc" if hasattr(network, "fc") else "classifier"
  head = getattr(network, name)
  setattr(network, name, nn.Identity())
  for auxiliary in ("aux1", "aux2"):
    if hasattr(network, auxiliary):
      setattr(network, auxiliary, None)
  return network, head
