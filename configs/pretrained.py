r"""The proposed method on a pretrained, frozen estimator (report section 5.1.2).

  python -m fidelity_jax.main --config=configs/pretrained.py:demo --workdir=runs/demo
  python -m fidelity_jax.main --config=configs/pretrained.py --workdir=runs/report \
    --config.dataset.path=DIR

In the workdir of another experiment it finds the classifier and restorer trained there.
"""

from fidelity_jax import defaults


def get_config(size: str = ""):
  return defaults.method("pretrained", size)
