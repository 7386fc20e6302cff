"""What the benchmarks against PyTorch share."""

import argparse
import contextlib
import json
import math
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen as nn

# The reference implementations live with the tests.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))

# This package, PyTorch as it comes, and PyTorch through `torch.compile`.
COMPILED = "compiled"
SIDES = ("jax", "eager", COMPILED)


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


def add_no_compiled(parser: argparse.ArgumentParser) -> None:
  """Adds the option that leaves the compiled side out."""
  parser.add_argument(
    f"--no_{COMPILED}",
    action="store_true",
    help="leave torch.compile out, which takes minutes to compile",
  )


def chosen(args: argparse.Namespace) -> tuple[str, ...]:
  """Returns the sides that are measured, of a parser with `add_no_compiled`."""
  return SIDES[:-1] if args.no_compiled else SIDES


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
  """Returns PyTorch's function or module through `torch.compile`, at its defaults.

  But for shapes: each gets code of its own, as JAX's do. What was compiled before is
  forgotten, because it counts towards the number of versions of the same code after
  which `torch.compile` runs the rest of them eagerly, and does not say so.
  """
  torch.compiler.reset()
  return torch.compile(function, dynamic=False)


@contextlib.contextmanager
def nothing_compiled() -> Iterator[None]:
  """Hides what `torch.compile` kept of earlier runs, unless the user says where it is.

  Processes that this one starts share what it compiles.
  """
  if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
    yield
    return
  options = {"prefix": "inductor-", "ignore_cleanup_errors": True}
  with tempfile.TemporaryDirectory(**options) as directory:
    with mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=directory):
      yield


def save(results: dict[str, object], path: pathlib.Path | None) -> None:
  """Writes results as JSON where a path is given."""
  if path:
    path.write_text(json.dumps(results, indent=2, default=str) + "\n")


def has_gpu() -> bool:
  """Whether both sides can run on a GPU."""
  return jax.default_backend() == "gpu" and torch.cuda.is_available()


def first_calls(sides: dict[str, Callable[[], object]]) -> dict[str, float]:
  """Returns the seconds of each function's first call, in which it is compiled.

  Where `torch.compile` cannot do it, a line says why, and its side is missing.
  """
  seconds = {}
  for name, function in sides.items():
    start = time.perf_counter()
    try:
      function()
    # What all errors of `torch.compile` are.
    except RuntimeError as error:
      if name != COMPILED:
        raise
      print(f"torch.compile is left out: {_reason(error)}", flush=True)
      continue
    seconds[name] = time.perf_counter() - start
  return seconds


def _reason(error: Exception) -> str:
  """Returns the line of an error's text that says most."""
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  # A C++ compiler's message stands below the command that failed.
  telling = [line for line in lines if "error: " in line] or lines
  return f"{type(error).__name__}: {telling[0][:300] if telling else 'no reason given'}"


def interleave(
  sides: dict[str, Callable[[], object]], repeats: int
) -> dict[str, dict[str, float]]:
  """Times functions in turn, so that a busy machine slows all of them alike.

  Args:
    sides: functions by name; each returns when its work is done. All run once before.
    repeats: timed rounds.

  Returns:
    Per name: "seconds", the median wall-clock time, "cpu_seconds", the median
    processor time of all threads, which other users of the machine hardly change, and
    "first_seconds", what the call before took. Without the compiled side if it fails.
  """
  first = first_calls(sides)
  sides = {name: sides[name] for name in first}
  wall = {name: [] for name in sides}
  cpu = {name: [] for name in sides}
  for _ in range(repeats):
    for name, function in sides.items():
      start, cpu_start = time.perf_counter(), time.process_time()
      function()
      cpu[name].append(time.process_time() - cpu_start)
      wall[name].append(time.perf_counter() - start)
  median = statistics.median
  return {
    name: {
      "seconds": median(wall[name]),
      "cpu_seconds": median(cpu[name]),
      "first_seconds": first[name],
    }
    for name in sides
  }


def with_ratios(times: dict[str, dict[str, float]]) -> dict[str, Any]:
  """Adds JAX's time over that of each other side: "ratio" and "cpu_ratio", by side."""

  def ratios(what: str) -> dict[str, float]:
    mine = times["jax"][what]
    return {side: mine / times[side][what] for side in times if side != "jax"}

  return {**times, "ratio": ratios("seconds"), "cpu_ratio": ratios("cpu_seconds")}


def ratios(row: dict[str, Any]) -> str:
  """Returns the ratios of a row of `with_ratios` as text."""
  return ", ".join(
    f"jax / {side} {ratio:.2f} (CPU time {row['cpu_ratio'][side]:.2f})"
    for side, ratio in row["ratio"].items()
  )


def firsts(row: dict[str, Any]) -> str:
  """Returns what the first calls of a row took, compilation included, as text."""
  taken = [f"{s} {row[s]['first_seconds']:.1f} s" for s in SIDES if s in row]
  return f"first call: {', '.join(taken)}"


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
