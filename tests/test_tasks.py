"""What trains, what does not, and what the losses are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from fidelity_jax import degradations, fidelity, models, pipeline, tasks
from fidelity_jax.tasks import base

SIZE = 32


def _batch(count=4):
  rng = np.random.default_rng(0)
  return {
    "image": jnp.asarray(rng.integers(0, 256, (count, SIZE, SIZE, 3)), jnp.uint8),
    "label": jnp.arange(count, dtype=jnp.int32) % 3,
    "index": jnp.arange(10, 10 + count, dtype=jnp.int32),
    "epoch": jnp.full(count, 2, jnp.int32),
  }


def _inputs(**kwargs):
  return tasks.Inputs(degradations.from_config("awgn"), 0, "test", **kwargs)


@pytest.fixture(scope="module")
def networks():
  """Returns modules and variables of a tiny method, everything random."""
  config = {"name": "resnet", "stage_sizes": (1, 1), "width": 8, "block": "basic"}
  classifier = models.create(config, 3)
  images = jnp.zeros((1, SIZE, SIZE, 3))
  key = jax.random.key(0)
  folded, frozen = models.fold(classifier, jax.jit(classifier.init)(key, images))
  stack = models.DnCNN(depth=3, width=4)
  method = pipeline.Method(
    classifier=folded,
    restorer=stack,
    calibration=models.Calibration(classifier.feature_size, classifier.num_taps),
    ensemble=models.Ensemble(classifier.feature_size),
    estimator=stack,
  )
  variables = {
    "classifier": frozen,
    "restorer": stack.init(jax.random.key(1), images),
    "estimator": stack.init(jax.random.key(2), images),
    "calibration": method.init_calibration(jax.random.key(3), (SIZE, SIZE)),
    "ensemble": method.init_ensemble(jax.random.key(4)),
  }
  return classifier, method, variables


def _gradients(task, batch):
  params, state = task.init(jax.random.key(5), task.initial)
  loss = lambda p: task.loss(
    p, state, task.frozen, batch, train=True, key=jax.random.key(6)
  )
  gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
  (value, (_, metrics)), grads = gradient(params)
  assert np.isfinite(value)
  np.testing.assert_allclose(value, np.mean(metrics["loss"]), rtol=1e-5)
  return params, grads


def _assert_all_reached(grads):
  for path, grad in jax.tree_util.tree_leaves_with_path(grads):
    assert np.any(np.asarray(grad)), jax.tree_util.keystr(path)


def _without(method, variables, *names):
  gone = {n: None for n in names if n in ("ensemble", "estimator")}
  kept = {k: v for k, v in variables.items() if k not in names}
  return pipeline.Method(**vars(method) | gone), kept


@pytest.mark.parametrize(
  ("mode", "trained"),
  [
    ("oracle", {"calibration"}),
    ("pretrained", {"calibration"}),
    ("end_to_end", {"calibration", "estimator"}),
    ("ensemble", {"ensemble"}),
  ],
)
def test_gradients_reach_exactly_what_trains(networks, mode, trained):
  _, method, variables = networks
  make, initial = tasks.CalibrationTask, {}
  if mode == "oracle":
    method, frozen = _without(method, variables, "ensemble", "estimator", "calibration")
  elif mode == "pretrained":
    method, frozen = _without(method, variables, "ensemble", "calibration")
  elif mode == "end_to_end":
    method, frozen = _without(method, variables, "ensemble", "calibration")
    initial = {"estimator": frozen.pop("estimator")}
  else:
    make = tasks.EnsembleTask
    frozen = {k: v for k, v in variables.items() if k != "ensemble"}
  task = make(
    method=method,
    inputs=_inputs(),
    image_size=SIZE,
    label_smoothing=0.1,
    frozen=frozen,
    initial=initial,
  )
  params, grads = _gradients(task, _batch())
  assert set(params) == trained
  assert not trained & set(task.frozen)
  _assert_all_reached(grads)
  if mode == "end_to_end":
    jax.tree.map(
      np.testing.assert_array_equal,
      params["estimator"],
      variables["estimator"]["params"],
    )


def test_rematerialization_changes_memory_not_gradients(networks):
  _, method, variables = networks
  gradients = []
  for rematerialize in (False, True):
    changed = pipeline.Method(
      **vars(method) | {"ensemble": None, "rematerialize": rematerialize}
    )
    frozen = {k: variables[k] for k in ("classifier", "restorer")}
    task = tasks.CalibrationTask(
      method=changed,
      inputs=_inputs(),
      image_size=SIZE,
      label_smoothing=0.1,
      frozen=frozen,
      initial={"estimator": variables["estimator"]},
    )
    gradients.append(_gradients(task, _batch())[1])
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)
  jax.tree.map(close, *gradients)


@pytest.mark.parametrize("source", ["clean", "degraded", "restored"])
def test_classification_trains_the_whole_network(networks, source):
  classifier, _, variables = networks
  task = tasks.ClassificationTask(
    classifier=classifier,
    inputs=_inputs(),
    source=source,
    image_size=SIZE,
    restorer=models.DnCNN(depth=3, width=4),
    frozen={"restorer": variables["restorer"]},
  )
  _, grads = _gradients(task, _batch())
  _assert_all_reached(grads)


def test_restoration_and_estimation_work_on_patches(networks):
  _, method, variables = networks
  inputs = _inputs(patch_size=20, patch_stride=10)
  task = tasks.RestorationTask(
    restorer=method.restorer, inputs=inputs, patches_per_image=9
  )
  params, grads = _gradients(task, _batch())
  _assert_all_reached(grads)
  _, (_, metrics) = task.loss(
    params, {}, (), _batch(), train=False, key=jax.random.key(0)
  )
  assert metrics["psnr_gain"].shape == (4 * 9,)
  task = tasks.EstimationTask(
    estimator=method.restorer,
    restorer=method.restorer,
    inputs=inputs,
    patches_per_image=9,
    map_kind="l1",
    estimator_input="degraded",
    frozen={"restorer": variables["restorer"]},
  )
  _, grads = _gradients(task, _batch())
  _assert_all_reached(grads)


def test_the_estimators_target_is_the_oracle_map(networks):
  _, method, variables = networks
  task = tasks.EstimationTask(
    estimator=method.restorer,
    restorer=method.restorer,
    inputs=_inputs(),
    patches_per_image=1,
    map_kind="l2",
    estimator_input="restored",
    frozen={"restorer": variables["restorer"]},
  )
  params, _ = task.init(jax.random.key(0), None)
  batch = _batch()
  _, (_, metrics) = task.loss(
    params, {}, task.frozen, batch, train=False, key=jax.random.key(0)
  )
  clean, degraded = task.inputs(batch, train=False)
  restored = pipeline.restore(method.restorer, variables["restorer"], degraded)
  estimate = method.restorer.apply({"params": params}, restored)
  target = fidelity.oracle_map(restored, clean, "l2")
  expected = np.abs(np.asarray(estimate - target)).mean((1, 2, 3))
  np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)


def test_inputs_depend_on_seed_epoch_and_index_alone():
  inputs, batch = _inputs(patch_size=16, patch_stride=16), _batch(6)
  clean, degraded = inputs(batch, train=True)
  some = {name: value[3:5] for name, value in batch.items()}
  clean_some, degraded_some = inputs(some, train=True)
  np.testing.assert_array_equal(clean[12:20], clean_some)
  np.testing.assert_array_equal(degraded[12:20], degraded_some)
  _, other_epoch = inputs(batch | {"epoch": batch["epoch"] + 1}, train=True)
  assert np.any(np.asarray(other_epoch != degraded))
  # Every patch has a level of its own.
  noise = np.asarray(jnp.std(degraded - clean, axis=(1, 2, 3)))
  assert len(set(noise.round(3))) > 3


def test_training_flips_half_of_the_examples_and_validation_none():
  batch = _batch(4)
  ramp = jnp.broadcast_to(
    jnp.arange(SIZE, dtype=jnp.uint8)[None, None, :, None], (64, SIZE, SIZE, 3)
  )
  batch = {
    "image": ramp,
    "label": jnp.zeros(64, jnp.int32),
    "index": jnp.arange(64, dtype=jnp.int32),
    "epoch": jnp.zeros(64, jnp.int32),
  }
  clean, _ = _inputs()(batch, train=True)
  flipped = np.asarray(clean[:, 0, 0, 0] > 0)
  assert 20 <= flipped.sum() <= 44
  clean, _ = _inputs()(batch, train=False)
  assert not np.any(np.asarray(clean[:, 0, 0, 0] > 0))


def test_smoothed_cross_entropy_gives_wrong_classes_eps_over_k_minus_1():
  logits = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
  labels = np.array([0, 3, 6, 1, 2])
  targets = np.full((5, 7), 0.1 / 6)
  targets[np.arange(5), labels] = 0.9
  reference = torch.nn.functional.cross_entropy(
    torch.tensor(logits), torch.tensor(targets), reduction="none"
  )
  found = base.smoothed_cross_entropy(jnp.asarray(logits), jnp.asarray(labels), 0.1)
  np.testing.assert_allclose(found, reference, rtol=1e-5)


def test_psnr():
  a = jnp.zeros((2, 4, 4, 3))
  b = a.at[1].set(0.1)
  np.testing.assert_allclose(base.psnr(a, b), [100.0, 20.0], rtol=1e-5)
