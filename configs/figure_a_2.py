r"""Four further degradations, on every network (paper, Figure A.2), and the method.

  python -m fidelity_jax.main --config=configs/figure_a_2.py:scratch --workdir=runs/demo
  python -m fidelity_jax.main --config=configs/figure_a_2.py --workdir=runs/paper \
    --config.dataset.path=DIR

Classifiers trained on clean images, with and without restoration; and, which the paper
leaves to future research, the whole method trained for each degradation, on one of the
networks.
With `:scratch`, which `:demo` is too, the networks are narrow, 16 channels wide at
their first convolution; it took 70 minutes of training and 15 of evaluation on a 2-core
AMD EPYC, beside other work that took most of it (2026-11-24). The paper's size was not
run here.
"""

from fidelity_jax.configs import common


def get_config(size: str = ""):
  if size == "demo":
    # No package has weights for these networks.
    size = "scratch"
  shows = "Other degradations: classifiers on every network, and the whole method"
  config = common.study("figure_a_2", shows, size)
  if size == "scratch":
    common.narrow(config)
  common.add_setup(config, "clean")
  common.add_method(config, "end_to_end", size)
  config.degradations = (
    "salt_and_pepper",
    "gaussian_blur",
    "motion_blur",
    "rectangular_crop",
  )
  own, others = config.parents.classifier.model.name, ("alexnet", "vgg16", "googlenet")
  # Of the small size only its own has weights by its name.
  others = {"": ("resnet18", *others), "lite": (), "scratch": others}[size]
  config.backbones = (own, *others)
  config.one_backbone = ("end_to_end",)
  config.sections = ("curves", "tables", "claims")
  return config
