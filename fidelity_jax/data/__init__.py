"""Datasets by name, from encoded records to batches on devices."""

from fidelity_jax.data.batches import BatchIterator, eval_iterator, train_iterator
from fidelity_jax.data.dataset import Dataset, Skipped, check_classes
from fidelity_jax.data.load import FIELDS, check, default_config, load
from fidelity_jax.data.prefetch import prefetch_to_device

__all__ = [
  "FIELDS",
  "BatchIterator",
  "Dataset",
  "Skipped",
  "check",
  "check_classes",
  "default_config",
  "eval_iterator",
  "load",
  "prefetch_to_device",
  "train_iterator",
]
