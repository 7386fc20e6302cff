r"""The proposed method with the estimator trained along (paper, 5.1.3, Table 5.1).

  python -m fidelity_jax.main --config=configs/end_to_end.py:demo --workdir=runs/demo
  python -m fidelity_jax.main --config=configs/end_to_end.py --workdir=runs/paper \
    --config.dataset.path=DIR

The estimator starts from the pretrained one, the calibration modules start fresh. In
the workdir of another experiment it finds the stages trained there.
With `:scratch` about 13 minutes more than the pretrained one's, on a 2-core VM with
AVX-512 (2026-11-23), and accuracies like the oracle's (docs/notebook.md).
The paper has 83.2 % on clean images and 58.7 % at sigma 0.5 with the ensemble. Not run
here yet at that size; no time is known.
"""

from fidelity_jax.configs import common


def get_config(size: str = ""):
  return common.method("end_to_end", size)
