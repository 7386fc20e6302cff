"""What tasks are to the training loop, kinds of stages, and the inputs they share."""

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from ml_collections import ConfigDict

from fidelity_jax import (
  data,
  degradations,
  errors,
  fidelity,
  randomness,
  rules,
  sharding,
  tracing,
)
from fidelity_jax.data import patches

PyTree = Any
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]

_EPOCHS = rules.whole(0, 1_000_000)
# Fields that every kind of stage has.
TRAINING: rules.Table = {
  "seed": rules.whole(0, 2**32 - 1),
  "dataset": data.FIELDS,
  "degradation": rules.ANYTHING,
  "precision": rules.choice("auto", "float32", "bfloat16"),
  "checkpoint_seconds": rules.number(0, 1e9),
  "profile": {"steps": tracing.STEPS},
  "mesh": sharding.FIELDS,
  "optimizer": rules.choice("sgd", "adam"),
  "learning_rate": rules.number(0, 1e30),
  "batch_size": rules.whole(1, 1_000_000),
  "epochs": _EPOCHS,
  "warmup_epochs": _EPOCHS,
  "validation_rounds": rules.whole(1, 10_000),
}
# Fields that several have.
WEIGHTS = rules.optional(rules.NAME)
MAP: rules.Table = {
  "map": rules.choice(*fidelity.MAPS),
  "estimator_input": rules.choice("degraded", "restored"),
}
PATCHES: rules.Table = {
  "patch_size": rules.whole(1, 4096),
  "patch_stride": rules.whole(1, 4096),
}


@dataclasses.dataclass(frozen=True)
class Inputs:
  """How a batch from the host becomes clean and degraded images on the device.

  Attributes:
    degradation: function of (keys [N], images [N, H, W, C]) to degraded images.
    seed: the experiment's seed.
    purpose: names the stage's kind, so that stages draw independently.
    patch_size: side of the square patches to cut, or None for whole images.
    patch_stride: stride of the patches.
    split: of the patches over devices, which images need not fill; None for none.
  """

  degradation: Any
  seed: int
  purpose: str
  patch_size: int | None = None
  patch_stride: int | None = None
  split: jax.sharding.Sharding | None = None

  def __call__(self, batch: Batch, train: bool) -> tuple[jax.Array, jax.Array]:
    """Returns (clean, degraded), both float32 [N, H, W, 3] in [0, 1].

    In training, examples are flipped by a fair coin; with patches, each example gives
    P of them, consecutive, each with its own key. Draws depend on (seed, epoch, index)
    alone; in validation the epoch is the round, so that all epochs draw the same.

    Args:
      batch: "image" uint8 [B, H, W, 3], "index" int32 [B], "epoch" int32 [B].
      train: whether this is training.
    """
    clean = batch["image"].astype(jnp.float32) / 255
    epoch, index = batch["epoch"], batch["index"]
    phase = "train" if train else "validation"
    if train:
      keys = self._keys(f"{phase}/flip", epoch, index)
      flip = jax.vmap(jax.random.bernoulli)(keys)
      clean = jnp.where(flip[:, None, None, None], clean[:, :, ::-1], clean)
    keys = self._keys(f"{phase}/degradation", epoch, index)
    if self.patch_size is not None:
      clean = patches.extract_patches(clean, self.patch_size, self.patch_stride)
      count = len(clean) // len(index)
      keys = jax.vmap(lambda key: jax.random.split(key, count))(keys).reshape(-1)
      if self.split is not None:
        clean, keys = jax.lax.with_sharding_constraint((clean, keys), self.split)
    return clean, self.degradation(keys, clean)

  def _keys(self, purpose: str, epoch: jax.Array, index: jax.Array) -> jax.Array:
    key = randomness.purpose_key(self.seed, f"{self.purpose}/{purpose}")
    return randomness.example_keys(key, epoch, index)


class Task(abc.ABC):
  """What one stage trains.

  Attributes:
    frozen: networks that the loss uses and that do not train: a PyTree of arrays that
      the loop passes through to `loss`.
    initial: arrays that `init` starts from, passed through to it likewise, or None.
    score: name of the validation metric that selects the checkpoint.
    score_sign: 1 if a higher score is better, else -1.
    patches_per_image: examples that one image of a batch stands for.
    trained_parents: roles of the parents whose networks train on.
  """

  frozen: PyTree = ()
  initial: PyTree = None
  score: str = "accuracy"
  score_sign: int = 1
  patches_per_image: int = 1
  trained_parents: tuple[str, ...] = ()

  @property
  @abc.abstractmethod
  def network(self) -> Any:
    """What the stage gives: a Linen module, or the whole `Method`."""

  @abc.abstractmethod
  def init(self, key: jax.Array, initial: PyTree) -> tuple[PyTree, PyTree]:
    """Returns (params, model_state) to start from; the loop jits it.

    Args:
      key: for random initial values.
      initial: `self.initial`, on the device.

    Returns:
      The parameters that train, and what training changes without gradients (batch
      statistics).

    Raises:
      UsageError: `initial` is of another network.
    """

  @abc.abstractmethod
  def loss(
    self,
    params: PyTree,
    model_state: PyTree,
    frozen: PyTree,
    batch: Batch,
    *,
    train: bool,
    key: jax.Array,
  ) -> tuple[jax.Array, tuple[PyTree, Metrics]]:
    """Returns (loss, (new model_state, metrics)).

    Args:
      params: what trains.
      model_state: batch statistics and the like.
      frozen: `self.frozen`, on the device.
      batch: "image" uint8 [B, H, W, 3], "label", "index", "epoch" int32 [B].
      train: training (dropout, batch statistics, flips) or evaluation.
      key: the step's key, for dropout.

    Returns:
      The mean loss, and metrics: per-example values, float32 [B * patches_per_image].
    """


@dataclasses.dataclass(frozen=True)
class Kind:
  """All that sets a kind of stage apart from the others.

  Attributes:
    name: as in `config.kind`, and of the stage's network where others build on it.
    fields: config -> the table of its fields beside those that every stage has.
    make: (config, networks of the parents by role, number of classes, inputs) -> task,
      without any arrays. Parents' networks are as they are when frozen.
    label: config -> what tells stages of the kind apart at a glance.
    trained_from: config -> roles of the parents that it is trained from.
    evaluated_with: roles of further parents, which serve its evaluation alone.
    labelled: whether it learns from labels.
    whole: whether its network is the whole method, with its parents' networks in it.
    evaluated: whether an experiment that ends in it is evaluated on test images.
    material: config -> fields that stand for others in the stage's identity; None for
      those that change nothing.
    check: (config, where) -> None; raises UsageError for what no single field shows.
  """

  name: str
  fields: Callable[[ConfigDict], rules.Table]
  make: Callable[[ConfigDict, Mapping[str, Any], int, Inputs], Task]
  label: Callable[[ConfigDict], str]
  trained_from: Callable[[ConfigDict], tuple[str, ...]] = lambda config: ()
  evaluated_with: tuple[str, ...] = ()
  labelled: bool = True
  whole: bool = False
  evaluated: bool = True
  material: Callable[[ConfigDict], dict[str, Any]] = lambda config: {}
  check: Callable[[ConfigDict, str], None] = lambda config, where: None


def make_inputs(
  config: ConfigDict, split: jax.sharding.Sharding | None = None
) -> Inputs:
  """Returns how a stage sees its images.

  Args:
    config: the stage's.
    split: see `Inputs`.
  """
  return Inputs(
    degradation=degradations.from_config(config.degradation),
    seed=config.seed,
    purpose=config.kind,
    patch_size=config.get("patch_size"),
    patch_stride=config.get("patch_stride"),
    split=split,
  )


def patches_per_image(config: ConfigDict) -> int:
  """Returns how many examples an image of a stage's batch gives."""
  if "patch_size" not in config:
    return 1
  size = config.dataset.image_size
  return len(patches.starts(size, config.patch_size, config.patch_stride)) ** 2


def images_per_step(config: ConfigDict) -> int:
  """Returns how many images a step of a stage takes; `batch_size` may count patches.

  Raises:
    UsageError: batch_size is not a whole number of images.
  """
  count = patches_per_image(config)
  if config.batch_size % count:
    raise errors.UsageError(
      f"{config.kind}: batch_size {config.batch_size} counts patches, and an image "
      f"gives {count}: use a multiple of {count}."
    )
  return config.batch_size // count


def take_over(fresh: PyTree, given: PyTree | None) -> PyTree:
  """Returns given variables, or fresh ones if there are none.

  Raises:
    UsageError: the given ones are of another network.
  """
  if given is None:
    return fresh
  shapes = lambda tree: jax.tree.map(lambda x: tuple(x.shape), dict(tree))
  if shapes(fresh) != shapes(given):
    raise errors.UsageError("the weights are of another network")
  return given


def start_on_patches(
  module: nn.Module,
  key: jax.Array,
  given: PyTree | None,
  size: int | None,
  method: str = "__call__",
) -> tuple[PyTree, PyTree]:
  """Returns (params, model_state) of a network that is trained on patches.

  Args:
    module: the network.
    key: for random initial values.
    given: variables to start from, or None for the network's own.
    size: side of the patches, pixels; None if the network takes any.
    method: the method that is trained.

  Raises:
    UsageError: they are of another network.
  """
  patch = jnp.zeros((1, size or 8, size or 8, 3))
  variables = take_over(module.init(key, patch, method=method), given)
  return variables["params"], variables.get("batch_stats", {})


def check_norm(config: ConfigDict, where: str) -> None:
  """Raises UsageError for batch norm with given weights, which are read without."""
  if config.model.weights is not None and config.model.get("batch_norm"):
    raise errors.UsageError(
      f"{where}: set model.batch_norm=False with given weights: batch norm is folded "
      "when they are read."
    )


def apply_trained(
  module: nn.Module,
  params: PyTree,
  model_state: PyTree,
  x: jax.Array,
  train: bool,
  key: jax.Array,
  method: str = "__call__",
) -> tuple[Any, PyTree]:
  """Applies the network under training.

  Args:
    module: the network.
    params: its parameters.
    model_state: its batch statistics, or {}.
    x: its input.
    train: whether batch statistics and dropout act as in training.
    key: for dropout.
    method: the network's method to call.

  Returns:
    (the network's output, the new batch statistics).
  """
  variables = {"params": params, "batch_stats": model_state}
  apply = functools.partial(module.apply, variables, x, method=method)
  if not train:
    return apply(train=False), model_state
  output, updates = apply(train=True, mutable=["batch_stats"], rngs={"dropout": key})
  return output, updates.get("batch_stats", {})


def smoothed_cross_entropy(
  logits: jax.Array, labels: jax.Array, smoothing: float
) -> jax.Array:
  """Returns the cross-entropy of each example, float32 [N].

  The target gives the right class 1 - smoothing and each of the K - 1 wrong ones
  smoothing / (K - 1) (docs/method.md, section 6; Szegedy et al.
  2016 spread it over all K).

  Args:
    logits: float [N, K].
    labels: int [N].
    smoothing: in [0, 1).
  """
  classes = logits.shape[-1]
  one_hot = jax.nn.one_hot(labels, classes)
  wrong = smoothing / max(classes - 1, 1)
  targets = one_hot * (1 - smoothing - wrong) + wrong
  return optax.softmax_cross_entropy(logits.astype(jnp.float32), targets)


def own_labels(config: ConfigDict) -> bool:
  """Returns whether a stage's labels are the frozen classifier's own answers."""
  return config.dataset.get("labels") == "self"


def correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Returns 1.0 where the largest logit is the label's, float32 [N]."""
  return (jnp.argmax(logits, -1) == labels).astype(jnp.float32)


def mean_absolute_error(a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns the l1 distance of each example, averaged over pixels, float32 [N]."""
  return jnp.mean(jnp.abs(a - b), axis=(1, 2, 3))


def psnr(a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns the peak signal-to-noise ratio of each example in dB, float32 [N].

  Images are in [0, 1]. Identical images, whose PSNR is infinite, count as 100 dB.
  """
  mse = jnp.mean(jnp.square(a - b), axis=(1, 2, 3))
  return -10 * jnp.log10(jnp.maximum(mse, 1e-10))
