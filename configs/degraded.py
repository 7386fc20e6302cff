r"""A classifier trained on degraded images: the paper's setup 2 (3.2, Table 5.1).

  python -m fidelity_jax.main --config=configs/degraded.py:demo --workdir=runs/demo
  python -m fidelity_jax.main --config=configs/degraded.py --workdir=runs/paper \
    --config.dataset.path=DIR

It is evaluated with and without restoration.
With `:demo` TD minutes on a 2-core AMD EPYC (2026-11-24): XD % on clean images; YD % at
sigma 0.3 without restoration and ZD % with it (seed 0).
The paper has 79.3 % on clean images and 66.4 % at sigma 0.5, both without restoration.
Not run here yet at that size; no time is known.
"""

from fidelity_jax.configs import common


def get_config(size: str = ""):
  return common.one_classifier("degraded", size)
