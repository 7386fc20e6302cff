r"""The proposed method on the oracle fidelity map (report section 5.1.1, Table 5.1).

  python -m fidelity_jax.main --config=configs/oracle.py:demo --workdir=runs/demo
  python -m fidelity_jax.main --config=configs/oracle.py --workdir=runs/oracle \
    --config.dataset.path=DIR

`:demo` needs no data and no weights: the embedded photographs, a small ResNet, a
shallow DnCNN. Without it, this is the report's experiment: Caltech-256, ResNet-50 from
ImageNet weights, DnCNN-20, 224 px, AWGN.
"""

from fidelity_jax import defaults


def get_config(size: str = ""):
  return defaults.method("oracle", size)
