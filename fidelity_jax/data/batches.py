"""Which example comes when, decoded into uint8 batches by Grain.

Every batch is a pure function of its number, so a run can start at any step and any
worker can make any batch.
"""

import contextlib
import functools
import os
import threading
from collections.abc import Iterator, Sequence

import grain.python as grain
import numpy as np
from absl import flags

from fidelity_jax.data import crops, images
from fidelity_jax.data.dataset import Dataset
from fidelity_jax.errors import RunError, UsageError

Batch = dict[str, np.ndarray]

# First words of the Philox key's second half: draws for different purposes differ.
_SHUFFLE, _CROP = 1, 2


def generator(seed: int, purpose: int, epoch: int, index: int) -> np.random.Generator:
  """Returns the random generator that belongs to one place."""
  key = np.array([seed % 2**64, purpose], np.uint64)
  counter = np.array([0, 0, epoch, index], np.uint64)
  return np.random.Generator(np.random.Philox(key=key, counter=counter))


@functools.lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
  """Returns the order of an epoch, a permutation of `count` examples."""
  return generator(seed, _SHUFFLE, epoch, 0).permutation(count).astype(np.int32)


def steps_per_epoch(dataset: Dataset, batch_size: int) -> int:
  """Returns the number of whole training batches in the dataset.

  Raises:
    UsageError: there is none.
  """
  if batch_size < 1:
    raise UsageError(f"batch size {batch_size} is less than 1")
  if batch_size > len(dataset):
    raise UsageError(
      f"batch size {batch_size} is larger than the {len(dataset)} examples of "
      f"dataset '{dataset.name}', split '{dataset.split}'"
    )
  return len(dataset) // batch_size


class _TrainBatches:
  """Batch number -> this host's part of the batch."""

  def __init__(
    self,
    dataset: Dataset,
    image_size: int,
    batch_size: int,
    seed: int,
    steps: int,
    shard: slice,
    crop: tuple[tuple[float, float], tuple[float, float]],
    reduced: bool,
  ):
    self._dataset = dataset
    self._image_size = image_size
    self._batch_size = batch_size
    self._seed = seed
    self._steps = steps
    self._shard = shard
    self._crop = crop
    self._reduced = reduced

  def __call__(self, step: int) -> Batch:
    epoch, place = divmod(int(step), self._steps)
    order = permutation(self._seed, epoch, len(self._dataset))
    start = place * self._batch_size
    index = order[start : start + self._batch_size][self._shard]
    size = self._image_size
    pixels = np.empty((len(index), size, size, 3), np.uint8)
    for row, i in enumerate(index.tolist()):
      draws = generator(self._seed, _CROP, epoch, i)
      with _naming(self._dataset, i):
        picture = self._dataset.picture(i)
        box = crops.random_box(picture.height, picture.width, draws, *self._crop)
        if self._reduced:
          crops.reduced(picture, box, pixels[row])
        else:
          crops.resized(picture.pixels(), box, pixels[row])
    return {
      "image": pixels,
      "label": self._dataset.labels[index],
      "index": index,
      "epoch": np.full(len(index), epoch, np.int32),
    }


class _EvalBatches:
  """Batch number -> this host's part of the batch, the last one padded."""

  def __init__(self, dataset: Dataset, image_size: int, batch_size: int, shard: slice):
    self._dataset = dataset
    self._image_size = image_size
    self._batch_size = batch_size
    self._shard = shard

  def __call__(self, step: int) -> Batch:
    start = int(step) * self._batch_size
    places = np.arange(start, start + self._batch_size, dtype=np.int32)[self._shard]
    real = places < len(self._dataset)
    index = np.where(real, places, 0).astype(np.int32)
    size = self._image_size
    pixels = np.zeros((len(index), size, size, 3), np.uint8)
    for row in np.flatnonzero(real):
      i = int(index[row])
      with _naming(self._dataset, i):
        image = self._dataset.picture(i).pixels()
      crops.central(image, pixels[row])
    return {
      "image": pixels,
      "label": np.where(real, self._dataset.labels[index], 0).astype(np.int32),
      "index": index,
      "epoch": np.zeros(len(index), np.int32),
      "mask": real.astype(np.float32),
    }


@contextlib.contextmanager
def _naming(dataset: Dataset, index: int) -> Iterator[None]:
  """Gives errors of a record its key."""
  try:
    yield
  except images.BadImageError as error:
    raise RunError(
      f"{dataset.keys[index]}: {error} (it was usable when the run began)"
    ) from error


class BatchIterator(Iterator[Batch]):
  """Batches from a given step on, made ahead of use by threads or processes.

  Attributes:
    step: number of the next batch, counted from the start of training; with the
      arguments of `train_iterator` it is all that is needed to go on from here.
  """

  def __init__(self, make, num_batches: int, start_step: int, num_workers: int):
    self._make = make
    self._num_batches = num_batches
    self._num_workers = num_workers
    self._batches = None
    self.set_state({"step": start_step})

  def __next__(self) -> Batch:
    if self.step >= self._num_batches:
      self.close()
      raise StopIteration
    if self._batches is None:
      self._batches = iter(
        _grain_dataset(self._make, self.step, self._num_batches, self._num_workers)
      )
    try:
      batch = next(self._batches)
    except BaseException:
      self.close()
      raise
    self.step += 1
    return batch

  def __len__(self) -> int:
    """Returns the number of batches that are still to come."""
    return max(self._num_batches - self.step, 0)

  def get_state(self) -> dict[str, int]:
    """Returns the position, to be stored in a checkpoint."""
    return {"step": self.step}

  def set_state(self, state: dict[str, int]) -> None:
    """Goes to a position that `get_state` returned."""
    self.close()
    self.step = int(state["step"])

  def close(self) -> None:
    """Stops threads and worker processes; iteration may be taken up again."""
    if self._batches is not None:
      self._batches.close()
      self._batches = None

  def __enter__(self) -> "BatchIterator":
    return self

  def __exit__(self, *unused) -> None:
    self.close()


def _grain_dataset(make, start: int, stop: int, num_workers: int) -> grain.IterDataset:
  # Pillow releases the interpreter's lock while it decodes, so threads help; a worker
  # process has its core to itself.
  threads = 1 if num_workers else min(os.cpu_count() or 1, 16)
  dataset = (
    grain.MapDataset.source(grain.RangeDataSource(start, stop, 1))
    .map(make)
    .to_iter_dataset(grain.ReadOptions(threads, prefetch_buffer_size=threads + 1))
  )
  if num_workers:
    # Grain reads flags before it starts processes; outside of absl's app.run, as in a
    # test or a notebook, nobody has parsed them.
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()
    dataset = dataset.mp_prefetch(
      grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=2),
      worker_init_fn=_start_worker,
    )
  return dataset


def _start_worker(worker: int, count: int) -> None:
  import multiprocessing
  import signal
  from multiprocessing import connection

  # The main process decides when to stop; a signal to the whole process group (^C, a
  # scheduler's SIGTERM) must not take the data away while it saves.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, signal.SIG_IGN)

  def follow_parent():
    connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)

  threading.Thread(target=follow_parent, daemon=True).start()


def _shard(batch_size: int, index: int, count: int) -> slice:
  if count < 1 or not 0 <= index < count:
    raise UsageError(f"shard {index} of {count} does not exist")
  if batch_size % count:
    raise UsageError(
      f"batch size {batch_size} is not divisible by the {count} hosts that share it"
    )
  share = batch_size // count
  return slice(index * share, (index + 1) * share)


def train_iterator(
  dataset: Dataset,
  *,
  image_size: int,
  batch_size: int,
  seed: int,
  epochs: int,
  start_step: int = 0,
  num_workers: int = 0,
  shard_index: int = 0,
  shard_count: int = 1,
  crop_area: Sequence[float] = crops.DEFAULT_AREA,
  crop_aspect: Sequence[float] = crops.DEFAULT_ASPECT,
  reduced_decode: bool = False,
) -> BatchIterator:
  """Iterates over randomly cropped training batches.

  Each epoch is a new permutation, cut into whole batches; the remainder, another one
  each epoch, is left out. An example's place and crop depend on (seed, epoch, example
  index) alone.

  Args:
    dataset: the training examples.
    image_size: side of the crops, in pixels.
    batch_size: examples per batch, over all hosts.
    seed: of the order and the crops.
    epochs: passes over the dataset.
    start_step: number of the first batch; the ones before it cost nothing.
    num_workers: worker processes; 0 for threads of this process.
    shard_index: this host's number.
    shard_count: number of hosts; each gets a contiguous part of every batch.
    crop_area: range of the crop's share of the area (torchvision's `scale`).
    crop_aspect: range of the crop's width / height (torchvision's `ratio`).
    reduced_decode: decode JPEGs at 1/2, 1/4 or 1/8 of their size where the crop stays
      at least image_size large; faster, but not torchvision's pixels.

  Returns:
    An iterator of {"image": uint8 [B, image_size, image_size, 3], "label": int32 [B],
    "index": int32 [B], "epoch": int32 [B]} with B = batch_size / shard_count.

  Raises:
    UsageError: the batch is larger than the dataset or cannot be shared evenly.
    RunError: from `next`, naming a record that can no longer be read.
  """
  steps = steps_per_epoch(dataset, batch_size)
  shard = _shard(batch_size, shard_index, shard_count)
  crop = (tuple(crop_area), tuple(crop_aspect))
  make = _TrainBatches(
    dataset, image_size, batch_size, seed, steps, shard, crop, reduced_decode
  )
  return BatchIterator(make, steps * epochs, start_step, num_workers)


def eval_iterator(
  dataset: Dataset,
  *,
  image_size: int,
  batch_size: int,
  num_workers: int = 0,
  shard_index: int = 0,
  shard_count: int = 1,
) -> BatchIterator:
  """Iterates once over all examples, in order, centrally cropped.

  The last batch is padded: `mask` is 0, `image` black, `label` and `index` 0 there.
  All hosts get the same number of batches.

  Args:
    dataset: the examples.
    image_size: side of the crops, in pixels.
    batch_size: examples per batch, over all hosts.
    num_workers: worker processes; 0 for threads of this process.
    shard_index: this host's number.
    shard_count: number of hosts; each gets a contiguous part of every batch.

  Returns:
    An iterator of train_iterator's fields and "mask": float32 [B]; "epoch" is 0.

  Raises:
    UsageError: the batch size is impossible.
    RunError: from `next`, naming a record that can no longer be read.
  """
  if batch_size < 1:
    raise UsageError(f"batch size {batch_size} is less than 1")
  shard = _shard(batch_size, shard_index, shard_count)
  make = _EvalBatches(dataset, image_size, batch_size, shard)
  return BatchIterator(make, -(-len(dataset) // batch_size), 0, num_workers)
