"""The Degradation object: one kind, or a sequence of kinds, over a batch of images."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from fidelity_jax.degradations import fields, kinds


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Step:
  """One kind of degradation with its levels and how they vary.

  Attributes:
    levels: "uniform": the level; "discrete": the set to draw from; "continuous": the
      range (lo, hi); "1d", "2d": the two ends (a, b).
    kind: a name in `kinds.KINDS`.
    variation: "uniform", "discrete", "continuous", "1d" or "2d".
    options: the function's static options as (name, value) pairs.
  """

  levels: tuple[float, ...]
  kind: str = dataclasses.field(metadata={"static": True})
  variation: str = dataclasses.field(metadata={"static": True})
  options: tuple[tuple[str, float], ...] = dataclasses.field(
    default=(), metadata={"static": True}
  )

  def __call__(self, key: jax.Array, image: jax.Array) -> jax.Array:
    """Degrades one image [H, W, C] with one key."""
    level_key, kind_key = jax.random.split(key)
    function = kinds.KINDS[self.kind].function
    level = self.draw_level(level_key, image.shape[:2])
    return function(kind_key, image, level, **dict(self.options))

  def draw_level(self, key: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Returns the level of one image of `size` (H, W): a scalar, or [H, W, 1]."""
    levels = jnp.stack([jnp.asarray(v, jnp.float32) for v in self.levels])
    match self.variation:
      case "uniform":
        return levels[0]
      case "discrete":
        return levels[jax.random.randint(key, (), 0, len(self.levels))]
      case "continuous":
        u = jax.random.uniform(key)
        return levels[0] * (1 - u) + levels[1] * u
      case "1d":
        return fields.linear(key, size, levels)
      case "2d":
        return fields.radial(key, size, levels)
    raise AssertionError(self.variation)

  @property
  def random(self) -> bool:
    """Whether two keys can give two results."""
    harmless = 1.0 if kinds.KINDS[self.kind].odd else 0.0
    drawn = len(set(self.levels)) > 1
    return drawn or (kinds.KINDS[self.kind].random and max(self.levels) > harmless)

  def record(self) -> dict[str, Any]:
    """Returns the step as JSON-able data; equal data mean equal degradations."""
    options = dict(self.options)
    # Room for lines of other levels, which changes no result.
    options.pop("max_length", None)
    return {
      "kind": self.kind,
      "variation": self.variation,
      "levels": list(self.levels),
      "options": options,
    }

  @property
  def name(self) -> str:
    """A short name: "clean", "awgn-0.1", "awgn-1d", "awgn-mixture"."""
    if self.kind == "clean":
      return "clean"
    match self.variation:
      case "uniform":
        return f"{self.kind}-{self.levels[0]:g}"
      case "1d" | "2d":
        return f"{self.kind}-{self.variation}"
    return f"{self.kind}-mixture"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Degradation:
  """Degrades batches of images, each example by its own key alone.

  Made by `from_config`. It is hashable, so it can be closed over or be a static
  argument of `jax.jit`; it is also a pytree whose leaves are its levels, so that passed
  as an ordinary argument all degradations that differ in their levels only share one
  compilation.

  Attributes:
    steps: applied in order; each has its own key per example.
  """

  steps: tuple[Step, ...]

  def __call__(self, keys: jax.Array, images: jax.Array) -> jax.Array:
    """Degrades a batch.

    Args:
      keys: typed PRNG keys [N], one per example.
      images: float32 [N, H, W, C] in [0, 1].

    Returns:
      float32 [N, H, W, C] in [0, 1]. Image i depends on keys[i] and images[i] alone.
    """
    return jax.vmap(self._degrade)(keys, images)

  def _degrade(self, key: jax.Array, image: jax.Array) -> jax.Array:
    for i, step in enumerate(self.steps):
      image = step(jax.random.fold_in(key, i), image)
    return image

  @property
  def random(self) -> bool:
    """Whether two keys can give two results; if not, one evaluation round is enough."""
    return any(step.random for step in self.steps)

  @property
  def name(self) -> str:
    """The steps' names, joined by "+"."""
    return "+".join(step.name for step in self.steps)
