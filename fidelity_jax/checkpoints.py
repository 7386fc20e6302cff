"""Orbax checkpoints of one stage: what it trains, and what resuming it needs.

Each checkpoint is a directory named by its optimizer step with three items:

- `variables`: the parameters (and batch statistics) that the stage trains;
- `training`: optimizer state and the running sums of the epoch under way;
- `progress`: JSON: the best step so far and its score.

Two are kept: the latest, to resume from, and the best, which is the stage's product.
Orbax writes under a temporary name and renames, so a checkpoint is whole or absent.
"""

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from fidelity_jax import errors

PyTree = Any


def _rank(metrics: dict[str, float]) -> tuple[float, float]:
  # Of equal scores the earliest counts, as in the loop.
  return metrics["score"], -metrics["step"]


class Checkpoints:
  """The checkpoints of one stage directory."""

  def __init__(self, directory: pathlib.Path):
    self.directory = pathlib.Path(directory).absolute()
    policy = checkpoint_managers.AnyPreservationPolicy(
      [
        checkpoint_managers.LatestN(1),
        checkpoint_managers.BestN(
          n=1, get_metric_fn=_rank, keep_checkpoints_without_metrics=False
        ),
      ]
    )
    self._manager = ocp.CheckpointManager(
      self.directory,
      item_names=("variables", "training", "progress"),
      options=ocp.CheckpointManagerOptions(
        preservation_policy=policy, cleanup_tmp_directories=True
      ),
    )

  def save(
    self,
    step: int,
    variables: PyTree,
    training: PyTree,
    progress: dict[str, Any],
    score: float | None,
  ) -> None:
    """Writes the checkpoint of `step` in the background.

    Args:
      step: optimizer steps done.
      variables: what the stage trains.
      training: optimizer state and running sums.
      progress: JSON-able facts.
      score: the validation score at this step, higher is better; None in mid-epoch.
    """
    self._manager.save(
      step,
      args=ocp.args.Composite(
        variables=ocp.args.StandardSave(variables),
        training=ocp.args.StandardSave(training),
        progress=ocp.args.JsonSave(progress),
      ),
      metrics=None if score is None else {"score": score, "step": step},
    )

  def latest(self) -> int | None:
    """Returns the step to resume from, or None."""
    return self._manager.latest_step()

  def restore(
    self, step: int, variables: PyTree, training: PyTree
  ) -> tuple[PyTree, PyTree, dict[str, Any]]:
    """Reads a checkpoint back.

    Args:
      step: the step to read.
      variables: arrays (or shapes) like those saved, with their shardings.
      training: likewise.

    Returns:
      (variables, training, progress).

    Raises:
      RunError: if the checkpoint is damaged.
    """
    abstract = lambda tree: jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
    try:
      restored = self._manager.restore(
        step,
        args=ocp.args.Composite(
          variables=ocp.args.StandardRestore(abstract(variables)),
          training=ocp.args.StandardRestore(abstract(training)),
          progress=ocp.args.JsonRestore(),
        ),
      )
    except Exception as error:  # Orbax and TensorStore raise many kinds.
      raise damaged(self.directory / str(step), error) from error
    return restored.variables, restored.training, restored.progress

  def close(self) -> None:
    """Waits for writes under way and releases the directory."""
    self._manager.wait_until_finished()
    self._manager.close()


def variables_directory(checkpoints: pathlib.Path, step: int) -> pathlib.Path:
  """Returns where the variables of a step lie."""
  return checkpoints / str(step) / "variables"


def load_variables(directory: pathlib.Path, like: PyTree) -> PyTree:
  """Reads the variables of a checkpoint.

  Args:
    directory: from `variables_directory`.
    like: arrays or shapes of the same structure.

  Raises:
    RunError: if the checkpoint is damaged or of another structure.
  """
  abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      return checkpointer.restore(directory.absolute(), abstract)
  except Exception as error:  # Orbax and TensorStore raise many kinds.
    raise damaged(directory, error) from error


def damaged(path: pathlib.Path, error: Exception) -> errors.RunError:
  """Returns the error that names a damaged checkpoint."""
  reason = " ".join(str(error).split())[:200]
  stage = next((p for p in path.parents if p.name == "checkpoints"), path).parent
  return errors.RunError(
    f"checkpoint {path} is damaged ({type(error).__name__}: {reason}): delete the "
    f"directory {stage} to train that stage again."
  )
