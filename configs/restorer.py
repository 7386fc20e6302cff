r"""The restorer alone: DnCNN, trained on noisy patches (paper, 3.2.1).

  python -m fidelity_jax.main --config=configs/restorer.py:demo --workdir=runs/demo
  python -m fidelity_jax.main --config=configs/restorer.py --workdir=runs/paper \
    --config.dataset.path=DIR

It is the stage that all other experiments build on. The result is the PSNR of the test
images with and without restoration.
With `:scratch` about 2 minutes on a 2-core AMD EPYC beside tests (2026-11-24). Seed 0:
24.1 dB at sigma 0.3, from 12.0 dB. The paper gives no PSNR, and the full size was not
run here yet.
"""

from fidelity_jax.configs import common


def get_config(size: str = ""):
  config = common.restorer(common.experiment("restorer", "restorer", size), size)
  common.evaluation(config, size)
  return config
