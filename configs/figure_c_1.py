r"""Loss and accuracy against epoch (paper, Figure C.1).

  python -m fidelity_jax.main --config=configs/figure_c_1.py:scratch --workdir=runs/demo
  python -m fidelity_jax.main --config=configs/figure_c_1.py --workdir=runs/paper \
    --config.dataset.path=DIR

Of the classifier trained on clean images, as the paper, and of all other stages;
`--config.only=clean` shows that one alone.
With `:scratch` it takes seconds where configs/end_to_end.py has trained its stages, on
a 2-core AMD EPYC (2026-11-24). The paper's size was not run here.
"""

from fidelity_jax.configs import common


def get_config(size: str = ""):
  shows = "Loss and accuracy against epoch, training and validation"
  config = common.study("figure_c_1", shows, size)
  common.add_setup(config, "clean")
  common.add_method(config, "end_to_end", size)
  config.sections = ("histories",)
  return config
