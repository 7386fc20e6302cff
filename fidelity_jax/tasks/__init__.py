"""What is trained: classification, restoration, estimation, calibration, ensemble.

A file per trained thing. It holds a task, which says what trains, what is frozen, the
loss, the metrics, and which metric selects the checkpoint; and a `Kind`, which says
which config and which parents such a stage has. The training loop
(`fidelity_jax.train`) knows no more of tasks, and what sets kinds apart stands here.
"""

from fidelity_jax.tasks import (
  calibration,
  classification,
  estimation,
  restoration,
)
from fidelity_jax.tasks.base import Inputs, Kind, Task
from fidelity_jax.tasks.calibration import CalibrationTask, EnsembleTask
from fidelity_jax.tasks.classification import ClassificationTask
from fidelity_jax.tasks.estimation import EstimationTask
from fidelity_jax.tasks.restoration import RestorationTask

# The kinds that configs can name.
CONFIGURED: dict[str, Kind] = {
  kind.name: kind
  for kind in (
    classification.KIND,
    restoration.KIND,
    estimation.KIND,
    calibration.KIND,
  )
}
KINDS: dict[str, Kind] = CONFIGURED | {calibration.ENSEMBLE.name: calibration.ENSEMBLE}

__all__ = [
  "CONFIGURED",
  "KINDS",
  "CalibrationTask",
  "ClassificationTask",
  "EnsembleTask",
  "EstimationTask",
  "Inputs",
  "Kind",
  "RestorationTask",
  "Task",
]
