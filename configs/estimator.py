r"""The fidelity map estimator alone, with the restorer it needs (paper, 5.1).

  python -m fidelity_jax.main --config=configs/estimator.py:demo --workdir=runs/demo
  python -m fidelity_jax.main --config=configs/estimator.py --workdir=runs/paper \
    --config.dataset.path=DIR

It is the stage that configs/pretrained.py and configs/end_to_end.py build on. It is
not evaluated on test images; the result is its loss on validation patches.
With `:scratch` about 3 minutes where the restorer is trained already, on a 2-core AMD
EPYC beside tests (2026-11-24): a validation loss of 0.030. The paper gives none, and
the full size was not run here yet.
"""

from fidelity_jax.configs import common


def get_config(size: str = ""):
  config = common.experiment("estimator", "estimator", size)
  config.parents.restorer = common.restorer(common.parent(config, "restorer"), size)
  return common.estimator(config, size)
