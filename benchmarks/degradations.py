"""Degradations: images per second against plain PyTorch, at 224 pixels.

  python benchmarks/degradations.py [--kinds=awgn,motion_blur] [--out=results.json]

The other side is each definition of docs/method.md, section 3, written directly in
PyTorch for one image in one thread, as a DataLoader worker would run it, then stacked
into a batch. Where the level varies over the image it loops: over rows or columns when
it varies along one axis ("1d"), over pixels when it varies in two dimensions ("2d").
"1d-pixels" is the former by the latter's general loop. Loops that take seconds an image
are timed on one image and scaled to the batch.

The JAX side is one jitted call for the batch of 64 on all cores. The two alternate
within every repetition; medians are printed. The last lines set the slowest
degradation against DnCNN-20's forward pass over the same batch.
"""

import argparse
import json
import math
import random
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F

from fidelity_jax import degradations
from fidelity_jax.degradations.blur import motion_offsets
from fidelity_jax.models import DnCNN

SIZE = 224
BATCH = 64
VARIATIONS = ("uniform", "discrete", "1d", "1d-pixels", "2d")


def gaussian_kernel(sigma: float, size: int = 13) -> torch.Tensor:
  """The normalized [size, size] kernel; sigma 0 is a single 1."""
  if sigma < 1e-6:
    kernel = torch.zeros(size, size)
    kernel[size // 2, size // 2] = 1
    return kernel
  distance = torch.arange(size) - size // 2
  line = torch.exp(-0.5 * (distance / sigma) ** 2)
  kernel = torch.outer(line, line)
  return kernel / kernel.sum()


def motion_kernel(level: float) -> torch.Tensor:
  """The normalized 45-degree kernel of the nearest odd length."""
  length = 2 * int(level / 2) + 1
  return torch.eye(length) / length


def blur_all(image: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
  """[3, H, W] under one kernel."""
  return blur_window(pad(image, kernel.shape[0] // 2), kernel)


def pad(image: torch.Tensor, reach: int) -> torch.Tensor:
  """Reflect padding on all sides."""
  return F.pad(image[None], (reach,) * 4, mode="reflect")[0]


def blur_window(window: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
  """A padded window under one kernel."""
  weight = kernel.expand(3, 1, *kernel.shape)
  return F.conv2d(window[None], weight, groups=3)[0]


class Plain:
  """One kind of degradation, per image of a side, up to a level."""

  def __init__(self, kind: str, top: float, size: int = SIZE):
    self.kind, self.top, self.size = kind, top, size
    self.make_kernel = gaussian_kernel if kind == "gaussian_blur" else motion_kernel
    self.reach = 6 if kind == "gaussian_blur" else int(top) // 2

  def uniform(self, image: torch.Tensor, level: float | None = None) -> torch.Tensor:
    """The same level everywhere."""
    level = self.top if level is None else level
    if self.kind == "awgn":
      return (image + level * torch.randn_like(image)).clamp(0, 1)
    if self.kind == "salt_and_pepper":
      u = torch.rand_like(image)
      output = image.clone()
      output[u < level / 2] = 0
      output[u > 1 - level / 2] = 1
      return output
    if self.kind == "rectangular_crop":
      side = int(level * self.size + 0.5)
      room = self.size - side
      top, left = random.randint(0, room), random.randint(0, room)
      output = image.clone()
      output[:, top : top + side, left : left + side] = 0
      return output
    return blur_all(image, self.make_kernel(level)).clamp(0, 1)

  def discrete(self, image: torch.Tensor) -> torch.Tensor:
    """A level drawn from the kind's own set."""
    level = random.choice(degradations.KINDS[self.kind].levels)
    return image.clone() if level == 0 else self.uniform(image, level)

  def vary_1d(self, image: torch.Tensor) -> torch.Tensor:
    """The level changes along rows or columns; a loop over them."""
    columns, reverse = random.random() < 0.5, random.random() < 0.5
    if columns:
      image = image.transpose(1, 2)
    levels = torch.linspace(self.top, 0, self.size)
    if reverse:
      levels = levels.flip(0)
    output = image.clone()
    padded = pad(image, self.reach) if "blur" in self.kind else None
    corner = random.random(), random.random()
    for row, level in enumerate(levels.tolist()):
      output[:, row] = self._line(image, padded, row, level, corner)
    return output.transpose(1, 2) if columns else output

  def _line(self, image, padded, row, level, corner):
    if self.kind == "awgn":
      return (image[:, row] + level * torch.randn(3, self.size)).clamp(0, 1)
    if self.kind == "salt_and_pepper":
      u = torch.rand(3, self.size)
      line = torch.where(u > 1 - level / 2, 1.0, image[:, row])
      return torch.where(u < level / 2, 0.0, line)
    if self.kind == "rectangular_crop":
      side = int(level * self.size + 0.5)
      top, left = (int(u * (self.size - side + 1)) for u in corner)
      line = image[:, row].clone()
      if top <= row < top + side:
        line[:, left : left + side] = 0
      return line
    kernel = self.make_kernel(level)
    half, around = kernel.shape[0] // 2, self.reach
    window = padded[:, row + around - half : row + around + half + 1]
    window = window[:, :, around - half : around + half + self.size]
    return blur_window(window, kernel)[:, 0].clamp(0, 1)

  def vary_1d_pixels(self, image: torch.Tensor) -> torch.Tensor:
    """As `vary_1d`, but by the general loop over pixels."""
    axis = random.randrange(2)
    a, b = (self.top, 0.0) if random.random() < 0.5 else (0.0, self.top)
    level = lambda *place: a + (b - a) * place[axis] / (self.size - 1)
    return self._by_pixel(image, level)

  def vary_2d(self, image: torch.Tensor) -> torch.Tensor:
    """The level changes with the distance to a random pixel; a loop over pixels."""
    row0, column0 = random.randrange(self.size), random.randrange(self.size)
    a, b = (self.top, 0.0) if random.random() < 0.5 else (0.0, self.top)
    far = self.size - 1
    farthest = math.hypot(max(row0, far - row0), max(column0, far - column0))
    distance = lambda row, column: math.hypot(row - row0, column - column0)
    level = lambda row, column: b + (a - b) * distance(row, column) / farthest
    return self._by_pixel(image, level)

  def _by_pixel(self, image, level_at) -> torch.Tensor:
    output = image.clone()
    padded = pad(image, self.reach) if "blur" in self.kind else None
    corner = random.random(), random.random()
    for row in range(self.size):
      for column in range(self.size):
        level = level_at(row, column)
        if level > 0:
          output[:, row, column] = self._pixel(
            image, padded, row, column, level, corner
          )
    return output

  def _pixel(self, image, padded, row, column, level, corner):
    value = image[:, row, column]
    if self.kind == "awgn":
      return (value + level * torch.randn(3)).clamp(0, 1)
    if self.kind == "salt_and_pepper":
      u = torch.rand(3)
      value = torch.where(u > 1 - level / 2, 1.0, value)
      return torch.where(u < level / 2, 0.0, value)
    if self.kind == "rectangular_crop":
      side = int(level * self.size + 0.5)
      top, left = (int(u * (self.size - side + 1)) for u in corner)
      inside = top <= row < top + side and left <= column < left + side
      return torch.zeros(3) if inside else value
    kernel = self.make_kernel(level)
    half = kernel.shape[0] // 2
    top, left = row + self.reach - half, column + self.reach - half
    size = kernel.shape[0]
    window = padded[:, top : top + size, left : left + size]
    return (window * kernel).sum((1, 2)).clamp(0, 1)


def specification(kind: str, variation: str) -> dict:
  """The spec that `Plain`'s method of the same name follows."""
  levels = degradations.KINDS[kind].levels
  if variation == "uniform":
    return {"kind": kind, "level": levels[-1]}
  if variation == "discrete":
    return {"kind": kind, "level": list(levels)}
  return {"kind": kind, "level": (levels[-1], 0), "vary": variation[:2]}


def timed(function) -> float:
  """Seconds that a call takes."""
  start = time.perf_counter()
  function()
  return time.perf_counter() - start


def compare(kind: str, variation: str, repeats: int) -> dict:
  """Times both sides, alternating; seconds are per batch."""
  images = np.random.default_rng(0).random((BATCH, SIZE, SIZE, 3), np.float32)
  degradation = degradations.from_config(specification(kind, variation))
  function = jax.jit(degradation)
  keys = jax.random.split(jax.random.key(0), BATCH)
  on_device = jnp.asarray(images)
  ours = lambda: jax.block_until_ready(function(keys, on_device))

  plain = Plain(kind, degradations.KINDS[kind].levels[-1])
  varying = variation[0] in "12"
  name = f"vary_{variation}".replace("-", "_") if varying else variation
  method = getattr(plain, name)
  chw = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
  count = {"1d": 4, "1d-pixels": 1, "2d": 1}.get(variation, BATCH)
  theirs = lambda: torch.stack([method(image) for image in chw[:count]])

  ours()
  if count > 1:
    theirs()
  pairs = [(timed(ours), timed(theirs) * BATCH / count) for _ in range(repeats)]
  jax_seconds = statistics.median(pair[0] for pair in pairs)
  torch_seconds = statistics.median(pair[1] for pair in pairs)
  return {
    "kind": kind,
    "variation": variation,
    "jax_images_per_second": BATCH / jax_seconds,
    "torch_images_per_second": BATCH / torch_seconds,
    "ratio": torch_seconds / jax_seconds,
    "jax_seconds": jax_seconds,
  }


def restorer_seconds() -> float:
  """DnCNN-20's forward pass over a batch, timed on two images and scaled."""
  count = 2
  model = DnCNN()
  images = jnp.zeros((count, SIZE, SIZE, 3))
  variables = model.init(jax.random.key(0), images)
  apply = jax.jit(model.apply)
  call = lambda: jax.block_until_ready(apply(variables, images))
  call()
  return statistics.median(timed(call) for _ in range(3)) * BATCH / count


def main() -> None:
  """Runs the comparison and prints a table."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  kinds = [kind for kind in degradations.KINDS if kind != "clean"]
  parser.add_argument("--kinds", default=",".join(kinds))
  parser.add_argument("--variations", default=",".join(VARIATIONS))
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--out")
  args = parser.parse_args()
  # What a DataLoader worker is given.
  torch.set_num_threads(1)

  # The eye kernel above is the definition's at 45 degrees.
  assert motion_offsets(45.0, 10) == tuple((k, k) for k in range(11))
  results = []
  print(f"{'kind':17} {'variation':9} {'JAX img/s':>10} {'PyTorch':>9} {'ratio':>7}")
  for kind in args.kinds.split(","):
    for variation in args.variations.split(","):
      result = compare(kind, variation, args.repeats)
      results.append(result)
      print(
        f"{kind:17} {variation:9} {result['jax_images_per_second']:10.0f} "
        f"{result['torch_images_per_second']:9.2f} {result['ratio']:7.1f}",
        flush=True,
      )

  restorer = restorer_seconds()
  print(f"DnCNN-20 forward, batch of {BATCH}: {restorer:.1f} s; of that, degrading is")
  for result in results:
    share = 100 * result["jax_seconds"] / restorer
    print(f"  {result['kind']:17} {result['variation']:9} {share:6.2f} %")
  if args.out:
    with open(args.out, "w") as file:
      json.dump({"restorer_seconds": restorer, "results": results}, file, indent=2)


if __name__ == "__main__":
  main()
