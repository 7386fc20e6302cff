"""What users name: paths, or addresses in buckets."""

import pathlib

from fidelity_jax import buckets, errors, files


def expand(place: str | pathlib.Path, write: bool = False) -> pathlib.Path:
  """Returns the path that a place stands for: of an address, that of a copy.

  Args:
    place: a path, in which "~" and "~user" are replaced, or an address such as
      gs://BUCKET/DIR; see `buckets.copy`.
    write: whether it is to be written to, which an address cannot be.

  Raises:
    UsageError: there is no such user, it cannot be a path, or an address cannot be
      used.
    RunError: an address cannot be reached.
  """
  if not buckets.is_address(place):
    return files.expand(place)
  if write:
    raise errors.UsageError(
      f"{place} is an address: name a directory on a disk. Only a run's --workdir may "
      "be in a bucket."
    )
  return buckets.copy(str(place))
