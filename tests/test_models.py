"""The networks' interface and the layers that PyTorch defines differently."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_reference as reference
from flax import traverse_util

from fidelity_jax import errors, models
from fidelity_jax.models import layers, registry

SIX = ("alexnet", "efficientnet_lite0", "googlenet", "resnet18", "resnet50", "vgg16")
TINY = {"name": "resnet", "stage_sizes": (1, 2), "width": 8, "block": "bottleneck"}


def shapes(module, size=64):
  images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
  return jax.eval_shape(module.init, jax.random.key(0), images)


def count(tree) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
  "name, parameters, features, taps",
  [
    ("alexnet", 61_100_840, 9216, 5),
    ("efficientnet_lite0", 4_652_008, 1280, 2),
    ("googlenet", 13_004_888, 1024, 6),
    ("resnet18", 11_689_512, 512, 3),
    ("resnet50", 25_557_032, 2048, 3),
    ("vgg16", 138_357_544, 25088, 7),
  ],
)
def test_published_sizes(name, parameters, features, taps):
  """The documented parameter counts (GoogLeNet: with auxiliary heads)."""
  module = models.create({"name": name}, 1000)
  variables = shapes(module)
  assert count(variables["params"]) == parameters
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
  assert (module.feature_size, module.num_taps) == (features, taps)
  assert module.num_classes == 1000
  sizes = module.tap_sizes((224, 160))
  assert len(sizes) == taps and sizes[0] == (224, 160)


@pytest.mark.parametrize(
  "name, size, hidden, features, taps",
  [
    ("alexnet", 63, (512, 512), 1152, 5),
    ("vgg16", 32, (512, 512), 3136, 7),
    pytest.param("googlenet", 16, (), 128, 6, marks=pytest.mark.slow),
  ],
)
def test_a_narrow_network(name, size, hidden, features, taps):
  """An eighth of torchvision's in every layer; it runs, and takes no wide weights."""
  module = models.create({"name": name, "width": 8}, 5)
  wide = models.create({"name": name}, 5)
  assert (module.feature_size, module.num_taps) == (features, taps)
  assert tuple(module.head.hidden) == hidden
  assert module.tap_sizes((size, size)) == wide.tap_sizes((size, size))
  narrow = shapes(module, size)
  layers_of = lambda variables: traverse_util.flatten_dict(variables["params"])
  given = shapes(wide, size)
  wide_layers = layers_of(given)
  for path, leaf in layers_of(narrow).items():
    expected = 5 if path[-2] == "logits" else wide_layers.pop(path).shape[-1] / 8
    assert leaf.shape[-1] == expected, path
  assert all(path[-2] == "logits" for path in wide_layers)
  with pytest.raises(errors.UsageError, match=r"do not fit the network: .*not \("):
    models.transfer(narrow, given, new_head=True)

  rng = np.random.default_rng(0)
  variables = jax.tree.map(lambda x: rng.random(x.shape, np.float32) / 8, narrow)
  images, seen = reference.images(2, size), []

  @jax.jit
  def run(variables, shift):
    def steer(index, feature):
      seen.append(index)
      return feature + shift * (index + 1)

    return module.apply(variables, images, tap=steer)

  logits, _ = run(variables, 0.0)
  assert logits.shape == (2, 5) and np.isfinite(logits).all()
  assert seen == list(range(taps))
  assert not np.allclose(run(variables, 1.0)[0], logits)


def test_widths_that_do_not_give_whole_numbers_of_channels_are_refused():
  with pytest.raises(errors.UsageError, match=r"model\.width is 20; .*multiple of 8"):
    models.create({"name": "googlenet", "width": 20}, 5)
  rule = registry.FIELDS["width"].rule
  assert rule.holds(20) and not any(map(rule.holds, (0, -8, 8.0, True, "8")))
  narrowest = models.create({"name": "alexnet", "width": 1}, 5)
  assert narrowest.feature_size == 4 * 36
  families = [f for f in registry.FAMILIES if "width" in f.fields]
  assert len(families) == 4
  assert all(f.fields["width"] is registry.FIELDS["width"] for f in families)


@pytest.mark.parametrize("convs", [2, 3])
@pytest.mark.parametrize("name", SIX)
def test_calibration_parameter_counts(name, convs):
  """Counted without making them: VGG-16's take 6.3 GB."""
  module = models.create({"name": name}, 257)
  calibration = models.Calibration(
    module.feature_size, module.num_taps, num_convs=convs
  )
  size = (8, 8)
  variables = jax.eval_shape(
    lambda feature, confidence: calibration.init(
      jax.random.key(0), feature, confidence, (size,) * module.num_taps
    ),
    jax.ShapeDtypeStruct((1, module.feature_size), jnp.float32),
    jax.ShapeDtypeStruct((1, *size, 1), jnp.float32),
  )
  stack = (9 + 1) * 16 + (9 * 16 + 1) + (9 * 16 + 1) * 16 * (convs - 2)
  size, hidden = module.feature_size, module.feature_size // 2
  out = hidden * size + size
  multiplication, concatenation = size * hidden + hidden, 2 * size * hidden + hidden
  expected = 2 * module.num_taps * stack + multiplication + concatenation + 2 * out
  assert count(variables["params"]) == expected
  # The paper gives 10.49 M with the released code's two convolutions.
  published = {("resnet50", 2): 10_493_734, ("vgg16", 2): 1_573_598_894}
  assert expected == published.get((name, convs), expected)


def test_free_resnet_runs_and_folds():
  module = models.create(TINY, 5)
  images = reference.images(3, 33)
  variables = jax.jit(module.init)(jax.random.key(0), images)
  assert set(variables) == {"params", "batch_stats"}
  train = functools.partial(module.apply, train=True, mutable=["batch_stats"])
  (logits, aux), updated = jax.jit(train)(variables, images)
  assert logits.shape == (3, 5) and logits.dtype == jnp.float32 and aux == ()
  variables = {**variables, **updated}
  extract = jax.jit(functools.partial(module.apply, method="features"))
  features = extract(variables, images)
  assert features.shape == (3, module.feature_size) == (3, 64)
  logits, _ = jax.jit(module.apply)(variables, images)
  again = module.apply(variables, features, method="classify")
  assert reference.relative_error(again, logits) < 1e-6
  folded, folded_variables = models.fold(module, variables)
  folded_logits, _ = jax.jit(folded.apply)(folded_variables, images)
  assert reference.relative_error(folded_logits, logits) < 1e-5
  assert folded == module.folded()
  assert models.fold(folded, folded_variables)[0] == folded


def test_taps_steer_and_keep_the_dtype():
  module = models.create(TINY, 5, jnp.bfloat16).folded()
  images = reference.images(2, 33)
  variables = jax.jit(module.init)(jax.random.key(0), images)
  seen = []

  def record(index, feature):
    seen.append((index, feature.shape[1:3], feature.dtype))
    return feature.astype(jnp.float32) + index

  @jax.jit
  def run(variables):
    features = lambda tap: module.apply(variables, images, tap=tap, method="features")
    # The last tap acts just before the global average.
    only_last = lambda index, feature: feature + 2 * (index == 2)
    return features(record), features(None), features(only_last)

  steered, plain, only_last = run(variables)
  assert [index for index, *_ in seen] == [0, 1, 2]
  assert tuple(size for _, size, _ in seen) == module.tap_sizes((33, 33))
  assert all(dtype == jnp.bfloat16 for *_, dtype in seen)
  np.testing.assert_allclose(only_last - plain, 2, atol=0.05)
  assert not np.allclose(steered, plain)
  with pytest.raises(ValueError, match="tap 1 turned shape"):
    crop = lambda index, feature: feature[:, 1:] if index == 1 else feature
    jax.eval_shape(
      lambda v: module.apply(v, images, tap=crop, method="features"), variables
    )


def test_dropout_acts_in_training_only():
  head = layers.Head(4, (16,), (0.0, 0.5))
  x = np.ones((2, 8), np.float32)
  variables = head.init(jax.random.key(0), x)
  run = lambda seed, train: head.apply(
    variables, x, train, rngs={"dropout": jax.random.key(seed)}
  )
  np.testing.assert_array_equal(run(0, False), run(1, False))
  assert not np.allclose(run(0, True), run(1, True))


def test_initial_last_layer_is_xavier_uniform_with_zero_bias():
  head = layers.Head(257)
  params = head.init(jax.random.key(0), np.ones((1, 2048), np.float32))["params"]
  kernel, bound = params["logits"]["kernel"], (6 / (2048 + 257)) ** 0.5
  assert (params["logits"]["bias"] == 0).all()
  assert 0.99 * bound < abs(kernel).max() <= bound
  np.testing.assert_allclose(kernel.std(), bound / 3**0.5, rtol=0.01)


def test_unknown_names_suggest_near_ones():
  with pytest.raises(errors.UsageError, match=r"'resnet52'; did you mean 'resnet50'"):
    models.create({"name": "resnet52"}, 5)
  with pytest.raises(errors.UsageError, match=r"no network None"):
    models.create({}, 5)
  with pytest.raises(errors.UsageError, match=r"'drop_out'|drop_out.*'dropout'"):
    models.create({"name": "vgg16", "drop_out": 0.1}, 5)
  with pytest.raises(errors.UsageError, match=r"model\.transform_input"):
    models.create({"name": "resnet50", "transform_input": True}, 5)
  with pytest.raises(errors.UsageError, match=r"model\.block is 'wide'"):
    models.create({**TINY, "block": "wide"}, 5)
  models.create({"name": "resnet50", "weights": "x", "transform_input": None}, 5)
  assert set(registry.NAMES) == {
    "alexnet",
    "efficientnet_lite0",
    "googlenet",
    "resnet",
    "resnet18",
    "resnet50",
    "vgg16",
  }


@pytest.mark.parametrize(
  "name, size",
  [
    ("alexnet", 63),
    ("efficientnet_lite0", 1),
    ("googlenet", 15),
    ("vgg16", 32),
    ("resnet18", 1),
  ],
)
def test_smallest_images(name, size):
  """Torchvision's own limits, and one clear line below them."""
  module = models.create({"name": name}, 5)
  assert module.tap_sizes((size, size + 9))[0] == (size, size + 9)
  if size > 1:
    with pytest.raises(errors.UsageError, match=f"at least {size} pixels"):
      module.tap_sizes((size - 1, size + 9))


def test_googlenet_from_weights_rescales_its_input_as_in_torchvision():
  backbone = lambda **fields: models.create({"name": "googlenet", **fields}, 5).backbone
  assert backbone(weights="torchvision").transform_input
  assert not backbone().transform_input
  assert not backbone(weights=None).transform_input
  assert not backbone(weights="mine.pth", transform_input=False).transform_input
  assert backbone(transform_input=True).transform_input


def test_googlenets_rescaling_when_steered_is_a_field():
  """What it does is compared with PyTorch in test_parity.py."""
  fields = {"name": "googlenet", "transform_input": True}
  default = models.create({**fields, "transform_steered": None}, 5)
  assert default.backbone.transform_steered and default == models.create(fields, 5)
  fields["transform_steered"] = False
  skipping = models.create(fields, 5)
  assert not skipping.backbone.transform_steered
  assert skipping.tap_sizes((32, 24)) == default.tap_sizes((32, 24))
  zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape), shapes(skipping))
  folded, _ = models.fold(skipping, zeros)
  assert folded.aux1 is None and folded == skipping.folded()
  assert folded.backbone.transform_input and not folded.backbone.transform_steered
  with pytest.raises(errors.UsageError, match=r"model\.transform_steered"):
    models.create({"name": "resnet50", "transform_steered": False}, 5)


def test_transfer():
  fill = lambda module, value: jax.tree.map(
    lambda leaf: np.full(leaf.shape, value, np.float32), shapes(module)
  )
  old, new = fill(models.create(TINY, 5), 1.0), fill(models.create(TINY, 9), 2.0)
  merged = models.transfer(new, old, new_head=True)
  assert merged["params"]["head"]["logits"]["kernel"].shape == (64, 9)
  assert (merged["params"]["head"]["logits"]["kernel"] == 2).all()
  assert all((leaf == 1).all() for leaf in jax.tree.leaves(merged["batch_stats"]))
  assert all((x == 1).all() for x in jax.tree.leaves(merged["params"]["backbone"]))
  with pytest.raises(errors.UsageError, match=r"head/logits/kernel is \(64, 5\), not"):
    models.transfer(new, old, new_head=False)
  alone = {k: {"backbone": v["backbone"]} for k, v in old.items()}
  merged = models.transfer(new, alone, new_head=True)
  assert (merged["params"]["head"]["logits"]["bias"] == 2).all()
  with pytest.raises(errors.UsageError, match="head/logits/bias is missing"):
    models.transfer(new, alone, new_head=False)


@pytest.mark.parametrize("size", [(13, 16), (14, 14), (2, 5), (7, 21)])
@pytest.mark.parametrize("cells", [1, 4, 6, 7])
def test_adaptive_average_pool(size, cells):
  import torch

  x = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
  theirs = torch.nn.functional.adaptive_avg_pool2d(
    torch.from_numpy(x.transpose(0, 3, 1, 2)).double(), cells
  )
  ours = layers.adaptive_average_pool(x, cells)
  expected = theirs.numpy().transpose(0, 2, 3, 1)
  assert reference.relative_error(ours, expected) < 1e-6
  half = layers.adaptive_average_pool(jnp.asarray(x, jnp.bfloat16), cells)
  assert half.dtype == jnp.bfloat16


def test_batch_norm_with_a_large_mean():
  """Statistics of values far from zero, where E[x^2] - E[x]^2 would cancel."""
  import torch

  rng = np.random.default_rng(0)
  x = (20 + rng.normal(size=(4, 5, 5, 6))).astype(np.float32)
  norm = torch.nn.BatchNorm2d(6).double()
  theirs = torch.from_numpy(x.transpose(0, 3, 1, 2)).double().requires_grad_()
  expected = norm(theirs)
  module = layers.BatchNorm()
  variables = module.init(jax.random.key(0), x)
  ours, updated = module.apply(variables, x, train=True, mutable=["batch_stats"])
  expected = expected.detach().numpy().transpose(0, 2, 3, 1)
  assert reference.relative_error(ours, expected) < 1e-5
  stats = updated["batch_stats"]
  assert reference.relative_error(stats["mean"], norm.running_mean) < 1e-6
  assert reference.relative_error(stats["var"], norm.running_var) < 1e-6
  # Gradients of what a product with g would hide: they sum to zero over pixels.
  g = rng.normal(size=x.shape).astype(np.float32)
  apply = lambda x, p: module.apply(
    variables | {"params": p}, x, train=True, mutable=["batch_stats"]
  )[0]
  of_x, of_params = jax.vjp(apply, x, variables["params"])[1](jnp.asarray(g))
  norm(theirs).backward(torch.from_numpy(g.transpose(0, 3, 1, 2)).double())
  assert reference.relative_error(of_x.transpose(0, 3, 1, 2), theirs.grad) < 2e-5
  assert reference.relative_error(of_params["scale"], norm.weight.grad) < 2e-5
  assert reference.relative_error(of_params["bias"], norm.bias.grad) < 1e-6


def test_batch_norm_keeps_dtypes():
  """Of what is kept for the backward pass, and of gradients; the sums are float32."""
  x = jax.random.normal(jax.random.key(0), (2, 3, 3, 4), jnp.bfloat16)
  scale, bias = jnp.ones(4), jnp.zeros(4)
  y, pull = jax.vjp(lambda *a: layers.normalize(*a, 1e-5)[0], x, scale, bias)
  assert y.dtype == jnp.float32
  kept = [a.dtype for a in jax.tree.leaves(pull) if a.shape == x.shape]
  assert kept == [jnp.bfloat16]
  assert [g.dtype for g in pull(y)] == [jnp.bfloat16, jnp.float32, jnp.float32]


@pytest.mark.parametrize("batch_norm", [False, True])
def test_dncnn(batch_norm):
  module = models.DnCNN(depth=5, width=8, batch_norm=batch_norm)
  images = reference.images(2, 12)
  variables = jax.jit(module.init)(jax.random.key(0), images)
  if batch_norm:
    _, updated = module.apply(variables, images, train=True, mutable=["batch_stats"])
    variables = {**variables, **updated}
  residual = module.apply(variables, images)
  assert residual.shape == images.shape and residual.dtype == jnp.float32
  folded, folded_variables = models.fold(module, variables)
  assert folded == models.DnCNN(depth=5, width=8)
  assert set(folded_variables) == {"params"}
  again = folded.apply(folded_variables, images)
  assert reference.relative_error(again, residual) < 1e-5
  with pytest.raises(ValueError, match="takes 3 channels"):
    module.apply(variables, images[..., :1])


def test_dncnn_starts_he_normal_and_has_the_published_size():
  module = models.DnCNN()
  variables = shapes(module)
  assert count(variables) == 668_227
  params = jax.jit(models.DnCNN(depth=3).init)(jax.random.key(0), np.ones((1, 8, 8, 3)))
  kernel = params["params"]["layer1"]["conv"]["kernel"]
  np.testing.assert_allclose(kernel.std(), (2 / (9 * 64)) ** 0.5, rtol=0.02)
  one = models.DnCNN(depth=3, out_channels=1)
  images = np.ones((1, 8, 8, 3))
  out, _ = jax.eval_shape(one.init_with_output, jax.random.key(0), images)
  assert out.shape == (1, 8, 8, 1)


def test_normalize():
  x = np.array(layers.IMAGENET_MEAN, np.float32) + [[layers.IMAGENET_STD]]
  normalized = models.create(TINY, 5).normalize(x[None].astype("f4"))
  np.testing.assert_allclose(normalized, 1.0, rtol=1e-5)
  normalized = models.create({"name": "efficientnet_lite0"}, 5).normalize(x[None])
  np.testing.assert_allclose(normalized, (x[None] - 0.498) / 0.502, rtol=1e-5)


@pytest.mark.parametrize("name", registry.NAMES)
def test_completed_configs(name):
  full = registry.complete({"name": name})
  unset = dict.fromkeys(full) | {"name": name, "weights": None, "new_head": True}
  assert registry.complete(unset) == registry.complete(full) == full
  assert json.loads(json.dumps(full)).keys() == full.keys()
  assert models.create(full, 5) == models.create({"name": name}, 5)
  assert set(registry.steering_fields(name)) <= full.keys()


def test_completed_values():
  block = {"name": "resnet50", "stage_sizes": [3, 4, 6, 3], "weights": "a.pth"}
  assert registry.complete(block) == {
    "name": "resnet50",
    "stage_sizes": (3, 4, 6, 3),
    "width": 64,
    "block": "bottleneck",
  }
  assert registry.complete({"name": "alexnet"}) == {
    "name": "alexnet",
    "width": 64,
    "dropout": 0.5,
  }
  assert registry.complete({"name": "vgg16", "width": 16})["width"] == 16
  googlenet = {"name": "googlenet", "transform_steered": False}
  assert registry.complete(googlenet)["transform_input"] is False
  from_weights = registry.complete({**googlenet, "weights": "a.pth"})
  assert from_weights["transform_input"] and not from_weights["transform_steered"]
  assert registry.complete(from_weights) == from_weights
  assert registry.steering_fields("googlenet") == ("transform_steered",)
  assert registry.steering_fields("resnet18") == ()
