"""conv2d and Conv against XLA's own convolution in float64, and against nn.Conv."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from fidelity_jax import cpu
from fidelity_jax.models import conv

# (x shape, kernel shape, strides, padding): one per way that a convolution or one of
# its gradients is computed, and the corners of each.
CASES = {
  "small": ((2, 9, 7, 5), (3, 3, 5, 4), (1, 1), "SAME"),
  "pointwise": ((2, 9, 7, 20), (1, 1, 20, 30), (1, 1), "SAME"),
  "pointwise_strided": ((2, 9, 8, 20), (1, 1, 20, 6), (2, 2), "VALID"),
  "pointwise_padded": ((2, 6, 5, 3), (1, 1, 3, 4), (1, 1), ((1, 0), (0, 2))),
  "plain": ((3, 47, 36, 12), (3, 3, 12, 24), (1, 1), "SAME"),
  "explicit": ((3, 50, 35, 7), (5, 3, 7, 24), (1, 1), ((2, 3), (0, 2))),
  "tiny": ((3, 2, 2, 20), (3, 3, 20, 30), (1, 1), "SAME"),
  "one_pixel": ((3, 1, 1, 20), (3, 3, 20, 30), (1, 1), ((1, 1), (1, 1))),
  "tiny_uneven": ((3, 2, 3, 5), (3, 3, 5, 4), (2, 1), ((1, 2), (0, 1))),
  "wide": ((2, 6, 5, 100), (3, 3, 100, 20), (1, 1), ((1, 1), (1, 1))),
  "small_strided": ((2, 9, 8, 12), (3, 3, 12, 20), (2, 2), ((1, 1), (1, 1))),
  "strided": ((2, 33, 30, 3), (7, 7, 3, 20), (2, 2), ((3, 3), (3, 3))),
  "from_one": ((2, 9, 8, 1), (3, 3, 1, 6), (1, 1), "SAME"),
  "from_one_uneven": ((2, 9, 8, 1), (3, 2, 1, 6), (1, 1), ((0, 4), (3, 0))),
  "to_one": ((2, 9, 8, 5), (3, 3, 5, 1), (1, 1), "SAME"),
  "to_one_uneven": ((2, 9, 8, 20), (2, 3, 20, 1), (1, 1), ((0, 4), (3, 0))),
  "to_one_strided": ((2, 9, 8, 5), (3, 3, 5, 1), (2, 2), "SAME"),
  "many_to_one": ((2, 9, 8, 40), (3, 3, 40, 1), (1, 1), "SAME"),
  "one_to_one": ((2, 9, 8, 1), (3, 3, 1, 1), (1, 1), "VALID"),
  "to_few": ((2, 9, 8, 20), (3, 3, 20, 3), (1, 1), ((0, 2), (1, 4))),
  "reflect": ((2, 9, 8, 5), (3, 3, 5, 4), (1, 1), "REFLECT"),
  "reflect_from_one": ((2, 9, 8, 1), (3, 3, 1, 4), (1, 1), "REFLECT"),
  "reflect_to_one": ((2, 9, 8, 5), (3, 3, 5, 1), (1, 1), "REFLECT"),
  "reflect_smallest": ((2, 2, 2, 5), (3, 3, 5, 4), (1, 1), "REFLECT"),
  "reflect_flat": ((2, 2, 7, 5), (3, 3, 5, 4), (1, 1), "REFLECT"),
  "strips": ((1, 16, 7, 3), (3, 3, 3, 4), (1, 1), "SAME"),
  "strips_strided": ((2, 34, 9, 5), (5, 3, 5, 4), (2, 2), ((2, 0), (1, 1))),
  "strips_cropped": ((4, 18, 9, 5), (5, 3, 5, 4), (1, 1), ((-1, 1), (1, -2))),
  "uneven_strides": ((2, 33, 30, 3), (3, 5, 3, 20), (2, 1), "SAME"),
}


def draw(case):
  x, kernel, strides, padding = CASES[case]
  rng = np.random.default_rng(0)
  arrays = [rng.standard_normal(s).astype(np.float32) for s in (x, kernel)]
  shape = jax.eval_shape(lambda x, k: plain(x, k, strides, padding), *arrays).shape
  arrays.append(rng.standard_normal(shape).astype(np.float32))
  return arrays, strides, padding


def plain(x, kernel, strides, padding):
  if padding == "REFLECT":
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    padding = "VALID"
  dimensions = ("NHWC", "HWIO", "NHWC")
  return jax.lax.conv_general_dilated(
    x, kernel, strides, padding, dimension_numbers=dimensions
  )


def with_gradients(function, strides, padding):
  def run(x, kernel, g):
    y, vjp = jax.vjp(lambda x, k: function(x, k, strides, padding), x, kernel)
    return y, *vjp(g)

  return jax.jit(run)


def relative(a, b):
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_match_float64(case):
  arrays, strides, padding = draw(case)
  got = with_gradients(conv.conv2d, strides, padding)(*arrays)
  with jax.enable_x64(True):
    wide = [a.astype(np.float64) for a in arrays]
    expected = with_gradients(plain, strides, padding)(*wide)
    also = with_gradients(conv.conv2d, strides, padding)(*wide)
  for mine, mine_wide, theirs in zip(got, also, expected, strict=True):
    assert mine.dtype == jnp.float32 and mine_wide.dtype == jnp.float64
    assert relative(mine, theirs) < 2e-6
    assert relative(mine_wide, theirs) < 1e-13


@pytest.mark.parametrize(
  ("case", "own"),
  [
    ("plain", (False, False, False)),
    ("pointwise", (True, True, True)),
    ("pointwise_strided", (True, True, True)),
    ("tiny", (True, True, False)),
    ("one_pixel", (True, True, False)),
    ("wide", (False, True, False)),
    ("small_strided", (False, True, False)),
    ("from_one", (True, True, False)),
    ("from_one_uneven", (True, True, False)),
    ("to_one", (True, True, False)),
    ("to_one_uneven", (True, True, True)),
    ("many_to_one", (False, True, True)),
    ("one_to_one", (True, True, False)),
    ("to_few", (False, False, True)),
  ],
)
def test_what_is_left_to_xla(case, own):
  """Says of output, dx and dk whether they are other than XLA's convolution."""
  arrays, strides, padding = draw(case)
  run = with_gradients(conv.conv2d, strides, padding)
  for part, expected in enumerate(own):
    # Compiled, so that what only the other parts need is gone.
    one = jax.jit(lambda *a, i=part: run(*a)[i])
    text = one.lower(*arrays).compile().as_text()
    assert (" convolution(" not in text) == expected


@pytest.mark.parametrize(
  ("x", "kernel", "strides"),
  [
    ((2, 1, 5, 3), (3, 3, 3, 4), (1, 1)),
    ((2, 9, 9, 3), (5, 5, 3, 4), (1, 1)),
    ((2, 9, 9, 3), (3, 3, 3, 4), (2, 2)),
  ],
)
def test_what_reflection_is_not_for_is_refused(x, kernel, strides):
  with pytest.raises(ValueError, match="padding by reflection is for 3x3 kernels"):
    conv.conv2d(jnp.ones(x), jnp.ones(kernel), strides, "REFLECT")


@pytest.mark.parametrize(
  ("x", "rows", "images"),
  [
    ((1, 16, 7, 3), 16, 8),
    ((4, 16, 7, 3), 16, 8),
    ((4, 16, 7, 3), 15, 4),  # Rows that do not divide.
    ((8, 16, 7, 3), 16, 8),
    ((4, 128, 128, 32), 128, 4),  # Too large to copy.
  ],
)
def test_few_images_are_cut_into_strips(x, rows, images):
  x, g, kernel = jnp.zeros(x), jnp.zeros((x[0], rows, 7, 4)), jnp.zeros((3, 3, 3, 4))
  pads = ((1, 1), (1, 1))
  x, g, _ = cpu._strips(x, g, kernel, (1, 1), pads)
  assert len(x) == len(g) == images


def test_nothing_has_a_gradient_of_zero():
  kernel = jnp.ones((3, 3, 3, 4))
  loss = lambda kernel: conv.conv2d(jnp.ones((0, 8, 8, 3)), kernel).sum()
  np.testing.assert_array_equal(jax.grad(loss)(kernel), jnp.zeros_like(kernel))


def test_features_are_kept_once_for_kernel_gradients():
  features = jnp.ones((4, 64, 64, 16))
  kernels = [jnp.ones((3, 3, 16, 16))] * 8

  def loss(kernels):
    x = features
    for kernel in kernels:
      x = jax.nn.relu(conv.conv2d(x, kernel))
    return x.sum()

  compiled = jax.jit(jax.grad(loss)).lower(kernels).compile()
  kept = len(kernels) * features.nbytes
  # XLA's own choice is to have each twice.
  assert compiled.memory_analysis().temp_size_in_bytes < 1.6 * kept


def test_runs_are_bit_identical():
  arrays, strides, padding = draw("plain")
  first, second = (
    with_gradients(conv.conv2d, strides, padding)(*arrays) for _ in range(2)
  )
  for a, b in zip(first, second, strict=True):
    np.testing.assert_array_equal(a, b)


def test_under_vmap_and_remat():
  arrays, strides, padding = draw("pointwise")
  x, kernel, _ = arrays

  def loss(kernel, x):
    return jnp.sum(jnp.sin(conv.conv2d(x, kernel, strides, padding)))

  expected = jax.grad(loss)(kernel, x)
  assert relative(jax.grad(jax.checkpoint(loss))(kernel, x), expected) < 1e-6
  each = jax.vmap(jax.grad(loss), (None, 0))(kernel, x[:, None])
  assert relative(each.sum(0), expected) < 1e-6


@pytest.mark.parametrize("case", CASES)
def test_accelerators_get_what_xla_has(case):
  arrays, strides, padding = draw(case)
  run = with_gradients(conv.conv2d, strides, padding)
  text = jax.export.export(run, platforms=["tpu"])(*arrays).mlir_module()
  assert text.count("stablehlo.convolution") == 3
  assert "stablehlo.dot_general" not in text


def test_so_does_bfloat16_everywhere():
  arrays, strides, padding = draw("pointwise")
  short = [a.astype(jnp.bfloat16) for a in arrays]
  run = with_gradients(conv.conv2d, strides, padding)
  text = run.lower(*short).as_text()
  assert text.count("stablehlo.convolution") == 3
  assert "stablehlo.dot_general" not in text
  # What has no gradient of its own can be differentiated forwards.
  add = lambda bias: conv.add_bias(short[0], bias)
  assert jax.jvp(add, *[(jnp.ones(20, jnp.bfloat16),)] * 2)[1].dtype == jnp.bfloat16


def test_accelerators_sum_the_gradient_of_a_bias():
  g = draw("plain")[0][2]
  gradient = lambda bias, g: jax.vjp(lambda b: conv.add_bias(g, b), bias)[1](g)
  for platform in ("tpu", "cpu"):
    export = jax.export.export(jax.jit(gradient), platforms=[platform])
    text = export(np.ones(24, np.float32), g).mlir_module()
    assert "stablehlo.reduce" in text
    # CPUs sum rows, and multiply these by ones.
    assert ("stablehlo.dot_general" in text) == (platform == "cpu")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bias_and_its_gradient_match_float64(dtype):
  rng = np.random.default_rng(0)
  x, g = rng.standard_normal((2, 3, 50, 40, 6))
  bias = rng.standard_normal(6)
  with jax.enable_x64(dtype == np.float64):
    y, vjp = jax.vjp(conv.add_bias, *(jnp.asarray(a, dtype) for a in (x, bias)))
    to_x, to_bias = vjp(jnp.asarray(g, dtype))
  assert y.dtype == to_x.dtype == to_bias.dtype == dtype
  limit = 1e-6 if dtype == np.float32 else 1e-14
  assert relative(y, x + bias) < limit
  assert relative(to_x, g) < limit
  assert relative(to_bias, g.sum((0, 1, 2))) < limit


@pytest.mark.parametrize("shape", [(4, 6), (2, 5, 6), (2, 3, 4, 5, 6)])
def test_a_bias_of_features_of_any_rank(shape):
  g = np.random.default_rng(0).standard_normal(shape, np.float32)
  _, vjp = jax.vjp(conv.add_bias, jnp.asarray(g), jnp.zeros(6))
  assert relative(vjp(jnp.asarray(g))[1], g.reshape(-1, 6).sum(0)) < 1e-6


@pytest.mark.parametrize(
  "options",
  [
    {},
    {"padding": "VALID", "use_bias": False},
    {"padding": ((1, 0), (2, 1)), "strides": (2, 2)},
    {"padding": "VALID", "dtype": jnp.bfloat16},
  ],
)
def test_layer_computes_what_flax_computes(options):
  rng = np.random.default_rng(0)
  x = rng.standard_normal((2, 9, 8, 4)).astype(np.float32)
  mine = conv.Conv(6, (3, 3), **options)
  theirs = nn.Conv(6, (3, 3), **options)
  shapes, expected_shapes = (
    jax.eval_shape(layer.init, jax.random.key(0), x) for layer in (mine, theirs)
  )
  assert shapes == expected_shapes
  variables = jax.tree.map(
    lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype), shapes
  )
  got, expected = mine.apply(variables, x), theirs.apply(variables, x)
  assert got.dtype == expected.dtype
  np.testing.assert_array_equal(got, expected)


# (image, kernel, strides, padding) of depthwise convolutions.
DEPTHWISE = {
  "3x3": ((9, 7), (3, 3), (1, 1), "SAME"),
  "5x5": ((9, 7), (5, 5), (1, 1), "SAME"),
  "3x3_strided": ((9, 8), (3, 3), (2, 2), "SAME"),
  "5x5_strided": ((9, 8), (5, 5), (2, 2), "SAME"),
  "uneven": ((11, 8), (3, 5), (2, 1), ((0, 3), (2, 0))),
  "not_padded": ((8, 9), (3, 3), (2, 2), "VALID"),
  "not_reached": ((9, 9), (1, 1), (2, 2), "VALID"),
  "sparse": ((9, 10), (2, 2), (3, 3), "VALID"),
  "one_pixel": ((1, 1), (5, 5), (1, 1), "SAME"),
}


@pytest.mark.parametrize("case", DEPTHWISE)
def test_depthwise_output_and_gradients_match_float64(case):
  size, kernel, strides, padding = DEPTHWISE[case]
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  x, kernel = draw(3, *size, 6), draw(*kernel, 1, 6)

  def xla(x, kernel, strides, padding):
    dimensions = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
      x, kernel, strides, padding, dimension_numbers=dimensions, feature_group_count=6
    )

  g = draw(*jax.eval_shape(lambda x, k: xla(x, k, strides, padding), x, kernel).shape)
  own = with_gradients(conv.depthwise, strides, padding)
  got = own(x, kernel, g)
  with jax.enable_x64(True):
    wide = [a.astype(np.float64) for a in (x, kernel, g)]
    expected = with_gradients(xla, strides, padding)(*wide)
    also = with_gradients(conv.depthwise, strides, padding)(*wide)
  for mine, mine_wide, theirs in zip(got, also, expected, strict=True):
    assert mine.dtype == jnp.float32 and mine_wide.dtype == jnp.float64
    assert relative(mine, theirs) < 2e-6
    assert relative(mine_wide, theirs) < 1e-13
  assert " convolution(" not in own.lower(x, kernel, g).compile().as_text()
  text = jax.export.export(own, platforms=["tpu"])(x, kernel, g).mlir_module()
  assert text.count("stablehlo.convolution") == 3
