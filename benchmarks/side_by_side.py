"""What the benchmarks against PyTorch share."""

import argparse
import json
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen as nn

# The reference implementations live with the tests.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))


def variables_of(module: nn.Module, *inputs: jax.Array) -> dict[str, object]:
  """Returns He-normal variables without compiling the module's own initialization.

  Compiling that takes longer for the deeper networks than the measurement.
  """
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)

  def draw(path, leaf):
    name = path[-1].key
    if name == "kernel":
      std = math.sqrt(2 / math.prod(leaf.shape[:-1]))
      return jnp.asarray(std * rng.standard_normal(leaf.shape, np.float32))
    return jnp.ones(leaf.shape) if name in ("scale", "var") else jnp.zeros(leaf.shape)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def parser(description: str, choice: str, known: Sequence[str]):
  """Returns a parser of the options that both benchmarks have.

  Args:
    description: the benchmark's docstring.
    choice: name of the option that selects what is measured.
    known: what can be selected; all of it by default.
  """
  result = argparse.ArgumentParser(
    description=description, formatter_class=argparse.RawDescriptionHelpFormatter
  )

  def names(text: str) -> list[str]:
    given = text.split(",")
    if unknown := sorted(set(given) - set(known)):
      raise argparse.ArgumentTypeError(
        f"unknown: {', '.join(unknown)}; known: {', '.join(known)}"
      )
    return given

  result.add_argument(f"--{choice}", type=names, default=list(known))
  result.add_argument("--batch", type=int, default=4)
  result.add_argument("--size", type=int, default=224, help="side of the images")
  result.add_argument("--repeats", type=int, default=3)
  result.add_argument("--json", type=pathlib.Path, help="file for the results")
  return result


def save(results: dict[str, object], path: pathlib.Path | None) -> None:
  """Writes results as JSON where a path is given."""
  if path:
    path.write_text(json.dumps(results, indent=2, default=str) + "\n")


def has_gpu() -> bool:
  """Whether both sides can run on a GPU."""
  return jax.default_backend() == "gpu" and torch.cuda.is_available()


def interleave(
  sides: dict[str, Callable[[], object]], repeats: int
) -> dict[str, dict[str, float]]:
  """Times functions in turn, so that a busy machine slows all of them alike.

  Args:
    sides: functions by name; each returns when its work is done. All run once before.
    repeats: timed rounds.

  Returns:
    Per name: "seconds", the median wall-clock time, and "cpu_seconds", the median
    processor time of all threads, which other users of the machine hardly change.
  """
  wall = {name: [] for name in sides}
  cpu = {name: [] for name in sides}
  for function in sides.values():
    function()
  for _ in range(repeats):
    for name, function in sides.items():
      start, cpu_start = time.perf_counter(), time.process_time()
      function()
      cpu[name].append(time.process_time() - cpu_start)
      wall[name].append(time.perf_counter() - start)
  median = statistics.median
  return {
    name: {"seconds": median(wall[name]), "cpu_seconds": median(cpu[name])}
    for name in sides
  }


def with_ratios(times: dict[str, dict[str, float]]) -> dict[str, object]:
  """Adds JAX's time over PyTorch's to the times of the sides "jax" and "torch"."""
  mine, theirs = times["jax"], times["torch"]
  return {
    **times,
    "ratio": mine["seconds"] / theirs["seconds"],
    "cpu_ratio": mine["cpu_seconds"] / theirs["cpu_seconds"],
  }


def matmul_rate(dtype: jnp.dtype, repeats: int = 5) -> float:
  """Returns the best measured rate of a square matrix product, in FLOP/s."""
  size = 2048 if jax.default_backend() == "cpu" else 8192
  a = jnp.ones((size, size), dtype)
  product = jax.jit(jnp.matmul)
  jax.block_until_ready(product(a, a))
  best = float("inf")
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(product(a, a))
    best = min(best, time.perf_counter() - start)
  return 2 * size**3 / best


def device_name() -> str:
  """Returns what the figures were measured on."""
  device = jax.devices()[0].device_kind
  return f"{device}, {torch.get_num_threads()} CPU threads"
