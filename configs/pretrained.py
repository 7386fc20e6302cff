r"""The proposed method on a pretrained, frozen estimator (paper, 5.1.2, Table 5.1).

  python -m fidelity_jax.main --config=configs/pretrained.py:demo --workdir=runs/demo
  python -m fidelity_jax.main --config=configs/pretrained.py --workdir=runs/paper \
    --config.dataset.path=DIR

In the workdir of another experiment it finds the classifier and restorer trained there.
With `:demo` 3 and a half minutes more than the oracle's, on a 2-core AMD EPYC
(2026-11-28; docs/results.md). With `:scratch` about 9 minutes more than the oracle's,
on a 2-core VM with AVX-512 (2026-11-23), and accuracies like the oracle's
(docs/notebook.md).
The paper has 83.1 % on clean images and 58.4 % at sigma 0.5 with the ensemble. Not run
here yet at that size; no time is known.
"""

from fidelity_jax.configs import common


def get_config(size: str = ""):
  return common.method("pretrained", size)
