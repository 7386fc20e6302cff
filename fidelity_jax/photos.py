"""Image files as what they are: all their bits, alpha, ICC profile and EXIF.

For commands that give a file back. Training and evaluation see 8-bit RGB, upright
(`data.images`); here pixels are as they are stored, and the orientation stays a tag.
"""

import dataclasses
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import tifffile
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

from fidelity_jax import locations
from fidelity_jax.data import images
from fidelity_jax.data.images import BadImageError
from fidelity_jax.errors import RunError, UsageError

# A header can claim any size; this takes 1.2 GB in 8 bits.
_MAX_PIXELS = 400_000_000

# The format that a file of this suffix is written in; others are written as PNG.
_FORMATS = {
  **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), "JPEG"),
  **dict.fromkeys((".tif", ".tiff"), "TIFF"),
  ".png": "PNG",
  ".webp": "WEBP",
}
_OPTIONS = {
  "JPEG": {"quality": 95, "subsampling": "4:4:4"},
  "PNG": {},
  # Compressed by libtiff, EXIF data would not fit in.
  "TIFF": {"compression": "raw"},
  "WEBP": {"lossless": True, "exact": True},
}
_EXIF_PREFIX = b"Exif\0\0"
# Tags of a TIFF that say how its pixels are stored, not what they show.
_STORAGE_TAGS = frozenset(
  [254, 255, 256, 257, 258, 259, 262, 263, 264, 265, 266, 273, 277, 278, 279, 280, 281]
  + [284, 288, 289, 290, 291, 292, 293, 297, 301, 317, 320, 321, 322, 323, 324, 325]
  + [330, 332, 334, 336, 338, 339, 340, 341, 342, 347, 512, 513, 514, 515, 517, 518]
  + [519, 520, 521, 529, 530, 531, 532, 34675]
)


@dataclasses.dataclass(frozen=True)
class Photo:
  """An image, and what else of its file is kept.

  Attributes:
    pixels: uint8 or uint16 [H, W, C], C = 1 (grey) or 3 (RGB), as stored: an EXIF
      orientation is not applied.
    alpha: [H, W], dtype of the pixels, or None.
    icc: the ICC profile, or None.
    exif: the EXIF data as in a JPEG, or None.
    frames: images in the file, of which this is the first.
  """

  pixels: np.ndarray
  alpha: np.ndarray | None = None
  icc: bytes | None = None
  exif: bytes | None = None
  frames: int = 1


class Found(NamedTuple):
  """An image file to work on.

  Attributes:
    path: the file.
    name: its path relative to what was asked for, with forward slashes.
  """

  path: Path
  name: str


def find(places: Iterable[str | Path], apart: Path | None = None) -> list[Found]:
  """Lists image files; what is named twice, such as by its folder too, once.

  Args:
    places: files; folders, searched recursively for files with an image's suffix,
      hidden ones left out; patterns such as "photos/**/*.png". A file's name is
      relative to its folder, to the part of the pattern before the first wildcard, or
      its own.
    apart: a folder to leave out.

  Raises:
    UsageError: a place is not there, or holds no images; a name cannot be shown.
    RunError: a folder cannot be read.
  """
  found = {}
  for place in places:
    path = locations.expand(place)
    if path.is_dir():
      here = _below(path, apart)
    elif os.path.lexists(path):
      here = [Found(path, path.name)]
    else:
      here = _matching(path, apart)
    if not here:
      there = "no images in it" if path.is_dir() else "no such file"
      raise UsageError(f"{path}: {there}; name image files or folders of images")
    for one in here:
      if not one.name.isprintable():
        raise UsageError(f"{str(one.path)!r}: a name that cannot be shown; rename it")
      # A link of another name is an image of its own.
      found.setdefault((os.path.realpath(one.path), one.name), one)
  return list(found.values())


def _is_image(path: Path) -> bool:
  return path.suffix.lower() in images.SUFFIXES and not path.name.startswith(".")


def _below(root: Path, apart: Path | None) -> list[Found]:
  found = []
  for folder, inner, names in os.walk(root, onerror=_unreadable):
    inner[:] = sorted(
      name
      for name in inner
      if not name.startswith(".")
      and (apart is None or not _same(Path(folder, name), apart))
    )
    paths = [Path(folder, name) for name in sorted(names)]
    found += [
      Found(path, path.relative_to(root).as_posix())
      for path in paths
      if _is_image(path)
    ]
  return found


def _unreadable(error: OSError) -> None:
  raise RunError(
    f"{error.filename} cannot be read ({error.strerror}): change its permissions, or "
    "name other folders"
  ) from error


def _same(a: Path, b: Path) -> bool:
  return a.exists() and b.exists() and a.samefile(b)


def _matching(pattern: Path, apart: Path | None) -> list[Found]:
  wild = [i for i, part in enumerate(pattern.parts) if set("*?[") & set(part)]
  if not wild:
    return []
  root = Path(*pattern.parts[: wild[0]])
  found = []
  for path in sorted(root.glob(str(Path(*pattern.parts[wild[0] :])))):
    name = path.relative_to(root)
    hidden = any(part.startswith(".") for part in name.parts)
    left_out = apart is not None and apart.resolve() in path.resolve().parents
    if _is_image(path) and path.is_file() and not hidden and not left_out:
      found.append(Found(path, name.as_posix()))
  return found


def written_suffix(suffix: str) -> str:
  """Returns the suffix that a file of this suffix is written with.

  JPEG, PNG, TIFF and WebP keep theirs; all others become ".png".
  """
  return suffix if suffix.lower() in _FORMATS else ".png"


def decode(encoded: bytes) -> Photo:
  """Decodes an image file.

  Palettes become the colours that they stand for, black and white pixels 8-bit grey,
  and a transparent colour alpha; of a TIFF's channels those without a meaning are left
  out. Pixels that are floating-point, 32-bit, CMYK or Lab are refused: they have no 8-
  or 16-bit grey or RGB value. So are 16-bit TIFFs whose channels are multiplied by
  alpha, or that are grey with alpha.

  Args:
    encoded: the content of a file in one of `data.images.FORMATS`.

  Raises:
    BadImageError: the bytes are no image, damaged, too large, or refused.
  """
  image = _opened(encoded)
  width, height = image.size
  if width * height > _MAX_PIXELS:
    raise BadImageError(f"{width}x{height} pixels are more than {_MAX_PIXELS}")
  try:
    frames = getattr(image, "n_frames", 1)
    # Pillow reads an orientation out of it.
    image.info.pop("xmp", None)
    exif = None
    if image.format == "TIFF":
      exif = _exif(image)
      if ExifTags.Base.Orientation in image.tag_v2:
        encoded = _unturned(encoded)
        image = images.opened(encoded)
    deep = _is_deep(image, encoded)
    # Pillow finds damage that OpenCV overlooks.
    image.load()
    pixels = _deep_pixels(image, encoded) if deep else _pixels(image)
  except (BadImageError, MemoryError):
    raise
  except Exception as error:
    # Pillow's decoders raise many types on damaged data.
    raise BadImageError(f"damaged or truncated: {error}") from error
  colour, alpha = pixels, None
  if pixels.shape[-1] in (2, 4):
    colour, alpha = pixels[..., :-1], pixels[..., -1]
  # Other formats may have them behind the pixels.
  exif = exif or _exif(image)
  return Photo(colour, alpha, image.info.get("icc_profile") or None, exif, frames)


def _opened(encoded: bytes) -> Image.Image:
  """Reads the header; tells TIFFs that Pillow does not know from other files."""
  try:
    return images.opened(encoded)
  except BadImageError as error:
    unknown = isinstance(error.__cause__, UnidentifiedImageError)
    if unknown and encoded.startswith((b"II*\0", b"MM\0*")):
      raise BadImageError(
        "a TIFF that is damaged or of a kind that is not read, such as 16-bit grey "
        "with alpha: convert it to PNG"
      ) from error
    raise


def _unturned(encoded: bytes) -> bytes:
  """Returns a TIFF without orientation, by which Pillow would turn its pixels."""
  buffer = io.BytesIO(encoded)
  with tifffile.TiffFile(buffer) as file:
    file.pages[0].tags["Orientation"].overwrite(1)
    return buffer.getvalue()


def _is_deep(image: Image.Image, encoded: bytes) -> bool:
  """Returns whether the file has 16 bits a channel, of which Pillow may drop 8."""
  if image.format == "PNG":
    # The header is the first chunk.
    return encoded[24] == 16
  if image.format == "TIFF":
    return max(image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (1,))) == 16
  if image.format == "PPM":
    args = image.tile[0].args
    largest = args[-1] if isinstance(args, tuple) else 255
    if image.mode == "RGB" and 255 < largest < 65535:
      raise BadImageError(f"colours with a largest value of {largest}: convert it")
    return image.mode == "I" or largest > 255
  return False


def _deep_pixels(image: Image.Image, encoded: bytes) -> np.ndarray:
  """Returns uint16 [H, W, 1 to 4]: grey or RGB, and alpha where there is any."""
  if image.mode not in ("I", "I;16", "I;16B", "L", "LA", "RGB", "RGBA", "RGBX"):
    raise BadImageError(f"16-bit pixels of the kind {image.mode}: convert it to RGB")
  tags = image.tag_v2 if image.format == "TIFF" else {}
  if image.mode.startswith("I"):
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
      raise BadImageError("pixels that are not from 0 to 65535")
    values = values.astype(np.uint16)[..., None]
    if (clear := image.info.get("transparency")) is not None:
      # Of colours, OpenCV makes alpha.
      alpha = np.where(values == clear, np.uint16(0), np.uint16(65535))
      return np.concatenate([values, alpha], -1)
    # 0 is white; of 8-bit pixels Pillow knows.
    inverted = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    return 65535 - values if inverted else values
  if tags.get(TiffImagePlugin.PLANAR_CONFIGURATION) == 2:
    # OpenCV would mix them up.
    raise BadImageError("16-bit channels that are not interleaved: convert it")
  if tifffile.EXTRASAMPLE.ASSOCALPHA in tags.get(TiffImagePlugin.EXTRASAMPLES, ()):
    # Divided, they would not come back as they were.
    raise BadImageError(
      "16-bit channels that are multiplied by alpha (associated alpha): convert it to "
      "unassociated alpha"
    )
  pixels = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_UNCHANGED)
  size = (image.height, image.width)
  if pixels is None or pixels.dtype != np.uint16 or pixels.shape[:2] != size:
    raise BadImageError("16-bit pixels that cannot be read: convert it to 16-bit PNG")
  if pixels.ndim == 2:
    return pixels[..., None]
  if image.mode == "LA":
    return pixels[..., [0, -1]]
  if image.format == "TIFF" and image.mode != "RGBA":
    # A fourth channel is not said to be alpha.
    pixels = pixels[..., :3]
  return pixels[..., [2, 1, 0, 3][: pixels.shape[-1]]]


def _pixels(image: Image.Image) -> np.ndarray:
  """Returns uint8 [H, W, 1 to 4]."""
  if image.mode in ("P", "PA") or "transparency" in image.info:
    grey = image.mode == "L"
    clear = image.has_transparency_data
    image = image.convert("LA" if grey else "RGBA" if clear else "RGB")
  elif image.mode in ("1", "RGBX", "YCbCr"):
    image = image.convert("L" if image.mode == "1" else "RGB")
  if image.mode not in ("L", "LA", "RGB", "RGBA"):
    raise BadImageError(
      f"pixels of the kind {image.mode}: convert it to 8- or 16-bit grey or RGB"
    )
  return np.atleast_3d(np.asarray(image))


def _exif(image: Image.Image) -> bytes | None:
  """Returns EXIF data in the form that a JPEG has them in, None if there are none."""
  try:
    if "exif" in image.info:
      return _EXIF_PREFIX + image.info["exif"].removeprefix(_EXIF_PREFIX)
    found = image.getexif()
    # A TIFF's own tags are among them.
    for tag in _STORAGE_TAGS & set(found):
      del found[tag]
    for place in {ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo} & set(found):
      found.get_ifd(place)
    return found.tobytes() if found else None
  except MemoryError:
    raise
  except Exception:
    # Damaged metadata leaves the pixels usable.
    return None


def encode(photo: Photo, suffix: str) -> bytes:
  """Returns the content of an image file.

  Args:
    photo: the image.
    suffix: one that `written_suffix` returns. JPEGs are written with quality 95 and
      full colour resolution, all others without loss.

  Raises:
    BadImageError: the format cannot hold the image.
  """
  kind = _FORMATS[suffix.lower()]
  deep = photo.pixels.dtype == np.uint16
  if kind == "JPEG" and (deep or photo.alpha is not None):
    what = "16-bit pixels" if deep else "alpha channel"
    raise BadImageError(f"JPEG has no {what}: rename it to what it is, such as .png")
  if kind == "WEBP" and deep:
    raise BadImageError("WebP has no 16-bit pixels: rename it to what it is")
  pixels = photo.pixels
  if photo.alpha is not None:
    pixels = np.concatenate([pixels, photo.alpha[..., None]], -1)
  try:
    if deep and pixels.shape[-1] > 1:
      if pixels.shape[-1] == 2:
        # 16-bit grey with alpha can hardly be read again anywhere.
        pixels = pixels[..., [0, 0, 0, 1]]
      return (_deep_tiff if kind == "TIFF" else _deep_png)(photo, pixels)
    buffer = io.BytesIO()
    squeezed = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    metadata = {"icc_profile": photo.icc, "exif": photo.exif}
    metadata = {name: value for name, value in metadata.items() if value}
    image = Image.fromarray(np.ascontiguousarray(squeezed))
    image.save(buffer, kind, **_OPTIONS[kind], **metadata)
  except MemoryError:
    raise
  except Exception as error:
    # For metadata that do not fit, Pillow's encoders raise many types.
    raise BadImageError(f"cannot be written as {kind}: {error}") from error
  return buffer.getvalue()


def _deep_png(photo: Photo, pixels: np.ndarray) -> bytes:
  """Returns 16-bit RGB or RGBA as PNG, which Pillow cannot write."""
  pixels = pixels[..., [2, 1, 0, 3][: pixels.shape[-1]]]
  metadata = {
    cv2.IMAGE_METADATA_EXIF: photo.exif and photo.exif.removeprefix(_EXIF_PREFIX),
    cv2.IMAGE_METADATA_ICCP: photo.icc,
  }
  metadata = {k: np.frombuffer(v, np.uint8) for k, v in metadata.items() if v}
  done, encoded = cv2.imencodeWithMetadata(
    ".png", np.ascontiguousarray(pixels), list(metadata), list(metadata.values())
  )
  if not done:
    raise OSError("OpenCV gives no reason")
  return encoded.tobytes()


def _deep_tiff(photo: Photo, pixels: np.ndarray) -> bytes:
  """Returns 16-bit RGB or RGBA as TIFF, which Pillow cannot write."""
  height, width, channels = pixels.shape
  exif = Image.Exif()
  exif.load(photo.exif)
  exif[TiffImagePlugin.SAMPLESPERPIXEL] = channels
  if photo.alpha is not None:
    exif[TiffImagePlugin.EXTRASAMPLES] = tifffile.EXTRASAMPLE.UNASSALPHA
  # Pillow writes it, with all tags, as grey pixels side by side; tifffile then says
  # what they are.
  buffer = io.BytesIO()
  grey = Image.fromarray(pixels.reshape(height, width * channels))
  grey.save(buffer, "TIFF", exif=exif, icc_profile=photo.icc)
  buffer.seek(0)
  with tifffile.TiffFile(buffer) as file:
    tags = file.pages[0].tags
    tags["ImageWidth"].overwrite(width)
    tags["BitsPerSample"].overwrite((16,) * channels)
    tags["PhotometricInterpretation"].overwrite(tifffile.PHOTOMETRIC.RGB)
    return buffer.getvalue()
