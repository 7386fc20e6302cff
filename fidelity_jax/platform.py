"""Settings of the platform that JAX runs on."""

import contextlib
import ctypes
import functools
import os
import platform as host
import warnings
from collections.abc import Callable

import jax
from absl import logging

from fidelity_jax import errors, files

# Bytes of compiled programs that are kept; those not used for longest go.
_COMPILED = 2 * 2**30
# JAX's own event.
_BACKEND_COMPILED = "/jax/core/compile/backend_compile_duration"
# Compiling that took less than so many seconds took little memory.
_LONG = 0.5


def set_up() -> None:
  """Quiets libraries, finds the devices, and has the compiler's memory given back.

  Raises:
    UsageError: the platform that is asked for is not there.
  """
  logging.set_verbosity(logging.ERROR)
  warnings.filterwarnings("ignore", module="orbax|tensorstore|flax|grain")
  try:
    jax.devices()
  except Exception as error:  # JAX raises RuntimeError and AssertionError.
    asked = os.environ.get("JAX_PLATFORMS", "")
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise errors.UsageError(
      f"JAX finds no device (JAX_PLATFORMS is {asked!r}; {reason}): set JAX_PLATFORMS "
      "to a platform that this machine has, such as cpu, or leave it unset."
    ) from error
  _watch_compilation()


@functools.cache
def _watch_compilation() -> None:
  """Has memory that compiling took given back to the system at once.

  It is half a gigabyte for a ResNet-50, which glibc keeps otherwise.
  """
  trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
  if trim is None:
    return

  def compiled(event: str, seconds: float, **_: object) -> None:
    if event == _BACKEND_COMPILED and seconds > _LONG:
      trim(0)

  jax.monitoring.register_event_duration_secs_listener(compiled)


def keep_compiled() -> None:
  """Has compiled programs kept in the cache folder: nothing is compiled a second time.

  JAX tells them apart by their content, its version, its flags and its devices. What
  the user says of it in JAX's own variables counts: JAX_COMPILATION_CACHE_DIR=DIR,
  JAX_ENABLE_COMPILATION_CACHE=false.
  """
  config = jax.config
  if not config.jax_enable_compilation_cache or config.jax_compilation_cache_dir:
    return
  # Code for one processor may not run on another, and homes are shared.
  folder = files.cache_folder() / "compiled" / files.digest(_processor(), 8)
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError:
    return
  if not os.access(folder, os.W_OK | os.X_OK):
    return
  config.update("jax_compilation_cache_dir", str(folder))
  config.update("jax_compilation_cache_max_size", _COMPILED)
  config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _processor() -> str:
  """Returns what this machine's processor is, and what it can do."""
  with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
    kinds = ("model name", "flags", "Features", "CPU part")
    return "".join(sorted({line for line in file if line.startswith(kinds)}))
  return f"{host.machine()} {host.processor()}"


def precision(name: str) -> str:
  """Returns what a config's `precision` means on this platform.

  Args:
    name: "auto" is "bfloat16" on accelerators and "float32" on CPUs; others are
      themselves.
  """
  if name != "auto":
    return name
  return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def host_memory() -> int:
  """Returns the memory of this machine, in bytes."""
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory() -> int:
  """Returns the memory of a device, in bytes; on a CPU, that of the machine."""
  stats = jax.local_devices()[0].memory_stats() or {}
  return stats.get("bytes_limit", host_memory())


def in_turn(function: Callable) -> Callable:
  """Returns a compiled function that is over when it returns, on simulated devices.

  These share a pool of as many threads as there are devices. Where two programs are
  under way whose devices wait for one another, each can hold threads that the other
  needs: XLA gives up after 40 seconds. Real devices run programs in their order.

  Args:
    function: compiled; independent of what else is under way.
  """
  if jax.default_backend() != "cpu" or jax.local_device_count() == 1:
    return function
  return lambda *arguments: jax.block_until_ready(function(*arguments))


@functools.cache
def compiler_options() -> dict[str, str] | None:
  """Returns the `compiler_options` of `jax.jit` for functions that run for long.

  On a CPU, YNNPACK is left matrix products only: it runs small convolutions on one
  thread, while Eigen splits all of them (docs/speed.md). None on accelerators and where
  jaxlib does not know the option.
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
