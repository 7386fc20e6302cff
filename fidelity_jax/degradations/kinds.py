"""The table of kinds: each kind's function, levels and options, in one place."""

import dataclasses
from collections.abc import Callable

import jax

from fidelity_jax.degradations import blur, crop, noise

# (key, image [H, W, C], level: scalar or [H, W, 1], **options) -> image [H, W, C].
Function = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class Kind:
  """What a kind of degradation is, apart from its level.

  Attributes:
    function: the pure function of (key, image, level).
    level_name: what the level is, for messages.
    levels: the default discrete mixture, mildest (the identity) first, harshest last.
      AWGN's is the paper's; the paper shows the others only as pictures, so theirs
      are this project's choice: the same number of steps, from none to severe.
    largest: the largest level that makes sense, or None.
    odd: whether levels are odd lengths (0 stands for 1).
    random: whether the function draws anything at a given level.
    options: the names of the options that a spec may set.
  """

  function: Function
  level_name: str
  levels: tuple[float, ...]
  largest: float | None = None
  odd: bool = False
  random: bool = True
  options: tuple[str, ...] = ()


def _clean(key: jax.Array, image: jax.Array, level: jax.Array) -> jax.Array:
  """The identity."""
  del key, level
  return image


KINDS: dict[str, Kind] = {
  "clean": Kind(_clean, "level", (0.0,), largest=0.0, random=False),
  "awgn": Kind(noise.awgn, "sigma", (0.0, 0.1, 0.2, 0.3, 0.4, 0.5), largest=1e6),
  "salt_and_pepper": Kind(
    noise.salt_and_pepper,
    "probability",
    (0.0, 0.1, 0.2, 0.3, 0.4, 0.5),
    largest=1.0,
  ),
  "gaussian_blur": Kind(
    blur.gaussian_blur,
    "sigma",
    (0.0, 1.0, 2.0, 3.0, 4.0, 5.0),
    largest=1e6,
    random=False,
    options=("kernel_size",),
  ),
  "motion_blur": Kind(
    blur.motion_blur,
    "length",
    (1.0, 5.0, 9.0, 13.0, 17.0, 21.0),
    odd=True,
    random=False,
    options=("orientation",),
  ),
  "rectangular_crop": Kind(
    crop.rectangular_crop,
    "ratio",
    (0.0, 0.1, 0.2, 0.3, 0.4, 0.5),
    largest=1.0,
  ),
}
