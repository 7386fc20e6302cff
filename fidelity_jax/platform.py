"""Settings of the platform that JAX runs on."""

import functools
import warnings

import jax
from absl import logging


def set_up() -> None:
  """Quiets libraries, whose messages would drown what the user wants to read."""
  logging.set_verbosity(logging.ERROR)
  warnings.filterwarnings("ignore", module="orbax|tensorstore|flax|grain")


@functools.cache
def compiler_options() -> dict[str, str] | None:
  """Returns the `compiler_options` of `jax.jit` for whatever takes long to run.

  On a CPU it leaves to YNNPACK only matrix products and no convolutions, of which it
  runs the small ones on one thread; Eigen splits them all (docs/speed.md). None on
  accelerators and where this jaxlib does not know the option.
  """
  if jax.default_backend() != "cpu":
    return None
  options = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
  }
  try:
    jax.jit(lambda x: x, compiler_options=options).lower(0.0).compile()
  except jax.errors.JaxRuntimeError:
    return None
  return options
