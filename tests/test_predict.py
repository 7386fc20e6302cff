"""`fidelity_jax predict`: what it prints, draws, passes over and refuses."""

import csv
import io
import json
import signal
import time

import numpy as np
import pytest
from conftest import one_line
from PIL import Image
from test_data_images import encoded, photograph

import fidelity_jax
from fidelity_jax import predict

_PROGRAM = ("-m", "fidelity_jax", "predict")


@pytest.fixture
def photos(tmp_path):
  """A folder of six photographs, two of them in a sub-folder, and a broken one."""
  root = tmp_path / "photos"
  (root / "more").mkdir(parents=True)
  for i in range(6):
    path = root / ("more" if i > 3 else ".") / f"{i}.png"
    path.write_bytes(encoded(photograph(40 + i, 50, seed=i), format="PNG"))
  (root / "broken.jpg").write_bytes(b"no image")
  (root / "notes.txt").write_text("no image either")
  return root


def _labels(model, path):
  result = model(path)
  return [result.top(1, x)[0][0][0] for x in (None, result.restored_logits)]


def test_formats(toy_estimated, command, photos):
  run = toy_estimated / "pretrained"
  model = fidelity_jax.load(run)
  (photos / "broken.jpg").unlink()
  names = ["0.png", "1.png", "2.png", "3.png", "more/4.png", "more/5.png"]
  result = command(run, photos, "--format=jsonl", "--top=3", program=_PROGRAM, check=0)
  told = [json.loads(line) for line in result.stdout.splitlines()]
  assert [one["file"] for one in told] == names
  for one in told:
    expected = model(photos / one["file"])
    label, probability = expected.top(1)[0][0]
    assert one["top"][0]["label"] == label and len(one["top"]) == 3
    assert abs(one["top"][0]["probability"] - probability) < 1e-4
    restored = expected.top(1, expected.restored_logits)[0][0][0]
    assert one["on_restored"]["label"] == restored
    assert abs(one["mean_map"] - expected.fidelity_map.mean()) < 1e-5


def test_pictures_resumed_and_broken_images_named(toy_estimated, command, photos):
  run, out = toy_estimated / "pretrained", photos.parent / "out"
  arguments = [run, photos, f"--out={out}", "--format=csv", "--full"]
  result = command(*arguments, program=_PROGRAM, check=1)
  line = one_line(result.stderr)
  assert "1 of 7 images could not be used" in line and "broken.jpg" in line
  rows = list(csv.DictReader(io.StringIO(result.stdout)))
  assert [row["file"] for row in rows] == [
    *("0.png", "1.png", "2.png", "3.png", "more/4.png", "more/5.png")
  ]
  pictures = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
  assert len(pictures) == 6 and out / "more" / "5.png.png" in pictures
  for path in pictures:
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert pixels.shape[0] > 200 and pixels.shape[1] > 2 * pixels.shape[0]
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 500
  # Again, one picture lost and a line half written: only that one is made again.
  (out / "2.png.png").unlink()
  with open(out / "predictions.jsonl", "a") as file:
    file.write('{"file": "x')
  again = command(*arguments, program=_PROGRAM, check=1)
  assert again.stdout == result.stdout
  for path, before in pictures.items():
    assert (path.stat().st_mtime_ns > before) == (path.name == "2.png.png")
  # Of another run the directory is refused.
  other = command(*arguments[:-2], "--format=csv", "--top=2", program=_PROGRAM, check=2)
  assert "another run or with other settings" in one_line(other.stderr)


def test_killed_it_goes_on(toy_estimated, background, command, photos):
  run, out = toy_estimated / "pretrained", photos.parent / "out"
  (photos / "broken.jpg").unlink()
  for i in range(60):
    path = photos / f"{100 + i}.png"
    path.write_bytes(encoded(photograph(64, 64, seed=i), format="PNG"))
  arguments = [run, photos, f"--out={out}", "--format=jsonl"]
  process = background(*arguments, program=_PROGRAM)
  end = time.monotonic() + 300
  while len(list(out.glob("*.png"))) < 5 and time.monotonic() < end:
    time.sleep(0.05)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  before = {p: p.stat().st_mtime_ns for p in out.rglob("*.png.png")}
  assert 5 <= len(before) < 66
  result = command(*arguments, program=_PROGRAM, check=0)
  assert len(result.stdout.splitlines()) == len(list(out.rglob("*.png.png"))) == 66
  # But for one whose line was not written yet, none is drawn again.
  redrawn = [p for p, at in before.items() if p.stat().st_mtime_ns != at]
  assert len(redrawn) <= 1
  assert not list(out.rglob("*.tmp"))


def test_an_oracle_and_its_clean_images(toy_run, command, photos, tmp_path):
  run = toy_run / "oracle"
  (photos / "broken.jpg").unlink()
  refused = command(run, photos, program=_PROGRAM, check=2)
  assert "--clean=DIR" in one_line(refused.stderr)
  noisy = tmp_path / "noisy"
  noisy.mkdir()
  rng = np.random.default_rng(0)
  for name in ("0.png", "1.png"):
    pixels = np.asarray(Image.open(photos / name)).astype(float)
    degraded = np.clip(pixels + rng.normal(0, 60, pixels.shape), 0, 255)
    Image.fromarray(degraded.astype(np.uint8)).save(noisy / name)
  names = "\n".join(str(noisy / name) for name in ("1.png", "0.png"))
  listed = tmp_path / "names.txt"
  listed.write_text(names)
  with open(listed) as stdin:
    result = command(
      *(run, "-", f"--clean={photos}", "--format=jsonl"),
      program=_PROGRAM,
      stdin=stdin,
      check=0,
    )
  told = {one["file"]: one for one in map(json.loads, result.stdout.splitlines())}
  assert list(told) == ["1.png", "0.png"]
  model = fidelity_jax.load(run)
  for name, one in told.items():
    expected = model(noisy / name, photos / name)
    assert one["top"][0]["label"] == expected.top(1)[0][0][0]
    assert abs(one["mean_map"] - expected.fidelity_map.mean()) < 1e-5
  missing = command(run, noisy / "1.png", f"--clean={noisy / 'no'}", program=_PROGRAM)
  assert missing.returncode == 1 and "no: cannot be read" in one_line(missing.stderr)


def test_tables_are_as_wide_as_they_need(capsys):
  write = predict._as_table(["a.png", "b" * 60 + ".png"])
  write(None)
  top = [{"label": "cat", "probability": 0.5}]
  told = {"file": "b" * 60 + ".png", "top": top, "on_input": top[0]}
  write(told)
  write({"file": "a.png", "mean_map": 0.1})
  header, first, second = capsys.readouterr().out.splitlines()
  assert (
    header.split() == "image prediction frozen, on restored frozen, on input".split()
  )
  assert first.startswith("…bbb") and " 50% cat" in first and len(first) < 130
  assert second.split() == ["a.png", "-", "-", "-"]


@pytest.mark.parametrize(
  "places, words",
  [
    ([], "no image is named"),
    (["nothing.png"], "there is no nothing.png"),
    (["*.gif"], r"there is no \*.gif"),
    (["."], r"\. has no images"),
    (["a/1.png", "b/1.png"], "two images of one name"),
  ],
)
def test_images_that_are_not_there(tmp_path, monkeypatch, places, words):
  monkeypatch.chdir(tmp_path)
  for place in places[:2] if len(places) > 1 else []:
    path = tmp_path / place
    path.parent.mkdir()
    path.write_bytes(b"")
  with pytest.raises(predict.errors.UsageError, match=words):
    predict.find(places)


def test_images_are_found_by_folder_pattern_and_name(photos, monkeypatch):
  monkeypatch.chdir(photos.parent)
  found = predict.find(["photos"])
  assert list(found) == [
    *("0.png", "1.png", "2.png", "3.png", "broken.jpg", "more/4.png", "more/5.png")
  ]
  assert found["more/4.png"] == "photos/more/4.png"
  assert list(predict.find(["photos/[12].png"])) == ["1.png", "2.png"]
  assert list(predict.find(["photos/more/4.png", "photos/0.png"])) == ["4.png", "0.png"]
