r"""A classifier trained on clean images: the paper's setup 1 (3.2, Table 5.1).

  python -m fidelity_jax.main --config=configs/clean.py:scratch --workdir=runs/demo
  python -m fidelity_jax.main --config=configs/clean.py --workdir=runs/paper \
    --config.dataset.path=DIR

It is evaluated with and without restoration.
With `:scratch` about 2 minutes on a 2-core AMD EPYC (2026-11-24), and seconds where
configs/oracle.py has trained its stages. Seed 0: 81.8 % on clean images; at sigma 0.3
35.6 % without and 76.0 % with restoration. The paper has 83.2 % on clean images, and
at sigma 0.5 1.7 % without and 30.3 % with restoration. Not run here yet at that size;
no time is known.
"""

from fidelity_jax.configs import common


def get_config(size: str = ""):
  return common.one_classifier("clean", size)
