"""The interface between tasks and the training loop, and the input side they share."""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from fidelity_jax import randomness
from fidelity_jax.data import patches

PyTree = Any
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Inputs:
  """How a batch from the host becomes clean and degraded images on the device.

  Attributes:
    degradation: function of (keys [N], images [N, H, W, C]) to degraded images.
    seed: the experiment's seed.
    purpose: names the stage, so that stages draw independently.
    patch_size: side of the square patches to cut, or None for whole images.
    patch_stride: stride of the patches.
  """

  degradation: Any
  seed: int
  purpose: str
  patch_size: int | None = None
  patch_stride: int | None = None

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
    return clean, self.degradation(keys, clean)

  def _keys(self, purpose: str, epoch: jax.Array, index: jax.Array) -> jax.Array:
    key = randomness.purpose_key(self.seed, f"{self.purpose}/{purpose}")
    return randomness.example_keys(key, epoch, index)


class Task(abc.ABC):
  """What one stage trains.

  Attributes:
    frozen: networks that the loss uses and nobody trains: a PyTree of arrays that the
      loop passes through to `loss`.
    initial: arrays that `init` starts from, passed through to it likewise, or None.
    score: name of the validation metric that selects the checkpoint.
    score_sign: 1 if a higher score is better, else -1.
    patches_per_image: examples that one image of a batch stands for.
  """

  frozen: PyTree = ()
  initial: PyTree = None
  score: str = "accuracy"
  score_sign: int = 1
  patches_per_image: int = 1

  @abc.abstractmethod
  def init(self, key: jax.Array, initial: PyTree) -> tuple[PyTree, PyTree]:
    """Returns (params, model_state) to start from; the loop jits it.

    Args:
      key: for whatever starts random.
      initial: `self.initial`, on the device.

    Returns:
      The parameters that train, and what training changes without gradients (batch
      statistics).
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


def apply_trained(
  module: nn.Module,
  params: PyTree,
  model_state: PyTree,
  x: jax.Array,
  train: bool,
  key: jax.Array,
) -> tuple[Any, PyTree]:
  """Applies the network under training.

  Args:
    module: the network.
    params: its parameters.
    model_state: its batch statistics, or {}.
    x: its input.
    train: whether batch statistics and dropout act as in training.
    key: for dropout.

  Returns:
    (the network's output, the new batch statistics).
  """
  variables = {"params": params, "batch_stats": model_state}
  if not train:
    return module.apply(variables, x, train=False), model_state
  output, updates = module.apply(
    variables, x, train=True, mutable=["batch_stats"], rngs={"dropout": key}
  )
  return output, updates.get("batch_stats", {})


def smoothed_cross_entropy(
  logits: jax.Array, labels: jax.Array, smoothing: float
) -> jax.Array:
  """Returns the cross-entropy of each example, float32 [N].

  The target gives the right class 1 - smoothing and each of the K - 1 wrong ones
  smoothing / (K - 1) (METHOD section 6; Szegedy et al. 2016 spread it over all K).

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
