"""How time and memory grow with batch, image and number of conditions, and why.

  python benchmarks/growth.py --json=growth.json --figures=FOLDER [--parts=sizes]
  python benchmarks/growth.py --draw=growth.json --figures=FOLDER

Three parts, each with a figure:

- "batches": the oracle's training step of benchmarks/train_step.py (ResNet-50 and
  DnCNN-20) at --size, for each batch size of --batches;
- "sizes": the same at --batch, for each side of an image of --sizes;
- "conditions": the evaluation of --rows of Table 5.1 as benchmarks/evaluation.py does
  it, "jax" all rows together, "eager" row by row, at --size, for each number of
  conditions of --conditions: AWGN of as many levels, one draw each.

This package and eager PyTorch take turns in one process; medians are printed. Memory
is what a process of its own takes at most, beyond what it had before: of a step one for
each point, compilation included; of evaluation one for each side, in which numbers of
conditions follow one another after an evaluation that compiles, PyTorch's loaders not
counted.

What bounds each point: the arithmetic (PyTorch's count of convolutions and matrix
products, shared work counted once, at the measured rate of a matrix product), what does
not grow (a line fitted to the times, at zero), and the rest: memory traffic, small
operations, convolutions that run below that rate. Figures show the arithmetic as a
dotted line. Results are saved after each point.
"""

import argparse
import ctypes
import functools
import gc
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import evaluation
import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import side_by_side
import torch
import train_step
from matplotlib.axes import Axes
from torch.utils.flop_counter import FlopCounterMode

from fidelity_jax import degradations, locations
from fidelity_jax.report import pictures

SIDES = side_by_side.SIDES[:-1]
NAMES = {"jax": "fidelity_jax", "eager": "PyTorch, eager"}


class Part(NamedTuple):
  """What grows.

  Attributes:
    key: its name in a point.
    label: of the figure's axis.
    work: returns what the time of a point should be proportional to.
    unit: of that.
    per: returns what a point's time is divided by in the figure.
    each: what that gives.
  """

  key: str
  label: str
  work: Callable[[dict[str, Any]], float]
  unit: str
  per: Callable[[dict[str, Any]], float]
  each: str


_images = lambda point: point["batch"]
PARTS = {
  "batches": Part("batch", "images in a batch", _images, "image", _images, "an image"),
  "sizes": Part(
    "size",
    "side of the images, pixels",
    lambda point: point["batch"] * point["size"] ** 2 / 1e6,
    "million pixels",
    _images,
    "an image",
  ),
  "conditions": Part(
    "conditions",
    "conditions",
    lambda point: point["conditions"],
    "condition",
    lambda point: 1,
    "an evaluation",
  ),
}


def measure_step(batch: int, size: int, args: argparse.Namespace) -> dict[str, Any]:
  """Returns the point of a training step: times, FLOPs and memory by side."""
  gpu = side_by_side.has_gpu()
  device = "cuda" if gpu else "cpu"
  images = train_step.make_batch(batch, size)
  sides = {
    "jax": train_step.jax_step("oracle", images, remat=False),
    "eager": train_step.torch_step("oracle", images, device),
  }
  point = {"batch": batch, "size": size}
  point |= side_by_side.interleave(sides, args.repeats)
  # Proportional to the batch, and a step of one image is soon done.
  one = train_step.torch_step("oracle", train_step.make_batch(1, size), device)
  with FlopCounterMode(display=False) as counter:
    one()
  # The processes that measure memory need it.
  del sides, one
  gc.collect()
  jax.clear_caches()
  alone = argparse.Namespace(batch=batch, size=size, remat=False)
  for side in SIDES:
    point[side]["flops"] = batch * counter.get_total_flops()
    if not args.no_memory:
      try:
        peak = train_step.measure_memory(side, "oracle", alone)
        point[side]["peak_bytes"] = peak
      except subprocess.CalledProcessError as error:
        print(f"no memory of {side}, batch {batch}, {size} px: {error}", flush=True)
  return point


class Evaluations:
  """Both sides of benchmarks/evaluation.py, under a number of conditions."""

  def __init__(self, workdir: pathlib.Path, args: argparse.Namespace):
    """Writes the stages, with random weights.

    Args:
      workdir: an empty directory.
      args: as of `parse`.
    """
    # All images at once.
    args = argparse.Namespace(**vars(args) | {"batch": args.images, "rounds": 1})
    self._args = args
    self._ours = evaluation.Ours(locations.expand(str(workdir)), args)
    # Networks alone are measured.
    self._ours.further.clear()
    count = self._ours.dataset.num_classes
    self._reference = evaluation.Reference(args.backbone, args.depth, count)
    self._ours.finish_stages(self._reference.states)
    self._theirs = evaluation.Theirs(self._reference, self._ours.dataset, args)
    most = max(args.conditions)
    levels = [0.5 * (i + 1) / most for i in range(most)]
    found = degradations.conditions({"kind": "awgn", "level": levels})
    # Conditions that cost the same: not the first, clean, nor the last two, 1D and 2D.
    self._conditions = found[1:-2]

  def jax(self, conditions: int) -> None:
    """Evaluates all rows together."""
    rows = list(self._ours.rows.values())
    for row in rows:
      # In the place of those of its config, which are cached there.
      vars(row)["conditions"] = self._conditions[:conditions]
    self._ours.run(rows)

  def eager(self, conditions: int) -> None:
    """Evaluates row by row."""
    self._theirs.run(self._args.rows, self._conditions[:conditions])

  def flops(self) -> dict[str, int]:
    """Returns the FLOPs of a condition by side."""
    self.jax(1)
    args = self._args
    per_image = self._reference.flops(args.size)
    shared = evaluation.networks(evaluation.profile(self._ours), per_image, args)
    image = torch.zeros(1, 3, args.size, args.size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
      for row in args.rows:
        self._reference.logits(row, image, image)
    return {
      "jax": shared["flops"],
      "eager": args.images * counter.get_total_flops(),
    }


def measure_conditions(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
  """Yields the points of evaluation."""
  memory = {}
  if not args.no_memory:
    memory = {side: _memory_of_evaluation(side) for side in SIDES}
  with tempfile.TemporaryDirectory() as directory:
    evaluations = Evaluations(pathlib.Path(directory), args)
    flops = evaluations.flops()
    for i, conditions in enumerate(args.conditions):
      calls = {
        side: lambda s=side, n=conditions: getattr(evaluations, s)(n) for side in SIDES
      }
      point = {"conditions": conditions, "size": args.size, "images": args.images}
      point |= side_by_side.interleave(calls, args.repeats)
      for side in SIDES:
        point[side]["flops"] = conditions * flops[side]
        if side in memory:
          point[side]["peak_bytes"] = memory[side][i]
      yield point


def _memory_of_evaluation(side: str) -> list[int]:
  """Returns the peaks of this command's numbers of conditions, in its own process."""
  command = [sys.executable, *sys.argv, f"--memory_of={side}"]
  result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
  return json.loads(result.stdout.splitlines()[-1])


def print_memory(side: str, args: argparse.Namespace) -> None:
  """Prints the peaks of a side's evaluation in bytes, as a JSON list."""
  with tempfile.TemporaryDirectory() as directory:
    evaluations = Evaluations(pathlib.Path(directory), args)
    getattr(evaluations, side)(1)
    before, peaks = _fresh_peak(), []
    for conditions in args.conditions:
      _fresh_peak()
      getattr(evaluations, side)(conditions)
      peaks.append(train_step.resident() - before)
  print(json.dumps(peaks))


def _fresh_peak() -> int:
  """Forgets this process's largest resident size so far; returns the present one."""
  gc.collect()
  # Else what follows is hidden in memory that glibc holds back: it took 4 for 98 MB.
  ctypes.CDLL(None).malloc_trim(0)
  pathlib.Path("/proc/self/clear_refs").write_text("5")
  return train_step.resident()


def told(point: dict[str, Any], part: Part, peak: float) -> Iterator[str]:
  """Yields a line for each side of a point."""
  for side in SIDES:
    times = point[side]
    rate = times["flops"] / times["seconds"]
    line = f"{part.key} {point[part.key]:4} {side:6} {times['seconds']:8.3f} s, "
    line += f"{times['seconds'] / part.work(point):8.4f} s per {part.unit}, "
    line += f"{rate / 1e9:5.0f} GFLOP/s ({rate / peak:4.0%} of matrix product)"
    if "peak_bytes" in times:
      line += f", {times['peak_bytes'] / 2**30:5.2f} GiB"
    yield line


def bounds(points: list[dict[str, Any]], part: Part, peak: float) -> Iterator[str]:
  """Yields what time and memory are made of: the fitted lines, and shares by point."""
  work = np.array([part.work(point) for point in points])
  for side in SIDES:
    seconds = np.array([point[side]["seconds"] for point in points])
    each, fixed = _line(work, seconds)
    line = f"{side}: {fixed:.3f} s {each:+.4f} s per {part.unit}"
    memory = [point[side].get("peak_bytes") for point in points]
    if None not in memory:
      grows, stays = _line(work, np.array(memory) / 2**30)
      line += f"; {stays:.2f} GiB {grows:+.4f} GiB per {part.unit}"
    yield line
    arithmetic = np.array([point[side]["flops"] for point in points]) / peak
    for point, total, least in zip(points, seconds, arithmetic, strict=True):
      shares = {"arithmetic": least / total, "fixed": max(fixed, 0.0) / total}
      shares["rest"] = max(0.0, 1 - sum(shares.values()))
      listed = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
      bound = max(shares, key=shares.get)
      yield f"  {part.key} {point[part.key]}: {listed}; largest: {bound}"


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
  """Returns slope and offset of a line; relative errors weigh the same everywhere."""
  if len(x) < 2:
    return float(y[0] / x[0]), 0.0
  slope, offset = np.polyfit(x, y, 1, w=1 / y)
  return float(slope), float(offset)


def figure(
  points: list[dict[str, Any]], part: Part, peak: float
) -> matplotlib.figure.Figure:
  """Returns time and, where it was measured, memory of both sides as curves."""
  panels = 1 + any("peak_bytes" in point[side] for point in points for side in SIDES)
  result = matplotlib.figure.Figure(figsize=(3.75 * panels, 3), layout="constrained")
  time, *memory = result.subplots(1, panels, squeeze=False)[0]
  x = [point[part.key] for point in points]
  for i, side in enumerate(SIDES):
    colour, style = pictures.COLOURS[i], {"label": NAMES[side]}
    style |= {"color": colour, "marker": pictures.MARKERS[i], "markersize": 4}
    seconds = [point[side]["seconds"] / part.per(point) for point in points]
    time.plot(x, seconds, **style)
    least = [point[side]["flops"] / peak / part.per(point) for point in points]
    # One line where both do the same.
    label = "arithmetic alone" if i == 0 else None
    time.plot(x, least, ":", color=colour, linewidth=1, label=label)
    for axes in memory:
      axes.plot(x, [_gib(point[side]) for point in points], **style)
      axes.set_title("Peak memory, GiB")
  time.set_title(f"Seconds for {part.each}")
  for axes in (time, *memory):
    _finish(axes, x, part)
  time.legend(fontsize=8)
  return result


def _gib(times: dict[str, float]) -> float:
  return times["peak_bytes"] / 2**30 if "peak_bytes" in times else np.nan


def _finish(axes: Axes, x: list[int], part: Part) -> None:
  if part.key == "batch":
    # The others in proportion, which shows what grows with them as a straight line.
    axes.set_xscale("log", base=2)
  axes.set_xticks(x, [str(value) for value in x])
  axes.set_xlabel(part.label)
  axes.minorticks_off()
  axes.set_ylim(bottom=0)
  axes.grid(True)


def draw(results: dict[str, Any], folder: pathlib.Path) -> None:
  """Writes a figure for each part that has been measured."""
  folder.mkdir(parents=True, exist_ok=True)
  for name, points in results["growth"].items():
    path = folder / f"growth-{name}.png"
    made = functools.partial(figure, points, PARTS[name], results["matmul_flops"])
    path.write_bytes(pictures.png(made))
    print(path)


def parse() -> argparse.Namespace:
  """Returns the arguments."""
  parser = side_by_side.parser(__doc__, "parts", tuple(PARTS))
  numbers = lambda text: sorted({int(number) for number in text.split(",")})
  add = parser.add_argument
  add("--batches", type=numbers, default=[1, 2, 4, 8, 16, 32])
  add("--sizes", type=numbers, default=[64, 128, 224, 320, 384, 512])
  add("--conditions", type=numbers, default=[1, 2, 4, 8])
  rows = lambda text: text.split(",")
  add("--rows", type=rows, default=["oracle", "oracle-ensemble"])
  add("--images", type=int, default=2, help="evaluated")
  add("--backbone", default="resnet50", help="the evaluation's, a ResNet")
  add("--depth", type=int, default=20, help="the evaluation's DnCNN")
  add("--no_memory", action="store_true", help="skip peak memory")
  add("--figures", type=pathlib.Path, help="folder for the figures")
  add("--draw", type=pathlib.Path, help="only draw what --json wrote earlier")
  add("--memory_of", choices=SIDES, help="only print the memory of a side's evaluation")
  args = parser.parse_args()
  if unknown := sorted(set(args.rows) - set(evaluation.ROWS)):
    parser.error(f"unknown rows: {', '.join(unknown)}")
  if "conditions" in args.parts and side_by_side.has_gpu():
    parser.error("evaluations are compared on CPUs: set JAX_PLATFORMS=cpu, or --parts")
  if args.draw and not args.figures:
    parser.error("--draw needs --figures")
  return args


def measure(args: argparse.Namespace) -> dict[str, Any]:
  """Measures and prints all parts; saves after each point."""
  dtype = jnp.bfloat16 if side_by_side.has_gpu() else jnp.float32
  peak = side_by_side.matmul_rate(dtype)
  results = {"device": side_by_side.device_name(), **vars(args), "matmul_flops": peak}
  results["growth"] = {}
  print(f"{results['device']}; matrix product {peak / 1e9:.0f} GFLOP/s")
  # Two parts have a point in common.
  step = functools.cache(lambda batch, size: measure_step(batch, size, args))
  points_of = {
    "batches": lambda: (step(number, args.size) for number in args.batches),
    "sizes": lambda: (step(args.batch, size) for size in args.sizes),
    "conditions": lambda: measure_conditions(args),
  }
  for name in args.parts:
    part, points = PARTS[name], results["growth"].setdefault(name, [])
    for point in points_of[name]():
      points.append(point)
      print(*told(point, part, peak), sep="\n", flush=True)
      side_by_side.save(results, args.json)
    print(*bounds(points, part, peak), sep="\n", flush=True)
  return results


def main() -> None:
  """Measures, or reads what was measured, and draws."""
  args = parse()
  torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
  if args.memory_of:
    print_memory(args.memory_of, args)
    return
  results = json.loads(args.draw.read_text()) if args.draw else measure(args)
  if args.figures:
    draw(results, args.figures)


if __name__ == "__main__":
  main()
