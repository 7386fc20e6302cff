r"""The fidelity map estimator alone, with the restorer it needs (report section 5.1).

  python -m fidelity_jax.main --config=configs/estimator.py:demo --workdir=runs/demo
  python -m fidelity_jax.main --config=configs/estimator.py --workdir=runs/report \
    --config.dataset.path=DIR

It is the stage that configs/pretrained.py and configs/end_to_end.py build on.
"""

from fidelity_jax import defaults


def get_config(size: str = ""):
  return defaults.estimator_alone(size)
