"""Which checkpoints are kept, and that what is read is what was written."""

import jax.numpy as jnp
import numpy as np
import pytest

from fidelity_jax import checkpoints, errors


def _save(saved, step, score):
  variables = {"params": {"x": jnp.full(4, step, jnp.float32)}}
  training = {"opt_state": jnp.full(4, -step, jnp.float32)}
  saved.save(step, variables, training, {"step": step, "score": score}, score)


def _steps(directory):
  return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit())


def test_the_latest_and_the_best_are_kept(tmp_path):
  saved = checkpoints.Checkpoints(tmp_path)
  for step, score in ((1, 0.5), (2, 0.9), (3, 0.9), (4, None), (5, 0.7)):
    _save(saved, step, score)
  saved.close()
  # Of the two best, the earlier; the latest, whatever its score.
  assert _steps(tmp_path) == [2, 5]


def test_round_trip(tmp_path):
  saved = checkpoints.Checkpoints(tmp_path)
  assert saved.latest() is None
  _save(saved, 3, 0.25)
  saved.close()
  again = checkpoints.Checkpoints(tmp_path)
  assert again.latest() == 3
  like = jnp.zeros(4)
  variables, training, progress = again.restore(
    3, {"params": {"x": like}}, {"opt_state": like}
  )
  again.close()
  np.testing.assert_array_equal(variables["params"]["x"], np.full(4, 3))
  np.testing.assert_array_equal(training["opt_state"], np.full(4, -3))
  assert progress == {"step": 3, "score": 0.25}


def test_a_damaged_checkpoint_is_named(tmp_path):
  directory = tmp_path / "stage" / "checkpoints"
  saved = checkpoints.Checkpoints(directory)
  _save(saved, 3, 0.25)
  saved.close()
  for path in (directory / "3" / "variables").rglob("*"):
    if path.is_file():
      path.write_bytes(b"")
  again = checkpoints.Checkpoints(directory)
  like = jnp.zeros(4)
  with pytest.raises(
    errors.RunError, match=r"is damaged .* delete the directory .*/stage"
  ):
    again.restore(3, {"params": {"x": like}}, {"opt_state": like})
  again.close()
