"""Where a stage's numbers go: metrics.jsonl and TensorBoard events."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import tensorboardX
from clu import metrics as clu_metrics

Averages = dict[str, clu_metrics.Average]


def averages(values: dict[str, jax.Array], mask: jax.Array) -> Averages:
  """Returns running averages of per-example values.

  Args:
    values: name to float [N].
    mask: float [N], 0 on padding.
  """
  return {
    name: clu_metrics.Average.from_model_output(jnp.asarray(value), mask=mask != 0)
    for name, value in values.items()
  }


def merge(a: Averages, b: Averages) -> Averages:
  """Returns the averages over both."""
  return {name: a[name].merge(b[name]) for name in a}


def zeros_like(a: Averages) -> Averages:
  """Returns averages over nothing, of the structure of `a` (or of its shapes)."""
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), a)


def compute(a: Averages, prefix: str = "") -> dict[str, float]:
  """Returns the averages as Python floats (this waits for the device)."""
  a = jax.device_get(a)
  return {prefix + name: float(average.compute()) for name, average in a.items()}


class MetricWriter:
  """Appends one record per epoch to metrics.jsonl and to TensorBoard events."""

  def __init__(self, directory: pathlib.Path, resume_step: int = 0):
    """Opens the files, dropping records beyond `resume_step`.

    Those records are of steps after the checkpoint that the run resumes from; they
    will be computed, and written, again.
    """
    self._path = directory / "metrics.jsonl"
    kept = [r for r in read(self._path) if r["step"] <= resume_step]
    temporary = self._path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
    temporary.replace(self._path)
    self._file = open(self._path, "a")
    self._events = tensorboardX.SummaryWriter(
      str(directory), purge_step=resume_step + 1 if resume_step else None
    )

  def write(self, step: int, record: dict[str, Any]) -> None:
    """Writes the record of `step`; numbers go to TensorBoard too."""
    self._file.write(json.dumps({"step": step, **record}) + "\n")
    self._file.flush()
    for name, value in record.items():
      self._events.add_scalar(name, value, step)

  def close(self) -> None:
    """Closes the files."""
    self._file.close()
    self._events.close()


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the records of a metrics.jsonl, without a half-written last line."""
  if not path.exists():
    return []
  records = []
  for line in path.read_text().splitlines():
    try:
      records.append(json.loads(line))
    except ValueError:
      break
  return records
