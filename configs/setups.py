r"""Accuracy against level of classifiers trained in three ways (paper, Figure 3.3).

  python -m fidelity_jax.main --config=configs/setups.py:scratch --workdir=runs/demo
  python -m fidelity_jax.main --config=configs/setups.py --workdir=runs/paper \
    --config.dataset.path=DIR

Trained on clean, degraded and restored images, each tested with and without
restoration; `--config.backbones="('resnet50','vgg16')"` shows several networks.
With `:scratch` the three classifiers and the restorer take 2 to 3 minutes each, on a
2-core AMD EPYC (2026-11-24); seed 0 is in docs/results.md. The paper's size was not run
here.
"""

from fidelity_jax.configs import common


def get_config(size: str = ""):
  shows = "Classifiers trained on clean, degraded and restored images"
  config = common.study("setups", shows, size)
  for source in ("clean", "degraded", "restored"):
    common.add_setup(config, source)
  config.sections = ("curves", "tables", "claims")
  return config
