"""Values per image that are kept, and taken up again."""

import numpy as np

from fidelity_jax.measurements import Measurements
from fidelity_jax.rows import Condition

_NOISE = Condition("awgn-0.1", "awgn", 0.1, None, [{"kind": "awgn"}])


def _values(start, stop, *names):
  return {name: np.arange(start, stop) for name in names}


def test_values_are_taken_up_where_they_end(tmp_path):
  kept = Measurements(tmp_path, "method", {"a": 1}, 5)
  kept.add(_NOISE, 0, 0, _values(0, 2, "rank", "logits"))
  kept.save()
  again = Measurements(tmp_path, "method", {"a": 1}, 5)
  assert again.done(_NOISE, 0, {"rank"}) == 2
  assert again.done(_NOISE, 0, {"rank", "confidence"}) == 0
  assert again.done(_NOISE, 1, {"rank"}) == 0
  # Logits are not asked for any more; the last batch is padded.
  again.add(_NOISE, 0, 2, _values(2, 4, "rank"))
  again.add(_NOISE, 0, 4, _values(4, 6, "rank"))
  again.save()
  found = Measurements(tmp_path, "method", {"a": 1}, 5)
  assert found.done(_NOISE, 0, {"rank"}) == 5
  assert found.get(_NOISE, 0).keys() == {"rank"}
  np.testing.assert_array_equal(found.get(_NOISE, 0)["rank"], np.arange(5))
  # Of something else there is nothing.
  other = Measurements(tmp_path, "method", {"a": 2}, 5)
  assert other.done(_NOISE, 0, {"rank"}) == 0
