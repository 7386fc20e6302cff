"""A denoiser alone, on files: the functions, and the command in real processes."""

import csv
import io
import signal
import time

import numpy as np
import pytest
import safetensors.numpy
import skimage.data
from conftest import flip, one_line
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from test_data_images import photograph

from fidelity_jax import (
  denoising,
  export,
  files,
  models,
  photos,
  port,
  quality,
  restore,
  runs,
)
from fidelity_jax.errors import UsageError
from fidelity_jax.tasks import base

PROGRAM = ("-m", "fidelity_jax", "restore")


def _smoothing(channels: int) -> dict[str, np.ndarray]:
  """Returns a DnCNN as KAIR publishes it, whose residual is the image less its mean."""
  # Noise goes below 0, where a ReLU alone would cut it off: each sign for itself.
  first = np.zeros((2 * channels, channels, 3, 3), np.float32)
  second = np.zeros((channels, 2 * channels, 3, 3), np.float32)
  for c in range(channels):
    for sign, at in ((1, 2 * c), (-1, 2 * c + 1)):
      first[at, c, 1, 1] = sign
      second[c, at] = -sign / 9
      second[c, at, 1, 1] += sign
  return {"model.0.weight": first, "model.2.weight": second}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  """Returns the files of denoisers for grey and for colour images."""
  places = {}
  for channels in (1, 3):
    places[channels] = tmp_path_factory.mktemp("weights") / f"{channels}.safetensors"
    safetensors.numpy.save_file(_smoothing(channels), places[channels])
  return places


def _photograph(height: int, width: int, channels: int = 3, at: int = 0) -> np.ndarray:
  image = skimage.data.astronaut()[at : at + height, 60 : 60 + width]
  return image if channels == 3 else image[..., :1]


def _save(path, pixels: np.ndarray) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(photos.encode(photos.Photo(pixels), path.suffix))


@pytest.fixture
def folder(tmp_path):
  """Returns a folder of three photographs of different kinds."""
  root = tmp_path / "photos"
  _save(root / "colour.png", _photograph(90, 130))
  _save(root / "inner" / "grey.png", _photograph(70, 64, 1))
  deep = _photograph(40, 50).astype(np.uint16) * 257
  _save(root / "inner" / "deep.tif", deep)
  return root


def _roughness(pixels: np.ndarray) -> float:
  """Returns how much neighbours differ, away from the border."""
  return np.abs(np.diff(pixels[1:-1, 1:-1].astype(float), axis=1)).mean()


def _rows(out) -> dict[str, dict[str, str]]:
  text = (out / "restored.csv").read_text()
  return {row["image"]: row for row in csv.DictReader(io.StringIO(text))}


def _read(path) -> photos.Photo:
  return photos.decode(path.read_bytes())


def _run(*arguments) -> int:
  return restore.main(list(map(str, arguments)))


@pytest.mark.parametrize("channels", [1, 3])
def test_it_is_the_published_network(channels, tmp_path):
  """Files restored by the command are what PyTorch gives."""
  torch = pytest.importorskip("torch")
  from test_port import prefixed, save_torch, sequential
  from torch_reference import state_dict

  network = sequential(7, channels, False, True)
  place = tmp_path / "net.pth"
  save_torch(prefixed("model.", state_dict(network)), place)
  pixels = _photograph(77, 140, channels).astype(np.uint16) * 257
  _save(tmp_path / "in.png", pixels)
  assert _run(place, tmp_path / "in.png", f"--out={tmp_path / 'out'}") == 0
  image = torch.from_numpy(pixels / 65535).permute(2, 0, 1)[None]
  with torch.no_grad():
    expected = (image - network(image)).clip(0, 1)[0].permute(1, 2, 0).numpy()
  assert expected.std() > 0.05
  restored = _read(tmp_path / "out" / "in.png").pixels
  np.testing.assert_allclose(restored, expected * 65535, atol=1.5)


def test_other_numbers_of_channels(weights):
  grey, colour = (denoising.load(weights[channels]) for channels in (1, 3))
  image = _photograph(40, 60).astype(np.float32) / 255
  np.testing.assert_allclose(
    denoising.restore(grey, image), denoising.restore(colour, image), atol=1e-6
  )
  one = image[..., :1]
  np.testing.assert_allclose(
    denoising.restore(colour, one), denoising.restore(grey, one), atol=1e-6
  )
  with pytest.raises(ValueError, match="1 or 3 channels, not 2"):
    denoising.restore(grey, image[..., :2])


def test_a_large_image_is_that_of_the_network(weights):
  denoiser = denoising.load(weights[1])
  image = np.tile(_photograph(512, 400, 1), (2, 2, 1)).astype(np.float32) / 255
  part = port.load_part(weights[1], "restorer")
  network = models.DnCNN(**part.config)
  expected = network.apply(part.variables, image[None], method="restore")[0]
  np.testing.assert_allclose(denoising.restore(denoiser, image), expected, atol=1e-5)


def test_what_is_no_denoiser_of_images(tmp_path):
  state = _smoothing(1)
  state["model.2.weight"] = np.zeros((3, 2, 3, 3), np.float32)
  safetensors.numpy.save_file(state, tmp_path / "x.safetensors")
  with pytest.raises(UsageError, match="from 1 channels to 3, which is no denoiser"):
    denoising.load(tmp_path / "x.safetensors")


def test_noise_is_gaussian_and_of_its_place():
  image = np.full((200, 300, 3), 0.5, np.float32)
  noise = lambda seed, name: denoising.add_noise(image, 25, seed, name) - image
  first = noise(0, "a/b.png")
  assert first.dtype == np.float32
  assert abs(first.std() * 255 - 25) < 0.2 and abs(first.mean() * 255) < 0.3
  # As far from normal as a finite sample may be.
  assert abs(np.mean((first / first.std()) ** 4) - 3) < 0.1
  np.testing.assert_array_equal(first, noise(0, "a/b.png"))
  for other in (noise(1, "a/b.png"), noise(0, "a/c.png")):
    assert abs(np.corrcoef(first.ravel(), other.ravel())[0, 1]) < 0.02
  bright = denoising.add_noise(np.ones_like(image), 25, 0, "x")
  assert bright.max() > 1.2


@pytest.mark.parametrize("shape", [(40, 50, 3), (11, 30, 1)])
def test_psnr_and_ssim_are_scikit_images(shape):
  rng = np.random.default_rng(0)
  clean = _photograph(*shape).astype(np.float32) / 255
  noisy = denoising.add_noise(clean, 15, 0, "x")
  exact = clean.astype(np.float64), noisy.astype(np.float64)
  expected = peak_signal_noise_ratio(*exact, data_range=1)
  assert denoising.psnr(clean, noisy) == pytest.approx(expected, abs=1e-4)
  options = {"gaussian_weights": True, "use_sample_covariance": False}
  expected = structural_similarity(*exact, data_range=1, channel_axis=-1, **options)
  assert denoising.ssim(clean, noisy) == pytest.approx(expected, abs=1e-5)
  # As evaluation measures them.
  batches = clean[None], noisy[None]
  assert float(base.psnr(*batches)[0]) == pytest.approx(denoising.psnr(clean, noisy))
  assert float(quality.ssim(*batches)[0]) == pytest.approx(expected, abs=1e-5)
  assert denoising.psnr(clean, clean) == 100
  assert np.isnan(denoising.ssim(*rng.random((2, 10, 30, 1))))


def test_a_folder(folder, weights, tmp_path, capsys):
  """Kinds, names and depths stay, smoother; nothing is measured without references."""
  out = tmp_path / "out"
  before = {path: path.read_bytes() for path in folder.rglob("*.*")}
  assert _run(weights[3], folder, f"--out={out}") == 0
  assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before
  names = ["colour.png", "inner/deep.tif", "inner/grey.png"]
  assert capsys.readouterr().out.split() == names
  for name in names:
    given, restored = _read(folder / name).pixels, _read(out / name).pixels
    assert (given.shape, given.dtype) == (restored.shape, restored.dtype)
    assert _roughness(restored) < 0.8 * _roughness(given)
  assert list(_rows(out)) == names
  assert _rows(out)["colour.png"]["psnr"] == ""
  # Named a second time, it is the same image.
  assert _run(weights[3], folder, folder / "colour.png", f"--out={out}") == 0
  assert capsys.readouterr().out.split() == names


def test_alpha_and_metadata_stay(weights, tmp_path):
  pixels = _photograph(40, 60)
  alpha = np.arange(2400, dtype=np.uint8).reshape(40, 60)
  exif = Image.Exif()
  exif[0x0112], exif[0x010F] = 6, "Maker"
  photo = photos.Photo(pixels, alpha, b"profile" * 20, exif.tobytes())
  (tmp_path / "a.png").write_bytes(photos.encode(photo, ".png"))
  assert _run(weights[3], tmp_path / "a.png", f"--out={tmp_path / 'out'}") == 0
  restored = _read(tmp_path / "out" / "a.png")
  np.testing.assert_array_equal(restored.alpha, alpha)
  assert (restored.icc, restored.exif) == (photo.icc, photo.exif)
  assert not np.array_equal(restored.pixels, pixels)


def test_added_noise_is_measured(folder, weights, tmp_path, capsys):
  """As an independent computation does, whatever else is restored with it."""
  out, other = tmp_path / "out", tmp_path / "other"
  assert _run(weights[1], folder, f"--out={out}", "--add_noise=25", "--seed=3") == 0
  printed = capsys.readouterr().out.splitlines()
  rows = _rows(out)
  denoiser = denoising.load(weights[1])
  found = []
  for name, row in rows.items():
    photo = _read(folder / name)
    clean = photo.pixels / np.float32(np.iinfo(photo.pixels.dtype).max)
    noisy = denoising.add_noise(clean, 25, 3, name)
    restored = denoising.restore(denoiser, noisy)
    pairs = ((clean, noisy), (clean, restored))
    expected = [peak_signal_noise_ratio(*pair, data_range=1) for pair in pairs]
    found.append([float(row["psnr_noisy"]), float(row["psnr"])])
    np.testing.assert_allclose(found[-1], expected, atol=1e-3)
    assert float(row["ssim"]) > float(row["ssim_noisy"]) > 0
    stored = _read(out / name).pixels / np.iinfo(photo.pixels.dtype).max
    np.testing.assert_allclose(stored, restored, atol=0.51 / 255)
  noisy, restored = np.mean(found, 0)
  assert abs(noisy - 20.17) < 0.1 and restored > noisy + 3
  assert len(printed) == 4
  assert f"mean of 3 images  PSNR {noisy:.2f} -> {restored:.2f} dB  SSIM" in printed[-1]
  # One image by itself: the same noise.
  inner = folder / "inner"
  (tmp_path / "alone").mkdir()
  alone = (inner / "grey.png").rename(tmp_path / "alone" / "grey.png")
  arguments = [weights[1], alone.parent, f"--out={other}", "--add_noise=25"]
  assert _run(*arguments, "--seed=3") == 0
  again = denoising.add_noise(_read(alone).pixels / np.float32(255), 25, 3, "grey.png")
  found = denoising.psnr(_read(alone).pixels / np.float32(255), again)
  assert float(_rows(other)["grey.png"]["psnr_noisy"]) == pytest.approx(found, abs=1e-4)


def test_references(folder, weights, tmp_path, capsys):
  """By name; what has none, or one of another size, is passed over."""
  noisy, out = tmp_path / "noisy", tmp_path / "out"
  for name in ("colour.png", "inner/grey.png"):
    clean = _read(folder / name).pixels
    degraded = denoising.add_noise(clean / np.float32(255), 25, 0, name)
    _save(noisy / name, np.rint(degraded.clip(0, 1) * 255).astype(np.uint8))
  arguments = [weights[3], noisy, f"--out={out}", f"--reference={folder}"]
  assert _run(*arguments) == 0
  for name, row in _rows(out).items():
    for column, place in (("psnr_noisy", noisy), ("psnr", out)):
      pixels = _read(folder / name).pixels, _read(place / name).pixels
      expected = peak_signal_noise_ratio(*pixels)
      # The output is measured before it is rounded.
      assert float(row[column]) == pytest.approx(expected, abs=0.02)
  _save(noisy / "new.png", _photograph(20, 20))

  def passed_over(reason):
    capsys.readouterr()
    assert _run(*arguments) == 1
    assert f"new.png: passed over: its reference {reason}" in capsys.readouterr().err

  passed_over("cannot be read")
  _save(folder / "new.png", _photograph(20, 21))
  passed_over("has shape (20, 21, 3), not (20, 20, 3)")
  (folder / "new.png").write_text("no image")
  passed_over("cannot be used: no image in a known format")
  _save(folder / "new.png", _photograph(20, 20))
  assert _run(*arguments) == 0
  assert float(_rows(out)["new.png"]["psnr_noisy"]) == 100


def test_broken_files_are_passed_over(folder, weights, tmp_path, command):
  text, cut = folder / "text.png", folder / "inner" / "cut.png"
  text.write_text("no image")
  content = (folder / "colour.png").read_bytes()
  cut.write_bytes(content[: len(content) // 2])
  _save(folder / "named.png", _photograph(20, 20))
  (folder / "named.png").rename(folder / "wrong.jpg")
  out = tmp_path / "out"
  run = command(weights[3], folder, f"--out={out}", program=PROGRAM, check=1)
  assert f"{text}: passed over: no image in a known format" in run.stderr
  assert f"{cut}: passed over: damaged or truncated" in run.stderr
  assert "2 of 6 images were passed over" in one_line(run.stderr)
  assert len(_rows(out)) == len(run.stdout.split()) == 4
  # A PNG of another name can be a JPEG.
  assert _read(out / "wrong.jpg").pixels.shape == (20, 20, 3)
  cut.write_bytes(content)
  text.unlink()
  run = command(weights[3], folder, f"--out={out}", program=PROGRAM, check=0)
  assert len(_rows(out)) == 5


def test_several_images_in_one_file(weights, tmp_path, capsys):
  frames = [Image.fromarray(_photograph(20, 30, at=k)) for k in (0, 50)]
  frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
  assert _run(weights[3], tmp_path / "a.gif", f"--out={tmp_path / 'out'}") == 0
  captured = capsys.readouterr()
  assert "a.gif: the first of 2 images in it" in captured.err
  assert captured.out.strip() == "a.png"
  assert _read(tmp_path / "out" / "a.png").pixels.shape == (20, 30, 3)


@pytest.mark.slow
def test_ended_and_run_again(weights, tmp_path, background, command):
  """Finished images are kept as they are, the rest comes out as without the end."""
  root, out, whole = (tmp_path / name for name in ("photos", "out", "whole"))
  for i in range(16):
    _save(root / f"{i:02d}.png", _photograph(300, 300, at=10 * i))
  arguments = [weights[3], root, "--add_noise=25"]
  command(*arguments, f"--out={whole}", program=PROGRAM, check=0)
  table = out / "restored.csv"
  rows = lambda: len(_rows(out)) if table.exists() else 0
  made = lambda: {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
  before = {}
  for number in (signal.SIGKILL, signal.SIGTERM):
    start = rows()
    process = background(*arguments, f"--out={out}", program=PROGRAM)
    while process.poll() is None and rows() <= start:
      time.sleep(0.002)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=120)
    recorded = set(_rows(out))
    before = {name: when for name, when in made().items() if name in recorded}
    assert 0 < len(before) < 16
    with open(table, "a") as file:
      # What a process that is killed while it writes may leave.
      file.write("15.png,15.p")
  assert process.returncode == 143
  assert "what is restored is kept" in one_line(stderr)
  run = command(*arguments, f"--out={out}", program=PROGRAM, check=0)
  assert "mean of 16 images" in run.stdout
  after = made()
  assert {name: after[name] for name in before} == before
  for path in whole.iterdir():
    assert (out / path.name).read_bytes() == path.read_bytes(), path.name


def test_only_what_is_new_is_restored(folder, weights, tmp_path):
  out = tmp_path / "out"
  arguments = [weights[3], folder, f"--out={out}"]
  assert _run(*arguments) == 0
  times = lambda: {path.name: path.stat().st_mtime_ns for path in out.rglob("*.*g")}
  before = times()
  _save(folder / "more.png", _photograph(20, 20))
  _save(folder / "colour.png", _photograph(30, 30))
  (out / "inner" / "grey.png").unlink()
  deep = (out / "inner" / "deep.tif").read_bytes()
  (out / "inner" / "deep.tif").write_text("no image")
  assert _run(*arguments) == 0
  after = times()
  assert (out / "inner" / "deep.tif").read_bytes() == deep
  assert {name for name in after if after[name] != before.get(name)} == {
    "more.png",
    "colour.png",
    "grey.png",
  }
  assert _read(out / "colour.png").pixels.shape == (30, 30, 3)


def test_what_becomes_broken_has_no_output(folder, weights, tmp_path, capsys):
  out = tmp_path / "out"
  arguments = [weights[3], folder, f"--out={out}"]
  assert _run(*arguments) == 0
  content = (out / "colour.png").read_bytes()
  given = (folder / "colour.png").read_bytes()
  (folder / "colour.png").write_text("no image")
  assert _run(*arguments) == 1
  assert "1 of 3 images were passed over" in one_line(capsys.readouterr().err)
  assert not (out / "colour.png").exists()
  assert list(_rows(out)) == ["inner/deep.tif", "inner/grey.png"]
  (folder / "colour.png").write_bytes(given)
  assert _run(*arguments) == 0
  assert (out / "colour.png").read_bytes() == content


def test_one_directory_has_one_kind_of_images(folder, weights, tmp_path, refused):
  out = tmp_path / "out"
  arguments = [weights[3], folder, f"--out={out}"]
  run = lambda status, words, *given: refused(given, status, words, restore.main)
  assert _run(*arguments, "--add_noise=25") == 0
  run(2, "with other add_noise: name another", *arguments, "--add_noise=15")
  run(2, "with other seed", *arguments, "--add_noise=25", "--seed=1")
  run(2, "with other add_noise and seed", *arguments)
  run(2, "other weights", weights[1], *arguments[1:], "--add_noise=25")
  run(2, "holds other files", *arguments[:2], f"--out={weights[1].parent}")
  run(2, "be written over", *arguments[:2], f"--out={folder}")
  run(2, "be written over", weights[3], out, f"--out={out}", "--add_noise=25")
  with files.holding(out / ".lock"):
    run(1, "another run restores into", *arguments, "--add_noise=25")
  table = (out / "restored.csv").read_bytes()
  for damaged in (table.replace(b"colour", b"col\xe9ur"), table.replace(b",", b"")):
    (out / "restored.csv").write_bytes(damaged)
    run(1, "restored.csv is damaged", *arguments, "--add_noise=25")
  flip(out / "restored.json", 30)
  run(1, "restored.json is damaged", *arguments, "--add_noise=25")


def test_what_is_refused(folder, weights, tmp_path, refused):
  out = f"--out={tmp_path / 'out'}"
  run = lambda status, words, *given: refused(given, status, words, restore.main)
  run(2, "--out", weights[3], folder)
  run(2, "there is no", tmp_path / "none.pth", folder, out)
  run(2, "none.png: no such file", weights[3], "none.png", out)
  run(2, "--add_noise=0: write", weights[3], folder, out, "--add_noise=0")
  run(2, "--add_noise=nan: write", weights[3], folder, out, "--add_noise=nan")
  run(2, "--seed=-1: write", weights[3], folder, out, "--seed=-1")
  run(2, "no such folder", weights[3], folder, out, "--reference=none")
  both = ("--add_noise=25", f"--reference={folder}")
  run(2, "leave one out", weights[3], folder, out, *both)
  twin = tmp_path / "twin" / "colour.png"
  _save(twin, _photograph(20, 20))
  words = ["colour.png", "would both be written to"]
  run(2, words, weights[3], folder / "colour.png", twin, out)
  (tmp_path / "file").write_text("")
  run(1, "a directory belongs", weights[3], twin, f"--out={tmp_path / 'file'}")
  assert not (tmp_path / "out" / "colour.png").exists()


def test_the_restorer_of_an_experiment(toy_run, tmp_path):
  """A run's own, from its directory; a run without one is refused."""
  denoiser = denoising.load(toy_run / "oracle")
  run = runs.find(toy_run / "oracle")
  image = photograph(40, 50, seed=2).astype(np.float32) / 255
  expected = run.method.restore(run.variables, image[None])[0]
  found = denoising.restore(denoiser, image)
  np.testing.assert_allclose(found, expected, atol=1e-5)
  assert np.abs(found - image).max() > 1e-3


def test_an_exported_file_restores_what_its_run_does(toy_run, folder, tmp_path, capsys):
  """Of grey, 16-bit and noisy images, too; what is too small is passed over."""
  place, path = toy_run / "oracle", tmp_path / "toy.jax"
  export.export(place, path)
  _save(folder / "small.png", _photograph(31, 60))
  noise = ("--add_noise=50", "--seed=1")
  for given, status in ((place, 0), (path, 1)):
    capsys.readouterr()
    out = f"--out={tmp_path / given.stem}"
    assert _run(given, folder, out, *noise) == status
  stderr = capsys.readouterr().err
  assert "small.png: passed over: an image of 60x31 pixels" in stderr
  assert "takes 32x32 and larger; its run's directory takes any size" in stderr
  found, want = (_rows(tmp_path / name) for name in ("toy", "oracle"))
  assert set(want) - set(found) == {"small.png"} and len(found) == 3
  for name, row in found.items():
    one, other = (_read(tmp_path / k / name).pixels for k in ("toy", "oracle"))
    assert one.dtype == other.dtype and one.shape == other.shape
    room = 1 if one.dtype == np.uint8 else 4
    assert np.abs(one.astype(int) - other.astype(int)).max() <= room
    for column in ("psnr_noisy", "psnr"):
      assert float(row[column]) == pytest.approx(float(want[name][column]), abs=1e-3)
  # Values beyond [0, 1], which noise has, are not clipped on their way.
  noisy = 1.5 * _photograph(60, 90).astype(np.float32) / 255 - 0.25
  results = [denoising.restore(denoising.load(one), noisy) for one in (place, path)]
  np.testing.assert_allclose(*results, atol=1e-5)
