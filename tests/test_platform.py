"""Settings of the platform that JAX runs on."""

import jax
import numpy as np
import pytest

from fidelity_jax import platform


@pytest.fixture(autouse=True)
def forget():
  """Each test finds the options anew."""
  platform.compiler_options.cache_clear()
  yield
  platform.compiler_options.cache_clear()


def test_convolutions_stay_the_same():
  """What the options give to another library computes the same."""
  rng = np.random.default_rng(0)
  x = rng.standard_normal((2, 64, 64, 16), np.float32)
  kernel = rng.standard_normal((3, 3, 16, 16), np.float32)

  def convolve(x, kernel):
    dimensions = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
      x, kernel, (1, 1), "SAME", dimension_numbers=dimensions
    )

  options = platform.compiler_options()
  got = jax.jit(convolve, compiler_options=options)(x, kernel)
  np.testing.assert_allclose(got, jax.jit(convolve)(x, kernel), atol=1e-4)


def test_an_option_unknown_to_jaxlib_is_left_out(monkeypatch):
  real = jax.jit

  def jit(function, compiler_options=None):
    assert compiler_options
    return real(function, compiler_options={"xla_no_such_option": True})

  monkeypatch.setattr(jax, "jit", jit)
  assert platform.compiler_options() is None


def test_accelerators_have_no_options(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert platform.compiler_options() is None


@pytest.mark.parametrize(
  ("backend", "expected"),
  [("cpu", "float32"), ("gpu", "bfloat16"), ("tpu", "bfloat16")],
)
def test_precision_is_what_it_means_here(monkeypatch, backend, expected):
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  assert platform.precision("auto") == expected
  assert platform.precision("float32") == "float32"
  assert platform.precision("bfloat16") == "bfloat16"
