"""`fidelity_jax predict`: what it prints, draws, passes over and refuses."""

import csv
import io
import json
import os
import pathlib
import signal
import time

import numpy as np
import pytest
from conftest import one_line
from PIL import Image
from test_data_images import encoded, photograph

import fidelity_jax
from fidelity_jax import errors, photos, predict

_PROGRAM = ("-m", "fidelity_jax", "predict")


@pytest.fixture
def pictures(tmp_path):
  """A folder of six photographs, two of them in a sub-folder, and a broken one."""
  root = tmp_path / "photos"
  (root / "more").mkdir(parents=True)
  for i in range(6):
    path = root / ("more" if i > 3 else ".") / f"{i}.png"
    path.write_bytes(encoded(photograph(40 + i, 50, seed=i), format="PNG"))
  (root / "broken.jpg").write_bytes(b"no image")
  (root / "notes.txt").write_text("no image either")
  return root


def test_formats(toy_estimated, command, pictures):
  run = toy_estimated / "pretrained"
  model = fidelity_jax.load(run)
  (pictures / "broken.jpg").unlink()
  names = ["0.png", "1.png", "2.png", "3.png", "more/4.png", "more/5.png"]
  result = command(
    run, pictures, "--format=jsonl", "--top=3", program=_PROGRAM, check=0
  )
  told = [json.loads(line) for line in result.stdout.splitlines()]
  assert [one["file"] for one in told] == [str(pictures / name) for name in names]
  for one in told:
    expected = model(one["file"])
    label, probability = expected.top(1)[0][0]
    assert one["top"][0]["label"] == label and len(one["top"]) == 3
    assert abs(one["top"][0]["probability"] - probability) < 1e-4
    restored = expected.top(1, expected.restored_logits)[0][0][0]
    assert one["on_restored"]["label"] == restored
    assert abs(one["mean_map"] - expected.fidelity_map.mean()) < 1e-5


@pytest.mark.slow
def test_pictures_resumed_and_broken_images_named(toy_estimated, command, pictures):
  run, out = toy_estimated / "pretrained", pictures.parent / "out"
  arguments = [run, pictures, f"--out={out}", "--format=csv", "--full"]
  result = command(*arguments, program=_PROGRAM, check=1)
  line = one_line(result.stderr)
  assert "1 of 7 images could not be used" in line and "broken.jpg" in line
  rows = list(csv.DictReader(io.StringIO(result.stdout)))
  names = ("0.png", "1.png", "2.png", "3.png", "more/4.png", "more/5.png")
  assert [row["file"] for row in rows] == [str(pictures / name) for name in names]
  drawn = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
  assert len(drawn) == 6 and out / "more" / "5.png.png" in drawn
  for path in drawn:
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert pixels.shape[0] > 200 and pixels.shape[1] > 2 * pixels.shape[0]
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 500
  # The whole image is shown, not the square that is classified.
  plain = out.parent / "plain"
  command(*arguments[:2], f"--out={plain}", program=_PROGRAM, check=1)
  assert (plain / "0.png.png").read_bytes() != (out / "0.png.png").read_bytes()
  # Again, one picture lost and a line half written: only that one is made again.
  (out / "2.png.png").unlink()
  with open(out / "predictions.jsonl", "a") as file:
    file.write('{"name": "x')
  again = command(*arguments, program=_PROGRAM, check=1)
  assert again.stdout == result.stdout
  for path, before in drawn.items():
    assert (path.stat().st_mtime_ns > before) == (path.name == "2.png.png")
  # Of another run the directory is refused.
  other = command(*arguments[:-2], "--format=csv", "--top=2", program=_PROGRAM, check=2)
  assert "another run or with other settings" in one_line(other.stderr)


@pytest.mark.slow
def test_killed_it_goes_on(toy_estimated, background, command, pictures):
  run, out = toy_estimated / "pretrained", pictures.parent / "out"
  (pictures / "broken.jpg").unlink()
  for i in range(60):
    path = pictures / f"{100 + i}.png"
    path.write_bytes(encoded(photograph(64, 64, seed=i), format="PNG"))
  arguments = [run, pictures, f"--out={out}", "--format=jsonl"]
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


@pytest.mark.slow
def test_an_oracle_and_its_clean_images(toy_run, command, pictures, tmp_path):
  run = toy_run / "oracle"
  (pictures / "broken.jpg").unlink()
  refused = command(run, pictures, program=_PROGRAM, check=2)
  assert "--clean=DIR" in one_line(refused.stderr)
  noisy = tmp_path / "noisy"
  noisy.mkdir()
  rng = np.random.default_rng(0)
  for name in ("0.png", "1.png"):
    pixels = np.asarray(Image.open(pictures / name)).astype(float)
    degraded = np.clip(pixels + rng.normal(0, 60, pixels.shape), 0, 255)
    Image.fromarray(degraded.astype(np.uint8)).save(noisy / name)
  names = "\n".join(str(noisy / name) for name in ("1.png", "0.png"))
  listed = tmp_path / "names.txt"
  listed.write_text(names)
  with open(listed) as stdin:
    result = command(
      *(run, "-", f"--clean={pictures}", "--format=jsonl"),
      program=_PROGRAM,
      stdin=stdin,
      check=0,
    )
  told = [json.loads(line) for line in result.stdout.splitlines()]
  told = {pathlib.Path(one["file"]).name: one for one in told}
  assert list(told) == ["1.png", "0.png"]
  model = fidelity_jax.load(run)
  for name, one in told.items():
    expected = model(noisy / name, pictures / name)
    assert one["top"][0]["label"] == expected.top(1)[0][0][0]
    assert abs(one["mean_map"] - expected.fidelity_map.mean()) < 1e-5
  (pictures / "1.png").unlink()
  arguments = [run, noisy, f"--clean={pictures}", f"--out={tmp_path / 'out'}", "--full"]
  missing = command(*arguments, program=_PROGRAM, check=1)
  line = one_line(missing.stderr)
  assert "1 of 2 images" in line and "1.png: cannot be read" in line
  assert (tmp_path / "out" / "0.png.png").is_file()
  nowhere = command(run, noisy, "--clean=nowhere", program=_PROGRAM, check=2)
  assert "--clean=nowhere: there is no such folder" in one_line(nowhere.stderr)


@pytest.mark.slow
def test_what_changed_is_predicted_anew(toy_estimated, pictures, tmp_path, capsys):
  """By content: neither the name nor the place tells what an image is."""
  run, out = toy_estimated / "pretrained", tmp_path / "out"
  (pictures / "broken.jpg").unlink()

  def predicted(folder, *more):
    arguments = [run, folder, f"--out={out}", "--format=jsonl", *more]
    assert predict.main(list(map(str, arguments))) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

  before = predicted(pictures)
  (pictures / "0.png").write_bytes(encoded(photograph(60, 50, seed=99), format="PNG"))
  after = predicted(pictures)
  assert [a == b for a, b in zip(after, before, strict=True)] == [False] + [True] * 5
  moved = pictures.rename(tmp_path / "moved")
  times = {path: path.stat().st_mtime_ns for path in out.rglob("*.png.png")}
  again = predicted(moved)
  assert {path: path.stat().st_mtime_ns for path in times} == times
  for one, other in zip(again, after, strict=True):
    assert one["file"].startswith(str(moved))
    assert {**one, "file": 0} == {**other, "file": 0}


def test_what_a_run_cannot_do_is_refused_first(toy_estimated, pictures, refused):
  run = toy_estimated / "pretrained"
  refuse = lambda words, *more: refused([run, pictures, *more], 2, words, predict.main)
  refuse("leave --clean out", f"--clean={pictures}")
  refuse("--top=0", "--top=0")
  refuse("say where with --out", "--full")
  refuse("has the images in it", f"--out={pictures}")
  assert not (pictures / "predict.json").exists()


def test_a_reader_that_has_seen_enough(toy_estimated, pictures, background):
  """`| head -1`: no error."""
  arguments = [toy_estimated / "pretrained", *[pictures / "0.png"] * 3]
  process = background(*arguments, program=_PROGRAM)
  process.stdout.close()
  assert process.wait(timeout=300) == 0
  assert "failed" not in process.stderr.read()


def test_names_on_standard_input_may_be_any(tmp_path, monkeypatch):
  """In any encoding, with any line ends, of files that are not there."""
  name = os.fsdecode(b"caf\xe9.png")
  stream = io.TextIOWrapper(io.BytesIO(b"a/1.png\r\ncaf\xe9.png\n\nb/1.png"))
  monkeypatch.setattr(predict.sys, "stdin", stream)
  assert [str(one.path) for one in predict.find(["-"])] == ["a/1.png", name, "b/1.png"]


def test_tables_are_as_wide_as_they_need():
  named = lambda name: photos.Found(pathlib.Path(name), name)
  write = predict._as_table([named("a.png"), named("b" * 60 + ".png")])
  top = [{"label": "cat", "probability": 0.5}]
  header = write(None)
  first = write({"file": "b" * 60 + ".png", "top": top, "on_input": top[0]})
  second = write({"file": "a.png", "mean_map": 0.1})
  assert (
    header.split() == "image prediction frozen, on restored frozen, on input".split()
  )
  assert first.startswith("…bbb") and " 50% cat" in first and len(first) < 130
  assert second.split() == ["a.png", "-", "-", "-"]


def test_images_that_cannot_be_told_apart(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(errors.UsageError, match="no image is named"):
    predict.find([])
  with pytest.raises(errors.UsageError, match=r"nothing\.png: no such file"):
    predict.find(["nothing.png"])
  for name in ("a", "b"):
    (tmp_path / name).mkdir()
    (tmp_path / name / "1.png").write_bytes(b"")
  assert len(predict.find(["a/1.png", "b/1.png"])) == 2
  with pytest.raises(errors.UsageError, match="would have one picture"):
    predict.find(["a/1.png", "b/1.png"], tmp_path / "out")
