"""Images of any kind and size in; predictions, restored images and maps out.

model = fidelity_jax.load("runs/demo/oracle")
result = model(images)
print(result.top(3))
"""

import contextlib
import dataclasses
import functools
import itertools
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image
from scipy import special

from fidelity_jax import (
  denoising,
  errors,
  exported,
  fidelity,
  files,
  locations,
  overlap,
  platform,
  runs,
  tiling,
)
from fidelity_jax.data import crops
from fidelity_jax.data import images as image_files

# A path, a Pillow image, or an array [H, W, 3] (grey: [H, W] or [H, W, 1]): uint8,
# uint16, or float in [0, 1].
OneImage = str | os.PathLike | Image.Image | np.ndarray | jax.Array
Outputs = Callable[[np.ndarray, np.ndarray | None], dict[str, Any]]

# Images that are computed at once, at most; fewer are filled up to a power of two, so
# that no more than six programs are compiled.
BATCH = 32
_DEFAULT_WORKERS = 4


@dataclasses.dataclass(frozen=True)
class Result:
  """What a model says of N images.

  What its networks do not have is None. Arrays are float32.

  Attributes:
    class_names: in the order of the logits.
    degraded: the images as the networks saw them, [N, S, S, 3] in [0, 1].
    logits: of the whole method, [N, K].
    restored: the restored images, [N, S, S, 3] in [0, 1].
    fidelity_map: how far each restored pixel is off, by the map that the method uses,
      [N, S, S, C]: 3 channels, for cosine similarity 1.
    confidence: what the calibration sees of the map, larger where restoration is
      better, [N, S, S, 1], not bounded.
    restored_logits: of the frozen classifier on the restored images, [N, K].
    degraded_logits: of the frozen classifier on the images as they are, [N, K].
  """

  class_names: tuple[str, ...]
  degraded: np.ndarray
  logits: np.ndarray | None = None
  restored: np.ndarray | None = None
  fidelity_map: np.ndarray | None = None
  confidence: np.ndarray | None = None
  restored_logits: np.ndarray | None = None
  degraded_logits: np.ndarray | None = None

  def __len__(self) -> int:
    """Returns N."""
    return len(self.degraded)

  def __getitem__(self, index: int | slice) -> "Result":
    """Returns the result for some of the images."""
    if not isinstance(index, slice):
      number = operator.index(index)
      if not -len(self) <= number < len(self):
        raise IndexError(f"there are {len(self)} images, not one of number {number}")
      index = slice(number, number + 1 or None)
    return self._map(lambda array: array[index])

  def _map(self, function: Callable[[np.ndarray], np.ndarray]) -> "Result":
    names = [field.name for field in dataclasses.fields(self)][1:]
    held = {name: getattr(self, name) for name in names}
    return dataclasses.replace(
      self, **{k: function(v) for k, v in held.items() if v is not None}
    )

  @property
  def probabilities(self) -> np.ndarray | None:
    """Softmax of the logits, [N, K]."""
    return None if self.logits is None else special.softmax(self.logits, -1)

  def top(
    self, k: int = 5, logits: np.ndarray | None = None
  ) -> list[list[tuple[str, float]]]:
    """Returns the k most probable classes of each image, with their probabilities.

    Args:
      k: how many; all if there are fewer.
      logits: [N, K], by default those of the whole method.

    Raises:
      UsageError: there is no classifier.
    """
    if k < 1:
      raise errors.UsageError(f"k = {k}: ask for one class or more.")
    logits = self.logits if logits is None else logits
    if logits is None:
      raise errors.UsageError("this run has no classifier: it only restores images.")
    found = []
    for row in special.softmax(logits, -1):
      best = np.argsort(-row, kind="stable")[:k]
      found.append([(self.class_names[i], float(row[i])) for i in best])
    return found


@dataclasses.dataclass(frozen=True)
class Streamed:
  """What `Model.stream` yields for one file.

  Attributes:
    path: the file's.
    result: for one image; None if it cannot be read.
    problem: why not; None if it can.
  """

  path: str
  result: Result | None
  problem: str | None


class _Read(NamedTuple):
  """A file's square and that of its clean image, or why they cannot be had."""

  path: str
  square: np.ndarray | None
  clean: np.ndarray | None
  problem: str | None


class Model:
  """Networks that take images of any size.

  Attributes are as `__init__` takes them.

  Calls from several threads at a time are safe. A program is compiled once for each
  size of batch, of which there are six (`BATCH`).
  """

  def __init__(
    self,
    outputs: Outputs,
    *,
    name: str,
    image_size: int,
    class_names: Sequence[str],
    needs_clean: bool,
    map_name: str,
    digest: str,
    classes_named: bool = True,
    run: runs.Run | None = None,
    file: exported.Exported | None = None,
  ):
    """Wraps compiled networks; `load` is the way to make one.

    Args:
      outputs: see `method.Method.outputs`; takes float32 [n, S, S, 3] in [0, 1].
      name: for people to read.
      image_size: S, pixels.
      class_names: in the order of the logits.
      needs_clean: whether the map is made from clean images.
      map_name: "l1", "l2" or "cosine".
      digest: tells whether two models are the same.
      classes_named: False if their names are only their numbers.
      run: where the networks came from; None for an exported file.
      file: the exported file; None for a run.
    """
    self.outputs, self.file = outputs, file
    self.name, self.image_size, self.run = name, image_size, run
    self.class_names, self.needs_clean = tuple(class_names), needs_clean
    self.map_name, self.digest = map_name, digest
    self.classes_named = classes_named

  @property
  def record(self) -> exported.Record | None:
    """What is noted of the exported file; None for a run."""
    return self.file and self.file.record

  @property
  def about(self) -> exported.About | None:
    """What an exported file notes of the experiment that it came from, if any."""
    return self.record and self.record.about

  def __call__(
    self,
    images: OneImage | Sequence[OneImage],
    clean: OneImage | Sequence[OneImage] | None = None,
  ) -> Result:
    """Returns what the networks say of images.

    Each is resized, so that its shorter side fits, and its central square is taken, as
    in evaluation; images of that size are taken as they are.

    Args:
      images: one or several, of any sizes: see `OneImage`; or an array [N, H, W, 3].
      clean: the same images without degradation, for runs on the true fidelity map.

    Raises:
      UsageError: they are no images, or clean ones are missing.
    """
    self._check_clean(clean)
    seen = _listed(images)
    degraded = self._batch(seen)
    truth = None
    if self.needs_clean:
      true = _listed(clean)
      if len(true) != len(seen):
        raise errors.UsageError(
          f"there are {len(seen)} images, but {len(true)} clean ones."
        )
      for pair in zip(seen, true, strict=True):
        _check_sizes(*pair)
      truth = self._batch(true)
    return self._result(degraded, truth)

  def stream(
    self,
    paths: Iterable[str | os.PathLike],
    clean: Callable[[str], str | os.PathLike] | None = None,
    batch_size: int = BATCH,
    workers: int = _DEFAULT_WORKERS,
  ) -> Iterator[Streamed]:
    """Yields what the networks say of files, in order, at constant memory.

    Files are decoded by threads while the networks compute.

    Args:
      paths: image files; they need not all be known at the start.
      clean: tells a file's clean image, for runs on the true fidelity map.
      batch_size: images that are computed at once, at most `BATCH`.
      workers: threads that decode.
    """
    self._check_clean(clean)
    return self._streaming(map(os.fspath, paths), clean, batch_size, workers)

  def _streaming(
    self,
    paths: Iterator[str],
    clean: Callable[[str], str | os.PathLike] | None,
    batch_size: int,
    workers: int,
  ) -> Iterator[Streamed]:
    batch_size = max(1, min(batch_size, BATCH))

    def read(path: str) -> _Read:
      try:
        pixels, truth = pixels_of(path), None
        if self.needs_clean:
          true = pixels_of(clean(path))
          _check_sizes(pixels, true, path)
          truth = self._square(true)
        return _Read(path, self._square(pixels), truth, None)
      except errors.UsageError as error:
        return _Read(path, None, None, str(error))

    squares = overlap.mapped(read, paths, workers)
    batches = iter(lambda: list(itertools.islice(squares, batch_size)), [])
    results = overlap.mapped(self._streamed, batches, threads=1)
    with contextlib.closing(squares), contextlib.closing(results):
      for batch in results:
        yield from batch

  def check_whole(self) -> None:
    """Raises UsageError if these networks cannot restore whole images."""
    if self.file is not None:
      self.file.check_whole(self.record.radius or ())
    elif self.run.method.restorer is None:
      raise errors.UsageError(
        f"{self.name} cannot restore whole images: name an experiment's directory or "
        "a checkpoint that has a denoiser."
      )

  def whole(self, image: OneImage, clean: OneImage | None = None) -> Result:
    """Restores a whole image, and maps it, without cropping or resizing it.

    Large ones are computed in windows, without seams (`tiling`).

    Args:
      image: one image of any size; for an exported file, at least S x S.
      clean: the same without degradation, for runs on the true fidelity map.

    Returns:
      What there is of "degraded", "restored", "fidelity_map" and "confidence", with
      S x S become H x W; no logits.

    Raises:
      UsageError: it is no image, the clean one is missing or of another size, the
        networks restore nothing, or they are an exported file's, and the image is too
        small for it, or its windows are for its networks (`Exported.whole`).
    """
    self.check_whole()
    self._check_clean(clean)
    seen, true = _as_float(pixels_of(image)), None
    if self.needs_clean:
      true = _as_float(pixels_of(clean))
      _check_sizes(seen, true)
    if self.file is not None:
      found = self.file.whole(list(self.record.radius), seen, true)
    else:
      found = self._run_whole(seen, true)
    arrays = {name: np.asarray(array)[None] for name, array in found.items()}
    return Result(class_names=self.class_names, degraded=seen[None], **arrays)

  def _run_whole(self, seen: np.ndarray, true: np.ndarray | None) -> dict[str, Any]:
    """Returns "restored", "fidelity_map" and "confidence" of a run, [H, W, C]."""
    method, variables = self.run.method, self.run.variables
    restored = denoising.apply_whole(
      method.restorer, variables["restorer"], seen, "restore"
    )
    found = {"restored": restored}
    if method.estimator is not None:
      shown = seen if method.estimator_input == "degraded" else restored
      found["fidelity_map"] = denoising.apply_whole(
        method.estimator, variables["estimator"], shown
      )
    elif true is not None:
      found["fidelity_map"] = fidelity.oracle_map(restored, true, self.map_name)
    if "fidelity_map" in found:
      found["confidence"] = fidelity.confidence(found["fidelity_map"], self.map_name)
    return found

  def _check_clean(self, clean: Any) -> None:
    if clean is None and self.needs_clean:
      raise errors.UsageError(
        f"{self.name} is steered by the true fidelity map, which is made from the "
        "clean images: give these too, or use a run on an estimated map (pretrained, "
        "end_to_end)."
      )

  def _streamed(self, batch: Sequence[_Read]) -> list[Streamed]:
    good = [one for one in batch if one.problem is None]
    found = iter(())
    if good:
      truth = None if good[0].clean is None else np.stack([one.clean for one in good])
      result = self._result(np.stack([one.square for one in good]), truth)
      found = (result[i] for i in range(len(good)))
    return [
      Streamed(one.path, None if one.problem else next(found), one.problem)
      for one in batch
    ]

  def _result(self, degraded: np.ndarray, clean: np.ndarray | None) -> Result:
    parts = []
    for start in range(0, len(degraded), BATCH):
      some = slice(start, start + BATCH)
      truth = clean[some] if self.needs_clean else None
      parts.append(self._computed(degraded[some], truth))
    joined = {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
    return Result(class_names=self.class_names, degraded=degraded, **joined)

  def _computed(
    self, degraded: np.ndarray, clean: np.ndarray | None
  ) -> dict[str, np.ndarray]:
    fill = tiling.filled
    found = self.outputs(fill(degraded), None if clean is None else fill(clean))
    return {k: np.asarray(v, np.float32)[: len(degraded)] for k, v in found.items()}

  def _batch(self, images: Sequence[OneImage]) -> np.ndarray:
    """Returns float32 [N, S, S, 3] in [0, 1]."""
    return np.stack([self._square(one) for one in images])

  def _square(self, image: OneImage) -> np.ndarray:
    """Returns the central square, float32 [S, S, 3] in [0, 1]."""
    pixels, size = pixels_of(image), self.image_size
    if pixels.dtype == np.uint8:
      square = np.empty((size, size, 3), np.uint8)
      crops.central(pixels, square)
      return _as_float(square)
    if pixels.shape[:2] == (size, size):
      return pixels
    return crops.central_float(pixels, size)


def load(place: str | os.PathLike, **wiring: str) -> Model:
  """Returns the model that a path or a name stands for.

  Args:
    place: see `runs.find`; or a file that `fidelity_jax export` wrote.
    **wiring: see `runs.find`.

  Raises:
    UsageError: there is nothing of the kind.
    RunError: it is not finished, or damaged.
  """
  if exported.is_file(place):
    if wiring:
      raise errors.UsageError(
        f"{place} knows how its map is made: leave {' and '.join(wiring)} out."
      )
    made = exported.load(place)
    return Model(
      made,
      name=made.record.name,
      image_size=made.record.image_size,
      class_names=made.record.class_names,
      needs_clean="clean" in made.record.inputs,
      map_name=made.record.map_name,
      digest=made.record.digest,
      classes_named=made.record.classes_named,
      file=made,
    )
  run = runs.find(place, **wiring)
  compiled = jax.jit(run.method.outputs, compiler_options=platform.compiler_options())
  return Model(
    functools.partial(compiled, run.variables),
    name=run.name,
    image_size=run.image_size,
    class_names=run.class_names,
    needs_clean=run.needs_clean,
    map_name=run.method.map_name,
    digest=run.digest,
    classes_named=run.classes_named,
    run=run,
  )


def _listed(images: Any) -> list[OneImage]:
  """Returns images one by one, paths as their pixels.

  Raises:
    UsageError: there are none.
  """
  if isinstance(images, str | os.PathLike | Image.Image):
    images = [images]
  elif not isinstance(images, list | tuple):
    array = np.asarray(images)
    images = list(array) if array.ndim == 4 else [array]
  if not images:
    raise errors.UsageError("there are no images.")
  return [pixels_of(one) for one in images]


def _check_sizes(degraded: np.ndarray, clean: np.ndarray, name: str = "") -> None:
  """Raises UsageError if a clean image is not of its degraded one's size."""
  if degraded.shape != clean.shape:
    height, width, _ = degraded.shape
    raise errors.UsageError(
      f"{name and name + ': '}the clean image has {clean.shape[1]}x{clean.shape[0]} "
      f"pixels, the degraded one {width}x{height}."
    )


def pixels_of(image: OneImage) -> np.ndarray:
  """Returns an image's pixels, [H, W, 3]: uint8, or float32 in [0, 1].

  Args:
    image: see `OneImage`.

  Raises:
    UsageError: it is none, or cannot be read.
  """
  try:
    if isinstance(image, str | os.PathLike):
      return image_files.decode(files.read_bytes(locations.expand(image)))
    if isinstance(image, Image.Image):
      return image_files.from_pillow(image)
  except (image_files.BadImageError, OSError) as error:
    name = image if isinstance(image, str | os.PathLike) else "image"
    reason = getattr(error, "strerror", None) or error
    raise errors.UsageError(f"{name}: cannot be read as an image: {reason}.") from error
  array = np.asarray(image)
  array = array[..., None] if array.ndim == 2 else array
  if array.ndim != 3 or array.shape[-1] not in (1, 3) or 0 in array.shape:
    raise errors.UsageError(
      f"an image has the shape [H, W, 3] (grey: [H, W] or [H, W, 1]), not "
      f"{list(np.shape(image))}."
    )
  array = np.broadcast_to(array, (*array.shape[:2], 3))
  if array.dtype == np.uint8:
    return np.ascontiguousarray(array)
  if array.dtype == np.uint16:
    return array.astype(np.float32) / 65535
  if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
    raise errors.UsageError(
      f"an image is uint8, uint16 or floating-point, not {array.dtype.name}."
    )
  array = np.ascontiguousarray(array, np.float32)
  # What is not a number is neither.
  if not (array.min() >= 0 and array.max() <= 1):
    raise errors.UsageError(
      "a floating-point image has values from 0 to 1; this one has "
      f"{array.min():g} to {array.max():g}."
    )
  return array


def _as_float(pixels: np.ndarray) -> np.ndarray:
  """Returns float32 in [0, 1]."""
  if pixels.dtype == np.uint8:
    return pixels.astype(np.float32) / 255
  return pixels
