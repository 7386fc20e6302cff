"""What accelerators can compute at most, by the names that JAX gives them.

Dense operations on matrices, a multiplication and an addition counted as two; vendors'
figures "with sparsity" are twice these. A chip that is not listed, a part of a GPU
(MIG), and a CPU have no peak here. Read in archived copies on 2026-11-27:

- TPU v4: https://docs.cloud.google.com/tpu/docs/v4
- TPU v5e: https://docs.cloud.google.com/tpu/docs/v5e
- TPU v5p: https://docs.cloud.google.com/tpu/docs/v5p-training
- TPU v6e: https://docs.cloud.google.com/tpu/docs/v6e
- A100: https://glennklockwood.com/garden/processors/A100, after NVIDIA's data sheet
- H100 SXM, H200: https://glennklockwood.com/garden/processors/h100
- H100 PCIe: https://archive-lib.hpctech.co.jp/gpuproduct/nvidia-h100.html, halved, as
  that is with sparsity

In float32 this package asks for full precision (`models.conv.product_precision`). GPUs
then leave their tensor cores alone, and TPUs take six bfloat16 products for one
(https://docs.jax.dev/en/latest/jax.lax.html#jax.lax.Precision): a sixth of the peak.
TPUs' names are those of `jax._src.pallas.mosaic.tpu_info` in JAX 0.10.2, GPUs' those of
the CUDA driver. Each JAX device of these is a whole chip.
"""

_TERA = 1e12
_TPU_PASSES = 6


def _tpu(bfloat16: float) -> dict[str, float]:
  return {"bfloat16": bfloat16 * _TERA, "float32": bfloat16 / _TPU_PASSES * _TERA}


def _gpu(bfloat16: float, float32: float) -> dict[str, float]:
  return {"bfloat16": bfloat16 * _TERA, "float32": float32 * _TERA}


_V5E, _V5P, _V6E = _tpu(197), _tpu(459), _tpu(918)
_A100 = _gpu(312, 19.5)
_PEAKS = {
  "TPU v4": _tpu(275),
  "TPU v5 lite": _V5E,
  "TPU v5e": _V5E,
  "TPU v5": _V5P,
  "TPU v5p": _V5P,
  "TPU v6 lite": _V6E,
  "TPU v6e": _V6E,
  "NVIDIA A100-SXM4-40GB": _A100,
  "NVIDIA A100-SXM4-80GB": _A100,
  "NVIDIA A100-PCIE-40GB": _A100,
  "NVIDIA A100 80GB PCIe": _A100,
  "NVIDIA H100 80GB HBM3": _gpu(989.4, 66.9),
  "NVIDIA H100 PCIe": _gpu(756.5, 51),
  "NVIDIA H200": _gpu(989.4, 66.9),
}


def peak(kind: str, precision: str) -> float | None:
  """Returns the peak of one chip in FLOP/s, None where it is not known.

  Args:
    kind: the chip's name, `jax.Device.device_kind`.
    precision: "bfloat16" or "float32".
  """
  return _PEAKS.get(kind, {}).get(precision)
