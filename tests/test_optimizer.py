import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from fidelity_jax import errors, optimizer


def test_schedule_warms_up_per_step_and_decays_per_epoch():
  schedule = optimizer.learning_rate_schedule(
    0.2, steps_per_epoch=10, epochs=12, warmup_epochs=2
  )
  rates = np.array([schedule(step) for step in range(120)])
  np.testing.assert_allclose(rates[:20], 0.2 * np.arange(1, 21) / 20, rtol=1e-6)
  for epoch in range(2, 12):
    expected = 0.1 * (1 + math.cos(math.pi * (epoch - 2) / 10))
    np.testing.assert_allclose(
      rates[epoch * 10 : epoch * 10 + 10], expected, rtol=1e-5, atol=1e-8
    )


def test_schedule_without_warmup_starts_at_the_peak():
  schedule = optimizer.learning_rate_schedule(0.5, 3, 4, 0)
  assert float(schedule(jnp.int32(0))) == 0.5


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_optimizers_follow_pytorch(name):
  start = np.linspace(-1, 1, 7, dtype=np.float32)
  weight = torch.tensor(start, requires_grad=True)
  if name == "sgd":
    reference = torch.optim.SGD([weight], 0.05, momentum=0.9, nesterov=True)
  else:
    reference = torch.optim.Adam([weight], 0.05)
  tx = optimizer.create(name, optax.constant_schedule(0.05))
  params = jnp.asarray(start)
  state = tx.init(params)
  loss = lambda x: (x**4).sum() - (2 * x).sum()
  for _ in range(20):
    reference.zero_grad()
    loss(weight).backward()
    reference.step()
    updates, state = tx.update(jax.grad(loss)(params), state, params)
    params = optax.apply_updates(params, updates)
  np.testing.assert_allclose(params, weight.detach().numpy(), rtol=1e-4, atol=1e-6)


def test_unknown_optimizer_is_refused():
  with pytest.raises(errors.UsageError, match="'lion' is unknown"):
    optimizer.create("lion", optax.constant_schedule(1.0))
