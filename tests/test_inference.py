"""Models on images of any kind: the run's own logits, whatever comes in."""

import concurrent.futures
import itertools
import os

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
import torch_reference
from conftest import experiment, flip
from PIL import Image
from test_data_images import encoded, photograph
from test_parity import TinyResNet, reference

import fidelity_jax
from fidelity_jax import data, errors, inference, port, runs

_LOGITS = {
  "logits": "pretrained-restored-ensemble",
  "restored_logits": "classifier-restored",
  "degraded_logits": "classifier",
}


@pytest.fixture(scope="module")
def model(toy_estimated) -> inference.Model:
  return fidelity_jax.load(toy_estimated / "pretrained")


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
  return photograph(32, 32, seed=3)


def test_logits_are_those_of_the_evaluation(model, toy_estimated):
  """Of the experiment's own test images, all methods."""
  test = data.load(model.run.planned.config.dataset, "test")
  pixels = [test.picture(i).pixels() for i in range(len(test))]
  assert len(pixels) > 32
  result = model(pixels)
  path = experiment(toy_estimated, "pretrained") / "predictions-pretrained.npz"
  with np.load(path) as kept:
    assert kept["images"].tolist() == list(test.keys)
    for name, method in _LOGITS.items():
      (expected,) = kept[f"{method}/clean"]
      assert np.ptp(expected) > 0.1
      np.testing.assert_allclose(getattr(result, name), expected, atol=1e-5)
  assert result.class_names == test.class_names
  assert result.restored.shape == result.degraded.shape == (len(test), 32, 32, 3)
  assert result.restored.min() >= 0 and result.restored.max() <= 1
  assert result.fidelity_map.shape == (len(test), 32, 32, 3)
  assert result.confidence.shape == (len(test), 32, 32, 1)
  probabilities = result.probabilities
  np.testing.assert_allclose(probabilities.sum(-1), 1, rtol=1e-5)
  best = result.top(3)
  assert [len(one) for one in best] == [3] * len(test)
  for row, one in zip(probabilities, best, strict=True):
    order = np.argsort(-row)[:3]
    assert [test.class_names.index(name) for name, _ in one] == order.tolist()
    np.testing.assert_allclose([p for _, p in one], row[order], rtol=1e-6)


def test_an_image_is_the_same_however_it_comes(model, photo, tmp_path):
  path = tmp_path / "photo.png"
  path.write_bytes(encoded(photo, format="PNG"))
  expected = model(photo)
  assert len(expected) == 1
  as_float = photo.astype(np.float32) / 255
  forms = [
    path,
    str(path),
    Image.fromarray(photo),
    as_float,
    as_float.astype(np.float64),
    jax.numpy.asarray(photo),
    photo.astype(np.uint16) * 257,
    [photo],
    photo[None],
  ]
  for form in forms:
    np.testing.assert_allclose(model(form).logits, expected.logits, atol=1e-5)
  grey = photo[..., 0]
  three = np.repeat(grey[..., None], 3, -1)
  for form in (grey, grey[..., None], Image.fromarray(grey)):
    np.testing.assert_allclose(model(form).logits, model(three).logits, atol=1e-5)


@pytest.mark.parametrize("size", [(32, 47), (90, 61), (20, 25), (17, 200)])
def test_images_of_any_size_are_cropped_as_in_evaluation(model, size):
  pixels = photograph(*size, seed=1)
  square = np.empty((32, 32, 3), np.uint8)
  data.crops.central(pixels, square)
  expected = model(square)
  result = model(pixels)
  np.testing.assert_array_equal(result.degraded, expected.degraded)
  np.testing.assert_array_equal(result.logits, expected.logits)
  # In floating point without rounding to grey levels.
  as_float = model(pixels.astype(np.float32) / 255).degraded
  apart = np.abs(as_float - result.degraded).max()
  # What is cut and not resized is the same.
  assert apart < 1.6 / 255 and (apart > 0) == (min(size) != 32)


@pytest.mark.slow
def test_batches_of_many_lengths_share_a_few_programs(toy_estimated, photo):
  model = fidelity_jax.load(toy_estimated / "pretrained")
  compiled = []
  listen = lambda name, *_, **__: compiled.append(name)
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    several = np.stack([np.roll(photo, i, 0) for i in range(37)])
    expected = model(several).logits
    for count in (3, 4, 6, 7, 31, 33, 35):
      np.testing.assert_allclose(
        model(several[:count]).logits, expected[:count], atol=1e-5
      )
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  programs = [name for name in compiled if name.endswith("backend_compile_duration")]
  # Of 32, 4 and 8, and of 1 and 4 where more than 32 are cut.
  assert 0 < len(programs) <= 4


def test_threads_may_call_it_at_a_time(model, photo):
  several = [np.roll(photo, i, 1) for i in range(16)]
  expected = [model(one).logits for one in several]
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    for _ in range(3):
      found = list(pool.map(lambda one: model(one).logits, several))
      np.testing.assert_array_equal(found, expected)


def test_results_are_sequences(model, photo):
  several = [np.roll(photo, i, 0) for i in range(3)]
  result = model(several)
  assert [len(one) for one in result] == [1, 1, 1]
  for index in (1, -2, np.int64(1)):
    np.testing.assert_array_equal(result[index].logits, result.logits[1:2])
  np.testing.assert_array_equal(result[1:].restored, result.restored[1:])
  with pytest.raises(IndexError, match="3 images"):
    result[3]
  with pytest.raises(errors.UsageError, match="one class or more"):
    result.top(0)


def test_a_line_of_pixels_is_no_large_image(model):
  """Enlarged whole it would take gigabytes; its square is of one line's middle."""
  line = np.zeros((1, 400_000, 3), np.uint8)
  line[:, 199_990:200_010] = 255
  assert model(line).degraded.mean() > 0.9


def test_streams_are_in_order_and_pass_over_what_is_broken(model, tmp_path):
  paths = []
  for i in range(21):
    path = tmp_path / f"{i}.png"
    path.write_bytes(encoded(photograph(30 + i, 40, seed=i), format="PNG"))
    paths.append(path)
  paths[4].write_bytes(b"no image")
  paths.insert(9, tmp_path / "missing.png")
  found = list(model.stream(paths, batch_size=4))
  assert [one.path for one in found] == list(map(str, paths))
  for number, one in enumerate(found):
    if number in (4, 9):
      assert one.result is None and str(paths[number]) in one.problem
    else:
      assert one.problem is None and len(one.result) == 1
      np.testing.assert_allclose(
        one.result.logits, model(paths[number]).logits, atol=1e-5
      )


def test_streams_read_no_further_ahead_than_they_need(model, photo, tmp_path):
  path = tmp_path / "photo.png"
  path.write_bytes(encoded(photo, format="PNG"))
  asked = itertools.count()
  names = (str(path) for _ in iter(lambda: next(asked), 10_000))
  stream = model.stream(names, batch_size=4)
  for _ in range(20):
    next(stream)
  stream.close()
  assert next(asked) < 60


def test_what_is_no_image_is_refused(model, photo, tmp_path):
  bad = tmp_path / "bad.png"
  bad.write_bytes(encoded(photo, format="PNG")[:300])
  cases = {
    "shape [H, W, 3]": np.zeros((4, 4, 5), np.uint8),
    "not [3]": np.zeros(3, np.uint8),
    "int64": np.zeros((4, 4, 3), np.int64),
    "to 255": photo.astype(np.float32) / photo.max() * 255,
    "nan": np.full((4, 4, 3), np.nan),
    "no images": [],
    "a directory": tmp_path,
    "bad.png: cannot be read": bad,
    "nothing.png: cannot be read": tmp_path / "nothing.png",
  }
  for words, image in cases.items():
    with pytest.raises(errors.UsageError, match=words.replace("[", r"\[")):
      model(image)


def test_an_oracle_needs_clean_images(toy_run, photo):
  model = fidelity_jax.load(toy_run / "oracle")
  noise = np.random.default_rng(0).normal(0, 0.3, photo.shape)
  noisy = np.clip(photo / 255 + noise, 0, 1).astype(np.float32)
  with pytest.raises(errors.UsageError, match="give these too"):
    model(noisy)
  with pytest.raises(errors.UsageError, match="2 clean ones"):
    model(noisy, [photo, photo])
  with pytest.raises(errors.UsageError, match="31x32 pixels, the degraded one 32x32"):
    model(noisy, photo[:, 1:])
  with pytest.raises(errors.UsageError, match="give these too"):
    model.stream(["photo.png"])
  result = model(noisy, photo)
  true = np.abs(result.restored[0] - photo / np.float32(255))
  np.testing.assert_allclose(result.fidelity_map[0], true, atol=1e-6)
  assert not np.allclose(result.logits, model(noisy, noisy).logits, atol=1e-4)


def test_a_run_needs_only_its_directories(toy_estimated, tmp_path, photo, model):
  """Moved, its datasets gone; an unfinished or damaged one is refused."""
  moved = tmp_path / "moved"
  moved.mkdir()
  for path in toy_estimated.iterdir():
    if path.name != "measurements":
      os.symlink(path, moved / path.name)
  again = fidelity_jax.load(moved / "pretrained")
  np.testing.assert_array_equal(again(photo).logits, model(photo).logits)
  assert again.digest == model.digest


def test_what_is_damaged_or_missing_is_named(toy_copy, tmp_path):
  place = experiment(toy_copy)
  (stage,) = toy_copy.glob("restorer-*")
  with pytest.raises(errors.UsageError, match="neither an experiment's directory"):
    runs.find(toy_copy)
  with pytest.raises(errors.UsageError, match=f"there are .*{place.name}"):
    runs.find(toy_copy / "orcale")
  with pytest.raises(errors.UsageError, match="there is no"):
    runs.find(tmp_path / "nothing" / "there")
  (stage / "finished.json").rename(stage / "aside")
  with pytest.raises(errors.RunError, match=f"{stage.name} is not finished"):
    runs.find(place)
  (stage / "aside").rename(stage / "finished.json")
  assert runs.find(place).name == "oracle"
  flip(place / "experiment.json")
  with pytest.raises(errors.RunError, match="damaged"):
    runs.find(place)


def test_one_name_for_several_is_refused(toy_copy):
  place = experiment(toy_copy)
  other = place.with_name("oracle-00000000")
  other.mkdir()
  (other / "experiment.json").write_bytes((place / "experiment.json").read_bytes())
  with pytest.raises(errors.UsageError, match="may be several"):
    runs.find(toy_copy / "oracle")
  assert runs.find(place).digest == runs.find(other).digest


@pytest.mark.slow
def test_an_authors_checkpoint_needs_no_experiment(tmp_path):
  """The whole of it, and its parts: logits are PyTorch's."""
  options = dict(num_convs=2, channels=4, ratio=2.0, ensemble=True)
  theirs = reference(TinyResNet(num_classes=16), 8, **options)
  path = tmp_path / "given.safetensors"
  state = torch_reference.state_dict(theirs)
  safetensors.numpy.save_file(state, path)
  nchw = lambda x: torch.tensor(x, dtype=torch.float64).permute(0, 3, 1, 2)
  rng = np.random.default_rng(0)
  clean, degraded = rng.uniform(size=(2, 3, 224, 224, 3)).astype(np.float32)
  with torch.no_grad():
    expected = theirs(*map(nchw, (degraded, clean))).numpy()
  port.save(port.load(path), tmp_path / "ported", str(path))
  for place in (path, tmp_path / "ported"):
    model = fidelity_jax.load(place)
    assert model.needs_clean and model.class_names == tuple(map(str, range(16)))
    result = model(degraded, clean)
    np.testing.assert_allclose(result.logits, expected, atol=1e-4 * np.ptp(expected))
  restorer = {k: v for k, v in state.items() if k.startswith("restoration.")}
  safetensors.numpy.save_file(restorer, tmp_path / "restorer.safetensors")
  alone = fidelity_jax.load(tmp_path / "restorer.safetensors")(degraded)
  np.testing.assert_allclose(alone.restored, result.restored, atol=1e-5)
  assert alone.logits is None and alone.class_names == ()
  with pytest.raises(errors.UsageError, match="has no classifier"):
    alone.top()
  # What the file does not tell.
  l2 = fidelity_jax.load(path, map_name="l2")(degraded, clean)
  np.testing.assert_allclose(l2.fidelity_map, result.fidelity_map**2, atol=1e-6)
  without = {k: v for k, v in state.items() if k not in restorer}
  safetensors.numpy.save_file(without, tmp_path / "without.safetensors")
  with pytest.raises(errors.UsageError, match="name the whole checkpoint"):
    fidelity_jax.load(tmp_path / "without.safetensors")


def test_whole_images_are_what_the_networks_make_of_them(model, toy_run):
  """Windows or not, of any size; restored and mapped as by the networks themselves."""
  pixels = photograph(75, 130, seed=5)
  seen = pixels[None].astype(np.float32) / 255
  method, variables = model.run.method, model.run.variables
  restored = method.restore(variables, seen)
  expected = method.fidelity_map(variables, seen, restored, None)
  result = model.whole(pixels)
  np.testing.assert_allclose(result.restored, restored, atol=1e-5)
  np.testing.assert_allclose(result.fidelity_map, expected, atol=1e-5)
  assert result.confidence.shape == (1, 75, 130, 1) and result.logits is None
  assert np.abs(expected).max() > 1e-3
  oracle = fidelity_jax.load(toy_run / "oracle")
  true = np.abs(oracle.whole(pixels, pixels).restored - seen)
  found = oracle.whole(pixels, pixels).fidelity_map
  np.testing.assert_allclose(found, true, atol=1e-6)
  with pytest.raises(errors.UsageError, match="130x74 pixels, the degraded one 130x75"):
    oracle.whole(pixels, pixels[1:])
  with pytest.raises(errors.UsageError, match="give these too"):
    oracle.whole(pixels)
