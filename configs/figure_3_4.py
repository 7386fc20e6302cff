r"""What noise does to the inputs of the head, neuron by neuron (paper, Figure 3.4).

  python -m fidelity_jax.main --config=configs/figure_3_4.py:scratch --workdir=runs/demo
  python -m fidelity_jax.main --config=configs/figure_3_4.py --workdir=runs/paper \
    --config.dataset.path=DIR

Mean over the images of one class (`--config.class_name=NAME`), degraded and restored.
With `:scratch` it takes seconds where configs/clean.py has trained its stages, and
about 4 minutes otherwise, on a 2-core AMD EPYC (2026-11-24). The paper's size was not
run here.
"""

from fidelity_jax.configs import common


def get_config(size: str = ""):
  shows = "Mean inputs of the head at each level, degraded and restored"
  config = common.study("figure_3_4", shows, size)
  common.add_setup(config, "clean")
  config.sections = ("activations", "curves", "tables")
  if not size:
    config.class_name = "006.basketball-hoop"
  return config
