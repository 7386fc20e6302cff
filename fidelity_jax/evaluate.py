"""Subjects x conditions x rounds -> values per image and rows (docs/method.md, 7).

The test images are read once. A batch is degraded once for each condition and round,
and whatever several methods need of it is computed once (`tensors`). All methods see
the same noise: it depends on the seed, the condition, the round and the example alone.
"""

import dataclasses
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import msgspec
import numpy as np
from ml_collections import ConfigDict

from fidelity_jax import (
  data,
  degradations,
  files,
  hosts,
  measurements,
  progress,
  rows,
  sharding,
  signals,
  statistics,
)
from fidelity_jax.subjects import Subject
from fidelity_jax.tensors import Networks, Tensors


def labelled(
  classifier: Subject, dataset: data.Dataset, workdir: pathlib.Path
) -> data.Dataset:
  """Returns test images with a classifier's own answers for labels.

  Args:
    classifier: the frozen classifier alone.
    dataset: the test images, in its classes.
    workdir: where the answers are kept.

  Raises:
    RunError, Stopped: see `Evaluation`.
  """
  config = classifier.config.copy_and_resolve_references()
  config.degradation = ConfigDict({"kind": "clean"})
  asked = dataclasses.replace(classifier, config=config)
  evaluation = Evaluation([asked], dataset, workdir)
  evaluation.measure()
  answers = evaluation.values(asked, asked.conditions[0])["prediction"][0]
  return dataclasses.replace(dataset, labels=answers)


class _Place(NamedTuple):
  """One draw of noise: everything that degrades an image."""

  seed: int
  condition: degradations.Condition
  round: int


class _Lacking(NamedTuple):
  """What is not measured whole.

  Attributes:
    subject: whose it is.
    first: the first batch that is lacking.
  """

  subject: Subject
  first: int


class Evaluation:
  """The evaluation of subjects on one test set."""

  def __init__(
    self, chosen: Sequence[Subject], dataset: data.Dataset, workdir: pathlib.Path
  ):
    """Prepares to evaluate.

    Args:
      chosen: what to measure, of experiments with images of one size; their stages are
        finished.
      dataset: the test images.
      workdir: the directory of all stages.

    Raises:
      RunError: what was kept is damaged.
    """
    self.dataset, self._workdir = dataset, workdir
    self.subjects = list(chosen)
    configs = [subject.config for subject in self.subjects]
    self._image_size = configs[0].dataset.image_size
    self._patience = min(config.checkpoint_seconds for config in configs)
    # Experiments of earlier versions had no such field.
    self.layout = sharding.make_layout(configs[0].get("mesh"))
    self._sharding = self.layout.batch
    batch_size = min(config.evaluation.batch_size for config in configs)
    self._batch_size = sharding.round_up(self.layout, batch_size)
    self.networks = Networks(dataset.num_classes, self.layout)
    # Several experiments may ask for the same, and one of them for more of it.
    same: dict[pathlib.Path, measurements.Measurements] = {}
    self._measured, self._names = {}, {}
    for subject in self.subjects:
      kept = self._kept(subject)
      kept = self._measured[subject] = same.setdefault(kept.directory, kept)
      self._names.setdefault(kept, set()).update(subject.names)

  def of(self, subject: Subject) -> dict[str, Any]:
    """Returns all that a subject's values depend on but for condition and round."""
    return {
      "format": 2,
      "method": subject.compared.key,
      **subject.networks,
      "images": self.dataset.fingerprint,
      "image_size": self._image_size,
      "seed": subject.config.evaluation.seed,
    }

  def _kept(self, subject: Subject) -> measurements.Measurements:
    key, count = subject.compared.key, len(self.dataset)
    of = self.of(subject)
    return measurements.Measurements(self._workdir, key, of, count)

  def _places(self, subject: Subject) -> list[_Place]:
    settings = subject.config.evaluation
    return [
      _Place(settings.seed, c, number)
      for c in subject.conditions
      for number in range(c.rounds_needed(settings.rounds))
    ]

  def batches(
    self, dataset: data.Dataset, start: int = 0
  ) -> Iterator[dict[str, jax.Array]]:
    """Returns batches of test images on the devices, from one on."""
    batches = data.eval_iterator(
      dataset,
      image_size=self._image_size,
      batch_size=self._batch_size,
      start_batch=start,
      num_workers=0,
      **sharding.host_shard(self._sharding),
    )
    return data.prefetch_to_device(batches, self._sharding)

  def _wanted(self) -> dict[_Place, dict[measurements.Measurements, _Lacking]]:
    """Returns what is not measured whole, by place and where it is kept."""
    wanted: dict[_Place, dict[measurements.Measurements, _Lacking]] = {}
    # A process that reads while the first writes would measure something else.
    hosts.wait("what is measured")
    asked = [(s, place) for s in self.subjects for place in self._places(s)]
    # A shared disk may show it to the others later.
    told = hosts.agree([self._done(*one) for one in asked])
    for (subject, place), done in zip(asked, told, strict=True):
      self._see(subject, place, done)
      if done < len(self.dataset):
        lacking = _Lacking(subject, done // self._batch_size)
        wanted.setdefault(place, {})[self._measured[subject]] = lacking
    return wanted

  def _done(self, subject: Subject, place: _Place) -> int:
    """Returns how many images are measured."""
    kept, condition = self._measured[subject], rows.Condition.of(place.condition)
    return kept.done(condition, place.round, self._names[kept])

  def _see(self, subject: Subject, place: _Place, done: int) -> None:
    """Waits until as many images are measured as the first process sees.

    Raises:
      RunError: it takes too long.
    """
    kept, condition = self._measured[subject], rows.Condition.of(place.condition)

    def look() -> bool | None:
      if self._done(subject, place) >= done:
        return True
      kept.look_again(condition)
      return None

    what = f"{condition.name} is measured in {kept.directory}"
    files.seen(look, what, self._workdir)

  def measure(self) -> bool:
    """Measures what is not measured yet.

    Returns:
      Whether there was anything to measure.

    Raises:
      RunError: it cannot be written.
      Stopped: on SIGTERM or SIGINT; what was measured is saved.
    """
    wanted = self._wanted()
    if not wanted:
      return False
    count = -(-len(self.dataset) // self._batch_size)
    firsts = {place: min(n for _, n in w.values()) for place, w in wanted.items()}
    first, total = min(firsts.values()), sum(count - n for n in firsts.values())
    bar = progress.Progress("evaluation", total)
    done, saved = 0, time.monotonic()
    for number, batch in enumerate(self.batches(self.dataset, first), first):
      found = []
      for place, lacking in wanted.items():
        now = {kept: s for kept, (s, n) in lacking.items() if n <= number}
        if not now:
          continue
        if signals.received() is not None:
          self._save(number, found)
          signals.stop(f"evaluating {place.condition.name}")
        if hosts.agree(time.monotonic() - saved > self._patience):
          self._save(number, found)
          found, saved = [], time.monotonic()
        found.append((place, self._values(place, batch, now)))
        done += 1
        if bar.due() or done == total:
          # The devices are behind the host.
          jax.block_until_ready(found[-1][1])
          images = min((number + 1) * self._batch_size, len(self.dataset))
          bar.update(done, images=images)
      self._take(number, found)
    self._save(count, [])
    # What is read next is whole.
    hosts.wait("measured")
    bar.close()
    return True

  def _values(
    self,
    place: _Place,
    batch: dict[str, jax.Array],
    chosen: dict[measurements.Measurements, Subject],
  ) -> list[tuple[measurements.Measurements, dict[str, jax.Array]]]:
    tensors = Tensors(self.networks, place.seed, place.condition, batch, place.round)
    return [
      (kept, tensors.values(subject, "logits" in self._names[kept]))
      for kept, subject in chosen.items()
    ]

  def _take(self, number: int, found: list) -> None:
    """Takes in what was computed of a batch."""
    for place, values in found:
      condition = rows.Condition.of(place.condition)
      for kept, arrays in values:
        start = number * self._batch_size
        kept.add(condition, place.round, start, sharding.fetch(arrays))

  def _save(self, number: int, found: list) -> None:
    self._take(number, found)
    for kept in self._names:
      kept.save()

  def scored(self, bootstrap: statistics.Bootstrap) -> dict[Any, rows.Scored]:
    """Returns the rows of all subjects and conditions, which are measured.

    Args:
      bootstrap: draws of the test images.

    Returns:
      Rows by what they are of: the same for what several experiments have in common.
    """
    found: dict[Any, rows.Scored] = {}
    for subject in self.subjects:
      kept = self._measured[subject]
      for condition in subject.conditions:
        record = rows.Condition.of(condition)
        # Clean images are a condition of every kind of degradation.
        degradation = self._degradation(subject)
        key = (kept.directory, condition, degradation)
        if key in found:
          continue
        values = self.values(subject, condition)
        values.pop("logits", None)
        found[key] = self._score(subject, record, degradation, values, bootstrap)
    return found

  def logits(self, subject: Subject) -> dict[str, np.ndarray]:
    """Returns float32 [R, N, K] by the condition's name, if the config keeps them."""
    return {c.name: self.values(subject, c)["logits"] for c in subject.conditions}

  def values(
    self, subject: Subject, condition: degradations.Condition
  ) -> dict[str, np.ndarray]:
    """Returns what was measured of a subject, arrays [R, N] or [R, N, K] by name."""
    kept, record = self._measured[subject], rows.Condition.of(condition)
    numbers = range(condition.rounds_needed(subject.config.evaluation.rounds))
    measured = [kept.get(record, number) for number in numbers]
    return {k: np.stack([one[k] for one in measured]) for k in sorted(subject.names)}

  def _degradation(self, subject: Subject) -> str:
    kinds = [c.kind for c in subject.conditions if c.kind != "clean"]
    return kinds[0] if kinds else "clean"

  def _score(self, subject, condition, degradation, values, bootstrap) -> rows.Scored:
    config = subject.config
    labels = self.dataset.labels if "rank" in values else None
    row = rows.Row(
      **msgspec.structs.asdict(subject.facts),
      experiment=config.experiment,
      dataset=config.dataset.name,
      image_size=config.dataset.image_size,
      degradation=degradation,
      condition=condition,
      noise_seed=config.evaluation.seed,
      fingerprint=self.dataset.fingerprint[:16],
      stages={role: stage.name for role, stage in subject.stages.items()},
      products={role: digest[:16] for role, digest in subject.products.items()},
      **statistics.summarize(values, labels, self.dataset.num_classes, bootstrap),
    )
    return rows.Scored(row, values)
