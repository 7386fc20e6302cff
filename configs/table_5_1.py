r"""The paper's main comparison: twelve rows under eight conditions (Table 5.1).

  python -m fidelity_jax.main --config=configs/table_5_1.py:scratch --workdir=runs/demo
  python -m fidelity_jax.main --config=configs/table_5_1.py --workdir=runs/paper \
    --config.dataset.path=DIR

Three classifiers, a restorer, an estimator, three calibrated models with ensembles.
With `:scratch` its stages took about 50 minutes one after the other on a 2-core AMD
EPYC that was busy with other things, the evaluation 3 minutes of processor time
(2026-11-24). With `:lite` they took 3 h 43 min, each on one core, the evaluation half
an hour on both (2026-11-28). Seed 0 of both is in docs/results.md. The paper's size was
not run here.
"""

from fidelity_jax.configs import common


def get_config(size: str = ""):
  shows = "The proposed method against classifiers trained in three ways"
  config = common.study("table_5_1", shows, size)
  for source in ("clean", "degraded", "restored"):
    common.add_setup(config, source)
  for source in ("oracle", "pretrained", "end_to_end"):
    common.add_method(config, source, size)
  return config
