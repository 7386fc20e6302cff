"""Averages over padded batches, and the files that numbers go to."""

import json

import jax.numpy as jnp

from fidelity_jax import metrics


def test_averages_leave_padding_out():
  a = metrics.averages({"loss": jnp.array([1.0, 3.0, 99.0])}, jnp.array([1, 1, 0]))
  b = metrics.averages({"loss": jnp.array([5.0])}, jnp.array([1]))
  assert metrics.compute(metrics.merge(a, b), "train/") == {"train/loss": 3.0}
  again = metrics.merge(metrics.zeros_like(a), a)
  assert metrics.compute(again) == {"loss": 2.0}


def test_resuming_replaces_what_will_be_written_again(tmp_path):
  records = [{"step": step, "loss": step / 10} for step in (10, 20, 30)]
  writer = metrics.MetricWriter(tmp_path, [])
  for record in records:
    writer.write(record)
  writer.close()
  with open(tmp_path / "metrics.jsonl", "ab") as file:
    file.write(b'{"step": 40, "lo\xff')  # cut off while writing, and damaged
  writer = metrics.MetricWriter(tmp_path, records[:2])
  writer.write({"step": 30, "loss": 3.5})
  writer.close()
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line) for line in lines] == [
    *records[:2],
    {"step": 30, "loss": 3.5},
  ]
  assert list(tmp_path.glob("events.out.tfevents.*"))
