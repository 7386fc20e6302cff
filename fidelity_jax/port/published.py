"""Published weights by name."""

import pathlib
import re

from fidelity_jax import downloading, errors, files
from fidelity_jax.models import registry

# URL by name, "PUBLISHER/NAME".
FILES = {
  name: url for family in registry.FAMILIES for name, url in family.published.items()
}


def is_name(checkpoint: str) -> bool:
  """Returns whether this is written as the names of published weights are."""
  publisher, slash, _ = checkpoint.partition("/")
  return bool(slash) and publisher in {name.partition("/")[0] for name in FILES}


def find(name: str) -> pathlib.Path:
  """Returns the file of published weights, downloaded once into the cache.

  Args:
    name: a key of `FILES`.

  Raises:
    errors.UsageError: no such name.
    errors.Missing: it could not be downloaded.
    errors.RunError: its checksum is wrong, or the cache cannot be written.
  """
  if name not in FILES:
    raise errors.UsageError(
      f"there are no published weights {name!r}; {errors.near(name, FILES)}"
    )
  digits = re.search(r"-([0-9a-f]{8,64})\.[a-z]+$", FILES[name]).group(1)
  return downloading.fetch(FILES[name], files.cache_folder(), f"sha256:{digits}")
