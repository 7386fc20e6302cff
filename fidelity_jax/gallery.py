r"""Draws what each degradation does to an image: the paper's Figures 3.2 and A.1.

  python -m fidelity_jax.gallery [IMAGE ...] --out=DIR [--kind=awgn] [--format=jpg]

For every image (by default two embedded photographs) and every kind one picture
IMAGE-KIND.png: the clean image, the kind's levels, and a level that varies along one
axis (1D) and with the distance to a point (2D). Without --kind also IMAGE-all.png, with
all kinds in one figure.
"""

from fidelity_jax import boundary, locations

if __name__ == "__main__":
  # Before imports that take seconds.
  boundary.start()

import argparse
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import skimage
from PIL import Image

from fidelity_jax import degradations, files, signals
from fidelity_jax.data import images as image_files
from fidelity_jax.errors import RunError, UsageError

EMBEDDED = ("astronaut.png", "chelsea.png")
KINDS = tuple(kind for kind in degradations.KINDS if kind != "clean")
_LARGEST = 2048
_ENCODER = {"png": {"optimize": True}, "jpg": {"quality": 80, "optimize": True}}
_TITLES = {
  "awgn": "AWGN",
  "salt_and_pepper": "Salt and pepper",
  "gaussian_blur": "Gaussian blur",
  "motion_blur": "Motion blur",
  "rectangular_crop": "Rectangular crop",
}


def read_square(path: Path, size: int) -> np.ndarray:
  """Reads an image: the shorter side resized to `size`, then the centre square.

  Returns:
    float32 [size, size, 3] in [0, 1].

  Raises:
    UsageError: there is no such file.
    RunError: it is no image.
  """
  if not path.is_file():
    raise UsageError(f"{path}: no such file; name image files")
  try:
    pixels = image_files.decode(files.read_bytes(path))
  except (image_files.BadImageError, OSError) as error:
    raise RunError(f"{path}: cannot be read as an image: {error}") from error
  image = Image.fromarray(pixels)
  scale = size / min(image.size)
  width, height = (max(size, round(side * scale)) for side in image.size)
  image = image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=3.0)
  left, top = (width - size) // 2, (height - size) // 2
  square = image.crop((left, top, left + size, top + size))
  return np.asarray(square, np.float32) / 255


def panels(image: np.ndarray, kind: str, seed: int) -> list[tuple[str, np.ndarray]]:
  """Returns (label, image [H, W, 3]) for each evaluation condition of a kind.

  Args:
    image: float32 [H, W, 3] in [0, 1].
    kind: a kind of degradation.
    seed: of the noise, the positions and the fields.
  """
  key = jax.random.key(seed)[None]
  degrade = jax.jit(lambda degradation: degradation(key, jnp.asarray(image)[None])[0])
  drawn = []
  for condition in degradations.conditions(kind):
    step = condition.degradation.steps[0]
    if condition.name == "clean":
      label = "clean"
    else:
      levels = ", ".join(f"{level:g}" for level in step.levels)
      name = degradations.KINDS[kind].level_name
      label = f"{name} = {levels}"
      if step.variation in ("1d", "2d"):
        label = f"{step.variation.upper()}: {name} = ({levels})"
    drawn.append((label, np.asarray(degrade(condition.degradation))))
  return drawn


def draw(
  rows: list[tuple[str, list[tuple[str, np.ndarray]]]],
) -> matplotlib.figure.Figure:
  """Returns a figure with one titled row of labelled panels for each kind."""
  columns = max(len(row) for _, row in rows)
  figure = matplotlib.figure.Figure(
    figsize=(1.55 * columns, 1.95 * len(rows)), layout="constrained"
  )
  subfigures = np.atleast_1d(figure.subfigures(len(rows), 1))
  for subfigure, (title, row) in zip(subfigures, rows, strict=True):
    subfigure.suptitle(title, fontsize=9, x=0.005, ha="left")
    axes = subfigure.subplots(1, columns)
    for axis in axes:
      axis.axis("off")
    for axis, (label, image) in zip(axes, row, strict=False):
      axis.imshow(image, vmin=0, vmax=1, interpolation="nearest")
      axis.set_title(label, fontsize=7, pad=2)
  return figure


def make(
  paths: Sequence[Path],
  out: Path,
  kinds: Sequence[str],
  size: int = 224,
  seed: int = 0,
  suffix: str = "png",
) -> list[Path]:
  """Draws the gallery of each image; returns the pictures' paths.

  Raises:
    UsageError, RunError: see `read_square`; RunError also if `out` cannot be written.
  """
  images = [read_square(path, size) for path in paths]
  names = _unique([path.stem for path in paths])
  try:
    out.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise RunError(f"{out}: cannot make this directory: {error.strerror}") from error
  written = []

  def save(rows, path):
    try:
      draw(rows).savefig(path, dpi=110, pil_kwargs=_ENCODER[suffix])
    except OSError as error:
      raise RunError(f"{path}: cannot be written: {error.strerror}") from error
    written.append(path)

  for name, image in zip(names, images, strict=True):
    rows = [(_TITLES[kind], panels(image, kind, seed)) for kind in kinds]
    for kind, row in zip(kinds, rows, strict=True):
      save([row], out / f"{name}-{kind}.{suffix}")
    if len(rows) > 1:
      save(rows, out / f"{name}-all.{suffix}")
  return written


def _unique(names: list[str]) -> list[str]:
  """Appends a number to names that occur before."""
  made: list[str] = []
  for name in names:
    candidate, count = name, 2
    while candidate in made:
      candidate, count = f"{name}_{count}", count + 1
    made.append(candidate)
  return made


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit status."""
  parser = boundary.Parser(
    prog="python -m fidelity_jax.gallery",
    description="Draw what each degradation does to images.",
  )
  parser.add_argument(
    "images", nargs="*", metavar="IMAGE", help="default: embedded photographs"
  )
  parser.add_argument("--out", required=True, metavar="DIR", help="directory to write")
  parser.add_argument("--kind", help=f"one of {', '.join(KINDS)} (default: all)")
  parser.add_argument("--size", type=int, default=224, help="pixels (default 224)")
  parser.add_argument("--seed", type=int, default=0, help="of all draws (default 0)")
  parser.add_argument("--format", choices=tuple(_ENCODER), default="png")
  return boundary.run(lambda: _draw(parser.parse_args(arguments)))


def _draw(args: argparse.Namespace) -> None:
  signals.interrupt("while it drew", "finished pictures are kept")
  embedded = Path(skimage.__file__).parent / "data"
  paths = [locations.expand(path) for path in args.images]
  paths = paths or [embedded / name for name in EMBEDDED]
  if not 16 <= args.size <= _LARGEST:
    raise UsageError(f"--size={args.size}: write a number from 16 to {_LARGEST}")
  if not 0 <= args.seed < 2**32:
    raise UsageError(f"--seed={args.seed}: write a number from 0 to 2^32 - 1")
  kinds = KINDS
  if args.kind is not None:
    # Its message names similar kinds.
    step = degradations.from_config(args.kind).steps[0]
    if step.kind not in KINDS:
      raise UsageError(f"--kind={args.kind}: shows nothing; choose another")
    kinds = (step.kind,)
  out = locations.expand(args.out, write=True)
  for path in make(paths, out, kinds, args.size, args.seed, args.format):
    print(path)


if __name__ == "__main__":
  boundary.leave(main())
