"""Orbax checkpoints of one stage: what it trains, and what resuming it needs.

Each checkpoint is a directory named by its optimizer step with three items:

- `variables`: the parameters (and batch statistics) that the stage trains;
- `training`: optimizer state and the running sums of the epoch under way;
- `progress`: JSON, see `Progress`: the best step so far, the records of all epochs, and
  checksums of all arrays.

Two are kept: the latest, to resume from, and the best, which is the stage's product.
Which is the best is read from the latest one's progress. Orbax writes under a temporary
name and renames, so a checkpoint is whole or absent; what is read back is compared with
the checksums of what was written.
"""

import contextlib
import functools
import hashlib
import json
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from fidelity_jax import errors, files, hosts, sharding

PyTree = Any

# Bytes that are summed up at a time.
_BLOCK = 2**26


class Progress(msgspec.Struct, forbid_unknown_fields=True):
  """What is known of a stage's training at some step.

  Attributes:
    best_step: the step with the best validation score so far, None before the first.
    best_score: that score, higher is better.
    records: what metrics.jsonl holds up to this step.
    checksums: of every array of the checkpoint, by its path; see `checksums`.
  """

  best_step: int | None = None
  best_score: float | None = None
  records: list[dict[str, int | float]] = []
  checksums: dict[str, int] = {}


class _LatestAndBest(checkpoint_managers.PreservationPolicy):
  """Keeps the latest checkpoint and that of one step."""

  def __init__(self):
    self.best: int | None = None

  def should_preserve(self, checkpoints, *, context):
    del context
    last = len(checkpoints) - 1
    return [i == last or c.step == self.best for i, c in enumerate(checkpoints)]


class _Manager(ocp.CheckpointManager):
  """Does not ask itself whether to stop: it would count steps where we count calls."""

  def reached_preemption(self, step: int) -> bool:
    """Returns False: see `hosts`."""
    return False


def checksums(tree: PyTree) -> dict[str, int]:
  """Returns the CRC-32 of every array's bytes, by its path.

  They do not depend on how arrays are split over devices. Of arrays that are split over
  hosts, each host reads its own part; all hosts call it then.
  """
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  named = {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in leaves
  }
  split = [name for name, leaf in named.items() if _is_split(leaf)]
  sums = {name: _crc(named[name]) for name in named if name not in split}
  if split:
    own = np.array([_own_crc(named[name]) for name in split], np.uint32)
    # A CRC is linear but for a constant, which depends on the length alone: where each
    # host has zeros in place of what others have, that of the whole is all of these
    # added up (without carry), the constant counted once.
    nothing = np.array([_zeros_crc(named[name].nbytes) for name in split], np.uint32)
    each = sharding.gather(own) ^ nothing
    sums |= dict(
      zip(split, map(int, np.bitwise_xor.reduce(each) ^ nothing), strict=True)
    )
  return sums


def _is_split(leaf: Any) -> bool:
  """Returns whether no device has the whole of an array."""
  return isinstance(leaf, jax.Array) and not leaf.is_fully_replicated


def _crc(array: Any, before: int = 0) -> int:
  contiguous = np.ascontiguousarray(array)
  return zlib.crc32(contiguous.reshape(-1).view(np.uint8), before)


@functools.cache
def _zeros_crc(size: int) -> int:
  sum_, block = 0, bytes(_BLOCK)
  for start in range(0, size, _BLOCK):
    sum_ = zlib.crc32(memoryview(block)[: size - start], sum_)
  return sum_


def _own_crc(array: jax.Array) -> int:
  """Returns the CRC-32 of an array with zeros in place of what other hosts have."""
  # Of copies, the first counts.
  own = [shard for shard in array.addressable_shards if shard.replica_id == 0]
  parts = [(shard.index, np.asarray(shard.data)) for shard in own]
  # Some rows at a time: a host may not have the memory for all of them.
  rows = max(1, _BLOCK * array.shape[0] // array.nbytes)
  sum_ = 0
  for start in range(0, array.shape[0], rows):
    stop = min(start + rows, array.shape[0])
    block = np.zeros((stop - start, *array.shape[1:]), array.dtype)
    for (first, *others), part in parts:
      top = first.start or 0
      low, high = max(start, top), min(stop, top + len(part))
      if low < high:
        inside = part[low - top : high - top]
        block[(slice(low - start, high - start), *others)] = inside
    sum_ = _crc(block, sum_)
  return sum_


class Checkpoints:
  """The checkpoints of one stage directory."""

  def __init__(self, directory: pathlib.Path):
    """Opens the directory, which is made where absent.

    Raises:
      RunError: if it cannot be made or read.
    """
    self.directory = pathlib.Path(directory).absolute()
    self._policy = _LatestAndBest()
    with _reading(self.directory, "opening the checkpoints in"):
      if hosts.first() or hosts.apart():
        self.directory.mkdir(parents=True, exist_ok=True)
      hosts.wait(f"checkpoints of {self.directory.parent.name}")
      self._manager = _Manager(
        self.directory,
        item_names=("variables", "training", "progress"),
        options=ocp.CheckpointManagerOptions(
          preservation_policy=self._policy,
          cleanup_tmp_directories=True,
          create=False,
          multiprocessing_options=_processes(),
        ),
      )

  def save(
    self, step: int, variables: PyTree, training: PyTree, progress: Progress
  ) -> None:
    """Writes the checkpoint of `step` in the background.

    Args:
      step: optimizer steps done.
      variables: what the stage trains.
      training: optimizer state and running sums.
      progress: what to keep beside them; checksums are added to it.

    Raises:
      RunError: if it, or an earlier one, could not be written.
    """
    if not self.directory.is_dir():
      raise errors.RunError(
        f"{self.directory} was removed while the run was working in it: run the same "
        "command again to train that stage anew."
      )
    sums = checksums({"variables": variables, "training": training})
    sealed = files.seal(msgspec.structs.replace(progress, checksums=sums))
    self._policy.best = progress.best_step
    if hosts.apart():
      # All have all of it: one writes, and the others get its files.
      if not hosts.first():
        return
      variables, training = jax.device_get((variables, training))
    with self._writing():
      self._manager.save(
        step,
        args=ocp.args.Composite(
          variables=ocp.args.StandardSave(variables),
          training=ocp.args.StandardSave(training),
          progress=ocp.args.JsonSave(sealed),
        ),
      )

  def latest(self) -> int | None:
    """Returns the step to resume from, or None."""
    return self._manager.latest_step()

  def restore(
    self, step: int, variables: PyTree, training: PyTree
  ) -> tuple[PyTree, PyTree, Progress]:
    """Reads a checkpoint back, to go on from.

    Args:
      step: the step to read.
      variables: arrays (or shapes) like those saved, with their shardings.
      training: likewise.

    Returns:
      (variables, training, progress).

    Raises:
      RunError: if it, or the best one, cannot be read or is damaged or missing.
    """
    path = self.directory / str(step)
    progress = self._progress(step)
    best = progress.best_step
    if best is not None and not (self.directory / str(best)).is_dir():
      raise errors.RunError(
        f"the best checkpoint {self.directory / str(best)} is missing: "
        f"{_again(self.directory)}"
      )
    abstract = lambda tree: jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
    with _reading(path):
      restored = self._manager.restore(
        step,
        args=ocp.args.Composite(
          variables=ocp.args.StandardRestore(abstract(variables)),
          training=ocp.args.StandardRestore(abstract(training)),
        ),
      )
    found = {"variables": restored.variables, "training": restored.training}
    _compare(path, progress, found)
    if best not in (None, step):
      # Checked now, and not only after everything is trained.
      self.check_product(best, variables)
    self._policy.best = best
    return restored.variables, restored.training, progress

  def check_product(self, step: int, like: PyTree) -> str:
    """Reads the variables of a step back, as the stage's product.

    Args:
      step: the step.
      like: arrays or shapes of the same structure.

    Returns:
      The digest of their names and checksums, which does not depend on how they are
      stored.

    Raises:
      RunError: if they are not there, not what was saved, or not finite.
    """
    path = self.directory / str(step)
    variables = load_variables(variables_directory(self.directory, step), like)
    _compare(path, self._progress(step), {"variables": variables})
    for name, leaf in jax.tree_util.tree_leaves_with_path(variables):
      # On the devices: all hosts have the same answer.
      if not _finite(leaf):
        raise errors.RunError(
          f"{path} holds numbers that are not finite, in "
          f"{jax.tree_util.keystr(name, simple=True, separator='/')}: lower the "
          "learning rate, or look at the weights that the stage starts from; then "
          f"{_again(self.directory)}"
        )
    text = json.dumps(checksums(variables), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()

  def _progress(self, step: int) -> Progress:
    path = self.directory / str(step)
    with _reading(path):
      args = ocp.args.Composite(progress=ocp.args.JsonRestore())
      value = self._manager.restore(step, args=args).progress
    return files.unseal(value, Progress, path / "progress", _again(self.directory))

  def wait(self) -> None:
    """Waits for writes under way.

    Raises:
      RunError: if one could not be written.
    """
    with self._writing():
      self._manager.wait_until_finished()
      self._manager.check_for_errors()

  def close(self) -> None:
    """Waits for writes under way and releases the directory; raises as `wait`."""
    try:
      self.wait()
    finally:
      self._manager.close()

  def _writing(self):
    return errors.while_doing(f"writing a checkpoint to {self.directory}")


def _processes() -> ocp.options.MultiprocessingOptions:
  """Returns which processes Orbax has to do with: all, or each with its own disk."""
  if not hosts.apart():
    return ocp.options.MultiprocessingOptions()
  own = hosts.index()
  return ocp.options.MultiprocessingOptions(
    primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"{own}"
  )


@jax.jit
def _finite(array: jax.Array) -> jax.Array:
  return jnp.isfinite(array).all()


def variables_directory(checkpoints: pathlib.Path, step: int) -> pathlib.Path:
  """Returns where the variables of a step lie."""
  return checkpoints / str(step) / "variables"


def load_variables(
  directory: pathlib.Path, like: PyTree, verified: bool = False
) -> PyTree:
  """Reads the variables of a checkpoint.

  Args:
    directory: from `variables_directory`.
    like: arrays or shapes of the same structure; they come back where these are, those
      without a place on this host's first device.
    verified: whether its files are known to be what was written.

  Raises:
    RunError: it cannot be read, is damaged, or of another structure.
  """
  # Not where they were when they were saved: those devices may not be here.
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  place = lambda leaf: getattr(leaf, "sharding", None) or here
  abstract = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place(leaf)),
    like,
  )
  open_ = ocp.StandardCheckpointer(multiprocessing_options=_processes())
  with _reading(directory, verified=verified), open_ as reader:
    return reader.restore(directory.absolute(), abstract)


@contextlib.contextmanager
def _reading(
  path: pathlib.Path, doing: str = "reading checkpoint", verified: bool = False
) -> Iterator[None]:
  """Distinguishes a checkpoint that cannot be read from one that is damaged."""
  try:
    yield
  except (errors.UsageError, errors.RunError):
    raise
  except Exception as error:  # Orbax and TensorStore raise many types.
    reason = errors.circumstance(error, context=True) or files.unreadable(path)
    if reason:
      raise errors.RunError(f"{doing} {path} failed: {reason}.") from error
    kind, text = type(error).__name__, " ".join(str(error).split())[:200]
    if verified:
      raise errors.RunError(
        f"checkpoint {path} is what was written, but holds another network than this "
        f"version of fidelity_jax makes of its config ({kind}: {text}): {_again(path)}"
      ) from error
    raise errors.RunError(
      f"checkpoint {path} is damaged ({kind}: {text}): {_again(path)}"
    ) from error


def _again(path: pathlib.Path) -> str:
  """Returns the advice to train the stage of a path below "checkpoints" again."""
  places = [path, *path.parents]
  stage = next((p for p in places if p.name == "checkpoints"), path).parent
  return f"delete the directory {stage} to train that stage again."


def _compare(path: pathlib.Path, progress: Progress, found: PyTree) -> None:
  """Raises RunError unless arrays are those that were saved with `progress`."""
  for name, checksum in checksums(found).items():
    if progress.checksums.get(name) != checksum:
      raise errors.RunError(
        f"checkpoint {path} is damaged: {name} is not what was written: {_again(path)}"
      )
