"""The training loop's own parts; whole runs are in test_main and test_kills."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training
from conftest import ROOT

from fidelity_jax import data, errors, sharding, train


@pytest.fixture(scope="module")
def make_trainer(tmp_path_factory):
  """Returns a function of validation_rounds that prepares to train a restorer."""
  place = tmp_path_factory.mktemp
  make = lambda rounds: training.restorer(
    place("stage"), None, 40, 64, validation_rounds=rounds
  )
  return make


def test_validation_is_the_mean_over_rounds_of_fixed_degradations(make_trainer):
  trainer = make_trainer(3)
  state = trainer.initial_state()
  whole = data.eval_iterator(
    trainer.validation_data, image_size=64, batch_size=len(trainer.validation_data)
  )
  batch = jax.tree.map(jnp.asarray, next(iter(whole)))
  losses = []
  for draw in range(3):
    at = batch | {"epoch": jnp.full_like(batch["epoch"], draw)}
    loss, _ = trainer.task.loss(
      state.params, {}, (), at, train=False, key=jax.random.key(0)
    )
    losses.append(float(loss))
  assert len(set(losses)) == 3
  first, again = (trainer.validate(state) for _ in range(2))
  assert first == again
  np.testing.assert_allclose(first["validation/loss"], np.mean(losses), rtol=1e-5)
  once = make_trainer(1).validate(state)
  np.testing.assert_allclose(once["validation/loss"], losses[0], rtol=1e-5)


_SHARDED = """
import pathlib, sys, training
from fidelity_jax import data
trainer = training.restorer(pathlib.Path(sys.argv[1]), None, 2, 64)
state = trainer.initial_state()
batch = next(data.prefetch_to_device(trainer._batches(0), trainer.batch_sharding))
step = trainer.train_step.lower(state, trainer.frozen, batch).compile()
print(trainer.validate(state)["validation/loss"])
print("f32[2,32,32,4]" in step.as_text(), "all-reduce" in step.as_text())
"""


@pytest.mark.slow
def test_patches_are_split_where_images_are_too_few(command, make_trainer, tmp_path):
  """Two images of four patches each, on four devices."""
  flags = "--xla_force_host_platform_device_count=4"
  program = ("-c", _SHARDED)
  path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
  env = {"XLA_FLAGS": flags, "PYTHONPATH": path}
  result = command(tmp_path, program=program, env=env, check=0)
  loss, *compiled = result.stdout.split()
  # Each device convolves two patches.
  assert compiled == ["True", "True"]
  trainer = make_trainer(1)
  alone = trainer.validate(trainer.initial_state())["validation/loss"]
  np.testing.assert_allclose(float(loss), alone, rtol=1e-5)


def test_a_validation_batch_is_bounded_in_patches(make_trainer):
  trainer = make_trainer(1)
  assert trainer._validation_size == 40
  for images, patches, expected in ((8, 1, 32), (64, 1, 64), (2, 64, 2), (8, 4, 32)):
    trainer.settings = dataclasses.replace(trainer.settings, images_per_step=images)
    trainer.task = dataclasses.replace(trainer.task, patches_per_image=patches)
    del trainer.__dict__["_validation_size"]
    assert trainer._validation_size == expected


def test_the_whole_batch_of_a_loss_that_is_not_finite_is_named(
  make_trainer, monkeypatch
):
  """On each of several hosts, which reads a part of it."""
  trainer = make_trainer(1)
  with trainer._batches(1) as batches:
    index = next(batches)["index"]
  assert len(set(index)) == 40
  state = train.TrainState(
    step=jnp.int32(3),
    params={},
    model_state={},
    opt_state=(),
    averages={},
    bad_step=jnp.int32(1),
  )
  part = {"shard_index": 1, "shard_count": 2}
  monkeypatch.setattr(sharding, "host_shard", lambda batch: part)
  with pytest.raises(errors.RunError, match="not finite at step 2") as caught:
    trainer._check_finite(state)
  named = str(caught.value).rpartition("that batch: ")[2].split(", ")
  assert named == [trainer.train_data.keys[i] for i in index]
