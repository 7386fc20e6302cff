"""Learning-rate schedule and optimizers (docs/method.md, section 6)."""

import jax.numpy as jnp
import optax

from fidelity_jax import errors


def learning_rate_schedule(
  learning_rate: float, steps_per_epoch: int, epochs: int, warmup_epochs: int
) -> optax.Schedule:
  """Linear warm-up per step, then cosine decay per epoch to 0.

  In step t of the warm-up (t = 0, 1, ...) the rate is
  learning_rate * (t + 1) / (warmup_epochs * steps_per_epoch); in epoch e after it,
  learning_rate / 2 * (1 + cos(pi * (e - warmup_epochs) / (epochs - warmup_epochs))),
  constant within an epoch (Goyal et al. 2017; He et al. 2019).

  Args:
    learning_rate: the peak rate.
    steps_per_epoch: optimizer steps in one epoch.
    epochs: epochs in all, warm-up included.
    warmup_epochs: epochs of warm-up, at most `epochs`.

  Returns:
    A function from step (int32 scalar) to learning rate (float32 scalar).
  """

  def schedule(step):
    epoch = step // steps_per_epoch
    decay_epochs = max(epochs - warmup_epochs, 1)
    cosine = 0.5 * (1 + jnp.cos(jnp.pi * (epoch - warmup_epochs) / decay_epochs))
    if not warmup_epochs:
      return learning_rate * cosine
    warmup = (step + 1) / (warmup_epochs * steps_per_epoch)
    return learning_rate * jnp.where(epoch < warmup_epochs, warmup, cosine)

  return schedule


def create(name: str, schedule: optax.Schedule) -> optax.GradientTransformation:
  """Returns an optimizer by name.

  Args:
    name: "sgd" (Nesterov momentum 0.9, as the paper's classifier and calibration)
      or "adam" (as its restorer and estimator).
    schedule: step to learning rate.

  Raises:
    UsageError: for any other name.
  """
  if name == "sgd":
    return optax.sgd(schedule, momentum=0.9, nesterov=True)
  if name == "adam":
    return optax.adam(schedule)
  raise errors.UsageError(f"optimizer {name!r} is unknown: use 'sgd' or 'adam'.")
