"""Networks multiply float32 operands as float32 on accelerators too."""

import re

import jax
import jax.numpy as jnp
import pytest

from fidelity_jax import models

SIZES = ((64, 64), (8, 8))


def classifier(dtype):
  module = models.create({"name": "alexnet"}, 10, dtype)
  return module, (jnp.zeros((2, 64, 64, 3)),)


def calibration(dtype):
  module = models.Calibration(64, len(SIZES), dtype=dtype)
  return module, (jnp.zeros((2, 64)), jnp.zeros((2, 64, 64, 1)), SIZES)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
# (what, convolutions and dense layers): the convolutions pad with zeros or reflect.
@pytest.mark.parametrize(("make", "layers"), [(classifier, 5 + 3), (calibration, 16)])
def test_products_on_an_accelerator(make, layers, dtype):
  module, inputs = make(dtype)
  init = lambda: module.init(jax.random.key(0), *inputs)

  def loss(variables):
    return sum(
      jnp.sum(leaf**2) for leaf in jax.tree.leaves(module.apply(variables, *inputs))
    )

  gradient = jax.jit(jax.grad(loss))
  exported = jax.export.export(gradient, platforms=["tpu"])(jax.eval_shape(init))
  products = re.findall(
    r"stablehlo\.(?:convolution|dot_general).*: \(tensor<\w*x\w+>.*",
    exported.mlir_module(),
  )
  found = {"f32": [], "bf16": []}
  for line in products:
    operands = re.search(r": \(tensor<\w*x(\w+)>", line)[1]
    found[operands].append(line.count("HIGHEST"))
  # Means and resizing are products in float32 whatever the dtype.
  assert set(found["f32"]) == {2}
  assert set(found["bf16"]) <= {0}
  # A layer's output and the gradient of its kernel, at least.
  assert len(found["bf16" if dtype == jnp.bfloat16 else "f32"]) >= 2 * layers
