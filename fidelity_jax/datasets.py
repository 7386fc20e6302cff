"""The datasets of all stages, and which images there are in each."""

from typing import Any

from ml_collections import ConfigDict

from fidelity_jax import data, files, locations, stages

# Fields of `dataset` that say how images are read, not which there are.
_READING = (
  *("cache", "crop_area", "crop_aspect", "image_size", "max_pixels"),
  *("reduced_decode", "strict", "workers"),
)


def selection(config: ConfigDict) -> dict[str, Any]:
  """Returns the fields of a stage's dataset that say which images there are."""
  chosen = {k: v for k, v in config.dataset.items() if k not in _READING}
  if chosen["path"]:
    chosen["path"] = str(locations.expand(chosen["path"]).absolute())
  return {k: v for k, v in chosen.items() if v is not None}


class Datasets:
  """Loads each split of each dataset once."""

  def __init__(self):
    self._loaded: dict[str, data.Dataset] = {}

  def load(self, config: ConfigDict, split: str) -> data.Dataset:
    """Returns one split ("train", "validation" or "test") of a dataset."""
    # How images are cropped and resized later makes no other dataset.
    later = ("crop_area", "crop_aspect", "image_size", "reduced_decode", "workers")
    fields = {k: v for k, v in config.items() if k not in later}
    key = files.digest([stages.as_json(fields), split])
    if key not in self._loaded:
      self._loaded[key] = data.load(config, split)
    return self._loaded[key]

  def encoded(self, config: ConfigDict, split: str) -> data.Dataset:
    """Returns the same, not decoded even if it is to be cached."""
    config = config.copy_and_resolve_references()
    config.cache = None
    return self.load(config, split)

  def fingerprint(self, config: ConfigDict, labelled: bool = True) -> str:
    """Returns the fingerprint of what a stage is trained and selected on.

    Args:
      config: the dataset's.
      labelled: whether the stage looks at labels.
    """
    splits = [self.encoded(config, split) for split in ("train", "validation")]
    of = lambda d: d.fingerprint if labelled else d.images_fingerprint
    return "-".join(of(dataset)[:32] for dataset in splits)
