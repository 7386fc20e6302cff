"""What is left to do; whole plans are in test_study."""

import json

import pytest

from fidelity_jax import plan


def _stage(workdir, *records):
  directory = workdir / "classifier-resnet-clean-12345678"
  directory.mkdir()
  lines = [json.dumps(record) + "\n" for record in records]
  (directory / "metrics.jsonl").write_text("".join(lines))


@pytest.mark.parametrize(
  ("records", "expected"),
  [
    # Of an epoch of 100 steps, with 10 s of validation.
    ([{"step": 100, "steps_per_second": 2.0, "seconds": 60.0}], 0.6),
    # The last 10 of them after a run was resumed: the record's seconds are theirs.
    ([{"step": 100, "steps_per_second": 2.0, "seconds": 15.0}], 0.5),
    # Nothing in earlier versions' records tells one from the other.
    ([{"step": 100, "seconds": 60.0}], 0.6),
    ([{"step": 0, "seconds": 3.0}], None),
  ],
)
def test_an_interrupted_epoch_was_no_faster(tmp_path, records, expected):
  _stage(tmp_path, *records)
  rates = plan._rates(tmp_path)
  names = ("classifier", "classifier-resnet-clean")
  assert rates == ({} if expected is None else dict.fromkeys(names, expected))
