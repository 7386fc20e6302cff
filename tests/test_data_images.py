"""Decoding, cropping and resizing: parity with torchvision, and bad images."""

import io
import pathlib

import numpy as np
import pytest
from PIL import Image

from fidelity_jax.data import crops, images

CALTECH101 = pathlib.Path(__file__).parents[2] / "shared" / "caltech101"


def photograph(height=200, width=300, seed=0):
  """Returns uint8 [height, width, 3], smooth shapes with some noise."""
  rng = np.random.default_rng(seed)
  y, x = np.mgrid[:height, :width] / 40.0
  waves = np.stack([np.sin(x + y), np.cos(x - 2 * y), np.sin(3 * x) * np.cos(y)], -1)
  noisy = 128 + 90 * waves + rng.normal(0, 12, (height, width, 3))
  return np.clip(noisy, 0, 255).astype(np.uint8)


def encoded(image, **kwargs):
  """Returns the bytes of a saved PIL image or array."""
  image = image if isinstance(image, Image.Image) else Image.fromarray(image)
  buffer = io.BytesIO()
  image.save(buffer, **{"format": "PNG", **kwargs})
  return buffer.getvalue()


@pytest.fixture(scope="module")
def transforms():
  """Returns torchvision.transforms."""
  import torch_reference

  return torch_reference.torchvision().transforms


def samples():
  """Returns encoded images: real photographs where there are any, else made ones."""
  paths = sorted(CALTECH101.glob("*/*.jpg"))[::160]
  made = [encoded(photograph(h, w), format="JPEG") for h, w in ((31, 500), (400, 17))]
  return made + [path.read_bytes() for path in paths]


class TorchDraws:
  """Draws what torchvision's RandomResizedCrop would draw next."""

  def uniform(self, low, high):
    import torch

    return torch.empty(1).uniform_(low, high).item()

  def integers(self, low, high):
    import torch

    return torch.randint(low, high, (1,)).item()


def test_decoding_gives_pillows_pixels():
  for record in samples():
    expected = np.asarray(Image.open(io.BytesIO(record)).convert("RGB"))
    np.testing.assert_array_equal(images.decode(record), expected)


@pytest.mark.parametrize("size", [224, 64])
def test_training_crop_has_torchvisions_box_and_pixels(transforms, size):
  import torch

  for number, record in enumerate(samples()):
    image = Image.open(io.BytesIO(record)).convert("RGB")
    torch.manual_seed(number)
    top, left, height, width = transforms.RandomResizedCrop.get_params(
      image, crops.DEFAULT_AREA, crops.DEFAULT_ASPECT
    )
    torch.manual_seed(number)
    box = crops.random_box(image.height, image.width, TorchDraws())
    assert box == (left, top, left + width, top + height)
    torch.manual_seed(number)
    expected = np.asarray(transforms.RandomResizedCrop(size)(image))
    actual = np.empty((size, size, 3), np.uint8)
    crops.resized(images.decode(record), box, actual)
    assert np.abs(actual.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("size", [500, 224, 64, 33])
def test_evaluation_crop_has_torchvisions_pixels(transforms, size):
  both = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size)])
  for record in samples():
    expected = np.asarray(both(Image.open(io.BytesIO(record)).convert("RGB")))
    actual = np.empty((size, size, 3), np.uint8)
    crops.central(images.decode(record), actual)
    assert np.abs(actual.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("shape", [(10, 200), (200, 10), (100, 100)])
def test_crop_falls_back_to_torchvisions_central_box(transforms, shape):
  height, width = shape
  image = Image.new("RGB", (width, height))
  # Nine times the area never fits.
  top, left, h, w = transforms.RandomResizedCrop.get_params(
    image, [9.0, 9.0], crops.DEFAULT_ASPECT
  )
  box = crops.random_box(height, width, TorchDraws(), area=(9.0, 9.0))
  assert box == (left, top, left + w, top + h)


def test_reduced_decoding_is_close_to_the_full_one():
  record = encoded(photograph(480, 640), format="JPEG", quality=95)
  picture = images.Picture(record)
  assert picture.pixels((100, 100)).shape == (120, 160, 3)
  assert picture.pixels((300, 300)).shape == (480, 640, 3)
  box = (101, 50, 601, 430)
  full, reduced = np.empty((2, 64, 64, 3), np.uint8)
  crops.resized(images.decode(record), box, full)
  crops.reduced(images.Picture(record), box, reduced)
  assert np.abs(full.astype(int) - reduced).mean() < 3


def test_greyscale_is_repeated():
  grey = photograph()[..., 0]
  for kwargs in ({"format": "PNG"}, {"format": "JPEG", "quality": 100}):
    decoded = images.decode(encoded(grey, **kwargs))
    assert decoded.shape == (200, 300, 3)
    assert np.abs(decoded.astype(int) - grey[..., None]).max() <= 2


def test_palette_is_expanded():
  image = Image.fromarray(photograph()).quantize(64)
  expected = np.asarray(image.convert("RGB"))
  np.testing.assert_array_equal(images.decode(encoded(image)), expected)
  # One of its colours may be transparent: white, too.
  chosen = np.asarray(image) == 7
  assert chosen.any()
  decoded = images.decode(encoded(image, transparency=7))
  np.testing.assert_array_equal(decoded, np.where(chosen[..., None], 255, expected))


def test_16_bit_values_keep_their_upper_byte():
  deep = np.linspace(0, 65535, 60 * 50).reshape(60, 50).astype(np.uint16)
  decoded = images.decode(encoded(deep))
  np.testing.assert_array_equal(decoded[..., 0], deep >> 8)
  decoded = images.decode(encoded(deep, format="TIFF"))
  np.testing.assert_array_equal(decoded[..., 2], deep >> 8)


def test_16_bit_colours_keep_their_upper_byte():
  import cv2

  deep = np.random.default_rng(0).integers(0, 2**16, (20, 30, 3)).astype(np.uint16)
  _, png = cv2.imencode(".png", deep[..., ::-1])
  np.testing.assert_array_equal(images.decode(png.tobytes()), deep >> 8)


def test_transparent_pixels_show_white():
  pixels = np.dstack([photograph(), np.full((200, 300), 255, np.uint8)])
  pixels[:100, :, 3] = 0
  decoded = images.decode(encoded(pixels))
  assert (decoded[:100] == 255).all()
  np.testing.assert_array_equal(decoded[100:], pixels[100:, :, :3])
  grey = np.dstack([pixels[..., 0], pixels[..., 3]])
  assert (images.decode(encoded(Image.fromarray(grey, "LA")))[:100] == 255).all()


def test_cmyk_becomes_rgb():
  image = Image.fromarray(photograph())
  for source in (image, image.convert("L").convert("RGB")):
    cmyk = encoded(source.convert("CMYK"), format="JPEG", quality=95)
    difference = images.decode(cmyk).astype(int) - np.asarray(source)
    assert np.abs(difference).mean() < 6


# What turns an image with each EXIF orientation upright.
UPRIGHT = {
  1: lambda x: x,
  2: lambda x: x[:, ::-1],
  3: lambda x: x[::-1, ::-1],
  4: lambda x: x[::-1],
  5: lambda x: x.swapaxes(0, 1),
  6: lambda x: np.rot90(x, k=-1),
  7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
  8: np.rot90,
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_exif_orientation_is_applied(format, orientation):
  pixels = photograph()
  exif = Image.Exif()
  exif[0x0112] = orientation
  record = encoded(pixels, format=format, exif=exif)
  upright = UPRIGHT[orientation](images.decode(encoded(pixels, format=format)))
  np.testing.assert_array_equal(images.decode(record), upright)
  # The header alone gives the upright size: the crop is drawn from it.
  picture = images.Picture(record)
  assert (picture.height, picture.width) == upright.shape[:2]


def test_the_first_frame_of_an_animation_is_taken():
  frames = [Image.new("RGB", (20, 10), color) for color in ("red", "blue")]
  for format in ("GIF", "WEBP"):
    options = {"lossless": True} if format == "WEBP" else {}
    record = encoded(
      frames[0], format=format, save_all=True, append_images=frames[1:], **options
    )
    decoded = images.decode(record)
    assert decoded.shape == (10, 20, 3)
    assert tuple(decoded[5, 5]) == (255, 0, 0)


def bad_images():
  """Returns (name, bytes, words of the reason)."""
  jpeg = encoded(photograph(), format="JPEG")
  png = encoded(photograph())
  return [
    ("truncated JPEG", jpeg[: len(jpeg) // 2], "truncated"),
    ("truncated PNG", png[: len(png) // 2], "truncated"),
    ("JPEG header only", jpeg[:100], "damaged"),
    ("zero bytes", b"", "empty"),
    ("text", b"this is a letter, not a picture", "no image"),
    ("JPEG magic, then text", b"\xff\xd8\xff" + b"nonsense " * 40, "damaged|no image"),
    ("PostScript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image"),
    ("PNG checksum", png[:60] + b"\0\0\0\0" + png[64:], "damaged|no image"),
  ]


@pytest.mark.parametrize("name,record,reason", bad_images())
def test_bad_images_are_refused_with_a_reason(name, record, reason):
  del name
  for use in (images.decode, images.check):
    with pytest.raises(images.BadImageError, match=reason) as caught:
      use(record)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_decompression_bombs_are_refused_before_decoding(format):
  bomb = encoded(Image.new("L", (5000, 4000)), format=format)
  assert len(bomb) < 400_000
  for use in (images.decode, images.check):
    with pytest.raises(images.BadImageError, match="5000x4000 pixels are more than"):
      use(bomb, max_pixels=10_000_000)
  assert images.decode(bomb, max_pixels=20_000_000).shape == (4000, 5000, 3)


def test_check_accepts_what_decode_accepts():
  for record in samples():
    images.check(record)
