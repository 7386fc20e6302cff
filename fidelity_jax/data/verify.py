"""Reads every image of a dataset once, before training.

Unusable ones are found, so that the dataset's length is fixed, and the content of all
is hashed, so that other content is noticed. JPEGs are decoded at an eighth of their
size, which still reads all of the data. Results are remembered by key and by the
record's version (a file's size, times and inode).
"""

import concurrent.futures
import dataclasses
import hashlib
import os
from pathlib import Path

import msgspec

from fidelity_jax import files, progress
from fidelity_jax.data import images
from fidelity_jax.data.dataset import Dataset, Skipped, digest
from fidelity_jax.errors import RunError, UsageError

_NAMED = 10
_CHUNK = 64


def verified(dataset: Dataset, *, strict: bool, cache_dir: Path) -> Dataset:
  """Returns the dataset without its unusable records, with digests of the others.

  The first ten records left out are each named in a line.

  Args:
    dataset: what to check.
    strict: stop at the first unusable record instead.
    cache_dir: where results are remembered.

  Raises:
    UsageError: `strict`, and a record is unusable; or no usable record is left, or
      none of a class to train on.
  """
  if strict and dataset.skipped:
    _refuse(dataset, dataset.skipped[0])
  store = _Store(dataset, cache_dir)
  _check_unknown(dataset, store, strict)
  bad = [i for i in range(len(dataset)) if i in store.found and store.found[i].reason]
  skipped = [Skipped(dataset.keys[i], store.found[i].reason) for i in bad]
  if strict and skipped:
    _refuse(dataset, skipped[0])
  left = sorted(set(range(len(dataset))) - set(bad))
  usable = dataclasses.replace(
    dataset.select(left), digests=tuple(store.found[i].digest for i in left)
  )
  lost = set(dataset.labels.tolist()) - set(usable.labels.tolist())
  if not left or (lost and dataset.split == "train"):
    what = why = ""
    if left:
      what = f" of class '{dataset.class_names[min(lost)]}'"
      bad = [i for i in bad if dataset.labels[i] == min(lost)]
    if bad:
      why = f"; the first is {dataset.keys[bad[0]]}: {store.found[bad[0]].reason}"
    raise UsageError(
      f"dataset '{dataset.name}' has no usable image{what} for '{dataset.split}'{why}: "
      "look at the images, or at dataset.fractions, counts and split_file"
    )
  if dataset.split == "train":
    absent = sorted(set(range(dataset.num_classes)) - set(usable.labels.tolist()))
    for label in absent[:_NAMED]:
      progress.say(f"class '{dataset.class_names[label]}' has no image to train on")
  # What was left out before the images were split is named once, with train.
  _report(usable, [*(dataset.skipped if dataset.split == "train" else ()), *skipped])
  return usable.with_skipped(skipped)


def _check_unknown(dataset: Dataset, store: "_Store", strict: bool) -> None:
  """Checks the records that no earlier run has checked; strictly, up to a bad one."""
  unknown = [i for i in range(len(dataset)) if i not in store.found]
  chunks = [unknown[i : i + _CHUNK] for i in range(0, len(unknown), _CHUNK)]
  if not chunks or (strict and any(f.reason for f in store.found.values())):
    return
  title = f"reading {dataset.name}, {dataset.split}"
  bar = progress.Progress(title, len(unknown), unit="image")
  pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1)
  try:
    futures = [pool.submit(_check, dataset, chunk, strict) for chunk in chunks]
    for number, future in enumerate(futures, 1):
      found = future.result()
      store.found.update(found)
      if bar.due():
        bar.update(min(number * _CHUNK, len(unknown)))
      if strict and any(f.reason for f in found.values()):
        return
  finally:
    # After a failure or a signal, what has been found until then is kept.
    try:
      pool.shutdown(cancel_futures=True)
      bar.close()
    finally:
      store.save()


def _refuse(dataset: Dataset, skipped: Skipped) -> None:
  raise UsageError(
    f"{skipped.key}: {skipped.reason} (dataset '{dataset.name}', dataset.strict=True; "
    "with strict=False such records are left out)"
  )


def _report(dataset: Dataset, skipped: list[Skipped]) -> None:
  for one in skipped[:_NAMED]:
    progress.say(f"{one.key}: left out: {one.reason}")
  if skipped:
    more = len(skipped) - _NAMED
    progress.say(
      f"dataset '{dataset.name}', split '{dataset.split}': {len(skipped)} left out, "
      f"{len(dataset)} images remain"
      + (f"; the first {_NAMED} left out are named above" if more > 0 else "")
    )


class _Found(msgspec.Struct, array_like=True):
  """What is known of a record: what is wrong with it, its digest.

  The reason is "" if nothing is; the digest "" if the record cannot be read.
  """

  reason: str
  digest: str


def _check(dataset: Dataset, indices: list[int], strict: bool) -> dict[int, _Found]:
  """Returns what is found of each record, in strict runs up to a bad one."""
  found = {}
  for i in indices:
    found[i] = _look(dataset, i)
    if strict and found[i].reason:
      break
  return found


def _look(dataset: Dataset, index: int) -> _Found:
  content = ""
  try:
    record = dataset.records[index]
    content = digest(record)
    images.check(record, dataset.max_pixels)
  except images.BadImageError as error:
    return _Found(str(error), content)
  return _Found("", content)


class _Known(msgspec.Struct, forbid_unknown_fields=True):
  """What the file of a dataset holds: by key, a record's version and what was found."""

  records: dict[str, tuple[str, _Found]]


class _Store:
  """What is known of a dataset's files from earlier runs."""

  def __init__(self, dataset: Dataset, cache_dir: Path):
    self.found: dict[int, _Found] = {}
    self._path = None
    self._keys, self._versions = dataset.keys, dataset.records.versions()
    if not any(self._versions):
      return
    root = getattr(dataset.records, "root", "")
    place = f"{dataset.name}\n{root}\n{dataset.max_pixels}"
    digest = hashlib.sha256(place.encode()).hexdigest()[:16]
    self._path = cache_dir / f"verified-{digest}.json"
    known = self._read()
    for i, (key, version) in enumerate(zip(self._keys, self._versions, strict=True)):
      if version and key in known and known[key][0] == version:
        self.found[i] = known[key][1]

  def _read(self) -> dict[str, tuple[str, _Found]]:
    try:
      return files.read_record(self._path, _Known, "it is made again").records
    except RunError:
      # Absent or damaged: everything is checked again.
      return {}

  def save(self) -> None:
    """Writes what is known, in one step; a store that cannot be written is no error."""
    if self._path is None:
      return
    known = self._read()
    for i, found in self.found.items():
      # What could not be read may be readable the next time.
      if self._versions[i] and found.digest:
        known[self._keys[i]] = (self._versions[i], found)
    try:
      self._path.parent.mkdir(parents=True, exist_ok=True)
      files.write_record(self._path, _Known(known))
    except (OSError, RunError) as error:
      progress.say(f"cannot remember which images were read: {error}")
