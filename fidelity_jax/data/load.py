"""Datasets by name."""

import dataclasses
from pathlib import Path

import ml_collections
from ml_collections import config_dict

from fidelity_jax import files, rules
from fidelity_jax.data import (
  caches,
  classes,
  crops,
  demo,
  folder,
  images,
  splits,
  verify,
)
from fidelity_jax.data.dataset import SPLITS, Dataset, join
from fidelity_jax.errors import UsageError

_CALTECH = splits.AUTHORS
# The paper's numbers of train, validation and test per class; -1: all that remain.
_PAPER_COUNTS = {"caltech256": (48, 12, -1), "caltech101": (24, 6, -1)}

# Every field of `config.dataset` and what it may hold.
FIELDS: rules.Table = {
  "name": rules.TEXT,
  "path": rules.optional(rules.TEXT),
  "image_size": rules.whole(1, 4096),
  "split_seed": rules.whole(0, 2**32 - 1),
  "split_file": rules.optional(rules.TEXT),
  "fractions": rules.several(rules.SHARE, 3, 3),
  "counts": rules.optional(rules.several(rules.whole(-1, 10**9), 0, 3)),
  "tfds_splits": rules.several(rules.TEXT, 3, 3),
  "per_class": rules.whole(0, 10**9),
  "crop_area": rules.span(1.0),
  "crop_aspect": rules.span(1e6),
  "reduced_decode": rules.FLAG,
  "strict": rules.FLAG,
  "cache": rules.optional(rules.choice("ram", "disk")),
  "workers": rules.whole(0, 1024),
  "max_pixels": rules.whole(1, 10**10),
  "classes": rules.optional(rules.TEXT),
  "labels": rules.choice("given", "self"),
}


def default_config(name: str = "demo") -> ml_collections.ConfigDict:
  """Returns every field of `config.dataset`, with a dataset's defaults.

  Args:
    name: "demo", "folder", "caltech256", "caltech101" or the name of a TFDS image
      classification dataset.
  """
  config = ml_collections.ConfigDict()
  config.name = name
  # Folder or CSV file (folder), or where archives and prepared files are (others).
  config.path = config_dict.placeholder(str)
  config.image_size = 64 if name == "demo" else 224
  # Independent of the training seed: every training run sees the same splits.
  config.split_seed = 0
  # JSON file of splits, or "caltech256" or "caltech101" for the authors' own lists;
  # "": drawn from all images by split_seed, from fractions or counts; None: the
  # dataset's own splits (those lists, or a folder's sub-folders train, val and test),
  # drawn if it has none.
  config.split_file = config_dict.placeholder(str)
  # Shares of train, validation and test, per class. Of a folder that comes with train
  # and one more split: the third one's share of train; the rest is trained on.
  config.fractions = (0.5, 0.15, 0.35) if name == "demo" else (0.6, 0.15, 0.25)
  # Numbers per class in place of fractions, -1: all that remain; (): fractions; None:
  # the paper's numbers if the dataset is one of the two, else fractions.
  config.counts = config_dict.placeholder(tuple) if name in _CALTECH else ()
  # TFDS split expressions of train, validation and test, for datasets from TFDS.
  config.tfds_splits = ("train[:80%]", "train[80%:]", "test")
  # Largest number of examples of a class (demo); 0: all.
  config.per_class = 64
  # Training crop: range of its share of the area, and of width / height.
  config.crop_area = crops.DEFAULT_AREA
  config.crop_aspect = crops.DEFAULT_ASPECT
  # Decode JPEGs at 1/2, 1/4 or 1/8 of their size where the training crop allows it:
  # faster, but not torchvision's pixels to one grey level.
  config.reduced_decode = False
  # An unusable image is an error instead of being left out.
  config.strict = False
  # None, "ram" or "disk": keep decoded images.
  config.cache = config_dict.placeholder(str)
  # Worker processes; 0: threads of this process.
  config.workers = 0
  # Larger images are refused, in pixels.
  config.max_pixels = images.DEFAULT_MAX_PIXELS
  # None: its own classes; "imagenet", or a text file of names: those of a classifier
  # that is not trained further, of which the images show some.
  config.classes = config_dict.placeholder(str)
  # "given" with the images, or "self": the frozen classifier's own prediction on the
  # clean image.
  config.labels = "given"
  return config


def load(
  config: ml_collections.ConfigDict,
  split: str,
  *,
  workdir_cache: str | Path | None = None,
) -> Dataset:
  """Loads one split of the dataset that a config names.

  Args:
    config: see `default_config`.
    split: "train", "validation" or "test".
    workdir_cache: folder for what is worth keeping between runs; None for
      $FIDELITY_JAX_CACHE or ~/.cache/fidelity_jax.

  Returns:
    The dataset; unusable images are left out and listed in `skipped`.

  Raises:
    UsageError: an impossible field, a missing path, or (strict) an unusable image.
  """
  check(config)
  cache_dir = Path(workdir_cache) if workdir_cache else files.cache_folder()
  part = dataclasses.replace(_part(config, split), max_pixels=config.max_pixels)
  dataset = verify.verified(part, strict=config.strict, cache_dir=cache_dir)
  if config.labels == "self":
    known = classes.names(config.classes) if config.classes else dataset.class_names
    dataset = classes.unlabelled(dataset, known)
  elif config.classes:
    known, of = classes.names(config.classes), f"dataset.classes={config.classes}"
    dataset = classes.relabelled(dataset, known, of)
  if config.cache is not None:
    return caches.decoded(dataset, config.cache, cache_dir)
  return dataset


def _part(config: ml_collections.ConfigDict, split: str) -> Dataset:
  own = {}
  if config.name == "demo":
    whole = demo.build(config.per_class, config.split_seed)
  elif config.name == "folder":
    labelled = config.labels == "given" or not config.classes
    whole, own = folder.build(config.path, labelled)
  else:
    # TFDS takes seconds to import; most runs do not need it.
    from fidelity_jax.data import tfds_source

    expressions = SPLITS if config.name in _CALTECH else config.tfds_splits
    parts = tfds_source.build(config.name, config.path, tuple(expressions))
    if config.name not in _CALTECH or config.split_file in (None, config.name):
      return parts[split]
    whole = join(parts.values())
  if config.split_file:
    chosen = splits.from_file(
      config.split_file, whole.class_names, whole.keys, whole.labels
    )
  elif own and config.split_file is None:
    chosen = _own_splits(config, whole, own)
  else:
    counts = config.counts
    if counts is None:
      counts = _PAPER_COUNTS.get(config.name, ())
    chosen = splits.draw(
      whole.class_names,
      whole.labels,
      whole.keys,
      seed=config.split_seed,
      fractions=tuple(config.fractions),
      counts=tuple(counts),
    )
  return dataclasses.replace(whole.select(chosen[split]), split=split)


def _own_splits(
  config: ml_collections.ConfigDict, whole: Dataset, own: splits.Chosen
) -> splits.Chosen:
  """Returns the splits that a folder comes with, the missing one drawn from train.

  Raises:
    UsageError: counts ask for other splits, or a class is not to be trained on.
  """
  if config.counts:
    raise rules.refusal(
      "config.dataset",
      "counts",
      config.counts,
      f"draws splits, but {config.path} comes with its own: leave it (), or draw from "
      "all of its images with --config.dataset.split_file=",
    )
  trained = set(whole.labels[own["train"]].tolist())
  untrained = [i for i, n in enumerate(whole.labels.tolist()) if n not in trained]
  if untrained:
    key, name = whole.keys[untrained[0]], whole.class_names[whole.labels[untrained[0]]]
    raise UsageError(
      f"dataset.path: {config.path} has {len(untrained)} images of classes that are "
      f"not in train, the first is {key} of class '{name}'; add images of these "
      "classes to train, or move these away"
    )
  present = " and ".join(split for split in SPLITS if split in own)
  message = f"{config.path}: {present} are its sub-folders"
  if missing := next((split for split in SPLITS if split not in own), None):
    share = config.fractions[SPLITS.index(missing)]
    message += f"; {missing} is drawn from train, {100 * share:g}% of each class"
    own = splits.draw_missing(
      own,
      missing,
      share,
      whole.class_names,
      whole.labels,
      whole.keys,
      seed=config.split_seed,
    )
  folder.say_once(message)
  return own


def check(config: ml_collections.ConfigDict) -> None:
  """Refuses impossible values.

  Raises:
    UsageError: naming the field, its value and what is possible.
  """
  rules.check(config, FIELDS, "config.dataset")
  if config.name not in ("demo", "folder", *_CALTECH):
    from fidelity_jax.data import tfds_source

    if not tfds_source.known(config.name):
      near = " or ".join(tfds_source.near(config.name))
      raise UsageError(
        f"unknown dataset.name '{config.name}'"
        + (f"; did you mean {near}?" if near else "; 'folder' reads any images")
      )
  if config.name == "folder" and not config.path:
    raise UsageError(
      "dataset.name=folder needs dataset.path: a folder with one sub-folder per class, "
      "or a .csv file of paths and labels"
    )
  if sum(config.fractions) > 1 + 1e-6:
    raise rules.refusal(
      "config.dataset", "fractions", config.fractions, "must have a sum of at most 1"
    )
  counts = config.counts or ()
  if len(counts) not in (0, 3) or list(counts).count(-1) > 1:
    raise rules.refusal(
      "config.dataset",
      "counts",
      counts,
      "must be empty or three numbers of examples per class (train, validation, test), "
      "at most one of them -1 for the rest",
    )
