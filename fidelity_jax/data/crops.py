"""Crops and resizing with the results of torchvision's transforms on PIL images."""

import math
import threading
from typing import Protocol

import numpy as np
from PIL import Image

from fidelity_jax.data import images

try:
  import cykooz_resizer as simd
except ImportError:
  # There is no wheel for every platform; Pillow gives the same to one grey level.
  simd = None

DEFAULT_AREA = (0.08, 1.0)
DEFAULT_ASPECT = (3 / 4, 4 / 3)
_ATTEMPTS = 10

Box = tuple[float, float, float, float]


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
  pixels: np.ndarray, box: tuple[int, int, int, int], size: int
) -> np.ndarray:
  """Crops a box and resizes it to a square, bilinear with antialiasing.

  Args:
    pixels: uint8 [H, W, 3].
    box: (left, top, right, bottom) in pixels.
    size: side of the result, in pixels.

  Returns:
    uint8 [size, size, 3].
  """
  left, top, right, bottom = box
  # Cut first: the resizing filter must not reach outside of the box.
  cut = pixels[top:bottom, left:right]
  return _resize(cut, (0, 0, right - left, bottom - top), size)


def reduced(
  picture: images.Picture, box: tuple[int, int, int, int], size: int
) -> np.ndarray:
  """Like `resized`, from a JPEG decoded as small as the result allows.

  Args:
    picture: not yet decoded.
    box: (left, top, right, bottom) in pixels of the full size.
    size: side of the result, in pixels.

  Returns:
    uint8 [size, size, 3]; the filter may reach outside of the box by a pixel.
  """
  left, top, right, bottom = box
  least = (
    math.ceil(picture.height * size / (bottom - top)),
    math.ceil(picture.width * size / (right - left)),
  )
  pixels = picture.pixels(least)
  down, across = pixels.shape[0] / picture.height, pixels.shape[1] / picture.width
  scaled = (left * across, top * down, right * across, bottom * down)
  return _resize(pixels, scaled, size)


def central(pixels: np.ndarray, size: int) -> np.ndarray:
  """Resizes the shorter side to `size` and cuts the central square.

  The result of torchvision's Resize(size) and CenterCrop(size) on PIL images; only
  the pixels that the square needs are computed.

  Args:
    pixels: uint8 [H, W, 3].
    size: side of the result, in pixels.

  Returns:
    uint8 [size, size, 3].
  """
  height, width = pixels.shape[:2]
  if width <= height:
    new_width, new_height = size, int(size * height / width)
  else:
    new_width, new_height = int(size * width / height), size
  left, top = round((new_width - size) / 2.0), round((new_height - size) / 2.0)
  across, down = width / new_width, height / new_height
  right, bottom = (left + size) * across, (top + size) * down
  box = (left * across, top * down, min(right, width), min(bottom, height))
  return _resize(pixels, box, size)


def _resize(pixels: np.ndarray, box: Box, size: int) -> np.ndarray:
  """Resizes a box of real-valued edges; the filter reaches outside of the box."""
  height, width = pixels.shape[:2]
  if box == (0, 0, size, size) == (0, 0, width, height):
    return pixels
  if simd is None:
    image = Image.fromarray(pixels)
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))
  left, top, right, bottom = box
  source = simd.ImageData(width, height, simd.PixelType.U8x3, pixels.tobytes())
  target = simd.ImageData(size, size, simd.PixelType.U8x3)
  options = simd.ResizeOptions(
    resize_alg=simd.ResizeAlg.convolution(simd.FilterType.bilinear),
    crop_box=simd.CropBox(left, top, right - left, bottom - top),
    use_alpha=False,
  )
  _resizer().resize(source, target, options)
  return np.frombuffer(target.get_buffer(), np.uint8).reshape(size, size, 3)


_local = threading.local()


def _resizer() -> "simd.Resizer":
  # One per thread: a resizer holds buffers.
  if not hasattr(_local, "resizer"):
    _local.resizer = simd.Resizer()
  return _local.resizer
