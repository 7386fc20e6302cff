"""Exported networks, read back: programs that need none of this package's networks.

They take images of one size. Larger ones are restored and mapped in windows of it.
"""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import msgspec
import numpy as np

from fidelity_jax import buckets, errors, files, locations, platform, rows, tiling

SUFFIXES = (".jax", ".onnx")
_AGAIN = "export it again, or copy it again with the .json file beside it."


class About(msgspec.Struct, kw_only=True):
  """What an experiment is about, which its networks do not tell.

  Attributes:
    degradation: that of its config, as `stages.as_json` has it.
    rounds: draws of noise per test image.
    seed: of that noise.
    facts: what is known of the networks together; None without a classifier.
  """

  degradation: Any
  rounds: int
  seed: int
  facts: rows.Facts | None


class Record(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
  """What the JSON file beside an exported file holds.

  Attributes:
    name: the experiment's, or the checkpoint's.
    digest: SHA-256 of the exported file.
    inputs: shapes by name, in order: "degraded" and, for runs on the true fidelity map,
      "clean"; float32 in [0, 1]. "batch" stands for any number.
    outputs: shapes by name, float32; see `method.Method.outputs`.
    image_size: side of the images, pixels.
    class_names: in the order of the logits; empty without a classifier.
    map_name: of the fidelity map: "l1", "l2" or "cosine".
    radius: how many pixels away the images can be that a pixel of an output depends on,
      by the output's name; see `method.Method.radius`. None in older records.
    precision: what the networks compute in, "float32" or "bfloat16".
    platforms: what the program runs on.
    stages: names of the stages that the networks came from, by role.
    products: digests of what these stages gave, by role.
    source: digest of the checkpoint that the networks came from, None for stages.
    licence: of the weights, "unknown" if nobody said.
    versions: of the libraries that exported it.
    about: for whoever measures them; None where nobody knows.
    classes_named: False if the names of the classes are only their numbers.
    format: version of this record.
  """

  name: str
  digest: str
  inputs: dict[str, list[int | str]]
  outputs: dict[str, list[int | str]]
  image_size: int
  class_names: list[str]
  map_name: str
  precision: str
  platforms: list[str]
  stages: dict[str, str]
  products: dict[str, str]
  source: str | None
  licence: str
  versions: dict[str, str]
  about: About | None = None
  radius: dict[str, int] | None = None
  classes_named: bool = True
  format: int = 1


# From arrays by name to those of its outputs that are named.
Program = Callable[[dict[str, np.ndarray], Sequence[str]], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Exported:
  """An exported file, ready to run.

  Attributes:
    record: what it takes and gives, and where it came from.
    program: see `Program`.
  """

  record: Record
  program: Program

  def __call__(
    self, degraded: np.ndarray, clean: np.ndarray | None = None
  ) -> dict[str, np.ndarray]:
    """Returns what the networks say of images, float32 arrays by name.

    Args:
      degraded: floating-point [N, S, S, 3] in [0, 1], S = `record.image_size`.
      clean: likewise; used by the true fidelity map only.

    Raises:
      UsageError: images are missing, of another shape, type or range, or not as many
        of one kind as of the other.
    """
    given = {"degraded": degraded, "clean": clean}
    arrays = {}
    for name, shape in self.record.inputs.items():
      if given[name] is None:
        raise errors.UsageError(f"{self.record.name} needs the {name} images, too.")
      array = np.asarray(given[name])
      if list(array.shape[1:]) != shape[1:]:
        raise errors.UsageError(
          f"{self.record.name} takes images of the shape {tuple(shape)}, not "
          f"{array.shape}."
        )
      if not jnp.issubdtype(array.dtype, jnp.floating):
        raise errors.UsageError(
          f"{self.record.name} takes {name} images as floating-point numbers in "
          f"[0, 1], not {array.dtype}: divide bytes by 255."
        )
      # NaN is in no range.
      if not ((array >= 0) & (array <= 1)).all():
        raise errors.UsageError(
          f"{self.record.name} takes {name} images with values in [0, 1], and some are "
          "not: clip them, or divide what goes to 255 by that."
        )
      arrays[name] = array.astype(np.float32)
    if len({len(array) for array in arrays.values()}) > 1:
      raise errors.UsageError(
        f"{self.record.name} takes as many clean images as degraded ones, not "
        f"{len(arrays['clean'])} and {len(arrays['degraded'])}."
      )
    found = self.program(arrays, list(self.record.outputs))
    return {k: np.asarray(v) for k, v in found.items()}

  def check_whole(self, outputs: Sequence[str] = ("restored",)) -> None:
    """Raises UsageError if `whole` cannot give these outputs of any image."""
    name, record = self.record.name, self.record
    if "restored" not in record.outputs:
      raise errors.UsageError(
        f"{name} cannot restore images: it was exported without a denoiser; name one "
        "with it, or a checkpoint of a denoiser."
      )
    if record.radius is None:
      raise errors.UsageError(
        f"{name} cannot be applied to whole images: its record does not say yet how "
        "far its networks see; export it again, or name its run's directory."
      )
    size, radius = record.image_size, max(record.radius[one] for one in outputs)
    if size <= 2 * radius:
      raise errors.UsageError(
        f"{name} cannot be applied to whole images: its networks see {radius} pixels "
        f"far, for which windows of {size}x{size} are too small; name its run's "
        "directory."
      )

  def whole(
    self,
    outputs: Sequence[str],
    degraded: np.ndarray,
    clean: np.ndarray | None = None,
  ) -> dict[str, np.ndarray]:
    """Returns what the networks make of one whole image, float32 [H, W, C] by name.

    It is computed in windows of S x S pixels, S = `record.image_size`: of each what the
    window's border does not reach is used, so that there are no seams.

    Args:
      outputs: some of "restored", "fidelity_map" and "confidence".
      degraded: float32 [H, W, 3], at least S x S. Clean values would be in [0, 1]; as
        no network clips what it is given, noise may go beyond.
      clean: likewise; used by the true fidelity map only.

    Raises:
      UsageError: the image is smaller, a clean one is missing, or see `check_whole`.
    """
    self.check_whole(outputs)
    size, (height, width, _) = self.record.image_size, degraded.shape
    if min(height, width) < size:
      raise errors.UsageError(
        f"an image of {width}x{height} pixels: {self.record.name} is an exported file, "
        f"which takes {size}x{size} and larger; its run's directory takes any size."
      )
    names = list(self.record.inputs)
    if clean is None:
      if "clean" in names and set(outputs) != {"restored"}:
        raise errors.UsageError(f"{self.record.name} needs the clean image, too.")
      # On which what is restored does not depend.
      clean = degraded
    given = {"degraded": degraded, "clean": clean}

    def program(windows: np.ndarray) -> np.ndarray:
      arrays = dict(zip(names, np.split(windows, len(names), -1), strict=True))
      found = self.program(arrays, outputs)
      return np.concatenate([np.asarray(found[name]) for name in outputs], -1)

    image = np.concatenate([given[name] for name in names], -1)
    radius = max(self.record.radius[name] for name in outputs)
    joined = tiling.apply_fixed(program, image, radius, size)
    channels = [self.record.outputs[name][-1] for name in outputs]
    parts = np.split(joined, np.cumsum(channels)[:-1], -1)
    return dict(zip(outputs, parts, strict=True))


def is_file(place: str | os.PathLike) -> bool:
  """Returns whether a path is written as an exported file's, and no directory's."""
  path = _here(place)
  return path.suffix in SUFFIXES and not os.path.isdir(path)


def _here(place: str | os.PathLike) -> pathlib.Path:
  """Returns the path of a file that may be in a bucket, with its record beside it."""
  if buckets.is_address(place) and str(place).endswith(SUFFIXES):
    locations.expand(f"{place}.json")
  return locations.expand(place)


def record_path(path: pathlib.Path) -> pathlib.Path:
  """Returns where the record of an exported file is."""
  return path.with_name(f"{path.name}.json")


def card_path(path: pathlib.Path) -> pathlib.Path:
  """Returns where the card of an exported file is."""
  return path.with_name(f"{path.name}.md")


def read_record(path: pathlib.Path) -> Record:
  """Returns the record of an exported file, which is compared with its digest.

  Raises:
    UsageError: there is no such file.
    RunError: it or its record is damaged, or cannot be read.
  """
  if not path.is_file():
    raise errors.UsageError(f"there is no exported file {path}.")
  record = files.read_record(record_path(path), Record, _AGAIN)
  with errors.while_doing(f"reading {path}"):
    digest = files.sha256(path)
  if digest != record.digest:
    raise errors.RunError(f"{path} is not what its record says: {_AGAIN}")
  return record


def load(place: str | os.PathLike) -> Exported:
  """Returns an exported file, ready to run.

  Args:
    place: a .jax or .onnx file; its record is the .json file beside it.

  Raises:
    UsageError: there is no such file, or it is of another kind.
    RunError: it is damaged, this machine cannot run it, or, for .onnx files,
      onnxruntime is not installed.
  """
  path = _here(place)
  if path.suffix not in SUFFIXES:
    raise errors.UsageError(f"{path} is no exported file: {' or '.join(SUFFIXES)}.")
  record = read_record(path)
  read = _read_jax if path.suffix == ".jax" else _read_onnx
  with _unreadable(path):
    return Exported(record, read(files.read_bytes(path)))


@contextlib.contextmanager
def _unreadable(path: pathlib.Path) -> Iterator[None]:
  """Turns what libraries raise for files that they cannot read into one line."""
  try:
    with errors.while_doing(f"reading {path}"):
      yield
  except (errors.RunError, errors.UsageError):
    raise
  except Exception as error:  # They raise many types.
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise errors.RunError(
      f"{path} cannot be read by the libraries here ({reason:.200}): {_AGAIN}"
    ) from error


def _read_jax(content: bytes) -> Program:
  network = jax.export.deserialize(bytearray(content))
  backend = jax.default_backend()
  # JAX calls NVIDIA's and AMD's alike where it names its own.
  if {"gpu": "cuda"}.get(backend, backend) not in network.platforms:
    raise errors.RunError(
      f"this file is for {', '.join(network.platforms)}, not for {backend}: set "
      "JAX_PLATFORMS=cpu."
    )

  # What leads to none of the outputs is left out.
  def call(outputs: tuple[str, ...], *arrays: jax.Array) -> dict[str, jax.Array]:
    found = network.call(*arrays)
    return {name: found[name] for name in outputs}

  compiled = jax.jit(
    call, static_argnums=0, compiler_options=platform.compiler_options()
  )
  return lambda arrays, outputs: compiled(tuple(outputs), *arrays.values())


def _read_onnx(content: bytes) -> Program:
  try:
    import onnxruntime
  except ImportError as error:
    raise errors.RunError(
      "onnxruntime, which runs .onnx files, is not installed: pip install "
      "'fidelity_jax[onnx]'."
    ) from error
  session = onnxruntime.InferenceSession(
    content, providers=onnxruntime.get_available_providers()
  )
  options = onnxruntime.RunOptions()
  options.only_execute_path_to_fetches = True

  def run(arrays: dict[str, np.ndarray], outputs: Sequence[str]) -> dict[str, Any]:
    found = session.run(list(outputs), arrays, options)
    return dict(zip(outputs, found, strict=True))

  return run
