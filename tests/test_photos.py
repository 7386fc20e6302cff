"""Image files come back with their bits, alpha, ICC profile and EXIF."""

import io
import pathlib
import tempfile
import zlib

import cv2
import numpy as np
import pytest
import skimage.data
import tifffile
from conftest import without_privileges
from PIL import Image, ImageCms

from fidelity_jax import photos
from fidelity_jax.errors import RunError, UsageError

ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def _exif() -> Image.Exif:
  exif = Image.Exif()
  exif[0x010F], exif[0x0112], exif[0x011A] = "Maker", 6, 72.0
  exif.get_ifd(0x8769).update({0x9003: "2020:01:02 03:04:05", 0x829A: 0.01})
  exif.get_ifd(0x8825).update({1: "N", 2: (46.0, 31.0, 12.5)})
  return exif


def _meant(exif: bytes) -> dict:
  """Returns what EXIF data say, however they are laid out."""
  read = Image.Exif()
  read.load(exif)
  inner = {place: dict(read.get_ifd(place)) for place in (0x8769, 0x8825)}
  return {tag: value for tag, value in read.items() if tag not in inner} | inner


def _pixels(channels: int, dtype: type) -> np.ndarray:
  """A photograph, 45x60; in 16 bits with lower bits that matter."""
  photograph = skimage.data.astronaut()[100:145, 150:210, :3]
  alpha = np.tile(np.linspace(0, 255, 60).astype(np.uint8)[:, None], (45, 1, 1))
  pixels = np.concatenate([photograph, alpha], -1)
  pixels = pixels[..., {1: [0], 2: [0, 3], 3: [0, 1, 2], 4: [0, 1, 2, 3]}[channels]]
  if dtype == np.uint16:
    low = np.random.default_rng(0).integers(0, 256, pixels.shape, np.uint16)
    return pixels.astype(np.uint16) * 256 + low
  return pixels


def _photo(channels: int, dtype: type = np.uint8) -> photos.Photo:
  pixels = _pixels(channels, dtype)
  alpha = pixels[..., -1] if channels in (2, 4) else None
  colour = pixels[..., : 1 if channels < 3 else 3]
  return photos.Photo(colour, alpha, ICC, _exif().tobytes())


def _same(a: photos.Photo, b: photos.Photo) -> None:
  np.testing.assert_array_equal(a.pixels, b.pixels)
  assert a.pixels.dtype == b.pixels.dtype
  assert (a.alpha is None) == (b.alpha is None)
  if a.alpha is not None:
    np.testing.assert_array_equal(a.alpha, b.alpha)
    assert a.alpha.dtype == b.alpha.dtype
  assert a.icc == b.icc
  assert (a.exif and _meant(a.exif)) == (b.exif and _meant(b.exif))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("suffix", [".png", ".tif", ".TIFF"])
def test_everything_comes_back(suffix, channels, dtype):
  photo = _photo(channels, dtype)
  read = photos.decode(photos.encode(photo, suffix))
  if channels == 2 and dtype == np.uint16:
    # Written in colour, as hardly any program reads it.
    np.testing.assert_array_equal(read.pixels, np.repeat(photo.pixels, 3, -1))
    np.testing.assert_array_equal(read.alpha, photo.alpha)
  else:
    _same(read, photo)
  assert _meant(read.exif)[0x0112] == 6 and _meant(read.exif)[0x8825][1] == "N"


@pytest.mark.parametrize("channels", [3, 4])
def test_webp_is_without_loss(channels):
  photo = _photo(channels)
  _same(photos.decode(photos.encode(photo, ".webp")), photo)


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_nearly_so(channels):
  photo = _photo(channels)
  read = photos.decode(photos.encode(photo, ".JPG"))
  assert read.pixels.shape == photo.pixels.shape
  assert np.abs(read.pixels.astype(int) - photo.pixels).mean() < 2
  assert (read.icc, _meant(read.exif)) == (ICC, _meant(photo.exif))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_other_programs_read_16_bit_files(channels):
  photo = _photo(channels, np.uint16)
  expected = _pixels(channels, np.uint16)
  tiff = tifffile.imread(io.BytesIO(photos.encode(photo, ".tif")))
  np.testing.assert_array_equal(np.atleast_3d(tiff), expected)
  png = np.frombuffer(photos.encode(photo, ".png"), np.uint8)
  png = np.atleast_3d(cv2.imdecode(png, cv2.IMREAD_UNCHANGED))
  np.testing.assert_array_equal(
    png[..., {1: [0], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[channels]], expected
  )


def _saved(image: Image.Image, kind: str, **options) -> bytes:
  buffer = io.BytesIO()
  image.save(buffer, kind, **options)
  return buffer.getvalue()


@pytest.mark.parametrize("channels", [1, 3])
def test_compressed_and_turned_tiffs_of_others(channels):
  """Pixels are as they are stored, and the orientation stays."""
  for dtype in (np.uint8, np.uint16):
    pixels = _pixels(channels, dtype)
    buffer = io.BytesIO()
    tifffile.imwrite(
      buffer,
      pixels if channels == 3 else pixels[..., 0],
      photometric="rgb" if channels == 3 else "minisblack",
      compression="zlib",
      predictor=True,
      byteorder=">",
      extratags=[(274, 3, 1, 8, True)],
    )
    read = photos.decode(buffer.getvalue())
    np.testing.assert_array_equal(read.pixels, pixels)
    assert _meant(read.exif)[0x0112] == 8
    again = photos.decode(photos.encode(read, ".tif"))
    _same(again, read)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_white_that_is_zero(dtype):
  pixels = _pixels(1, dtype)[..., 0]
  buffer = io.BytesIO()
  tifffile.imwrite(buffer, np.iinfo(dtype).max - pixels, photometric="miniswhite")
  read = photos.decode(buffer.getvalue())
  np.testing.assert_array_equal(read.pixels[..., 0], pixels)
  _same(photos.decode(photos.encode(read, ".tif")), read)


def test_other_tags_of_a_tiff():
  """Where a satellite image lies, for one."""
  tags = [(33550, 12, 3, (1.0, 1.0, 0.0), True), (34737, 2, 0, "WGS 84|", True)]
  for channels, dtype in ((3, np.uint8), (3, np.uint16), (1, np.uint16)):
    pixels = _pixels(channels, dtype)
    kind = "rgb" if channels == 3 else "minisblack"
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels.squeeze(), photometric=kind, extratags=tags)
    encoded = photos.encode(photos.decode(buffer.getvalue()), ".tif")
    with tifffile.TiffFile(io.BytesIO(encoded)) as file:
      found = file.pages[0].tags
      assert (found[33550].value, found[34737].value) == (tags[0][3], "WGS 84|")
      assert 34665 not in found


def test_channels_one_after_the_other():
  for dtype in (np.uint8, np.uint16):
    pixels = np.moveaxis(_pixels(3, dtype), -1, 0)
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, photometric="rgb", planarconfig="separate")
    if dtype == np.uint16:
      with pytest.raises(photos.BadImageError, match="not interleaved"):
        photos.decode(buffer.getvalue())
    else:
      read = photos.decode(buffer.getvalue())
      np.testing.assert_array_equal(np.moveaxis(read.pixels, -1, 0), pixels)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF"])
def test_palettes_become_their_colours(kind):
  image = Image.fromarray(_pixels(3, np.uint8)).quantize(64)
  read = photos.decode(_saved(image, kind))
  np.testing.assert_array_equal(read.pixels, np.asarray(image.convert("RGB")))
  assert read.alpha is None


def test_transparent_colours_become_alpha():
  grey = _pixels(1, np.uint8)[..., 0]
  read = photos.decode(
    _saved(Image.fromarray(grey), "PNG", transparency=int(grey[0, 0]))
  )
  np.testing.assert_array_equal(read.pixels[..., 0], grey)
  np.testing.assert_array_equal(read.alpha, np.where(grey == grey[0, 0], 0, 255))
  image = Image.fromarray(_pixels(3, np.uint8)).quantize(16)
  read = photos.decode(_saved(image, "PNG", transparency=3))
  np.testing.assert_array_equal(read.alpha == 0, np.asarray(image) == 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_transparent_colour_of_16_bits_becomes_alpha(channels):
  pixels = _pixels(channels, np.uint16)
  clear = pixels[0, 0].astype(">u2").tobytes()
  plain = photos.encode(photos.Photo(pixels), ".png")
  at = plain.index(b"IDAT") - 4
  chunk = len(clear).to_bytes(4, "big") + b"tRNS" + clear
  chunk += zlib.crc32(chunk[4:]).to_bytes(4, "big")
  read = photos.decode(plain[:at] + chunk + plain[at:])
  np.testing.assert_array_equal(read.pixels, pixels)
  expected = np.where((pixels == pixels[0, 0]).all(-1), 0, 65535)
  np.testing.assert_array_equal(read.alpha, expected)
  again = photos.decode(photos.encode(read, ".png"))
  np.testing.assert_array_equal(again.alpha, expected)


def _tiff(channels: int, dtype: type, extra: str, byteorder: str = "<") -> bytes:
  buffer = io.BytesIO()
  tifffile.imwrite(
    buffer,
    _pixels(channels, dtype),
    photometric="rgb" if channels > 2 else "minisblack",
    planarconfig="contig",
    extrasamples=[extra],
    byteorder=byteorder,
  )
  return buffer.getvalue()


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_channel_without_a_meaning_is_left_out(dtype, byteorder):
  pixels = _pixels(4, dtype)
  read = photos.decode(_tiff(4, dtype, "unspecified", byteorder))
  np.testing.assert_array_equal(read.pixels, pixels[..., :3])
  assert read.alpha is None
  read = photos.decode(_tiff(4, dtype, "unassalpha", byteorder))
  np.testing.assert_array_equal(read.pixels, pixels[..., :3])
  np.testing.assert_array_equal(read.alpha, pixels[..., 3])


def test_associated_alpha_of_8_bits_is_divided_by():
  pixels = _pixels(4, np.uint8)
  read = photos.decode(_tiff(4, np.uint8, "assocalpha"))
  np.testing.assert_array_equal(read.alpha, pixels[..., 3])
  colour, alpha = pixels[..., :3].astype(float), pixels[..., 3:]
  # Alpha is 0 where there is no colour.
  expected = np.minimum(255, colour * 255 / np.maximum(alpha, 1))
  seen = np.broadcast_to(alpha > 0, colour.shape)
  np.testing.assert_allclose(read.pixels[seen], expected[seen], atol=1)


def test_black_and_white():
  bits = _pixels(1, np.uint8)[..., 0] > 128
  read = photos.decode(_saved(Image.fromarray(bits), "PNG"))
  np.testing.assert_array_equal(read.pixels[..., 0], np.where(bits, 255, 0))


@pytest.mark.parametrize(
  ("channels", "largest"), [(1, 255), (3, 255), (1, 1023), (1, 65535), (3, 65535)]
)
def test_portable_pixmaps(channels, largest):
  values = _pixels(channels, np.uint16).astype(np.int64) * largest // 65535
  header = f"P{5 if channels == 1 else 6}\n60 45\n{largest}\n".encode()
  encoded = header + values.astype(np.uint8 if largest == 255 else ">u2").tobytes()
  read = photos.decode(encoded)
  assert read.pixels.dtype == (np.uint8 if largest == 255 else np.uint16)
  expected = values * (np.iinfo(read.pixels.dtype).max / largest)
  np.testing.assert_allclose(read.pixels, expected, atol=1)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_of_several_images(kind):
  frames = [Image.fromarray(np.roll(_pixels(3, np.uint8), k, 0)) for k in range(3)]
  options = {} if kind == "GIF" else {"lossless": True}
  read = photos.decode(
    _saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
  )
  assert read.frames == 3
  if kind != "GIF":
    np.testing.assert_array_equal(read.pixels, _pixels(3, np.uint8))


def _refused() -> dict[str, tuple[bytes, str]]:
  cmyk = Image.fromarray(_pixels(3, np.uint8)).convert("CMYK")
  floating = Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8))
  deep = photos.encode(_photo(3, np.uint16), ".png")
  plain = photos.encode(_photo(3), ".png")
  damaged = bytearray(deep)
  damaged[len(deep) // 2] ^= 1
  return {
    "cmyk": (_saved(cmyk, "JPEG"), "kind CMYK: convert"),
    "floating": (_saved(floating, "TIFF"), "kind F: convert"),
    "text": (b"no image", "no image in a known format"),
    "empty": (b"", "the file is empty"),
    "cut": (plain[: len(plain) // 2], "damaged or truncated"),
    "cut16": (deep[: len(deep) // 2], "damaged or truncated"),
    "damaged16": (bytes(damaged), "damaged or truncated"),
    "associated16": (_tiff(4, np.uint16, "assocalpha"), "multiplied by alpha"),
    "grey with alpha16": (_tiff(2, np.uint16, "unassalpha"), "16-bit grey with alpha"),
    "associated grey": (_tiff(2, np.uint8, "assocalpha"), "kind La: convert"),
    "large": (b"P6\n40000 20000\n255\n", "40000x20000 pixels are more than"),
    "odd": (b"P6\n2 2\n1023\n" + bytes(24), "largest value of 1023"),
  }


@pytest.mark.parametrize("name", list(_refused()))
def test_what_is_refused(name):
  encoded, reason = _refused()[name]
  with pytest.raises(photos.BadImageError, match=reason):
    photos.decode(encoded)


@pytest.mark.parametrize(
  ("channels", "dtype", "suffix", "reason"),
  [
    (4, np.uint8, ".jpg", "JPEG has no alpha channel"),
    (3, np.uint16, ".jpeg", "JPEG has no 16-bit pixels"),
    (3, np.uint16, ".webp", "WebP has no 16-bit pixels"),
  ],
)
def test_what_a_format_cannot_hold(channels, dtype, suffix, reason):
  with pytest.raises(photos.BadImageError, match=reason):
    photos.encode(_photo(channels, dtype), suffix)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_leaves_the_image():
  image = Image.fromarray(_pixels(3, np.uint8))
  read = photos.decode(_saved(image, "TIFF"))
  assert read.exif is None
  encoded = _saved(image, "JPEG", exif=b"Exif\0\0MM\0*" + b"\xff" * 40)
  assert photos.decode(encoded).pixels.shape == (45, 60, 3)


def test_suffixes():
  kept = (".jpg", ".JPEG", ".png", ".tif", ".webp")
  assert tuple(map(photos.written_suffix, kept)) == kept
  assert {photos.written_suffix(s) for s in (".gif", ".bmp", ".ppm", "")} == {".png"}


def test_a_folder_that_cannot_be_read():
  # Not below the test runner's own folder, which is closed to others.
  with tempfile.TemporaryDirectory() as name:
    root = pathlib.Path(name)
    root.chmod(0o755)
    (root / "closed").mkdir(mode=0)
    with without_privileges(), pytest.raises(RunError, match="closed cannot be read"):
      photos.find([root])


def test_files_folders_and_patterns(tmp_path, monkeypatch):
  for name in (
    "b.png",
    "a/b.JPG",
    "a/notes.txt",
    "a/.hidden.png",
    ".x/c.png",
    "out/o.png",
  ):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"")
  out = tmp_path / "out"
  names = lambda *places: [one.name for one in photos.find(places, out)]
  assert names(tmp_path) == ["b.png", "a/b.JPG"]
  assert names(tmp_path / "a", tmp_path / "b.png") == ["b.JPG", "b.png"]
  assert names(tmp_path / "*.png") == ["b.png"]
  assert names(tmp_path / "**/*.*") == ["a/b.JPG", "b.png"]
  # One file once, however it is named; a link of another name is another image.
  assert names(tmp_path, tmp_path / "b.png", tmp_path / "a" / ".." / "*.png") == [
    "b.png",
    "a/b.JPG",
  ]
  (tmp_path / "c.png").symlink_to("b.png")
  assert names(tmp_path / "*.png") == ["b.png", "c.png"]
  (tmp_path / "c.png").unlink()
  monkeypatch.chdir(tmp_path)
  assert names("a/notes.txt", "*/*.JPG") == ["notes.txt", "a/b.JPG"]
  for place, reason in (("none", "no such file"), (".x/*.gif", "no such file")):
    with pytest.raises(UsageError, match=reason):
      names(place)
  (tmp_path / "empty").mkdir()
  with pytest.raises(UsageError, match="no images in it"):
    names("empty")
