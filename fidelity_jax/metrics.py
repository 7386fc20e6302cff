"""Where a stage's numbers go: metrics.jsonl and TensorBoard events."""

import contextlib
import json
import pathlib

import jax
import jax.numpy as jnp
from clu import metrics as clu_metrics

from fidelity_jax import errors, files, hosts

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
  """Returns averages over nothing, of the structure of `a` (or of its shapes).

  They live where `a` does: a step that is given arrays elsewhere is compiled again.
  """
  place = lambda x: getattr(x, "sharding", None)
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=place(x)), a)


def compute(a: Averages, prefix: str = "") -> dict[str, float]:
  """Returns the averages as Python floats (this waits for the device)."""
  a = jax.device_get(a)
  return {prefix + name: float(average.compute()) for name, average in a.items()}


class MetricWriter:
  """Appends one record per epoch to metrics.jsonl and to TensorBoard events.

  Of several processes the first does.
  """

  def __init__(
    self, directory: pathlib.Path, records: list[dict[str, float]], step: int = 0
  ):
    """Opens the files.

    Args:
      directory: the stage's.
      records: those up to the checkpoint that the run resumes from. What the file holds
        is replaced by them: later records will be computed and written again.
      step: that checkpoint's; TensorBoard drops the events after it.
    """
    self._file = self._events = None
    if not hosts.first():
      return
    path = directory / "metrics.jsonl"
    files.check_file(path)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    files.write_bytes(path, lines.encode())
    # Takes a second to import, most of it PyTorch's where that is installed.
    import tensorboardX

    with errors.while_doing(f"opening {path}"):
      self._file = open(path, "a", encoding="utf-8")
      self._events = tensorboardX.SummaryWriter(str(directory), purge_step=step + 1)

  def write(self, record: dict[str, float]) -> None:
    """Writes the record of an epoch; numbers go to TensorBoard too."""
    if self._file is None:
      return
    with errors.while_doing(f"writing {self._file.name}"):
      self._file.write(json.dumps(record) + "\n")
      self._file.flush()
      for name, value in record.items():
        if name != "step":
          self._events.add_scalar(name, value, record["step"])

  def write_interval(self, step: int, values: dict[str, float]) -> None:
    """Writes what was measured since the last line of progress, to TensorBoard alone.

    Args:
      step: optimizer steps done.
      values: by name; "interval/" is put before these.
    """
    if self._file is None:
      return
    with errors.while_doing(f"writing TensorBoard events beside {self._file.name}"):
      for name, value in values.items():
        self._events.add_scalar(f"interval/{name}", value, step)

  def close(self) -> None:
    """Closes the files."""
    if self._file is None:
      return
    # What was written is flushed; on a full disk closing fails once more.
    with contextlib.suppress(OSError):
      self._file.close()
    with contextlib.suppress(OSError):
      self._events.close()
