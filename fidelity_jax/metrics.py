"""Where a stage's numbers go: two files of JSON lines, and TensorBoard events."""

import contextlib
import json
import pathlib
import time

import jax
import jax.numpy as jnp
from clu import metrics as clu_metrics

from fidelity_jax import errors, files, hosts

# Between records of intervals, at least: days of training stay a few megabytes.
INTERVAL_SECONDS = 10.0

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
  """Writes a stage's numbers, as they come.

  One record per epoch goes to metrics.jsonl, one per interval of some seconds to
  intervals.jsonl, and all of them to TensorBoard events. A record is a whole line. Of
  several processes the first writes.
  """

  def __init__(
    self, directory: pathlib.Path, records: list[dict[str, float]], step: int = 0
  ):
    """Opens the files.

    Args:
      directory: the stage's.
      records: of the epochs up to the checkpoint that the run resumes from. What
        metrics.jsonl holds is replaced by them: later records will be computed and
        written again.
      step: that checkpoint's; records of intervals after it, and TensorBoard's events,
        are dropped.
    """
    self._events, self._files = None, {}
    self._last = time.monotonic()
    if not hosts.first():
      return
    intervals = files.read_json_lines(directory / "intervals.jsonl")
    kept = {
      "metrics.jsonl": records,
      "intervals.jsonl": [
        r for r in intervals if isinstance(r.get("step"), int) and r["step"] <= step
      ],
    }
    # Takes a second to import, most of it PyTorch's where that is installed.
    import tensorboardX

    for name, lines in kept.items():
      path = directory / name
      files.check_file(path)
      text = "".join(json.dumps(record) + "\n" for record in lines)
      files.write_bytes(path, text.encode())
      with errors.while_doing(f"opening {path}"):
        self._files[name] = open(path, "a", encoding="utf-8")
    with errors.while_doing(f"opening TensorBoard events in {directory}"):
      self._events = tensorboardX.SummaryWriter(str(directory), purge_step=step + 1)

  def write(self, record: dict[str, float]) -> None:
    """Writes the record of an epoch.

    Args:
      record: numbers by name, "step" among them.
    """
    self._write("metrics.jsonl", record, "")

  def interval_due(self) -> bool:
    """Returns whether the last record of an interval is long enough ago."""
    return hosts.first() and time.monotonic() - self._last >= INTERVAL_SECONDS

  def write_interval(self, record: dict[str, float]) -> None:
    """Writes the record of an interval, called "interval/" and so on in TensorBoard.

    Args:
      record: numbers by name, "step" among them.
    """
    self._last = time.monotonic()
    self._write("intervals.jsonl", record, "interval/")

  def _write(self, name: str, record: dict[str, float], prefix: str) -> None:
    if self._events is None:
      return
    file = self._files[name]
    with errors.while_doing(f"writing {file.name}"):
      file.write(json.dumps(record) + "\n")
      file.flush()
    with errors.while_doing(f"writing TensorBoard events beside {file.name}"):
      for key, value in record.items():
        if key != "step":
          self._events.add_scalar(f"{prefix}{key}", value, record["step"])

  def close(self) -> None:
    """Closes the files."""
    # What was written is flushed; on a full disk closing fails once more.
    for file in (*self._files.values(), self._events):
      with contextlib.suppress(OSError):
        if file is not None:
          file.close()
