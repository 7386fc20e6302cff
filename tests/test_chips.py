"""The table of chips."""

import jax
import pytest

from fidelity_jax import chips


@pytest.mark.parametrize(
  ("kind", "bfloat16", "float32"),
  [
    ("TPU v4", 275e12, 275e12 / 6),
    ("TPU v5 lite", 197e12, 197e12 / 6),
    ("TPU v5p", 459e12, 459e12 / 6),
    ("TPU v6 lite", 918e12, 918e12 / 6),
    ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
    ("NVIDIA H100 80GB HBM3", 989.4e12, 66.9e12),
    ("NVIDIA H200", 989.4e12, 66.9e12),
  ],
)
def test_known_chips_have_a_peak_for_each_precision(kind, bfloat16, float32):
  assert chips.peak(kind, "bfloat16") == pytest.approx(bfloat16)
  assert chips.peak(kind, "float32") == pytest.approx(float32)


@pytest.mark.parametrize(
  "kind", ["cpu", "NVIDIA A100-SXM4-80GB MIG 1g.10gb", "NVIDIA H200 NVL", ""]
)
def test_other_chips_have_none(kind):
  assert chips.peak(kind, "bfloat16") is None


def test_tpus_have_the_names_that_jax_knows():
  info = pytest.importorskip("jax._src.pallas.mosaic.tpu_info")
  kinds = [kind for kind in chips._PEAKS if kind.startswith("TPU")]
  assert all(info.chip_version_from_device_kind(kind) for kind in kinds)
  assert info.chip_version_from_device_kind(jax.devices("cpu")[0].device_kind) is None
