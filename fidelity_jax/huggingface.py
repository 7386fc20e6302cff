"""Hugging Face's hub: addresses on it, its library, and what that objects to."""

import contextlib
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

from fidelity_jax import errors

_ADDRESS = re.compile(
  r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<file>[^@\0]+))?(?:@(?P<revision>[\w./-]+))?"
)


def is_address(place: str) -> bool:
  """Returns whether this is written as an address on the hub is."""
  return place.startswith("hf:")


def parsed(address: str, file: bool = True) -> tuple[str, str | None, str | None]:
  """Returns repository, file and revision of "hf:OWNER/NAME[/FILE][@REVISION]".

  Args:
    address: the address.
    file: whether it may have a file.

  Raises:
    UsageError: it is none.
  """
  match = _ADDRESS.fullmatch(address)
  if match is None or (match["file"] and not file):
    form = f"hf:OWNER/NAME{'[/FILE]' * file}"
    raise errors.UsageError(
      f"{address!r} is no address: write {form}, or {form}@REVISION."
    )
  return match["repo"], match["file"], match["revision"]


def fetch(
  address: str, choose: Callable[[Sequence[str], bool], Sequence[str]]
) -> pathlib.Path:
  """Returns a file, or a directory of several, downloaded into the library's cache.

  What is there already is not downloaded again and, without a network, is used as it
  is.

  Args:
    address: "hf:OWNER/NAME[/FILE][@REVISION]".
    choose: returns the files to take of those that a repository has, and is told
      whether these are all, or, without a network, those of the cache; of the address
      of a file it is not asked.

  Raises:
    UsageError: the address is none.
    RunError: there is no such repository, revision or file, or it is not reached.
  """
  repo, file, revision = parsed(address)
  hub = library()
  with speaking(hub, address):
    names = [file] if file else choose(*_names(hub, repo, revision))
    if len(names) == 1:
      path = hub.hf_hub_download(repo, names[0], revision=revision)
    else:
      path = hub.snapshot_download(repo, revision=revision, allow_patterns=list(names))
  return pathlib.Path(path)


def _names(hub: ModuleType, repo: str, revision: str | None) -> tuple[list[str], bool]:
  """Returns the files of a repository, and whether these are all.

  Without a network they are those in the cache.
  """
  try:
    return hub.HfApi().list_repo_files(repo, revision=revision), True
  except (OSError, hub.errors.HTTPError) as error:
    response = getattr(error, "response", None)
    if response is not None and response.status_code < 500:
      raise
    try:
      # A directory of what was downloaded before, with nothing to add to it.
      place = hub.snapshot_download(
        repo, revision=revision, local_files_only=True, allow_patterns=[]
      )
    except hub.errors.LocalEntryNotFoundError:
      raise error from None
  root = pathlib.Path(place)
  there = (path for path in root.rglob("*") if path.is_file())
  return [str(path.relative_to(root)) for path in there], False


def library() -> ModuleType:
  """Returns huggingface_hub, an extra of this package.

  Raises:
    RunError: it is not installed.
  """
  try:
    import huggingface_hub

    # Which it does not import itself until something needs them.
    import huggingface_hub.constants
    import huggingface_hub.errors
  except ImportError as error:
    raise errors.RunError(
      "huggingface_hub, which speaks to the hub, is not installed: pip install "
      "'fidelity_jax[hub]'."
    ) from error
  return huggingface_hub


@contextlib.contextmanager
def speaking(hub: ModuleType, address: str) -> Iterator[None]:
  """Turns what the hub or the way there objects to into one line.

  Args:
    hub: the library.
    address: what it is about.

  Raises:
    UsageError: the address is none.
    RunError: anything else.
  """
  try:
    yield
  except hub.errors.GatedRepoError as error:
    raise errors.RunError(
      f"{address} asks for its owner's permission first: see its page, then set "
      "HF_TOKEN."
    ) from error
  except hub.errors.RepositoryNotFoundError as error:
    raise errors.RunError(
      f"{address}: the hub has no such repository, or shows it to others only: check "
      "the name, and set HF_TOKEN to a token that may use it."
    ) from error
  except hub.errors.RevisionNotFoundError as error:
    raise errors.RunError(f"{address}: the repository has no such revision.") from error
  except hub.errors.RemoteEntryNotFoundError as error:
    raise errors.RunError(f"{address}: the repository has no such file.") from error
  except hub.errors.LocalTokenNotFoundError as error:
    raise errors.RunError(
      f"{address}: no token: set HF_TOKEN to one that may write there "
      "(huggingface.co/settings/tokens)."
    ) from error
  except hub.errors.HfHubHTTPError as error:
    status = error.response.status_code if error.response is not None else None
    reason = str(error).strip().splitlines()[0]
    if status in (401, 403):
      reason = f"the hub refuses (HTTP {status}): set HF_TOKEN to one that may do so"
    raise errors.RunError(f"{address}: {reason:.200}.") from error
  except hub.errors.HFValidationError as error:
    raise errors.UsageError(f"{address} is no address of the hub: {error}.") from error
  except (errors.RunError, errors.UsageError):
    raise
  except Exception as error:
    if errors.circumstance(error):
      raise
    # The latter is what its HTTP library's errors have in common.
    if isinstance(error, OSError | hub.errors.HTTPError):
      raise errors.RunError(
        f"{address}: the hub at {hub.constants.ENDPOINT} is not reached "
        f"({error!s:.100}): check the network and run the same command again."
      ) from error
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    raise errors.RunError(
      f"{address}: huggingface_hub fails: {reason:.200}."
    ) from error
