r"""A classifier trained on restored images: the paper's setup 3 (3.2, Table 5.1).

  python -m fidelity_jax.main --config=configs/restored.py:demo --workdir=runs/demo
  python -m fidelity_jax.main --config=configs/restored.py --workdir=runs/paper \
    --config.dataset.path=DIR

It is evaluated with and without restoration.
With `:demo` TS minutes on a 2-core AMD EPYC (2026-11-24): XS % on clean images; YS % at
sigma 0.3 without restoration and ZS % with it (seed 0).
The paper has 80.9 % on clean images and 67.2 % at sigma 0.5, both with restoration. Not
run here yet at that size; no time is known.
"""

from fidelity_jax.configs import common


def get_config(size: str = ""):
  return common.one_classifier("restored", size)
