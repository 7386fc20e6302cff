"""Runs and exported files on Hugging Face's hub: `fidelity_jax push` and `pull`."""

import os
import pathlib
import shutil
import tempfile

from fidelity_jax import (
  cards,
  errors,
  export,
  exported,
  files,
  huggingface,
  locations,
  port,
)
from fidelity_jax.port import storing

# What `push` uploads. Code that lies beside it is not downloaded.
_OURS = ("*.json", "*.safetensors", "*.jax", "*.onnx", "*.md", "LICENSE*")


def push(
  place: str | os.PathLike,
  address: str,
  private: bool = False,
  licence: str = cards.UNKNOWN,
) -> str:
  """Uploads a run or an export, in one commit, to a repository, made where absent.

  An exported file goes with its record, and its card becomes the repository's. A run is
  exported to a directory first.

  Args:
    place: an exported file or directory, or a run, see `runs.find`.
    address: "hf:OWNER/NAME", with "@BRANCH" for another branch than the main one.
    private: whether the repository is to be private.
    licence: of the weights, for a run; exports have theirs.

  Returns:
    The commit's address.

  Raises:
    UsageError: the address is none, there is no such run, the repository is there and
      public where `private` is asked for, or a licence is given for an export.
    RunError: what is to be uploaded is damaged, or the hub refuses or is not reached.
  """
  repo, _, revision = huggingface.parsed(address, file=False)
  hub, path = huggingface.library(), locations.expand(place)
  is_file = exported.is_file(path)
  if licence != cards.UNKNOWN and (is_file or port.is_ported(path)):
    raise errors.UsageError(
      f"{path} is exported already, its card has a licence: export it again with "
      f"--license={licence}."
    )
  with tempfile.TemporaryDirectory() as temporary:
    if is_file:
      uploads = _of_file(path)
    else:
      if not port.is_ported(path):
        path = pathlib.Path(temporary) / "weights"
        export.export(place, path, licence)
      port.load(path)
      uploads = {one.name: one for one in storing.contents(path)}
    with huggingface.speaking(hub, address):
      api = hub.HfApi()
      api.create_repo(repo, private=private, exist_ok=True)
      if private and not api.repo_info(repo).private:
        raise errors.UsageError(
          f"{address} is there already, and public: nothing was uploaded. Make it "
          "private on its page, or push to another."
        )
      if revision:
        api.create_branch(repo, branch=revision, exist_ok=True)
      commit = api.create_commit(
        repo,
        [hub.CommitOperationAdd(name, one) for name, one in uploads.items()],
        commit_message="Exported by fidelity_jax",
        revision=revision,
      )
  return commit.commit_url


def _of_file(path: pathlib.Path) -> dict[str, pathlib.Path]:
  """Returns what belongs to an exported file, by its name in a repository."""
  digest, record = exported.read_record(path).digest, exported.record_path(path)
  uploads = {path.name: path, record.name: record}
  card, pulled = exported.card_path(path), path.with_name("README.md")
  if card.is_file():
    uploads["README.md"] = card
  # `pull` writes it there; a card names the digest, what else is called so does not.
  elif pulled.is_file() and digest.encode() in pulled.read_bytes():
    uploads["README.md"] = pulled
  return uploads


def pull(address: str, to: str | os.PathLike) -> list[pathlib.Path]:
  """Downloads what `push` uploaded, whole or not at all, and checks its digests.

  Args:
    address: "hf:OWNER/NAME", with "@REVISION" for a branch, a tag or a commit.
    to: a directory that does not exist.

  Returns:
    What can be loaded: exported files, or the directory itself.

  Raises:
    UsageError: the address is none, or the directory exists or cannot be made.
    RunError: there is no such repository, nothing of this package in it, it is damaged,
      or the hub is not reached.
  """
  repo, _, revision = huggingface.parsed(address, file=False)
  hub = huggingface.library()
  path = pathlib.Path(os.path.abspath(locations.expand(to, write=True)))
  if os.path.lexists(path):
    raise errors.UsageError(f"--to={to} exists: name a directory that does not.")
  if not path.parent.is_dir():
    raise errors.UsageError(f"--to={to}: there is no directory {path.parent}.")
  files.check_directory(path.parent, write=True)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    with huggingface.speaking(hub, address), errors.while_doing(f"writing {path}"):
      hub.snapshot_download(
        repo, revision=revision, local_dir=temporary, allow_patterns=list(_OURS)
      )
    # Where huggingface_hub notes what it has downloaded.
    shutil.rmtree(temporary / ".cache", ignore_errors=True)
    found = _checked(temporary, address)
    with errors.while_doing(f"writing {path}"):
      os.replace(temporary, path)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
  return [path / one.relative_to(temporary) for one in found]


def _checked(directory: pathlib.Path, address: str) -> list[pathlib.Path]:
  """Returns what can be loaded of a directory, after all of it was compared."""
  found = [
    path
    for suffix in exported.SUFFIXES
    for path in sorted(directory.glob(f"*{suffix}"))
    if exported.record_path(path).is_file()
  ]
  for path in found:
    exported.read_record(path)
  if port.is_ported(directory):
    port.load(directory)
    found.append(directory)
  if not found:
    raise errors.RunError(f"{address} has nothing in it that fidelity_jax exported.")
  return found
