r"""The proposed method with the estimator trained along (report section 5.1.3).

  python -m fidelity_jax.main --config=configs/end_to_end.py:demo --workdir=runs/demo
  python -m fidelity_jax.main --config=configs/end_to_end.py --workdir=runs/report \
    --config.dataset.path=DIR

The estimator starts from the pretrained one, the calibration modules start fresh. In
the workdir of another experiment it finds the stages trained there.
"""

from fidelity_jax import defaults


def get_config(size: str = ""):
  return defaults.method("end_to_end", size)
