"""From an encoded record to a uint8 RGB crop, with the result of torchvision on PIL.

The only work the host does: decode, crop, resize. Everything here is a pure function
of the encoded bytes and of an explicit random generator.
"""

import io
import math
from typing import Protocol

import numpy as np
from PIL import Image, ImageOps

# Formats that are tried, most frequent first: Pillow's others are either no
# photographs or start an external program (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SUFFIXES = frozenset(
  ".jpg .jpeg .jpe .jfif .png .webp .bmp .gif .tif .tiff .ppm .pgm".split()
)
DEFAULT_MAX_PIXELS = 64_000_000
DEFAULT_CROP_AREA = (0.08, 1.0)
DEFAULT_CROP_ASPECT = (3 / 4, 4 / 3)

# The limit is `max_pixels`, which is checked before anything is decoded; Pillow's own
# would only warn, and at another size.
Image.MAX_IMAGE_PIXELS = None

_ORIENTATION_TAG = 0x0112
_CROP_ATTEMPTS = 10

Box = tuple[int, int, int, int]


class BadImageError(Exception):
  """A record that cannot be used as an image; the message is the reason."""


class Draws(Protocol):
  """The two draws that a crop needs; `numpy.random.Generator` has both."""

  def uniform(self, low: float, high: float) -> float:
    """Returns a real number, uniform in [low, high)."""

  def integers(self, low: int, high: int) -> int:
    """Returns an integer, uniform in [low, high)."""


def open_image(encoded: bytes, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
  """Reads an image's header and checks that decoding it is safe.

  Args:
    encoded: the bytes of an image file in one of `FORMATS`.
    max_pixels: the largest width times height that is accepted, in pixels.

  Returns:
    An image whose pixels have not been decoded yet.

  Raises:
    BadImageError: the bytes are no image, or a larger one than `max_pixels`.
  """
  if not encoded:
    raise BadImageError("the file is empty")
  try:
    image = Image.open(io.BytesIO(encoded), formats=FORMATS)
  except Image.UnidentifiedImageError as error:
    raise BadImageError(f"no image in a known format ({', '.join(FORMATS)})") from error
  except Exception as error:
    raise BadImageError(f"damaged header: {error}") from error
  width, height = image.size
  if width * height > max_pixels:
    raise BadImageError(
      f"{width}x{height} pixels are more than dataset.max_pixels={max_pixels}"
    )
  return image


def decode(encoded: bytes, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
  """Decodes an image to 8-bit RGB, upright.

  Greyscale is repeated over the channels; 16-bit values keep their upper 8 bits;
  transparent pixels show white; of an animation the first frame is taken; an EXIF
  orientation is applied.

  Args:
    encoded: the bytes of an image file in one of `FORMATS`.
    max_pixels: the largest width times height that is accepted, in pixels.

  Returns:
    A loaded PIL image of mode "RGB".

  Raises:
    BadImageError: the bytes are no image, damaged, truncated or too large.
  """
  image = open_image(encoded, max_pixels)
  try:
    image.load()
    return _upright(_to_rgb(image))
  except BadImageError:
    raise
  except Exception as error:
    # Pillow's decoders raise many types on damaged data: OSError, SyntaxError,
    # ValueError, struct.error, ...
    raise BadImageError(f"damaged or truncated: {error}") from error


def check(encoded: bytes, max_pixels: int = DEFAULT_MAX_PIXELS) -> None:
  """Finds out whether `decode` will succeed, faster than by decoding.

  Args:
    encoded: the bytes of an image file.
    max_pixels: the largest width times height that is accepted, in pixels.

  Raises:
    BadImageError: as `decode`.
  """
  image = open_image(encoded, max_pixels)
  if image.format != "JPEG" or image.mode not in ("RGB", "L"):
    decode(encoded, max_pixels)
    return
  # An eighth of the size: all data are read, but only block means computed.
  image.draft(image.mode, (image.width // 8, image.height // 8))
  try:
    image.load()
  except Exception as error:
    raise BadImageError(f"damaged or truncated: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
  if image.mode == "RGB" and "transparency" not in image.info:
    return image
  if image.mode.startswith("I") or image.mode == "F":
    return _from_deep(image)
  if image.has_transparency_data:
    layer = image.convert("RGBA")
    ground = Image.new("RGBA", image.size, (255, 255, 255, 255))
    flat = Image.alpha_composite(ground, layer).convert("RGB")
    flat.info = dict(image.info)
    return flat
  return image.convert("RGB")


def _from_deep(image: Image.Image) -> Image.Image:
  values = np.asarray(image)
  if image.mode == "F":
    if not np.isfinite(values).all() or values.min() < 0:
      raise BadImageError("floating-point pixels below 0 or not finite")
    # Floating-point TIFFs hold either [0, 1] or 8-bit values.
    values = values * 255 if values.max() <= 1 else values
    grey = np.clip(np.rint(values), 0, 255).astype(np.uint8)
  else:
    # Pillow opens 16-bit greyscale as "I;16" or, from older files, as "I".
    grey = np.clip(values.astype(np.int64) >> 8, 0, 255).astype(np.uint8)
  return Image.fromarray(grey).convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
  # Reading the tag is cheap, but parsing EXIF of every image is not.
  if "exif" not in image.info and "Raw profile type exif" not in image.info:
    return image
  try:
    orientation = image.getexif().get(_ORIENTATION_TAG, 1)
  except Exception:
    # Damaged metadata leaves the pixels usable.
    return image
  return ImageOps.exif_transpose(image) if orientation in range(2, 9) else image


def random_crop_box(
  height: int,
  width: int,
  draws: Draws,
  area: tuple[float, float] = DEFAULT_CROP_AREA,
  aspect: tuple[float, float] = DEFAULT_CROP_ASPECT,
) -> Box:
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
  for _ in range(_CROP_ATTEMPTS):
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


def resized_crop(image: Image.Image, box: Box, size: int) -> np.ndarray:
  """Crops a box and resizes it to a square, bilinear with antialiasing.

  Args:
    image: of mode "RGB".
    box: (left, top, right, bottom) in pixels.
    size: side of the result, in pixels.

  Returns:
    uint8 [size, size, 3].
  """
  # Not resize(box=...): its filter would reach outside of the box.
  crop = image if box == (0, 0, *image.size) else image.crop(box)
  return np.asarray(crop.resize((size, size), Image.Resampling.BILINEAR))


def central_crop(image: Image.Image, size: int) -> np.ndarray:
  """Resizes the shorter side to `size` and cuts the central square.

  The result of torchvision's Resize(size) and CenterCrop(size) on PIL images; only
  the pixels that the square needs are computed.

  Args:
    image: of mode "RGB".
    size: side of the result, in pixels.

  Returns:
    uint8 [size, size, 3].
  """
  width, height = image.size
  if width <= height:
    new_width, new_height = size, int(size * height / width)
  else:
    new_width, new_height = int(size * width / height), size
  left, top = round((new_width - size) / 2.0), round((new_height - size) / 2.0)
  across, down = width / new_width, height / new_height
  box = (left * across, top * down, (left + size) * across, (top + size) * down)
  box = (box[0], box[1], min(box[2], width), min(box[3], height))
  resized = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
  return np.asarray(resized)
