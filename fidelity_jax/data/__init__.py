"""Datasets by name, from encoded records to batches on devices."""

from fidelity_jax.data.batches import (
  BatchIterator,
  eval_iterator,
  steps_per_epoch,
  train_iterator,
)
from fidelity_jax.data.dataset import Dataset, Skipped, check_num_classes
from fidelity_jax.data.load import FIELDS, check, default_config, load
from fidelity_jax.data.patches import extract_patches, patch_index
from fidelity_jax.data.prefetch import prefetch_to_device

__all__ = [
  "FIELDS",
  "BatchIterator",
  "Dataset",
  "Skipped",
  "check",
  "check_num_classes",
  "default_config",
  "eval_iterator",
  "extract_patches",
  "load",
  "patch_index",
  "prefetch_to_device",
  "steps_per_epoch",
  "train_iterator",
]
