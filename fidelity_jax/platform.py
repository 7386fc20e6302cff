"""One-time set-up of logging and JAX for command lines."""

import os
import warnings

import jax
from absl import logging


def set_up() -> None:
  """Quiets libraries and gives JAX two CPU devices; call it before any computation.

  Libraries' messages would drown what the user wants to read. XLA runs a large
  convolution on one thread of the CPU, so a batch split over two devices trains up to
  1.8 times as fast on two cores (docs/speed.md). A count of devices that the user
  asked for stays.
  """
  asked = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
  if not asked and (os.cpu_count() or 1) > 1 and jax.config.jax_num_cpu_devices < 0:
    jax.config.update("jax_num_cpu_devices", 2)
  logging.set_verbosity(logging.ERROR)
  warnings.filterwarnings("ignore", module="orbax|tensorstore|flax|grain")
