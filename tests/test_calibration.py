"""The calibration and ensemble modules against plain PyTorch ones."""

import functools
import math

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_method
from torch import nn

from fidelity_jax import errors
from fidelity_jax.models.calibration import (
  Calibration,
  ConvStack,
  Ensemble,
  fidelity_feature,
)
from fidelity_jax.resize import resize2d

SIZE = (11, 9)
CHANNELS = 6
FEATURE_SIZE = CHANNELS
MODULES = (
  "spatial_multiplication",
  "spatial_addition",
  "residual",
  "channel_multiplication",
  "channel_concatenation",
)


def reference(**options):
  """A torch method whose backbone is one convolution and two pools: three taps."""
  torch.manual_seed(0)
  backbone = nn.Sequential(
    nn.Conv2d(3, CHANNELS, 3, padding=1), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1)
  )
  options = dict(dncnn=dict(depth=2, width=2), channels=4) | options
  return torch_method.Method(backbone, nn.Identity(), FEATURE_SIZE, **options).double()


def from_torch(module):
  """Params of Calibration (and Ensemble) from the reference's state dict."""
  groups = {
    "cnn_layers_weight": "multiplication",
    "cnn_layers_bias": "addition",
    "mul_fc": "channel_multiplication",
    "cat_fc": "channel_concatenation",
    "ensemble": "weights",
  }
  flat = {}
  for name, value in module.state_dict().items():
    group, *path = name.split(".")
    if group not in groups:
      continue
    value = value.numpy().astype(np.float32)
    kind = "bias" if value.ndim == 1 else "kernel"
    layer = int(path[-2]) // 2
    if group.startswith("cnn"):
      value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value
      keys = (f"{groups[group]}_{path[0]}", f"conv_{layer}", kind)
    else:
      keys = (groups[group], ("hidden", "output")[layer], kind)
      value = value.T
    flat[keys] = value
  params = flax.traverse_util.unflatten_dict(flat)
  ensemble = {name: params.pop(name) for name in ("weights",) if name in params}
  return params, ensemble


def gradients(module):
  """What `from_torch` would return, holding gradients."""
  for parameter in module.parameters():
    if parameter.grad is not None:
      parameter.data = parameter.grad
  return from_torch(module)


def assert_trees_close(ours, expected, tolerance=2e-5):
  """Each leaf within `tolerance` of its own largest value."""
  assert jax.tree.structure(ours) == jax.tree.structure(expected)
  for path, value in jax.tree.leaves_with_path(expected):
    other = ours
    for key in path:
      other = other[key.key]
    scale = np.abs(value).max() + 1e-8
    np.testing.assert_allclose(
      other / scale, value / scale, atol=tolerance, err_msg=jax.tree_util.keystr(path)
    )


def calibrated(calibration, params, confidence, kernel, bias, images):
  """The reference's backbone and channel modules, in JAX."""
  sizes = (SIZE, SIZE, (SIZE[0] // 2, SIZE[1] // 2))
  variables = {"params": params}
  maps = calibration.apply(variables, confidence, sizes, method="spatial_maps")
  tap = calibration.steer(maps)
  x = jax.lax.conv_general_dilated(
    tap(0, images),
    kernel,
    (1, 1),
    "SAME",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    precision="highest",
  )
  x = flax.linen.max_pool(tap(1, x + bias), (2, 2), (2, 2))
  features = jnp.mean(tap(2, x), axis=(1, 2))
  return calibration.apply(variables, features, confidence, method="channel"), features


# Each ablation alone is compared in test_parity.py, within the whole method.
CASES = [
  dict(),
  dict(resize="bicubic", num_convs=2, channels=16),
  dict(resize="nearest", residual=False),
  dict(spatial_multiplication=False, channel_multiplication=False),
  dict(spatial_addition=False, channel_concatenation=False, num_convs=1, ratio=1.0),
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_matches_torch_with_gradients(options):
  rng = np.random.default_rng(0)
  images = rng.uniform(size=(2, *SIZE, 3)).astype(np.float32)
  confidence = rng.normal(size=(2, *SIZE, 1)).astype(np.float32)
  cotangent = rng.normal(size=(2, FEATURE_SIZE)).astype(np.float32)
  module = reference(ensemble=True, **options)
  params, ensemble_params = from_torch(module)
  conv = module.feature_extractor[0]
  kernel = conv.weight.detach().numpy().transpose(2, 3, 1, 0).astype(np.float32)
  bias = conv.bias.detach().numpy().astype(np.float32)

  calibration = Calibration(FEATURE_SIZE, 3, **({"channels": 4} | options))
  ensemble = Ensemble(FEATURE_SIZE, options.get("ratio", 0.5))

  @jax.jit
  def ours(params, ensemble_params, confidence):
    h, plain = calibrated(calibration, params, confidence, kernel, bias, images)
    # Any [N, F] may be the plain feature here; this one depends on the maps.
    blended = ensemble.apply({"params": ensemble_params}, h, plain, confidence)
    return jnp.sum(blended * cotangent), (h, blended)

  (_, (h, blended)), grads = jax.value_and_grad(ours, (0, 1, 2), has_aux=True)(
    params, ensemble_params, confidence
  )

  nchw = lambda x: torch.tensor(x, dtype=torch.float64).permute(0, 3, 1, 2)
  f = nchw(confidence).requires_grad_()
  steered = module.steered_features(nchw(images), f)
  expected_h = module.channel(steered, f)
  v = torch.sigmoid(module.ensemble(f.mean((2, 3))))
  expected = (1 - v) * expected_h + v * steered
  (expected * torch.tensor(cotangent)).sum().backward()

  np.testing.assert_allclose(h, expected_h.detach(), rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(blended, expected.detach(), rtol=1e-5, atol=1e-5)
  expected_grads = gradients(module)
  assert_trees_close(grads[0], expected_grads[0])
  assert_trees_close(grads[1], expected_grads[1])
  assert_trees_close(
    {"f": np.asarray(grads[2])}, {"f": f.grad.permute(0, 2, 3, 1).numpy()}
  )


def init(calibration, size=8):
  """The shapes of fresh params; `jax.jit` of the same gives their values."""
  return jax.eval_shape(lambda: init_values(calibration, size))


def init_values(calibration, size=8):
  features = jnp.zeros((1, calibration.feature_size))
  sizes = ((size, size),) * calibration.num_taps
  confidence = jnp.zeros((1, size, size, 1))
  return calibration.init(jax.random.key(0), features, confidence, sizes)["params"]


@pytest.mark.parametrize("off", MODULES)
def test_modules_that_are_off_own_nothing_and_compute_nothing(off):
  full = set(init(Calibration(8, 2, channels=2)))
  # In bfloat16 every convolution is XLA's own, which can be counted; so can products,
  # as nearest resizing has none.
  calibration = Calibration(
    8, 2, channels=2, resize="nearest", dtype=jnp.bfloat16, **{off: False}
  )
  params = init(calibration)
  missing = {
    "spatial_multiplication": {"multiplication_0", "multiplication_1"},
    "spatial_addition": {"addition_0", "addition_1"},
    "residual": set(),
  }.get(off, {off})
  assert full - set(params) == missing
  assert set(params) <= full

  def run(params, features, confidence):
    sizes = ((8, 8), (4, 4))
    return calibration.apply({"params": params}, features, confidence, sizes)

  jaxpr = str(jax.make_jaxpr(run)(params, jnp.zeros((1, 8)), jnp.zeros((1, 8, 8, 1))))
  # 3 convolutions per tap and chain; 2 products per channel module.
  spatial = 6 if off in ("spatial_multiplication", "spatial_addition") else 12
  assert jaxpr.count("conv_general_dilated[") == spatial
  channel = 2 if off in ("channel_multiplication", "channel_concatenation") else 4
  assert jaxpr.count("dot_general[") == channel


def test_residual_mechanism_adds_a_stacks_input():
  with_it = Calibration(8, 2, channels=2)
  stack, size = ConvStack(with_it.num_convs, with_it.channels), (5, 3)
  confidence = jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
  arguments = (confidence, ((8, 8), size))
  maps = functools.partial(Calibration.apply, method="spatial_maps")
  variables = with_it.init(jax.random.key(0), *arguments, method="spatial_maps")
  results = [
    maps(module, variables, *arguments)
    for module in (with_it, with_it.clone(residual=False))
  ]
  for chain, name in enumerate(("multiplication", "addition")):
    params = [variables["params"][f"{name}_{i}"] for i in range(2)]
    first = stack.apply({"params": params[0]}, confidence)
    following = stack.apply({"params": params[1]}, first)
    for (maps_0, maps_1), expected in zip(
      results, (following + first, following), strict=True
    ):
      # The first stack has no residual in either case.
      np.testing.assert_allclose(maps_0[chain], first, atol=1e-6)
      np.testing.assert_allclose(maps_1[chain], resize2d(expected, size), atol=1e-6)
    assert np.abs(resize2d(first, size)).max() > 1e-2


def test_without_spatial_modules_taps_change_nothing():
  calibration = Calibration(
    4,
    2,
    spatial_multiplication=False,
    spatial_addition=False,
    channel_multiplication=False,
    channel_concatenation=False,
  )
  maps, features = calibration.apply(
    {}, jnp.ones((1, 4)), jnp.ones((1, 8, 8, 1)), ((8, 8), (4, 4))
  )
  assert maps == ((None, None), (None, None))
  assert np.array_equal(features, np.ones((1, 4)))
  g = jnp.ones((1, 4, 4, 3))
  assert calibration.steer(maps)(1, g) is g


def test_initialization_is_pytorchs():
  # U(+-1/sqrt(fan_in)): the bounds hold and are approached, the variance is a third
  # of the bound squared.
  params = jax.jit(lambda: init_values(Calibration(128, 1)))()
  layers = {
    "multiplication_0": [("conv_0", 9), ("conv_1", 144), ("conv_2", 144)],
    "channel_multiplication": [("hidden", 128), ("output", 64)],
    "channel_concatenation": [("hidden", 256), ("output", 64)],
  }
  for group, expected in layers.items():
    for name, fan_in in expected:
      bound = 1 / math.sqrt(fan_in)
      for leaf in params[group][name].values():
        assert np.abs(leaf).max() <= bound
        if leaf.size > 100:
          assert np.abs(leaf).max() > 0.97 * bound
          assert leaf.std() == pytest.approx(bound / math.sqrt(3), rel=0.1)
  # PyTorch's own layers, drawn as often, agree.
  torch.manual_seed(0)
  theirs = nn.Linear(128, 64)
  ours = params["channel_multiplication"]["hidden"]
  assert float(ours["kernel"].std()) == pytest.approx(
    theirs.weight.std().item(), rel=0.03
  )
  assert float(ours["bias"].std()) == pytest.approx(theirs.bias.std().item(), rel=0.2)


def test_params_do_not_depend_on_the_image_size():
  shapes = lambda size: jax.tree.map(jnp.shape, init(Calibration(6, 3), size))
  assert shapes(4) == shapes(13)


def test_fidelity_feature_halves():
  # Row-major first, column-major second; no resizing at this length.
  f = jnp.arange(6.0).reshape(1, 2, 3, 1)
  phi = fidelity_feature(f, 12)
  np.testing.assert_array_equal(phi[0], [0, 1, 2, 3, 4, 5, 0, 3, 1, 4, 2, 5])
  # An odd length gives the first half the extra place.
  phi = fidelity_feature(f, 11)
  np.testing.assert_array_equal(phi[0, :6], np.arange(6))
  assert phi.shape == (1, 11)


def test_bfloat16_computes_in_bfloat16():
  calibration = Calibration(8, 2, dtype=jnp.bfloat16)
  params = init(calibration)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))

  def run(params):
    maps, features = calibration.apply(
      {"params": params}, jnp.ones((1, 8)), jnp.ones((1, 8, 8, 1)), ((8, 8), (4, 4))
    )
    return (maps, features), calibration.steer(maps)(0, jnp.ones((1, 8, 8, 3)))

  computed, tapped = jax.eval_shape(run, params)
  assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(computed))
  assert tapped.dtype == jnp.float32


def test_bad_arguments():
  with pytest.raises(errors.UsageError, match="did you mean 'bilinear'"):
    Calibration(8, 2, resize="bilinaer")
  with pytest.raises(errors.UsageError, match=r"ratio 0.1 of a feature of 8 leaves 0"):
    Calibration(8, 2, ratio=0.1)
  with pytest.raises(errors.UsageError, match="ratio"):
    Ensemble(8, ratio=0)
  with pytest.raises(errors.UsageError, match="num_convs is 0"):
    Calibration(8, 2, num_convs=0)
  calibration = Calibration(8, 2)
  variables = {"params": init(calibration)}
  maps = lambda size, sizes: jax.eval_shape(
    lambda v: calibration.apply(
      v, jnp.zeros((1, *size, 1)), sizes, method="spatial_maps"
    ),
    variables,
  )
  with pytest.raises(errors.UsageError, match="3 tap sizes for a calibration of 2"):
    maps((8, 8), ((8, 8), (4, 4), (2, 2)))
  with pytest.raises(errors.UsageError, match="both must have the image's size"):
    maps((8, 8), ((9, 8), (4, 4)))
  with pytest.raises(errors.UsageError, match="too small to pad"):
    maps((1, 8), ((1, 8), (1, 4)))
