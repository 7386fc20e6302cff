"""What results were made with: versions, hardware."""

import functools
import importlib.metadata
import os
import platform

import jax

_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def hardware() -> str:
  """Returns the devices and the host, e.g. "1 x NVIDIA H100, 16 cores of x86_64"."""
  devices = jax.devices()
  cores = f"{os.cpu_count()} cores of {_processor()}"
  if devices[0].platform == "cpu":
    return cores
  return f"{len(devices)} x {devices[0].device_kind}, {cores}"


def versions() -> dict[str, str]:
  """Returns versions: of this package, Python and the libraries it stands on."""
  found = {
    "fidelity_jax": _version("fidelity_jax"),
    "python": platform.python_version(),
  }
  return found | {name: _version(name) for name in _LIBRARIES}


def _version(name: str) -> str:
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    # Run from a bare clone.
    return "not installed"


@functools.cache
def _processor() -> str:
  """Returns the processor's name where the system tells it."""
  try:
    with open("/proc/cpuinfo") as file:
      lines = [line for line in file if line.startswith("model name")]
    return lines[0].partition(":")[2].strip()
  except (OSError, IndexError):
    return platform.processor() or platform.machine()
