"""Datasets by name."""

import difflib
from pathlib import Path

import ml_collections
from ml_collections import config_dict

from fidelity_jax.data import crops, demo, folder, images, splits, verify
from fidelity_jax.data.dataset import SPLITS, Dataset
from fidelity_jax.errors import UsageError

_NAMES = ("demo", "folder", "caltech256", "caltech101")
_CACHES = ("ram", "disk")


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
  # JSON file of splits; takes the place of the drawn ones.
  config.split_file = config_dict.placeholder(str)
  # Shares of train, validation and test, per class.
  config.fractions = (0.5, 0.15, 0.35) if name == "demo" else (0.6, 0.15, 0.25)
  # Or numbers per class; -1: all that remain.
  config.counts = ()
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
    workdir_cache: folder for what is worth keeping between runs; None for nothing.

  Returns:
    The dataset; unusable images are left out and listed in `skipped`.

  Raises:
    UsageError: an impossible field, a missing path, or (strict) an unusable image.
  """
  validate(config)
  if split not in SPLITS:
    raise UsageError(f"no split '{split}'; there are {', '.join(SPLITS)}")
  cache_dir = Path(workdir_cache) if workdir_cache else None
  if config.name == "demo":
    whole = demo.build(config.per_class, config.split_seed)
  else:
    whole = folder.build(config.path)
  chosen = _split(
    whole, config.split_seed, tuple(config.fractions), tuple(config.counts)
  )
  part = whole.part(split, chosen[split], config.max_pixels)
  return verify.verified(part, strict=config.strict, cache_dir=cache_dir)


def _split(
  whole: Dataset, seed: int, fractions: tuple[float, ...], counts: tuple[int, ...]
) -> dict[str, list[int]]:
  return splits.draw(
    whole.class_names,
    whole.labels,
    whole.keys,
    seed=seed,
    fractions=fractions,
    counts=counts,
  )


def validate(config: ml_collections.ConfigDict) -> None:
  """Refuses impossible values.

  Raises:
    UsageError: naming the field, its value and what is possible.
  """
  if config.name not in _NAMES:
    near = difflib.get_close_matches(config.name, _NAMES)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise UsageError(f"unknown dataset.name '{config.name}'{hint}")
  if config.name == "folder" and not config.path:
    raise UsageError(
      "dataset.name=folder needs dataset.path: a folder with one sub-folder per class, "
      "or a .csv file of paths and labels"
    )
  for field, least in (
    ("image_size", 1),
    ("per_class", 0),
    ("workers", 0),
    ("max_pixels", 1),
  ):
    if config[field] < least:
      raise UsageError(f"dataset.{field} must be at least {least}: {config[field]}")
  if config.cache is not None and config.cache not in _CACHES:
    raise UsageError(f"dataset.cache must be None, ram or disk, not '{config.cache}'")
  low, high = config.crop_area
  if not 0 < low <= high <= 1:
    raise UsageError(
      f"dataset.crop_area must be a range in (0, 1], not {tuple(config.crop_area)}"
    )
  low, high = config.crop_aspect
  if not 0 < low <= high:
    raise UsageError(
      "dataset.crop_aspect must be a range above 0, not "
      f"{tuple(config.crop_aspect)}"
    )
  splits.check_shares(config.fractions, config.counts)
