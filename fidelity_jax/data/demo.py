"""The embedded dataset: which photograph is a 64x64 tile cut from?

Sixteen photographs that scikit-image carries in its wheel are cut into disjoint
tiles. A tile is left out when it shows nothing but black background (the retina's
corners), and no class has more than `per_class` tiles, chosen by the split seed.
"""

import functools
import io
from pathlib import Path

import numpy as np
import skimage
from PIL import Image

from fidelity_jax.data import splits
from fidelity_jax.data.dataset import Dataset, MemoryRecords
from fidelity_jax.errors import RunError

TILE = 64
PHOTOGRAPHS = (
  "astronaut.png",
  "brick.png",
  "camera.png",
  "cell.png",
  "chelsea.png",
  "clock_motion.png",
  "coffee.png",
  "coins.png",
  "grass.png",
  "gravel.png",
  "hubble_deep_field.jpg",
  "ihc.png",
  "moon.png",
  "motorcycle_left.png",
  "retina.jpg",
  "rocket.jpg",
)
# Mean over a tile of the brightest channel, in grey levels. The darkest tile of any
# other photograph (night sky) has 14.0, the retina's empty corners have below 4.
_BLACK = 10.0


def build(per_class: int, seed: int) -> Dataset:
  """Cuts the photographs into tiles.

  Args:
    per_class: largest number of tiles of a class; 0 keeps all.
    seed: which tiles are kept where a photograph has more.

  Returns:
    All tiles, not yet split, as PNG records with keys "demo/PHOTOGRAPH/rRRcCC".

  Raises:
    RunError: the installed scikit-image lacks a photograph.
  """
  return _build(per_class, seed)


@functools.lru_cache(maxsize=4)
def _build(per_class: int, seed: int) -> Dataset:
  names = tuple(Path(file).stem for file in PHOTOGRAPHS)
  encoded, keys, labels = [], [], []
  for label, (name, file) in enumerate(zip(names, PHOTOGRAPHS, strict=True)):
    tiles = _tiles(_photograph(file))
    order = splits.class_generator(seed, name).permutation(len(tiles))
    chosen = order[: per_class or len(tiles)]
    for i in sorted(chosen):
      row, column, tile = tiles[i]
      keys.append(f"demo/{name}/r{row:02d}c{column:02d}")
      encoded.append(_encode(tile))
      labels.append(label)
  return Dataset(
    name="demo",
    split="all",
    records=MemoryRecords(tuple(encoded)),
    keys=tuple(keys),
    labels=np.asarray(labels, np.int32),
    class_names=names,
  )


def _photograph(file: str) -> np.ndarray:
  path = Path(skimage.__file__).parent / "data" / file
  try:
    with Image.open(path) as image:
      return np.asarray(image.convert("RGB"))
  except OSError as error:
    raise RunError(
      f"cannot read {path}, a photograph of the demo dataset ({error}); reinstall "
      "scikit-image from its wheel"
    ) from error


def _tiles(photograph: np.ndarray) -> list[tuple[int, int, np.ndarray]]:
  rows, columns = photograph.shape[0] // TILE, photograph.shape[1] // TILE
  tiles = []
  for row in range(rows):
    for column in range(columns):
      y, x = row * TILE, column * TILE
      tile = photograph[y : y + TILE, x : x + TILE]
      if tile.max(axis=-1).mean() >= _BLACK:
        tiles.append((row, column, tile))
  return tiles


def _encode(tile: np.ndarray) -> bytes:
  buffer = io.BytesIO()
  # Low compression keeps the start of every run short; PNG is lossless either way.
  Image.fromarray(tile).save(buffer, format="PNG", compress_level=1)
  return buffer.getvalue()
