"""Finds the unusable images of a dataset before training, so that its length is fixed.

Every record is decoded once, in parallel. JPEGs are decoded at an eighth of their
size, which still reads all of the data. Results are remembered by key
and by the record's version (a file's size and times).
"""

import concurrent.futures
import hashlib
import json
import os
import tempfile
from pathlib import Path

from absl import logging

from fidelity_jax.data import images
from fidelity_jax.data.dataset import Dataset, MemoryRecords, Skipped
from fidelity_jax.errors import UsageError

_NAMED = 10
_CHUNK = 64


def verified(dataset: Dataset, *, strict: bool, cache_dir: Path | None) -> Dataset:
  """Returns the dataset without its unusable records.

  Each of the first ten records left out is named in one line of the log.

  Args:
    dataset: what to check.
    strict: stop at the first unusable record instead.
    cache_dir: where results are remembered; None for nowhere.

  Raises:
    UsageError: `strict`, and a record is unusable; or no usable record is left.
  """
  if strict and dataset.skipped:
    _refuse(dataset, dataset.skipped[0])
  store = _Store(dataset, cache_dir)
  _check_unknown(dataset, store, strict)
  skipped = [
    Skipped(dataset.keys[i], store.reasons[i])
    for i in range(len(dataset))
    if store.reasons.get(i)
  ]
  if strict and skipped:
    _refuse(dataset, skipped[0])
  if skipped:
    dataset = dataset.select([i for i in range(len(dataset)) if not store.reasons[i]])
  if not len(dataset):
    first = f"; the first is {skipped[0].key}: {skipped[0].reason}" if skipped else ""
    raise UsageError(
      f"dataset '{dataset.name}' has no usable image for '{dataset.split}'{first}"
    )
  dataset = dataset.with_skipped(skipped)
  _report(dataset)
  return dataset


def _check_unknown(dataset: Dataset, store: "_Store", strict: bool) -> None:
  """Checks the records that no earlier run has checked; strictly, up to a bad one."""
  unknown = [i for i in range(len(dataset)) if i not in store.reasons]
  chunks = [unknown[i : i + _CHUNK] for i in range(0, len(unknown), _CHUNK)]
  if not chunks or (strict and any(store.reasons.values())):
    return
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
    futures = [pool.submit(_check, dataset, chunk, strict) for chunk in chunks]
    for future in futures:
      found = future.result()
      store.reasons.update(found)
      if strict and any(found.values()):
        pool.shutdown(cancel_futures=True)
        return
  store.save()


def _refuse(dataset: Dataset, skipped: Skipped) -> None:
  raise UsageError(
    f"{skipped.key}: {skipped.reason} (dataset '{dataset.name}', dataset.strict=True; "
    "with strict=False such records are left out)"
  )


def _report(dataset: Dataset) -> None:
  skipped = dataset.skipped
  for one in skipped[:_NAMED]:
    logging.warning("%s: left out: %s", one.key, one.reason)
  if skipped:
    logging.warning(
      "dataset '%s', split '%s': %d left out, %d images remain%s",
      dataset.name,
      dataset.split,
      len(skipped),
      len(dataset),
      f"; the first {_NAMED} left out are named above" if len(skipped) > _NAMED else "",
    )


def _check(dataset: Dataset, indices: list[int], strict: bool) -> dict[int, str]:
  """Returns the reason against each record, "" if there is none."""
  reasons = {}
  for i in indices:
    reasons[i] = _reason(dataset, i)
    if strict and reasons[i]:
      break
  return reasons


def _reason(dataset: Dataset, index: int) -> str:
  try:
    images.check(dataset.records[index], dataset.max_pixels)
  except images.BadImageError as error:
    return str(error)
  return ""


class _Store:
  """What is known of a dataset's files from earlier runs."""

  def __init__(self, dataset: Dataset, cache_dir: Path | None):
    self.reasons: dict[int, str] = {}
    self._path = None
    # What is in memory is checked faster than looked up.
    if cache_dir is None or isinstance(dataset.records, MemoryRecords):
      return
    root = getattr(dataset.records, "root", "")
    place = f"{dataset.name}\n{root}\n{dataset.max_pixels}"
    digest = hashlib.sha256(place.encode()).hexdigest()[:16]
    self._path = cache_dir / f"verified-{digest}.json"
    self._keys, self._versions = dataset.keys, dataset.records.versions()
    known = self._read()
    for i, (key, version) in enumerate(zip(self._keys, self._versions, strict=True)):
      if version and known.get(key, ("", ""))[0] == version:
        self.reasons[i] = known[key][1]

  def _read(self) -> dict[str, list[str]]:
    try:
      known = json.loads(self._path.read_text())
      return known if isinstance(known, dict) else {}
    except (OSError, ValueError):
      # Absent or damaged: everything is checked again.
      return {}

  def save(self) -> None:
    """Writes what is known, in one step; a store that cannot be written is no error."""
    if self._path is None:
      return
    known = self._read()
    for i, reason in self.reasons.items():
      if self._versions[i]:
        known[self._keys[i]] = [self._versions[i], reason]
    try:
      self._path.parent.mkdir(parents=True, exist_ok=True)
      with tempfile.NamedTemporaryFile(
        "w", dir=self._path.parent, delete=False
      ) as file:
        json.dump(known, file)
      os.replace(file.name, self._path)
    except OSError as error:
      logging.warning("cannot remember checked images: %s", error)
