"""What is trained: classification, restoration, estimation, calibration, ensemble.

A task says what trains, what is frozen, the loss, the metrics, and which metric
selects the checkpoint. The training loop (`fidelity_jax.train`) knows no more of it.
"""

from fidelity_jax.tasks.base import Inputs, Task
from fidelity_jax.tasks.calibration import CalibrationTask, EnsembleTask
from fidelity_jax.tasks.classification import ClassificationTask
from fidelity_jax.tasks.estimation import EstimationTask
from fidelity_jax.tasks.restoration import RestorationTask

__all__ = [
  "CalibrationTask",
  "ClassificationTask",
  "EnsembleTask",
  "EstimationTask",
  "Inputs",
  "RestorationTask",
  "Task",
]
