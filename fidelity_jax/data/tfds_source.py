"""Datasets that TFDS has prepared as ArrayRecord files, read without TensorFlow."""

import dataclasses
import difflib
import hashlib
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from fidelity_jax import buckets, errors, files, locations, progress
from fidelity_jax.data import caltech
from fidelity_jax.data.dataset import SPLITS, Dataset
from fidelity_jax.errors import RunError, UsageError

BUILDERS = {"caltech256": caltech.Caltech256, "caltech101": caltech.Caltech101}
# Other names of TFDS datasets.
_ALIASES = {"cub200": "caltech_birds2011"}
_TFDS_HOST = "storage.googleapis.com"
_FORMAT = tfds.core.FileFormat.ARRAY_RECORD


@dataclasses.dataclass(frozen=True)
class TfdsRecords:
  """Encoded images of a TFDS data source.

  Attributes:
    source: a random-access data source that leaves images encoded.
    indices: positions in it.
    prepared: changes when the prepared files do.
  """

  source: Any
  indices: tuple[int, ...]
  prepared: str

  def __len__(self) -> int:
    return len(self.indices)

  def __getitem__(self, index: int) -> bytes:
    return self.source[self.indices[index]]["image"]

  def versions(self) -> list[str]:
    """Returns the version of the prepared files, with each position in them."""
    return [f"{self.prepared}-{i}" for i in self.indices]

  def select(self, indices: Sequence[int]) -> "TfdsRecords":
    """Returns the records at `indices`."""
    chosen = tuple(self.indices[i] for i in indices)
    return dataclasses.replace(self, indices=chosen)


def data_dir(path: str | None) -> Path:
  """Returns the folder of archives and prepared files: `path`, or TFDS's default."""
  return locations.expand(path or tfds.core.constants.DATA_DIR)


def known(name: str) -> bool:
  """Returns whether there is a dataset of this name, here or in TFDS."""
  return name in BUILDERS or name in _ALIASES or name in _catalogue()


def near(name: str) -> list[str]:
  """Returns names that are similar."""
  names = [*BUILDERS, *_ALIASES, "demo", "folder", *_catalogue()]
  return difflib.get_close_matches(name, names)


def _catalogue() -> list[str]:
  return tfds.list_builders(with_community_datasets=False)


def build(
  name: str, path: str | None, expressions: Sequence[str]
) -> dict[str, Dataset]:
  """Opens a dataset, preparing its files once if that is possible.

  Args:
    name: "caltech256", "caltech101", "cub200" or a TFDS name.
    path: see `data_dir`.
    expressions: TFDS split expressions for train, validation and test.

  Returns:
    The three splits, not yet verified.

  Raises:
    UsageError: no image classification dataset, an impossible split expression, or
      files that are missing and cannot be prepared here.
    RunError: prepared files that are damaged or cannot be read.
  """
  folder = data_dir(path)
  try:
    with errors.while_doing(f"reading the dataset '{name}'"):
      builder = _builder(name, folder)
      folder = builder.data_path
      return {
        split: _open(builder, name, split, expression)
        for split, expression in zip(SPLITS, expressions, strict=True)
      }
  except (UsageError, RunError):
    raise
  except Exception as error:  # TFDS and ArrayRecord raise many types.
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise RunError(
      f"the files of the dataset '{name}' that were prepared in {folder} are damaged "
      f"({reason[:160]}): delete them and run again to prepare them anew"
    ) from error


def _builder(name: str, folder: Path) -> tfds.core.DatasetBuilder:
  # A line is logged before and after; TFDS's progress bars would break it.
  tfds.disable_progress_bar()
  if name in BUILDERS:
    return _prepared(BUILDERS[name], folder)
  tfds_name = _ALIASES.get(name, name)
  try:
    builder = tfds.builder(tfds_name, data_dir=folder, file_format=_FORMAT)
    if not builder.is_prepared():
      if buckets.is_copy(folder):
        raise OSError("what is in a bucket is read only")
      # TFDS retries for minutes where there is no network at all.
      socket.getaddrinfo(_TFDS_HOST, 443)
      builder.download_and_prepare()
  except Exception as error:
    if errors.circumstance(error):
      raise
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise UsageError(
      f"dataset '{name}' is not prepared in {folder} and cannot be prepared here "
      f"({reason[:160]}); where there is a network, and TensorFlow, which some TFDS "
      'builders need, run once: python -c "import tensorflow_datasets as tfds; '
      f"tfds.builder('{tfds_name}', data_dir='{folder}', "
      "file_format='array_record').download_and_prepare()\""
    ) from error
  return builder


def _prepared(
  make: type[tfds.core.DatasetBuilder], folder: Path
) -> tfds.core.DatasetBuilder:
  """Returns one of this package's builders, its files written if need be."""
  make.source_dir = folder
  # A folder that the user extracted is not written into.
  own = folder / make.SOURCE.folder
  ours = os.access(folder, os.W_OK) or not folder.exists()
  ours = ours and not buckets.is_copy(folder)
  if ours and (own.is_dir() or make(data_dir=folder).extracted() is None):
    target = folder
  else:
    digest = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]
    target = files.cache_folder() / f"tfds-{digest}"
  builder = make(data_dir=target, file_format=_FORMAT)
  if builder.is_prepared():
    return builder
  progress.say(f"preparing {make.LIST} from {builder.source} in {target}")
  try:
    builder.download_and_prepare()
  except OSError as error:
    reason = errors.circumstance(error) or error
    raise RunError(f"cannot prepare {make.LIST} in {target}: {reason}") from error
  return builder


def _prepared_version(folder: Path) -> str:
  """Returns a text that changes when a prepared file does."""
  status = [f"{p.name} {files.version(p.stat())}" for p in sorted(folder.iterdir())]
  return hashlib.sha256("\n".join(status).encode()).hexdigest()[:16]


def _open(
  builder: tfds.core.DatasetBuilder, name: str, split: str, expression: str
) -> Dataset:
  features = builder.info.features
  if not {"image", "label"} <= set(features) or not isinstance(
    features["label"], tfds.features.ClassLabel
  ):
    raise UsageError(
      f"dataset '{name}' is no image classification dataset: its features are "
      f"{', '.join(features)} instead of image and label"
    )
  # Pictures beside the image, such as the birds' masks, are not needed.
  encoded = {
    feature: tfds.decode.SkipDecoding()
    for feature, kind in features.items()
    if isinstance(kind, tfds.features.Image)
  }
  try:
    source = builder.as_data_source(expression, decoders=encoded)
  except ValueError as error:
    raise UsageError(
      f"dataset.tfds_splits: {expression!r} is no split of '{name}' "
      f"({', '.join(builder.info.splits)}): {str(error).splitlines()[0]}"
    ) from error
  examples = [source[i] for i in range(len(source))]
  if any(example.get("image") is None for example in examples):
    raise RunError(
      f"the files of the dataset '{name}' that were prepared in {builder.data_path} "
      "are cut off: delete them and run again to prepare them anew"
    )
  names = features["label"].names
  if "key" in features:
    keys = [f"{name}/{example['key'].decode()}" for example in examples]
  else:
    keys = [f"{name}/{expression}/{i:07d}" for i in range(len(examples))]
  return Dataset(
    name=name,
    split=split,
    records=TfdsRecords(
      source,
      tuple(range(len(examples))),
      f"{expression}-{_prepared_version(Path(builder.data_path))}",
    ),
    keys=tuple(keys),
    labels=np.asarray([example["label"] for example in examples], np.int32),
    class_names=tuple(names),
  )
