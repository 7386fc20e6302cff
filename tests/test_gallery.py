"""The gallery command: pictures for good input, one line for bad input."""

import numpy as np
import pytest
from PIL import Image

from fidelity_jax import degradations, gallery


@pytest.fixture
def photograph(tmp_path):
  pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
  path = tmp_path / "photo.png"
  Image.fromarray(pixels).save(path)
  return path


def test_panels_are_the_evaluation_conditions():
  image = np.random.default_rng(0).random((16, 16, 3)).astype(np.float32)
  panels = gallery.panels(image, "salt_and_pepper", seed=0)
  conditions = degradations.conditions("salt_and_pepper")
  assert len(panels) == len(conditions) == 8
  labels = [label for label, _ in panels]
  assert labels[0] == "clean"
  assert labels[2] == "probability = 0.2"
  assert labels[-2:] == [f"{d}: probability = (0.5, 0)" for d in ("1D", "2D")]
  np.testing.assert_array_equal(panels[0][1], image)
  for _, degraded in panels[1:]:
    assert degraded.shape == image.shape
    assert not np.array_equal(degraded, image)


def test_a_picture_for_every_image_and_kind(photograph, tmp_path, capsys):
  out = tmp_path / "new" / "pictures"
  other = tmp_path / "again"
  other.mkdir()
  twin = other / "photo.png"
  twin.write_bytes(photograph.read_bytes())
  arguments = [str(photograph), str(twin), f"--out={out}", "--size=24"]
  assert gallery.main([*arguments, "--kind=rectangular_crop"]) == 0
  names = ["photo-rectangular_crop.png", "photo_2-rectangular_crop.png"]
  assert sorted(path.name for path in out.iterdir()) == names
  assert capsys.readouterr().out.split() == [str(out / name) for name in names]
  with Image.open(out / names[0]) as picture:
    assert picture.width > 5 * picture.height
    assert np.asarray(picture.convert("L")).std() > 20


def test_all_kinds_of_the_embedded_photograph(tmp_path, monkeypatch):
  monkeypatch.setattr(gallery, "EMBEDDED", ("chelsea.png",))
  kinds = ("awgn", "rectangular_crop")
  monkeypatch.setattr(gallery, "KINDS", kinds)
  out = tmp_path / "pictures"
  assert gallery.main([f"--out={out}", "--size=16", "--format=jpg"]) == 0
  names = {path.name for path in out.iterdir()}
  assert names == {f"chelsea-{kind}.jpg" for kind in (*kinds, "all")}


def test_images_are_cropped_to_the_centre(photograph):
  square = gallery.read_square(photograph, 40)
  with Image.open(photograph) as image:
    np.testing.assert_allclose(square, np.asarray(image)[:, 10:50] / 255, atol=1e-6)


@pytest.mark.parametrize(
  ("arguments", "status", "message"),
  [
    (["missing.png"], 2, "missing.png: no such file"),
    (["{dir}"], 2, "no such file"),
    (["{text}"], 1, "cannot be read as an image"),
    (["{photo}", "--kind=motion"], 2, "did you mean 'motion_blur'"),
    (["{photo}", "--kind=clean"], 2, "shows nothing"),
    (["{photo}", "--size=4"], 2, "from 16 to 2048"),
    (["{photo}", "--out={text}/inside"], 1, "cannot make this directory"),
  ],
)
def test_bad_input_ends_in_one_line(
  photograph, tmp_path, capsys, arguments, status, message
):
  text = tmp_path / "notes.png"
  text.write_text("not an image")
  places = {"dir": tmp_path, "text": text, "photo": photograph}
  given = [argument.format(**places) for argument in arguments]
  assert gallery.main([f"--out={tmp_path / 'out'}", *given]) == status
  captured = capsys.readouterr()
  assert message in captured.err and captured.err.count("\n") == 1
  assert captured.out == ""


def test_a_missing_directory_is_a_usage_error(capsys):
  assert gallery.main([]) == 2
  assert "--out" in capsys.readouterr().err
