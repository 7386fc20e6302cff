"""Averages over padded batches, and the files that numbers go to."""

import jax.numpy as jnp
import numpy as np

from fidelity_jax import metrics


def test_averages_leave_padding_out():
  a = metrics.averages({"loss": jnp.array([1.0, 3.0, 99.0])}, jnp.array([1, 1, 0]))
  b = metrics.averages({"loss": jnp.array([5.0])}, jnp.array([1]))
  assert metrics.compute(metrics.merge(a, b), "train/") == {"train/loss": 3.0}
  again = metrics.merge(metrics.zeros_like(a), a)
  assert metrics.compute(again) == {"loss": 2.0}


def test_resuming_drops_what_will_be_written_again(tmp_path):
  writer = metrics.MetricWriter(tmp_path)
  for step in (10, 20, 30):
    writer.write(step, {"loss": step / 10})
  writer.close()
  with open(tmp_path / "metrics.jsonl", "a") as file:
    file.write('{"step": 40, "lo')  # cut off while writing
  writer = metrics.MetricWriter(tmp_path, resume_step=20)
  writer.write(30, {"loss": 3.5})
  writer.close()
  records = metrics.read(tmp_path / "metrics.jsonl")
  assert [r["step"] for r in records] == [10, 20, 30]
  np.testing.assert_allclose([r["loss"] for r in records], [1, 2, 3.5])
  assert list(tmp_path.glob("events.out.tfevents.*"))
