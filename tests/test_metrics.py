"""Averages over padded batches, and the files that numbers go to."""

import json

import jax.numpy as jnp

from fidelity_jax import files, metrics


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


def test_a_resumed_run_drops_the_intervals_that_it_repeats(tmp_path):
  """Those of a run that was killed in the middle of a line, too."""
  path = tmp_path / "intervals.jsonl"
  epochs = [{"step": 10, "loss": 1.0}]
  for start in (0, 15):
    writer = metrics.MetricWriter(tmp_path, epochs[: start // 10], start)
    for step in range(start + 3, 19, 3):
      writer.write_interval({"step": step, "run": start})
    writer.close()
    found = files.read_json_lines(path)
    with open(path, "ab") as file:
      file.write(b'{"step": 2, "lo')
  assert [record["step"] for record in found] == [3, 6, 9, 12, 15, 18]
  assert [record["run"] for record in found] == [0] * 5 + [15]
  assert files.read_json_lines(tmp_path / "metrics.jsonl") == epochs
  # A stage that begins anew has none.
  metrics.MetricWriter(tmp_path, []).close()
  assert path.read_bytes() == b""


def test_an_interval_is_due_ten_seconds_after_the_last(tmp_path):
  writer = metrics.MetricWriter(tmp_path, [])
  for _ in range(2):
    assert not writer.interval_due()
    writer._last -= 10.0
    assert writer.interval_due()
    writer.write_interval({"step": 1})
  writer.close()
