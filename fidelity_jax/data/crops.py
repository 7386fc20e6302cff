"""Crops and resizing with the results of torchvision's transforms on PIL images.

Enlarging is OpenCV's work, several times as fast as Pillow and never more than one grey
level off; shrinking with antialiasing, which OpenCV does not have, is Pillow's.
"""

import math
from typing import Protocol

import cv2
import numpy as np
from PIL import Image

from fidelity_jax.data import images

# Batches are made by threads already.
cv2.setNumThreads(0)

DEFAULT_AREA = (0.08, 1.0)
DEFAULT_ASPECT = (3 / 4, 4 / 3)
_ATTEMPTS = 10


class Draws(Protocol):
  """The two draws that a crop needs; `numpy.random.Generator` has both."""

  def uniform(self, low: float, high: float) -> float:
    """Returns a real number, uniform in [low, high)."""

  def integers(self, low: int, high: int) -> int:
    """Returns an integer, uniform in [low, high)."""


def random_box(
  height: int,
  width: int,
  draws: Draws,
  area: tuple[float, float] = DEFAULT_AREA,
  aspect: tuple[float, float] = DEFAULT_ASPECT,
) -> tuple[int, int, int, int]:
  """Draws the crop of torchvision's RandomResizedCrop.

  Ten attempts at a box of a uniform share of the area and a log-uniform aspect
  ratio; if none fits, the largest central box of an allowed aspect ratio.

  Args:
    height: of the image, in pixels.
    width: of the image, in pixels.
    draws: source of the random draws, taken in torchvision's order.
    area: range of the crop's share of the image's area, in (0, 1].
    aspect: range of the crop's width divided by its height.

  Returns:
    (left, top, right, bottom) in pixels, inside the image.
  """
  log_aspect = (math.log(aspect[0]), math.log(aspect[1]))
  for _ in range(_ATTEMPTS):
    target = height * width * draws.uniform(*area)
    ratio = math.exp(draws.uniform(*log_aspect))
    w = round(math.sqrt(target * ratio))
    h = round(math.sqrt(target / ratio))
    if 0 < w <= width and 0 < h <= height:
      top = int(draws.integers(0, height - h + 1))
      left = int(draws.integers(0, width - w + 1))
      return left, top, left + w, top + h
  ratio = width / height
  if ratio < aspect[0]:
    w, h = width, round(width / aspect[0])
  elif ratio > aspect[1]:
    w, h = round(height * aspect[1]), height
  else:
    w, h = width, height
  left, top = (width - w) // 2, (height - h) // 2
  return left, top, left + w, top + h


def resized(
  pixels: np.ndarray, box: tuple[int, int, int, int], out: np.ndarray
) -> None:
  """Crops a box and resizes it to a square, bilinear with antialiasing.

  Args:
    pixels: uint8 [H, W, 3].
    box: (left, top, right, bottom) in pixels.
    out: uint8 [size, size, 3], contiguous, to be filled.
  """
  left, top, right, bottom = box
  # Cut first: the resizing filter must not reach outside of the box.
  _resize(pixels[top:bottom, left:right], out)


def reduced(
  picture: images.Picture, box: tuple[int, int, int, int], out: np.ndarray
) -> None:
  """Like `resized`, from a JPEG decoded as small as the result allows.

  Args:
    picture: not yet decoded.
    box: (left, top, right, bottom) in pixels of the full size.
    out: uint8 [size, size, 3], contiguous, to be filled.
  """
  left, top, right, bottom = box
  size = len(out)
  least = (
    math.ceil(picture.height * size / (bottom - top)),
    math.ceil(picture.width * size / (right - left)),
  )
  pixels = picture.pixels(least)
  height, width = pixels.shape[:2]
  down, across = height / picture.height, width / picture.width
  scaled = (
    round(left * across),
    round(top * down),
    max(round(right * across), round(left * across) + 1),
    max(round(bottom * down), round(top * down) + 1),
  )
  resized(pixels, scaled, out)


def central(pixels: np.ndarray, out: np.ndarray) -> None:
  """Resizes the shorter side to a square's and cuts the central square.

  The result of torchvision's Resize(size) and CenterCrop(size) on PIL images.

  Args:
    pixels: uint8 [H, W, 3].
    out: uint8 [size, size, 3], contiguous, to be filled.
  """
  height, width = pixels.shape[:2]
  size = len(out)
  (new_height, new_width), (top, left) = _central(height, width, size)
  enlarged = new_width >= width and new_height >= height
  # A line of pixels would become a very large image.
  if enlarged and new_width * new_height <= images.DEFAULT_MAX_PIXELS:
    whole = np.empty((new_height, new_width, 3), np.uint8)
    _resize(pixels, whole)
    out[:] = whole[top : top + size, left : left + size]
    return
  out[:] = _square(pixels, size)


def central_float(pixels: np.ndarray, size: int) -> np.ndarray:
  """Returns the same of an image in floating point, float32 [size, size, 3].

  Args:
    pixels: float32 [H, W, 3].
    size: side of the square, in pixels.
  """
  return np.stack([_square(pixels[..., i], size) for i in range(3)], -1)


def _central(
  height: int, width: int, size: int
) -> tuple[tuple[int, int], tuple[int, int]]:
  """Returns the resized image's (height, width), and the square's (top, left)."""
  if width <= height:
    new_width, new_height = size, int(size * height / width)
  else:
    new_width, new_height = int(size * width / height), size
  left, top = round((new_width - size) / 2.0), round((new_height - size) / 2.0)
  return (new_height, new_width), (top, left)


def _square(pixels: np.ndarray, size: int) -> np.ndarray:
  """Returns the central square; only what it needs is computed."""
  height, width = pixels.shape[:2]
  (new_height, new_width), (top, left) = _central(height, width, size)
  across, down = width / new_width, height / new_height
  right, bottom = (left + size) * across, (top + size) * down
  box = (left * across, top * down, min(right, width), min(bottom, height))
  image = Image.fromarray(pixels)
  return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))


def _resize(pixels: np.ndarray, out: np.ndarray) -> None:
  height, width = out.shape[:2]
  if pixels.shape[0] <= height and pixels.shape[1] <= width:
    cv2.resize(pixels, (width, height), dst=out, interpolation=cv2.INTER_LINEAR)
  else:
    image = Image.fromarray(pixels)
    out[:] = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
