"""From an encoded record to upright uint8 RGB pixels.

Ordinary JPEGs are decoded by simplejpeg, whose pixels equal Pillow's; all other images,
and JPEGs that it finds fault with, by Pillow.
"""

import io
import re

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

# Formats that are tried, most frequent first: Pillow's others are either no
# photographs or start an external program (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SUFFIXES = frozenset(
  ".jpg .jpeg .jpe .jfif .png .webp .bmp .gif .tif .tiff .ppm .pgm".split()
)
DEFAULT_MAX_PIXELS = 64_000_000

# The limit is `max_pixels`, which is checked before anything is decoded; Pillow's own
# would only warn, and at another size.
Image.MAX_IMAGE_PIXELS = None

_ORIENTATION_TAG = 0x0112
_EXIF = re.compile(b"Exif\\0\\0")
# The EXIF segment comes before the image data, mostly first.
_EXIF_WITHIN = 1 << 16


class BadImageError(Exception):
  """A record that cannot be used as an image; the message is the reason."""


class Picture:
  """An image whose size is known and whose pixels are decoded on demand.

  Attributes:
    height: upright, in pixels.
    width: upright, in pixels.
  """

  def __init__(self, record: bytes | np.ndarray, max_pixels: int = DEFAULT_MAX_PIXELS):
    """Reads the header.

    Args:
      record: the bytes of an image file in one of `FORMATS`, or uint8 [H, W, 3].
      max_pixels: the largest width times height that is accepted, in pixels.

    Raises:
      BadImageError: the bytes are no image, damaged, or a larger one.
    """
    self._encoded = None
    self._max_pixels = max_pixels
    if isinstance(record, np.ndarray):
      self._pixels = record
      self.height, self.width = record.shape[:2]
      return
    size = _plain_jpeg_size(record)
    if size is None:
      self._pixels = _decode_any(record, max_pixels)
      self.height, self.width = self._pixels.shape[:2]
      return
    self._encoded, self._pixels = record, None
    self.height, self.width = size
    _check_size(self.width, self.height, max_pixels)

  def pixels(self, least: tuple[int, int] = (0, 0)) -> np.ndarray:
    """Decodes.

    Args:
      least: (height, width) that suffice: a JPEG may be decoded at 1/2, 1/4 or 1/8 of
        its size if it stays at least that large. (0, 0): the full size.

    Returns:
      uint8 [H, W, 3]; do not modify. Greyscale is repeated over the channels; 16-bit
      values keep their upper 8 bits; transparent pixels show white; of an animation
      the first frame is taken; an EXIF orientation is applied.

    Raises:
      BadImageError: the record is damaged or truncated.
    """
    if self._pixels is not None:
      return self._pixels
    try:
      if least == (0, 0):
        return simplejpeg.decode_jpeg(self._encoded)
      return simplejpeg.decode_jpeg(
        self._encoded, min_height=least[0], min_width=least[1], min_factor=2
      )
    except ValueError:
      # Damaged: Pillow decides whether it can be used.
      return _decode_any(self._encoded, self._max_pixels)


def decode(
  record: bytes | np.ndarray, max_pixels: int = DEFAULT_MAX_PIXELS
) -> np.ndarray:
  """Decodes an image at its full size; see `Picture`.

  Args:
    record: the bytes of an image file in one of `FORMATS`, or uint8 [H, W, 3].
    max_pixels: the largest width times height that is accepted, in pixels.

  Returns:
    uint8 [H, W, 3]; do not modify.

  Raises:
    BadImageError: the bytes are no image, damaged, truncated or too large.
  """
  return Picture(record, max_pixels).pixels()


def check(encoded: bytes, max_pixels: int = DEFAULT_MAX_PIXELS) -> None:
  """Finds out whether `decode` will succeed, faster than by decoding.

  Args:
    encoded: the bytes of an image file.
    max_pixels: the largest width times height that is accepted, in pixels.

  Raises:
    BadImageError: as `decode`.
  """
  # An eighth of the size: all data are read, but only block means computed.
  Picture(encoded, max_pixels).pixels(least=(1, 1))


def _plain_jpeg_size(encoded: bytes) -> tuple[int, int] | None:
  """Returns (height, width) of a JPEG that needs nothing but decoding, else None."""
  if encoded[:2] != b"\xff\xd8":
    return None
  try:
    height, width, colorspace, _ = simplejpeg.decode_jpeg_header(encoded)
  except ValueError:
    return None
  if colorspace not in ("YCbCr", "Gray", "RGB"):
    return None
  if _EXIF.search(encoded, 0, _EXIF_WITHIN) and _orientation(encoded) != 1:
    return None
  return height, width


def _orientation(encoded: bytes) -> int:
  try:
    image = Image.open(io.BytesIO(encoded), formats=("JPEG",))
    return image.getexif().get(_ORIENTATION_TAG, 1)
  except Exception:
    # Damaged metadata leaves the pixels usable.
    return 1


def _check_size(width: int, height: int, max_pixels: int) -> None:
  if width * height > max_pixels:
    raise BadImageError(
      f"{width}x{height} pixels are more than dataset.max_pixels={max_pixels}"
    )


def opened(encoded: bytes) -> Image.Image:
  """Reads the header of an image in one of `FORMATS`; pixels are not yet decoded.

  Raises:
    BadImageError: the bytes are no image, or their header is damaged.
  """
  if not encoded:
    raise BadImageError("the file is empty")
  try:
    return Image.open(io.BytesIO(encoded), formats=FORMATS)
  except Image.UnidentifiedImageError as error:
    raise BadImageError(f"no image in a known format ({', '.join(FORMATS)})") from error
  except MemoryError:
    raise
  except Exception as error:
    raise BadImageError(f"damaged header: {error}") from error


def _decode_any(encoded: bytes, max_pixels: int) -> np.ndarray:
  image = opened(encoded)
  _check_size(*image.size, max_pixels)
  try:
    image.load()
    return from_pillow(image)
  except (BadImageError, MemoryError):
    raise
  except Exception as error:
    # On damaged data Pillow's decoders raise many types: OSError, SyntaxError,
    # ValueError, struct.error, ...
    raise BadImageError(f"damaged or truncated: {error}") from error


def from_pillow(image: Image.Image) -> np.ndarray:
  """Returns an opened image's pixels, uint8 [H, W, 3], as `Picture.pixels` does.

  Raises:
    BadImageError: its pixels are floating-point numbers that are none of an image.
  """
  return np.asarray(_upright(_to_rgb(image)))


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
