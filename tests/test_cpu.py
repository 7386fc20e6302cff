"""Programs for CPUs have their own forms of what is slow there, all others have not."""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry2x32_p

from fidelity_jax import cpu, degradations, models
from fidelity_jax.degradations import random_words
from fidelity_jax.models import calibration, conv, dncnn

IMAGES = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
# What `jax.lax.platform_dependent` leaves of itself: conditionals with one branch.
CHOICE = {"case", "constant", "return"}


def network(name):
  """Returns a loss of (parameters, images), and the parameters' shapes."""
  module = models.create({"name": name}, 10, jnp.float32)
  variables = jax.eval_shape(module.init, jax.random.key(0), IMAGES)

  def loss(variables, images):
    (logits, _), _ = module.apply(
      variables,
      images,
      train=True,
      mutable=["batch_stats"],
      rngs={"dropout": jax.random.key(1)},
    )
    return jnp.sum(logits**2)

  return loss, variables


def stack():
  """Returns the same of a calibration stack, which pads by reflection."""
  module = calibration.ConvStack()
  first = lambda images: images[..., :1]
  variables = jax.eval_shape(lambda x: module.init(jax.random.key(0), first(x)), IMAGES)
  loss = lambda variables, images: jnp.sum(module.apply(variables, first(images)) ** 2)
  return loss, variables


def rematerialized():
  """Returns the same of a DnCNN of two groups of layers."""
  module = models.DnCNN(depth=8, width=8)
  params = jax.eval_shape(module.init, jax.random.key(0), IMAGES)["params"]

  def loss(params, images):
    return jnp.sum(dncnn.apply_rematerialized(module, params, images) ** 2)

  return loss, params


def program(name):
  """Returns a function and the shapes of its arguments."""
  if name == "awgn":
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2))
    return degradations.from_config({"kind": "awgn", "level": 0.2}), (keys, IMAGES)
  what, part = name.split()
  makers = {"stack": stack, "rematerialized": rematerialized}
  loss, variables = makers.get(what, lambda: network(what))()
  function = jax.grad(loss, argnums=(0, 1)) if part == "gradient" else loss
  return function, (variables, IMAGES)


def export(function, arguments, *platforms):
  # A function of its own each time, or the trace would come from a cache.
  jitted = jax.jit(lambda *arguments: function(*arguments))
  return jax.export.export(jitted, platforms=platforms)(*arguments)


def operations(function, arguments, platform):
  text = export(function, arguments, platform).mlir_module()
  return collections.Counter(re.findall(r"\b(?:stablehlo|chlo)\.(\w+)", text))


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize(
  ("name", "convolutions", "products"),
  [
    # 1x1 convolutions are convolutions; the products are the fully connected layers
    # and the average pool.
    ("resnet18 forward", 20, 1),
    ("resnet18 gradient", 60, 3),
    ("alexnet forward", 5, 5),
    ("alexnet gradient", 15, 12),
    pytest.param("efficientnet_lite0 gradient", 147, 3, marks=pytest.mark.slow),
    ("stack forward", 3, 0),
    ("stack gradient", 9, 0),
    # 8 forward, 7 of them again (the last one's output is known), 16 gradients.
    ("rematerialized gradient", 31, 0),
    ("awgn", 0, 0),
  ],
)
def test_accelerators_get_the_plain_program(name, platform, convolutions, products):
  found = operations(*program(name), platform)
  assert found["convolution"] == convolutions
  assert found["dot_general"] == products
  assert (found["optimization_barrier"] > 0) == ("rematerialized" in name)
  # The same as without the module. Padding by reflection is done anew for a gradient.
  with cpu.left_out():
    expected = operations(*program(name), platform)
  twice = {"slice", "reverse", "concatenate"} if name == "stack gradient" else set()
  names = (found.keys() | expected.keys()) - CHOICE - twice
  assert {n: found[n] for n in names} == {n: expected[n] for n in names}


def test_cpus_get_their_own():
  on_cpu = operations(*program("resnet18 gradient"), "cpu")
  elsewhere = operations(*program("resnet18 gradient"), "tpu")
  assert elsewhere["select_and_scatter"] == 1
  assert on_cpu["select_and_scatter"] == 0
  assert on_cpu["convolution"] < elsewhere["convolution"]
  assert on_cpu["dot_general"] > elsewhere["dot_general"] + 9
  rematerialized = operations(*program("rematerialized gradient"), "cpu")
  assert rematerialized["optimization_barrier"] == 0
  # What waits for a gradient: the input of each kernel's, and of each group of layers.
  assert rematerialized["is_finite"] == 8 + 2
  # JAX's own random words are a loop.
  words = jax.ShapeDtypeStruct((5,), jnp.uint32)
  threefry = lambda *pairs: random_words.threefry(pairs[:2], pairs[2:])
  assert operations(threefry2x32_p.bind, [words] * 4, "cpu")["while"]
  assert not operations(threefry, [words] * 4, "cpu")["while"]


def test_one_export_serves_all_platforms_and_decides_before_it_runs():
  rng = np.random.default_rng(0)
  arrays = [rng.normal(size=s).astype(np.float32) for s in [(2, 9, 8, 5), (1, 1, 5, 4)]]
  gradient = jax.grad(lambda x, k: jnp.sum(jnp.sin(conv.conv2d(x, k))), argnums=(0, 1))
  exported = export(gradient, arrays, "cpu", "tpu", "cuda")
  for mine, theirs in zip(exported.call(*arrays), gradient(*arrays), strict=True):
    np.testing.assert_allclose(mine, theirs, atol=1e-5)
  compiled = jax.jit(gradient).lower(*arrays).compile()
  assert " conditional(" not in compiled.as_text()


def test_random_words_are_the_same_everywhere():
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.integers(0, 2**32, shape, np.uint32)
  keys, counters = draw(2, 20), draw(2, 20, 3, 50)
  elsewhere = jax.vmap(threefry2x32_p.bind)(*keys, *counters)
  for mine, theirs in zip(
    jax.vmap(cpu.threefry)(*keys, *counters), elsewhere, strict=True
  ):
    np.testing.assert_array_equal(mine, theirs)
