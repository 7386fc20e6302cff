r"""Maps, ways to resize them, and modules left out (paper, Table 6.1).

  python -m fidelity_jax.main --config=configs/table_6_1.py:scratch --workdir=runs/demo
  python -m fidelity_jax.main --config=configs/table_6_1.py --workdir=runs/paper \
    --config.dataset.path=DIR

The oracle map without ensemble, ten times, beside restoration alone.
With `:scratch` each of the ten calibrations takes 2 to 5 minutes and the evaluation 2,
on a 2-core AMD EPYC that was busy with other things (2026-11-24); seed 0 is in
docs/results.md. With `:lite` a calibration takes 12 minutes on one such core, and the
evaluation half an hour (2026-11-28). The paper's size was not run here.
"""

from fidelity_jax.configs import common


def get_config(size: str = ""):
  shows = "Fidelity maps, resizing, and what each module contributes"
  config = common.study("table_6_1", shows, size)
  # No experiment here has an ensemble.
  config.ensemble.enabled = False
  if size == "scratch":
    # Ten calibrations; of many epochs the last ones change little.
    config.epochs = 30
  elif size == "lite":
    # Half of Table 5.1's: ten calibrations take two hours.
    config.epochs = 3
  common.add_method(config, "oracle", size)
  common.add_setup(config, "clean")
  for name in ("l2", "cosine"):
    common.add_method(config, "oracle", size, name).fidelity.map = name
  for name in ("bicubic", "nearest"):
    common.add_method(config, "oracle", size, name).model.resize = name
  for name in (
    "spatial_multiplication",
    "residual",
    "spatial_addition",
    "channel_multiplication",
    "channel_concatenation",
  ):
    common.add_method(config, "oracle", size, f"without_{name}").model[name] = False
  return config
