r"""The proposed method on the oracle fidelity map (paper, 5.1.1, Table 5.1).

  python -m fidelity_jax.main --config=configs/oracle.py:demo --workdir=runs/demo
  python -m fidelity_jax.main --config=configs/oracle.py --workdir=runs/paper \
    --config.dataset.path=DIR

`:demo` needs no download: the embedded photographs, EfficientNet-Lite0 with ImageNet
weights from the extra `pretrained`, a shallow DnCNN. 4 minutes on a 2-core AMD EPYC
(2026-11-28). `:scratch` needs no weights: a small ResNet, about 7 minutes (2026-11-24).
With both the oracle map leads restoration alone at every noise level (docs/results.md).
Without either, this is the paper's experiment: Caltech-256, ResNet-50 from ImageNet
weights, DnCNN-20, 224 px, AWGN. The paper has 82.4 % on clean images and 72.4 % at
sigma 0.5 with the ensemble. Not run here yet; no time is known.
"""

from fidelity_jax.configs import common


def get_config(size: str = ""):
  return common.method("oracle", size)
