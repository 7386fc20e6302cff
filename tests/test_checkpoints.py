"""Which checkpoints are kept, and that what is read is what was written."""

import contextlib
import os
import random
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fidelity_jax import checkpoints, errors

LIKE = ({"params": {"x": jnp.zeros(4)}}, {"opt_state": jnp.zeros(4)})


def _save(saved, step, best):
  variables = {"params": {"x": jnp.full(4, step, jnp.float32)}}
  training = {"opt_state": jnp.full(4, -step, jnp.float32)}
  records = [{"step": step, "loss": 0.1 * step}]
  saved.save(step, variables, training, checkpoints.Progress(best, 0.5, records))


def _steps(directory):
  return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit())


def test_the_latest_and_the_best_are_kept(tmp_path):
  saved = checkpoints.Checkpoints(tmp_path)
  for step, best in ((1, 1), (2, 2), (3, 2), (4, 2), (5, 2)):
    _save(saved, step, best)
  saved.close()
  assert _steps(tmp_path) == [2, 5]


def test_the_best_outlives_a_stop(tmp_path):
  """Which is the best is not known from memory alone."""
  saved = checkpoints.Checkpoints(tmp_path)
  _save(saved, 1, 1)
  _save(saved, 2, 1)
  saved.close()
  for step in (3, 4):
    again = checkpoints.Checkpoints(tmp_path)
    again.restore(step - 1, *LIKE)
    _save(again, step, 1)
    again.close()
    assert _steps(tmp_path) == [1, step]
  last = checkpoints.Checkpoints(tmp_path)
  last.check_product(1, LIKE[0])
  last.close()


def test_a_best_checkpoint_that_is_gone_is_noticed(tmp_path):
  """As earlier versions left it behind."""
  directory = tmp_path / "stage" / "checkpoints"
  saved = checkpoints.Checkpoints(directory)
  _save(saved, 1, 1)
  _save(saved, 2, 1)
  saved.close()
  shutil.rmtree(directory / "1")
  again = checkpoints.Checkpoints(directory)
  with pytest.raises(errors.RunError, match=r"best checkpoint .*/1 is missing.*delete"):
    again.restore(2, *LIKE)
  with pytest.raises(errors.RunError, match="damaged"):
    again.check_product(1, LIKE[0])
  again.close()


def test_round_trip(tmp_path):
  saved = checkpoints.Checkpoints(tmp_path)
  assert saved.latest() is None
  _save(saved, 3, 3)
  saved.close()
  again = checkpoints.Checkpoints(tmp_path)
  assert again.latest() == 3
  variables, training, progress = again.restore(3, *LIKE)
  again.close()
  np.testing.assert_array_equal(variables["params"]["x"], np.full(4, 3))
  np.testing.assert_array_equal(training["opt_state"], np.full(4, -3))
  assert (progress.best_step, progress.best_score) == (3, 0.5)
  assert progress.records == [{"step": 3, "loss": 0.1 * 3}]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A stage with a checkpoint whose arrays lie in files of their own."""
  stage = tmp_path_factory.mktemp("whole") / "stage"
  saved = checkpoints.Checkpoints(stage / "checkpoints")
  values = np.random.default_rng(0).normal(size=4096).astype(np.float32)
  tree = {"x": jnp.asarray(values)}
  progress = checkpoints.Progress(3, 0.5, [{"step": 3, "loss": 0.25}])
  saved.save(3, {"params": tree}, {"opt_state": tree}, progress)
  saved.close()
  return stage


def _restore(stage):
  saved = checkpoints.Checkpoints(stage / "checkpoints")
  tree = {"x": jnp.zeros(4096)}
  try:
    return saved.restore(3, {"params": tree}, {"opt_state": tree})
  finally:
    saved.close()


def test_every_flipped_bit_is_noticed_or_changes_nothing(whole, tmp_path):
  expected = _restore(whole)
  files = [p for p in (whole / "checkpoints").rglob("*") if p.is_file()]
  # OCDBT draws names anew each time.
  files.sort(key=lambda p: (p.stat().st_size, p.parent))
  draws, noticed = random.Random(0), 0
  # Each once, and the largest, in which the arrays lie, more often.
  for number, chosen in enumerate(
    [p for p in files if p.stat().st_size] + files[-2:] * 8
  ):
    stage = shutil.copytree(whole, tmp_path / str(number) / "stage")
    path = stage / chosen.relative_to(whole)
    content = bytearray(path.read_bytes())
    content[draws.randrange(len(content))] ^= 1 << draws.randrange(8)
    path.write_bytes(content)
    try:
      found = _restore(stage)
    except errors.RunError as error:
      noticed += 1
      assert "\n" not in str(error)
      assert f"delete the directory {stage} " in str(error)
    else:
      jax.tree.map(np.testing.assert_array_equal, found[:2], expected[:2])
      assert found[2] == expected[2]
  assert noticed > 16


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b'{"best_step": "x"}'])
def test_damaged_progress_is_named(whole, tmp_path, content):
  stage = shutil.copytree(whole, tmp_path / "stage")
  path = stage / "checkpoints" / "3" / "progress" / "metadata"
  path.write_bytes(content)
  with pytest.raises(errors.RunError, match=r"3.* is damaged.*delete the directory"):
    _restore(stage)


def test_what_cannot_be_read_is_not_called_damaged(whole, tmp_path):
  """Its deletion is not proposed; TensorStore's own words for it are understood."""
  stage = shutil.copytree(whole, tmp_path / "stage")
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  saved = checkpoints.Checkpoints(stage / "checkpoints")
  tree = {"x": jnp.zeros(4096)}
  highest = max(map(int, os.listdir("/proc/self/fd")))
  resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
  holes = []
  with contextlib.suppress(OSError):
    while True:
      holes.append(os.dup(0))
  try:
    with pytest.raises(errors.RunError, match=r"failed: .*Too many open") as caught:
      saved.restore(3, {"params": tree}, {"opt_state": tree})
  finally:
    for hole in holes:
      os.close(hole)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
  assert "delete" not in str(caught.value) and "damaged" not in str(caught.value)
  saved.close()
  _restore(stage)


def test_a_damaged_best_checkpoint_is_noticed_on_resuming(tmp_path):
  saved = checkpoints.Checkpoints(tmp_path / "stage" / "checkpoints")
  _save(saved, 1, 1)
  _save(saved, 2, 1)
  saved.close()
  for path in (tmp_path / "stage/checkpoints/1/variables").rglob("*"):
    if path.is_file():
      path.write_bytes(b"")
  again = checkpoints.Checkpoints(tmp_path / "stage" / "checkpoints")
  with pytest.raises(errors.RunError, match=r"checkpoints/1.* is damaged"):
    again.restore(2, *LIKE)
  again.close()


def test_a_product_that_is_not_finite_is_none(tmp_path):
  saved = checkpoints.Checkpoints(tmp_path / "stage" / "checkpoints")
  variables = {"params": {"x": jnp.array([1.0, jnp.nan])}}
  saved.save(0, variables, {"a": jnp.zeros(1)}, checkpoints.Progress(0, 0.5))
  saved.wait()
  with pytest.raises(errors.RunError, match="not finite, in params/x"):
    saved.check_product(0, variables)
  saved.close()


def test_a_directory_that_is_removed_is_noticed(tmp_path):
  saved = checkpoints.Checkpoints(tmp_path / "stage" / "checkpoints")
  shutil.rmtree(tmp_path / "stage")
  with pytest.raises(errors.RunError, match="was removed"):
    _save(saved, 1, 1)
  assert not (tmp_path / "stage").exists()
