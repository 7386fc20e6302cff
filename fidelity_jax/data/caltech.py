"""Caltech-256 and Caltech-101 as TFDS builders with the authors' own splits.

The encoded JPEGs go into ArrayRecord files as they are; TensorFlow is not needed.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import tensorflow_datasets as tfds

from fidelity_jax import downloading, progress
from fidelity_jax.data import archives, splits
from fidelity_jax.data.dataset import SPLITS
from fidelity_jax.errors import RunError

_NAMED = 10


@dataclasses.dataclass(frozen=True)
class Source:
  """Where a dataset comes from.

  Attributes:
    url: of the archive, on the dataset's site.
    md5: of the archive, as the site states it (and torchvision's source).
    size: of the archive, for messages.
    folder: name of the folder of class folders inside of it.
    left_out: class folders that are no classes.
  """

  url: str
  md5: str
  size: str
  folder: str
  left_out: tuple[str, ...] = ()


class _Caltech(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """What both datasets share: an archive of class folders with numbered JPEGs."""

  VERSION = tfds.core.Version("1.0.0")
  SOURCE: Source
  LIST: str
  # What a file's name must look like; the last group is its number.
  FILE: re.Pattern
  DESCRIPTION: str
  HOMEPAGE: str
  # Where the archive or its extracted folder is, or the download goes.
  source_dir: Path

  def lists(self) -> splits.Lists:
    """Returns the authors' split."""
    return splits.authors_lists(self.LIST)

  def class_key(self, folder: str) -> str:
    """Returns what identifies a class, however its folder's name is written."""
    return re.sub(r"[^a-z0-9]", "", folder.casefold())

  def extracted(self) -> Path | None:
    """Returns the folder of class folders, if the archive is extracted already."""
    classes = {self.class_key(name) for name in self.lists()}
    for place in (self.source_dir / self.SOURCE.folder, self.source_dir):
      if place.is_dir() and any(
        self.class_key(entry.name) in classes for entry in place.iterdir()
      ):
        return place
    return None

  @functools.cached_property
  def source(self) -> Path:
    """The folder or archive that is read, downloaded if need be.

    Raises:
      RunError: it is not there and cannot be downloaded, or is damaged.
    """
    return self.extracted() or downloading.fetch(
      self.SOURCE.url,
      self.source_dir,
      f"md5:{self.SOURCE.md5}",
      f" ({self.SOURCE.size}), or its extracted folder {self.SOURCE.folder}",
    )

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=self.DESCRIPTION,
      homepage=self.HOMEPAGE,
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(encoding_format="jpeg"),
          "label": tfds.features.ClassLabel(names=sorted(self.lists())),
          "key": tfds.features.Text(),
        }
      ),
      supervised_keys=("image", "label"),
    )

  def _split_generators(self, dl_manager):
    # It names downloads by digests, so a user could not put an archive there.
    del dl_manager
    self._check_complete(self.source)
    return {split: self._generate_examples(self.source, split) for split in SPLITS}

  def _generate_examples(self, source: Path, split: str):
    labels = {name: label for label, name in enumerate(sorted(self.lists()))}
    for class_name, number, content in self._images(source):
      train, validation = self.lists()[class_name]
      belongs = (
        "train" if number in train else "validation" if number in validation else "test"
      )
      if belongs == split:
        key = f"{class_name}/{number:04d}"
        yield (
          key,
          {
            "image": content,
            "label": labels[class_name],
            "key": key,
          },
        )

  def _images(
    self, source: Path, strays: list[str] | None = None
  ) -> Iterator[tuple[str, int, bytes]]:
    """Yields class name, number and bytes of every image that belongs to a class."""
    classes = {self.class_key(name): name for name in self.lists()}
    left_out = {self.class_key(name) for name in self.SOURCE.left_out}
    seen = set()
    for name, content in archives.members(source):
      path = PurePosixPath(name)
      if len(path.parts) < 2:
        class_key = ""
      else:
        class_key = self.class_key(path.parts[-2])
      match = self.FILE.fullmatch(path.name)
      place = (classes.get(class_key), match and int(match.groups()[-1]))
      if class_key in left_out:
        continue
      if None in place or place in seen or not self._fits(place[0], match):
        if strays is not None:
          strays.append(name)
        continue
      seen.add(place)
      yield *place, content

  def _fits(self, class_name: str, match: re.Match) -> bool:
    """Returns whether a file's name agrees with its class folder."""
    return True

  def _check_complete(self, source: Path) -> None:
    """Refuses a source that lacks what the authors' lists name.

    Raises:
      RunError: naming the first missing file and how many are missing.
    """
    strays = []
    found = {(name, number) for name, number, _ in self._images(source, strays)}
    for name in strays[:_NAMED]:
      progress.say(f"{source}: {name} is no image of a class; left out")
    if len(strays) > _NAMED:
      progress.say(f"{source}: {len(strays) - _NAMED} more such files left out")
    missing = sorted(
      (name, number)
      for name, parts in self.lists().items()
      for part in parts
      for number in part
      if (name, number) not in found
    )
    if missing:
      name, number = missing[0]
      raise RunError(
        f"{source} lacks {len(missing)} of the images that the authors' split names, "
        f"the first is number {number} of class {name}; fetch {self.SOURCE.url} again"
      )


class Caltech256(_Caltech, skip_registration=True):
  """257 classes (one of them clutter), 60 per class for training and validation."""

  LIST = "caltech256"
  FILE = re.compile(r"(\d{3})_(\d{4})\.jpe?g", re.IGNORECASE)
  DESCRIPTION = "Caltech-256 (Griffin, Holub, Perona 2007): 30607 photographs."
  HOMEPAGE = "https://data.caltech.edu/records/nyy15-4j048"
  SOURCE = Source(
    url=f"{HOMEPAGE}/files/256_ObjectCategories.tar",
    md5="67b4f42ca05d46448c6bb8ecd2220f6d",
    size="1.2 GB",
    folder="256_ObjectCategories",
  )

  def class_key(self, folder: str) -> str:
    """Returns the number that starts a class folder's name, "003" of "003.backpack"."""
    match = re.match(r"(\d{3})\.", folder)
    return match.group(1) if match else ""

  def _fits(self, class_name: str, match: re.Match) -> bool:
    return match.group(1) == self.class_key(class_name)


class Caltech101(_Caltech, skip_registration=True):
  """101 classes, 30 per class for training and validation."""

  LIST = "caltech101"
  FILE = re.compile(r"image_(\d{4})\.jpe?g", re.IGNORECASE)
  DESCRIPTION = "Caltech-101 (Fei-Fei, Fergus, Perona 2004), without its background."
  HOMEPAGE = "https://data.caltech.edu/records/mzrjq-6wc02"
  SOURCE = Source(
    url=f"{HOMEPAGE}/files/caltech-101.zip",
    md5="3138e1922a9193bfa496528edbbc45d0",
    size="137 MB",
    folder="101_ObjectCategories",
    left_out=("BACKGROUND_Google",),
  )
