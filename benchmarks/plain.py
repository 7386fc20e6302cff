"""How plain PyTorch goes about it: image by image, row by row. There is no JAX here."""

import math
import pathlib
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

# The reference implementations live with the tests.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))


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
  """One kind of degradation, per image of a side, up to a level.

  Attributes:
    levels: what `discrete` draws from.
  """

  def __init__(
    self, kind: str, top: float, size: int, levels: Sequence[float] = (0.0,)
  ):
    self.kind, self.top, self.size, self.levels = kind, top, size, levels
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
    """A level drawn from a set."""
    level = random.choice(self.levels)
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


def degrade(condition: Any, image: torch.Tensor) -> torch.Tensor:
  """Returns an image under a condition.

  Args:
    condition: has `kind`; a `level`, or several; and how that varies: `vary` is None,
      "mixture" (one of the levels, drawn), "1d" or "2d".
    image: [3, S, S] in [0, 1].
  """
  if condition.kind == "clean":
    return image.clone()
  level = condition.level
  levels = (level,) if isinstance(level, float | int) else level
  plain = Plain(condition.kind, max(levels), image.shape[-1], levels)
  ways = {None: "uniform", "mixture": "discrete", "1d": "vary_1d", "2d": "vary_2d"}
  return getattr(plain, ways[condition.vary])(image)


def normalized(images: torch.Tensor) -> torch.Tensor:
  """Returns what a network of ImageNet's sees of images [N, 3, H, W] in [0, 1]."""
  mean = images.new_tensor([0.485, 0.456, 0.406])[:, None, None]
  std = images.new_tensor([0.229, 0.224, 0.225])[:, None, None]
  return (images - mean) / std


def steered(
  method: Any, degraded: torch.Tensor, clean: torch.Tensor, ensemble: bool
) -> torch.Tensor:
  """Returns the logits of a method with or without its ensemble.

  Args:
    method: a `torch_method.Method`.
    degraded: images [N, 3, H, W] in [0, 1].
    clean: likewise.
    ensemble: whether it has its part.
  """
  images, confidence = method.inputs(degraded, clean)
  features = method.channel(method.steered_features(images, confidence), confidence)
  if ensemble:
    features = method.blend(features, method.plain_features(images), confidence)
  return method.classifier(features)


class Places(torch.utils.data.Sampler):
  """Batches of (condition, index), of the condition that is set; no part of one."""

  def __init__(self, count: int, batch: int, shuffle: bool = False):
    self.condition: Any = None
    self._count, self._batch, self._shuffle = count, batch, shuffle

  def __iter__(self) -> Iterator[list[tuple[Any, int]]]:
    order = torch.randperm(self._count) if self._shuffle else torch.arange(self._count)
    for start in range(0, len(self) * self._batch, self._batch):
      chosen = order[start : start + self._batch]
      yield [(self.condition, i) for i in chosen.tolist()]

  def __len__(self) -> int:
    return self._count // self._batch


class Pass(NamedTuple):
  """A row under a condition.

  Attributes:
    row: which.
    condition: which.
    seconds: that it took.
    calls: of these, what the networks took of each batch.
    logits: [N, K] of the last draw of noise.
  """

  row: str
  condition: Any
  seconds: float
  calls: list[float]
  logits: np.ndarray


@torch.inference_mode()
def by_row(
  rows: Sequence[str],
  conditions: Sequence[Any],
  rounds: int,
  batches: Callable[[Any], Iterable],
  logits: Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor],
) -> list[Pass]:
  """Evaluates row by row and condition by condition, everything anew for each.

  Args:
    rows: their names.
    conditions: see `degrade`; they know how many `rounds_needed`.
    rounds: draws of noise.
    batches: condition -> (degraded, clean, ...) images [N, 3, S, S].
    logits: (row, degraded, clean) -> [N, K].
  """
  passes = []
  for row in rows:
    for condition in conditions:
      start, calls = time.perf_counter(), []
      for _ in range(condition.rounds_needed(rounds)):
        found = []
        for degraded, clean, *_ in batches(condition):
          before = time.perf_counter()
          found.append(logits(row, degraded, clean).numpy())
          calls.append(time.perf_counter() - before)
      took = time.perf_counter() - start
      passes.append(Pass(row, condition, took, calls, np.concatenate(found)))
  return passes


def late(calls: Sequence[float]) -> float:
  """Returns by how much the first of some calls took longer than the others."""
  return max(0.0, calls[0] - statistics.median(calls[1:] or calls))
