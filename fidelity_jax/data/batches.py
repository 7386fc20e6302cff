"""Which example comes when, decoded into uint8 batches by Grain.

Every batch is a pure function of its number, so a run can start at any step and any
worker can make any batch.
"""

import contextlib
import dataclasses
import functools
import os
import threading
import zlib
from collections.abc import Iterator, Sequence

import grain.python as grain
import numpy as np
from absl import flags

from fidelity_jax.data import crops, images
from fidelity_jax.data.dataset import Dataset
from fidelity_jax.errors import RunError

Batch = dict[str, np.ndarray]


def generator(seed: int, purpose: str, epoch: int, index: int) -> np.random.Generator:
  """Returns the random generator that belongs to one place.

  Args:
    seed: the experiment's seed, in [0, 2**64).
    purpose: a name; different purposes draw independently, as those of
      `randomness.purpose_key` do on the device.
    epoch: the pass over the dataset.
    index: the example's index in its dataset; 0 for draws of a whole epoch.
  """
  key = np.array([seed, zlib.crc32(purpose.encode())], np.uint64)
  counter = np.array([0, 0, epoch, index], np.uint64)
  return np.random.Generator(np.random.Philox(key=key, counter=counter))


@functools.lru_cache(maxsize=4)
def permutation(seed: int, purpose: str, epoch: int, count: int) -> np.ndarray:
  """Returns the order of an epoch, a permutation of `count` examples."""
  draws = generator(seed, f"{purpose}/order", epoch, 0)
  return draws.permutation(count).astype(np.int32)


# Grain names its steps by their repr, which must not be that of all images.
_plain = dataclasses.dataclass(frozen=True, eq=False, repr=False)


@_plain
class _TrainBatches:
  """Batch number -> this host's part of the batch."""

  dataset: Dataset
  image_size: int
  batch_size: int
  seed: int
  purpose: str
  shard: slice
  area: tuple[float, float]
  aspect: tuple[float, float]
  reduced: bool

  def __call__(self, step: int) -> Batch:
    count = len(self.dataset)
    epoch, place = divmod(int(step), count // self.batch_size)
    order = permutation(self.seed, self.purpose, epoch, count)
    start = place * self.batch_size
    index = order[start : start + self.batch_size][self.shard]
    size = self.image_size
    pixels = np.empty((len(index), size, size, 3), np.uint8)
    for row, i in enumerate(index.tolist()):
      draws = generator(self.seed, f"{self.purpose}/crop", epoch, i)
      with _naming(self.dataset, i):
        picture = self.dataset.picture(i)
        box = crops.random_box(
          picture.height, picture.width, draws, self.area, self.aspect
        )
        if self.reduced:
          crops.reduced(picture, box, pixels[row])
        else:
          crops.resized(picture.pixels(), box, pixels[row])
    return {
      "image": pixels,
      "label": self.dataset.labels[index],
      "index": index,
      "epoch": np.full(len(index), epoch, np.int32),
    }


@_plain
class _EvalBatches:
  """Batch number -> this host's part of the batch, the last one padded."""

  dataset: Dataset
  image_size: int
  batch_size: int
  shard: slice

  def __call__(self, step: int) -> Batch:
    start = int(step) * self.batch_size
    places = np.arange(start, start + self.batch_size, dtype=np.int32)[self.shard]
    real = places < len(self.dataset)
    index = np.where(real, places, 0).astype(np.int32)
    size = self.image_size
    pixels = np.zeros((len(index), size, size, 3), np.uint8)
    for row in np.flatnonzero(real):
      i = int(index[row])
      with _naming(self.dataset, i):
        image = self.dataset.picture(i).pixels()
      crops.central(image, pixels[row])
    return {
      "image": pixels,
      "label": np.where(real, self.dataset.labels[index], 0).astype(np.int32),
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
  """Batches from a given step on, made ahead of use by threads or processes."""

  def __init__(self, make, num_batches: int, start_step: int, num_workers: int):
    self._make = make
    self._num_batches = num_batches
    self._num_workers = num_workers
    self._step = start_step
    self._batches = None

  def __next__(self) -> Batch:
    if self._step >= self._num_batches:
      self.close()
      raise StopIteration
    if self._batches is None:
      self._batches = iter(
        _grain_dataset(self._make, self._step, self._num_batches, self._num_workers)
      )
    try:
      batch = next(self._batches)
    except BaseException:
      self.close()
      raise
    self._step += 1
    return batch

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
    # test or a notebook, they have not been parsed.
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
  share = batch_size // count
  return slice(index * share, (index + 1) * share)


def train_iterator(
  dataset: Dataset,
  *,
  image_size: int,
  batch_size: int,
  seed: int,
  purpose: str,
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
  each epoch, is left out. An example's place and crop depend on (seed, purpose, epoch,
  example index) alone.

  Args:
    dataset: the training examples.
    image_size: side of the crops, in pixels.
    batch_size: examples per batch, over all hosts: at most `len(dataset)`, and a
      multiple of `shard_count`.
    seed: of the order and the crops.
    purpose: what is trained, e.g. "classifier": under one seed, different purposes
      have orders and crops of their own.
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
    RunError: from `next`, naming a record that can no longer be read.
  """
  make = _TrainBatches(
    dataset,
    image_size,
    batch_size,
    seed,
    purpose,
    _shard(batch_size, shard_index, shard_count),
    tuple(crop_area),
    tuple(crop_aspect),
    reduced_decode,
  )
  num_batches = len(dataset) // batch_size * epochs
  return BatchIterator(make, num_batches, start_step, num_workers)


def eval_iterator(
  dataset: Dataset,
  *,
  image_size: int,
  batch_size: int,
  start_batch: int = 0,
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
    batch_size: examples per batch, over all hosts: a multiple of `shard_count`.
    start_batch: number of the first batch; the ones before it cost nothing.
    num_workers: worker processes; 0 for threads of this process.
    shard_index: this host's number.
    shard_count: number of hosts; each gets a contiguous part of every batch.

  Returns:
    An iterator of train_iterator's fields and "mask": float32 [B]; "epoch" is 0.

  Raises:
    RunError: from `next`, naming a record that can no longer be read.
  """
  shard = _shard(batch_size, shard_index, shard_count)
  make = _EvalBatches(dataset, image_size, batch_size, shard)
  return BatchIterator(make, -(-len(dataset) // batch_size), start_batch, num_workers)
