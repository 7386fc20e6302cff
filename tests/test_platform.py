"""Settings of the platform that JAX runs on."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import TOY, measured, overrides, results
from jax._src import dispatch

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


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone keeps it")
def test_what_compiling_took_is_given_back():
  def resident():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if "VmRSS" in line).split()[1]) * 1024

  platform.set_up()
  assert platform._BACKEND_COMPILED == dispatch.BACKEND_COMPILE_EVENT
  # Blocks of a size that glibc keeps; those that are let go lie between others.
  blocks = [np.ones(10_000, np.uint8) for _ in range(20_000)]
  del blocks[:-1:2], blocks[:-1:2]
  before = resident()
  jax.monitoring.record_event_duration_secs(platform._BACKEND_COMPILED, 1.0)
  assert resident() < before - 50e6


@pytest.mark.parametrize(
  ("backend", "expected"),
  [("cpu", "float32"), ("gpu", "bfloat16"), ("tpu", "bfloat16")],
)
def test_precision_is_what_it_means_here(monkeypatch, backend, expected):
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  assert platform.precision("auto") == expected
  assert platform.precision("float32") == "float32"
  assert platform.precision("bfloat16") == "bfloat16"


def test_programs_are_kept_where_the_user_says(monkeypatch, tmp_path):
  """In processes of their own: JAX reads its variables once."""
  program = (
    "import jax\n"
    "from fidelity_jax import platform\n"
    "platform.keep_compiled()\n"
    "print(jax.config.jax_compilation_cache_dir)\n"
  )

  def told(**variables):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    environment |= {"FIDELITY_JAX_CACHE": str(tmp_path / "cache")} | variables
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, env=environment, capture_output=True, check=True)
    return done.stdout.decode().strip()

  usual = pathlib.Path(told())
  assert usual.is_dir() and usual.parent == tmp_path / "cache" / "compiled"
  assert told(JAX_COMPILATION_CACHE_DIR="/elsewhere") == "/elsewhere"
  assert told(JAX_ENABLE_COMPILATION_CACHE="false") == "None"
  # Where nothing can be kept, nothing is.
  (tmp_path / "file").write_text("")
  assert told(FIDELITY_JAX_CACHE=str(tmp_path / "file")) == "None"


@pytest.mark.slow
def test_a_second_experiment_compiles_nothing_again(command, toy_run, tmp_path):
  flags = ["--config=configs/oracle.py:scratch", *overrides(TOY)]
  cache = tmp_path / "cache"
  # "": as if they were not set.
  environment = {"FIDELITY_JAX_CACHE": str(cache), "JAX_COMPILATION_CACHE_DIR": ""}
  kept = []
  for name in ("first", "second"):
    command(*flags, f"--workdir={tmp_path / name}", env=environment, check=0)
    kept.append({p.name for p in cache.rglob("*-cache")})
    assert measured(results(tmp_path / name)) == measured(results(toy_run))
  first, second = kept
  steps = ("jit_train_step", "jit_eval_step")
  assert len([name for name in first if name.startswith(steps)]) >= 4
  # What takes half a second or so to compile may be kept by one run and not by another.
  assert first <= second and len(second - first) <= 3
  assert not any(name.startswith(steps) for name in second - first)
