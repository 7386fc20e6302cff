"""How fast training goes, and what it waits for: docs/observing.md.

The step does not wait for these numbers. They are read where the loop has waited for
the device anyway, as it has when it looks at the loss; between two such places the host
only takes the time.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import psutil

from fidelity_jax import chips


@dataclasses.dataclass(frozen=True)
class _Total:
  """What a stage's steps took from the first on.

  Attributes:
    steps: how many.
    clock: seconds, pauses left out.
    waited: of these, seconds that the host waited for batches.
  """

  steps: int = 0
  clock: float = 0.0
  waited: float = 0.0


class Meter:
  """Times the steps of one stage, by epoch and by interval of its progress."""

  def __init__(self, images: int, mesh: jax.sharding.Mesh, precision: str):
    """Prepares.

    Args:
      images: in one global batch.
      mesh: the devices that the step runs on.
      precision: of the networks, "bfloat16" or "float32".
    """
    self._images, self._chips = images, mesh.size
    self._devices = mesh.local_devices
    self._peak = chips.peak(mesh.devices.flat[0].device_kind, precision)
    self._flops: float | None = None
    self._steps, self._waited = 0, 0.0
    self._start = self._paused = 0.0
    self._marks: dict[str, _Total] = {}

  def start(self, step: Callable, *args: Any) -> None:
    """Compiles the step, counts its operations and starts the clock.

    The first batch is there. `step` finds the executable when it is called next, so
    nothing is compiled twice (`test_the_step_is_compiled_once`).

    Args:
      step: from `jax.jit`.
      *args: what it will be called with.
    """
    lowered = step.lower(*args)
    self._flops = flops(lowered)
    lowered.compile()
    self._start, self._steps, self._waited, self._paused = time.monotonic(), 1, 0.0, 0.0

  def next(self, batches: Iterator[Any]) -> Any:
    """Returns the next batch, and notes how long it was waited for."""
    start = time.monotonic()
    batch = next(batches)
    self._waited += time.monotonic() - start
    self._steps += 1
    return batch

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Leaves out what is no training: validation, checkpoints, traces.

    The device has nothing to do at its beginning, else the time of steps is left out.
    """
    start = time.monotonic()
    try:
      yield
    finally:
      self._paused += time.monotonic() - start

  def read(self, span: str) -> dict[str, float]:
    """Returns speed and memory since the last call with the same name.

    The device is done with all steps so far. Seconds are means over steps; bytes are
    those of now, of the fullest device and of this host. What is not known is left out.

    Args:
      span: a name, such as "epoch".
    """
    clock = time.monotonic() - self._start - self._paused
    now = _Total(self._steps, clock, self._waited)
    last, self._marks[span] = self._marks.get(span, _Total()), now
    steps = now.steps - last.steps
    if not steps:
      return {}
    seconds = (now.clock - last.clock) / steps
    rate = self._images / seconds
    found = {
      "speed/step_seconds": seconds,
      "speed/input_wait_seconds": (now.waited - last.waited) / steps,
      "speed/images_per_second": rate,
      "speed/images_per_second_per_chip": rate / self._chips,
    }
    if self._flops is not None:
      found["speed/flops_per_second"] = self._flops / seconds
      if self._peak is not None:
        found["speed/share_of_peak"] = self._flops / seconds / self._chips / self._peak
    # Looking it up takes some milliseconds.
    with self.paused():
      return found | memory(self._devices)


def facts(values: dict[str, float]) -> dict[str, float | str]:
  """Returns what of `Meter.read` is shown in a line of progress."""
  if not values:
    return {}
  waited = values["speed/input_wait_seconds"] / values["speed/step_seconds"]
  shown = {
    "images/s": values["speed/images_per_second"],
    "input wait": f"{waited:.0%}",
  }
  if "speed/share_of_peak" in values:
    shown["of peak"] = f"{values['speed/share_of_peak']:.0%}"
  return shown


def flops(lowered: jax.stages.Lowered) -> float | None:
  """Returns the floating-point operations of a function, on all its devices together.

  They are counted before the compiler optimizes: of what it makes for a GPU, XLA does
  not count the convolutions and products that libraries compute, and of a function that
  is split it counts one device's part. What is recomputed to save memory counts; a
  loop's body counts once.

  Args:
    lowered: from `jax.jit(...).lower(...)`.
  """
  counted = lowered.cost_analysis() or _counted_by_cpu(lowered) or {}
  found = counted.get("flops", 0.0)
  # XLA has -1 for what it cannot count.
  return found if found > 0 else None


def _counted_by_cpu(lowered: jax.stages.Lowered) -> dict[str, float] | None:
  """Returns what `cost_analysis` would, where the function's platform has none.

  JAX does not ask its plugins, of CUDA and TPUs (https://github.com/jax-ml/jax/issues/22713).
  Before the compiler optimizes, its CPU backend counts the same operations alike. None
  where there is no such backend (JAX_PLATFORMS=cuda), or JAX has changed: no public
  name leads there.
  """
  try:
    from jaxlib import _jax

    client = jax.local_devices(backend="cpu")[0].client
    module = lowered.compiler_ir("hlo").as_hlo_module()
    return _jax.hlo_module_cost_analysis(client, module)
  except (ImportError, AttributeError, TypeError, RuntimeError):
    # Training goes on without this number.
    return None


def memory(devices: list[jax.Device]) -> dict[str, float]:
  """Returns the memory in use, in bytes: of the fullest device, and of this host.

  Args:
    devices: of this host; those of a CPU do not tell.
  """
  stats = [stats for device in devices if (stats := device.memory_stats())]
  found = {}
  for name, key in (("device", "bytes_in_use"), ("device_peak", "peak_bytes_in_use")):
    if known := [s[key] for s in stats if key in s]:
      found[f"memory/{name}_bytes"] = max(known)
  return found | {"memory/host_bytes": _host_memory()}


def _host_memory() -> int:
  """Returns the resident memory of this process and of its workers, in bytes."""
  process = psutil.Process()
  total = process.memory_info().rss
  for child in process.children():
    # It may have ended since.
    with contextlib.suppress(psutil.Error):
      total += child.memory_info().rss
  return total
