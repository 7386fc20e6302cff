r"""The method and the baselines on other networks (paper, Figure 7.1).

  python -m fidelity_jax.main --config=configs/figure_7_1.py:scratch --workdir=runs/demo
  python -m fidelity_jax.main --config=configs/figure_7_1.py --workdir=runs/paper \
    --config.dataset.path=DIR

AlexNet, VGG-16 and GoogLeNet; `--config.backbones` names others.
With `:scratch`, which `:demo` is too, the networks have a quarter of their width, and
the calibration has the paper's rate, as AlexNet and VGG-16 diverge at that of
configs/oracle.py:scratch. Training took 58 minutes and the evaluation 6 on a 2-core AMD
EPYC, beside other work that took most of it (2026-11-24). The paper's size was not run
here.
"""

from fidelity_jax.configs import common


def get_config(size: str = ""):
  if size == "demo":
    # No package has weights for these networks.
    size = "scratch"
  shows = "The proposed method and the baselines on other networks"
  config = common.study("figure_7_1", shows, size)
  if size == "lite":
    # These networks have ImageNet weights of their own.
    config.parents.classifier.model.weights = "torchvision"
  if size == "scratch":
    common.narrow(config)
    # The paper's: networks without batch norm diverge at `:scratch`'s.
    config.learning_rate = 1e-3
  for source in ("clean", "degraded", "restored"):
    common.add_setup(config, source)
  common.add_method(config, "end_to_end", size)
  config.backbones = ("alexnet", "vgg16", "googlenet")
  config.sections = ("curves", "tables", "claims")
  return config
