"""The references that parity tests compare with, beside a CPU-only torch.

Networks are torchvision's, or efficientnet_lite_pytorch's.

torchvision's wheels bring operators built for CUDA. Where those cannot be loaded, its
networks and transforms can be imported all the same once the two operators exist by
name that its modules mention while they are imported.
"""

import functools
import types

import numpy as np


@functools.cache
def torchvision() -> types.ModuleType:
  """Returns torchvision; skips the test where it is not installed."""
  import pytest

  torch = pytest.importorskip("torch")
  signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
  for name in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, name):
      torch.library.define(f"torchvision::{name}", signature)
  return pytest.importorskip("torchvision")


def randomize(network, seed: int = 0) -> None:
  """Gives every parameter and running statistic of a network a non-trivial value.

  Convolutions and dense layers are scaled so that activations stay of order one. Batch
  norms mostly shift a channel well above or below the ReLU's kink: where an activation
  lies within rounding error of it, float32 gradients jump, in any implementation.
  """
  import torch

  rng = np.random.default_rng(seed)
  names = set(network.state_dict())
  for name, tensor in network.state_dict(keep_vars=True).items():
    shape = tuple(tensor.shape)
    if name.endswith("num_batches_tracked"):
      continue
    if name.endswith("running_var"):
      value = rng.uniform(0.5, 1.5, shape)
    elif name.removesuffix("bias") + "running_mean" in names:
      value = rng.uniform(0.8, 1.6, shape) * rng.choice((-1, 1), shape)
    elif name.endswith(("running_mean", "bias")):
      value = rng.normal(0.0, 0.1, shape)
    elif tensor.ndim == 1:  # A batch norm's scale; its bias comes next.
      value = rng.uniform(0.3, 0.6, shape)
    else:
      std = np.float32((2 / tensor[0].numel()) ** 0.5)
      value = std * rng.standard_normal(shape, np.float32)
    with torch.no_grad():
      tensor.copy_(torch.from_numpy(np.asarray(value, np.float32)))


def make(name: str, num_classes: int, **kwargs):
  """Returns a network of its publisher's, as he initializes it.

  EfficientNet-Lite0 pads for any size of images, and keeps all blocks in training.
  """
  if name == "efficientnet_lite0":
    import pytest

    package = pytest.importorskip("efficientnet_lite_pytorch")
    options = {"image_size": None, "drop_connect_rate": 0.0, **kwargs}
    name = name.replace("_", "-")
    return package.EfficientNet.from_name(name, num_classes=num_classes, **options)
  return getattr(torchvision().models, name)(num_classes=num_classes, **kwargs)


def build(name: str, num_classes: int, seed: int = 0, **kwargs):
  """Returns such a network in float64 with random weights, in training mode.

  Every weight is a float32 value. Dropout is off.
  """
  import torch

  if name == "googlenet":
    kwargs = {"init_weights": False, "aux_logits": True, **kwargs}
  with torch.device("meta"):
    network = make(name, num_classes, **kwargs)
  network = network.to_empty(device="cpu")
  randomize(network, seed)
  for key, tensor in network.state_dict(keep_vars=True).items():
    if key.endswith("num_batches_tracked"):
      tensor.zero_()
  for module in network.modules():
    if isinstance(module, torch.nn.Dropout):
      module.p = 0.0
  return network.double().train()


def state_dict(network) -> dict[str, np.ndarray]:
  """Returns a network's tensors as NumPy arrays, floats as float32."""
  state = {}
  for name, tensor in network.state_dict().items():
    array = tensor.detach().cpu().numpy()
    state[name] = array.astype(np.float32) if array.dtype.kind == "f" else array
  return state


def images(batch: int, size: int, seed: int = 0) -> np.ndarray:
  """Returns float32 [batch, size, size, 3] of order one: smooth patches and noise."""
  rng = np.random.default_rng(seed)
  coarse = rng.normal(size=(batch, 8, 8, 3))
  smooth = np.repeat(np.repeat(coarse, -(-size // 8), 1), -(-size // 8), 2)
  noise = 0.3 * rng.normal(size=(batch, size, size, 3))
  return (smooth[:, :size, :size] + noise).astype(np.float32)


def relative_error(value, reference) -> float:
  """Returns norm(value - reference) / norm(reference), computed in float64."""
  value = np.asarray(value, np.float64)
  reference = np.asarray(reference, np.float64)
  assert value.shape == reference.shape, (value.shape, reference.shape)
  return float(np.linalg.norm(value - reference) / np.linalg.norm(reference))
