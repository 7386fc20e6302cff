"""What trains, what does not, and what the losses are."""

import dataclasses
import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch

from fidelity_jax import (
  checkpoints,
  cpu,
  degradations,
  fidelity,
  metrics,
  models,
  optimizer,
  tasks,
  train,
)
from fidelity_jax.method import Method
from fidelity_jax.tasks import base

SIZE = 32
# Compiles several times faster, and runs once.
_jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 1}
)


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
  folded, frozen = models.fold(classifier, _jit(classifier.init)(key, images))
  stack = models.DnCNN(depth=3, width=4)
  method = Method(
    classifier=folded,
    restorer=stack,
    calibration=models.Calibration(
      classifier.feature_size, classifier.num_taps, num_convs=2, channels=4
    ),
    ensemble=models.Ensemble(classifier.feature_size),
    estimator=stack,
  )
  variables = {
    "classifier": frozen,
    "restorer": _jit(stack.init)(jax.random.key(1), images),
    "estimator": _jit(stack.init)(jax.random.key(2), images),
    "calibration": _jit(lambda key: method.init_calibration(key, (SIZE, SIZE)))(key),
    "ensemble": _jit(method.init_ensemble)(jax.random.key(4)),
  }
  return classifier, method, variables


def _gradients(task, batch):
  params, state = _jit(task.init)(jax.random.key(5), task.initial)
  loss = lambda p: task.loss(
    p, state, task.frozen, batch, train=True, key=jax.random.key(6)
  )
  gradient = _jit(jax.value_and_grad(loss, has_aux=True))
  (value, (_, metrics)), grads = gradient(params)
  assert np.isfinite(value)
  np.testing.assert_allclose(value, np.mean(metrics["loss"]), rtol=1e-5)
  return params, grads


def _assert_all_reached(grads):
  for path, grad in jax.tree_util.tree_leaves_with_path(grads):
    assert np.any(np.asarray(grad)), jax.tree_util.keystr(path)


# What each mode trains; the rest of its networks is frozen.
# Slow to compile.
ESTIMATED = ("pretrained", "end_to_end")
TRAINED = {
  "oracle": {"calibration"},
  "pretrained": {"calibration"},
  "end_to_end": {"calibration", "estimator"},
  "ensemble": {"ensemble"},
}


def _task(networks, mode, **changes):
  """Returns the task of a mode, on the fixture's networks."""
  _, method, variables = networks
  absent = set() if mode == "ensemble" else {"ensemble"}
  absent |= {"estimator"} if mode == "oracle" else set()
  method = dataclasses.replace(method, **dict.fromkeys(absent), **changes)
  frozen = {k: v for k, v in variables.items() if k not in absent | TRAINED[mode]}
  make = tasks.EnsembleTask if mode == "ensemble" else tasks.CalibrationTask
  estimator = {"estimator": variables["estimator"]}
  return make(
    method=method,
    inputs=_inputs(),
    image_size=SIZE,
    label_smoothing=0.1,
    frozen=frozen,
    initial=estimator if mode == "end_to_end" else {},
    trained_parents=("estimator",) if mode == "end_to_end" else (),
  )


@pytest.mark.parametrize(
  ("mode", "seen"),
  [
    *((mode, "degraded") for mode in TRAINED if mode not in ESTIMATED),
    *(pytest.param(m, "degraded", marks=pytest.mark.slow) for m in ESTIMATED),
    pytest.param("end_to_end", "restored", marks=pytest.mark.slow),
  ],
)
def test_steps_move_exactly_what_trains(networks, mode, seen, tmp_path):
  """Two steps of the real step function, and what a checkpoint of them holds."""
  task = _task(networks, mode, estimator_input=seen)
  frozen = jax.tree.map(np.array, task.frozen)
  assert not TRAINED[mode] & set(frozen)
  same = functools.partial(jax.tree.map, np.testing.assert_array_equal)
  # Adam keeps two numbers a parameter: a frozen network's would be noticed.
  tx = optimizer.create("adam", lambda step: 1e-3)
  params, model_state = _jit(task.init)(jax.random.key(5), task.initial)
  assert set(params) == TRAINED[mode]
  if mode == "end_to_end":
    same(params["estimator"], networks[2]["estimator"]["params"])
  ones = jnp.ones(4)
  values = {"loss": ones, "accuracy": ones}
  before = state = train.TrainState(
    step=jnp.int32(0),
    params=params,
    model_state=model_state,
    opt_state=tx.init(params),
    averages=metrics.zeros_like(metrics.averages(values, ones)),
    bad_step=jnp.int32(-1),
  )
  step = _jit(train.make_train_step(task, tx, jax.random.key(6)))
  for _ in range(2):
    state = step(state, task.frozen, _batch())
  assert int(state.bad_step) == -1
  assert jax.tree.structure(state) == jax.tree.structure(before)
  for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
    old = functools.reduce(lambda tree, key: tree[key.key], path, params)
    assert np.any(np.asarray(leaf != old)), jax.tree_util.keystr(path)
  # No batch statistics; frozen networks bit for bit as they were.
  assert state.model_state == {}
  same(frozen, task.frozen)
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
  assert sum(leaf.size for leaf in moments) == 2 * count
  saved = checkpoints.Checkpoints(tmp_path)
  saved.save(2, state.variables(), state.training(), checkpoints.Progress())
  saved.close()
  size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
  with ocp.StandardCheckpointer() as checkpointer:
    stored = checkpointer.restore(checkpoints.variables_directory(tmp_path, 2))
  assert set(stored) == {"params"}
  same(stored["params"], state.params)
  # Three float32 a parameter, and some bytes of metadata for each array.
  assert size < 12 * count + 4096 * (10 + 3 * len(jax.tree.leaves(params)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["l1", "l2", "cosine"])
def test_bfloat16_agrees_with_float32(networks, kind):
  """Logits and gradients of the whole method, for accelerators' default dtype."""
  _, method, variables = networks
  channels = fidelity.map_channels(kind)
  small = lambda dtype: models.DnCNN(3, 4, out_channels=channels, dtype=dtype)
  estimator = _jit(small(jnp.float32).init)(jax.random.key(2), jnp.zeros((1, 8, 8, 3)))
  found = []
  for dtype in (jnp.float32, jnp.bfloat16):
    changed = dataclasses.replace(
      method,
      classifier=method.classifier.clone(
        backbone=method.classifier.backbone.clone(dtype=dtype),
        head=method.classifier.head.clone(dtype=dtype),
      ),
      restorer=method.restorer.clone(dtype=dtype),
      estimator=small(dtype),
      calibration=method.calibration.clone(dtype=dtype),
      ensemble=method.ensemble.clone(dtype=dtype),
      map_name=kind,
    )
    trained = {"calibration": variables["calibration"], "estimator": estimator}
    rest = {k: v for k, v in variables.items() if k not in trained}
    rest = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), rest)
    clean, degraded = _jit(lambda: _inputs()(_batch(), train=False))()

    def loss(trained, method=changed, rest=rest, x=degraded, clean=clean):
      logits = method.logits(rest | trained, x, clean)
      return jnp.mean(jnp.square(logits)), logits

    (_, logits), grads = _jit(jax.value_and_grad(loss, has_aux=True))(trained)
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    found.append((np.asarray(logits), jax.flatten_util.ravel_pytree(grads)[0]))
  (logits, grads), (logits_short, grads_short) = found
  assert np.abs(logits_short - logits).max() < 0.1 * logits.std()
  cosine = jnp.vdot(grads, grads_short) / (
    jnp.linalg.norm(grads) * jnp.linalg.norm(grads_short)
  )
  assert cosine > 0.95


def test_rematerialization_changes_memory_not_gradients():
  stack = models.DnCNN(depth=20, width=8)
  x = jax.random.uniform(jax.random.key(1), (2, 24, 24, 3))
  params = stack.init(jax.random.key(0), x)["params"]

  def measure(apply):
    gradient = jax.jit(jax.grad(lambda params: jnp.sum(apply(params) ** 2)))
    compiled = gradient.lower(params).compile()
    return compiled(params), compiled.memory_analysis().temp_size_in_bytes

  plain, kept = measure(lambda params: stack.apply({"params": params}, x))
  again, less = measure(
    lambda params: models.dncnn.apply_rematerialized(stack, params, x)
  )
  assert less < 0.65 * kept
  before = cpu.choose.cache_info().misses
  jax.eval_shape(functools.partial(models.dncnn.apply_rematerialized, stack), params, x)
  assert cpu.choose.cache_info().misses == before
  close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(a).max())
  jax.tree.map(close, plain, again)


def test_rematerialization_is_the_methods_choice(networks):
  batch, barriers = _batch(), []
  for rematerialize in (False, True):
    task = _task(networks, "end_to_end", rematerialize=rematerialize)
    params, state = jax.eval_shape(task.init, jax.random.key(5), task.initial)
    loss = functools.partial(
      task.loss, frozen=task.frozen, batch=batch, train=True, key=jax.random.key(6)
    )
    gradient = jax.jit(jax.grad(loss, has_aux=True))
    exported = jax.export.export(gradient, platforms=["tpu"])(params, state)
    barriers.append(exported.mlir_module().count("optimization_barrier"))
  assert barriers[0] == 0 < barriers[1]


def test_without_labels_it_learns_what_the_classifier_says_of_clean_images(networks):
  task, batch = _task(networks, "pretrained"), _batch()
  method = task.method
  clean, degraded = task.inputs(batch, True)
  said = _jit(lambda v, x: method.classify(v, method.plain(v, x)))
  # The random head is made to hesitate between two classes.
  between = np.median(said(task.frozen, clean) @ np.array([-1, 1, 0]))
  bias = task.frozen["classifier"]["params"]["head"]["logits"]["bias"]
  moved = bias + jnp.array([between, 0, 0])
  frozen = jax.tree.map(lambda x: moved if x is bias else x, task.frozen)
  task = dataclasses.replace(task, frozen=frozen)
  answers = said(frozen, clean).argmax(-1)
  assert len(set(np.asarray(answers))) == 2
  assert (answers != said(frozen, degraded).argmax(-1)).any()
  wrong = batch | {"label": (answers + 1) % 3}
  params, state = task.init(jax.random.key(5), task.initial)
  given = lambda task, batch: _jit(functools.partial(task.loss, train=True))(
    params, state, task.frozen, batch, key=jax.random.key(6)
  )
  loss, (_, metrics) = given(dataclasses.replace(task, own_labels=True), wrong)
  expected, (_, same) = given(task, batch | {"label": answers})
  assert loss == expected != given(task, wrong)[0]
  jax.tree.map(np.testing.assert_array_equal, metrics, same)


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


@pytest.mark.parametrize("epochs", [2, 3])
def test_the_head_trains_first(networks, epochs):
  """The batch is of epoch 2, the third."""
  classifier, *_ = networks
  task = tasks.ClassificationTask(
    classifier=classifier,
    inputs=_inputs(),
    source="clean",
    image_size=SIZE,
    head_epochs=epochs,
  )
  _, grads = _gradients(task, _batch())
  moved = {k: any(np.any(g) for g in jax.tree.leaves(v)) for k, v in grads.items()}
  assert moved == {"head": True, "backbone": epochs == 2}
  _, plain = _gradients(dataclasses.replace(task, head_epochs=0), _batch())
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
  jax.tree.map(close, grads["head"], plain["head"])


def test_a_classifier_agrees_with_itself(networks):
  classifier, *_ = networks
  task = tasks.ClassificationTask(
    classifier=classifier,
    inputs=_inputs(),
    source="clean",
    image_size=SIZE,
    own_labels=True,
  )
  params, state = _jit(task.init)(jax.random.key(5), None)
  wrong = _batch() | {"label": jnp.full(4, 7, jnp.int32)}
  _, (_, metrics) = task.loss(
    params, state, (), wrong, train=False, key=jax.random.key(0)
  )
  np.testing.assert_array_equal(metrics["accuracy"], 1)


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
    map_name="l1",
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
    map_name="l2",
    estimator_input="restored",
    frozen={"restorer": variables["restorer"]},
  )
  params, _ = task.init(jax.random.key(0), None)
  batch = _batch()
  _, (_, metrics) = task.loss(
    params, {}, task.frozen, batch, train=False, key=jax.random.key(0)
  )
  clean, degraded = task.inputs(batch, train=False)
  restored = method.restorer.apply(variables["restorer"], degraded, method="restore")
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


def test_the_oracle_map_needs_clean_images(networks):
  _, method, variables = networks
  oracle = dataclasses.replace(method, estimator=None)
  images = jnp.zeros((1, SIZE, SIZE, 3))
  with pytest.raises(ValueError, match="needs the clean images"):
    oracle.fidelity_map(variables, images, images, None)
