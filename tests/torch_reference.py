"""The reference that parity tests compare with: torchvision, beside a CPU-only torch.

torchvision's wheels bring operators built for CUDA. Where those cannot be loaded, its
models can be imported all the same once the two operators exist by name that its
modules mention while they are imported.
"""

import functools
import types

import numpy as np


@functools.cache
def torchvision_models() -> types.ModuleType:
  """Returns `torchvision.models`; skips the test where it is not installed."""
  import pytest

  torch = pytest.importorskip("torch")
  signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
  for name in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, name):
      torch.library.define(f"torchvision::{name}", signature)
  return pytest.importorskip("torchvision.models")


def randomize(network, seed: int = 0) -> None:
  """Gives every parameter and running statistic of a network a non-trivial value.

  Convolutions and dense layers are scaled so that activations stay of order one; batch
  norms get scales, shifts, means and variances that are not their initial ones.
  """
  import torch

  generator = torch.Generator().manual_seed(seed)
  own = {"recurse": False}
  for module in network.modules():
    tensors = [*module.named_parameters(**own), *module.named_buffers(**own)]
    for name, tensor in tensors:
      draw = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
      uniform = torch.rand(tensor.shape, generator=generator, dtype=torch.float32)
      if name == "running_var":
        value = 0.5 + uniform
      elif name == "running_mean" or name == "bias":
        value = 0.1 * draw
      elif name == "num_batches_tracked":
        continue
      elif tensor.ndim == 1:
        value = 0.8 + 0.4 * uniform
      else:
        value = draw * (2 / tensor[0].numel()) ** 0.5
      with torch.no_grad():
        tensor.copy_(value)


def build(name: str, num_classes: int, seed: int = 0, **kwargs):
  """Returns a torchvision network in float64 with random weights, in training mode.

  Dropout is off. The last batch norm of ResNet's residual branches is scaled down so
  that the sum over the blocks stays of order one.
  """
  import torch

  make = getattr(torchvision_models(), name)
  if name == "googlenet":
    kwargs = {"init_weights": False, "aux_logits": True, **kwargs}
  network = make(num_classes=num_classes, **kwargs)
  randomize(network, seed)
  for key, parameter in network.named_parameters():
    last = "bn3.weight" if name == "resnet50" else "bn2.weight"
    if name.startswith("resnet") and key.endswith(last):
      parameter.data.mul_(0.3)
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
