"""DnCNN (Zhang et al., 2017): a restorer, and the fidelity estimator's stack."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from fidelity_jax import cpu, rules
from fidelity_jax.models import layers
from fidelity_jax.models.restorer import Restorer

# Fields of a config.
FIELDS: rules.Table = {
  "depth": rules.whole(2, 200),
  "width": rules.whole(1, 65_536),
  "batch_norm": rules.FLAG,
}


class DnCNN(Restorer):
  """3x3 convolutions with ReLU between them; the output is the predicted residual.

  As a restorer it subtracts the output from its input; a fidelity estimator uses the
  output itself. Children are `layer0` ... `layer{depth - 1}`, each with a `conv` and,
  in the middle layers of a network with batch norm, a `bn`.

  Attributes:
    depth: number of convolutions, at least 2.
    width: channels between them.
    channels: channels of the input and, unless `out_channels` is given, the output.
    out_channels: channels of the output (1 for a cosine fidelity map).
    batch_norm: after every convolution but the first and the last, instead of a bias.
    dtype: compute dtype; the output is float32.
  """

  depth: int = 20
  width: int = 64
  channels: int = 3
  out_channels: int | None = None
  batch_norm: bool = False
  dtype: Any = jnp.float32

  @property
  def radius(self) -> int:
    """See `Restorer`: each of the 3x3 convolutions reaches one pixel further."""
    return self.depth

  def __call__(
    self, x: jax.Array, train: bool = False, mask: jax.Array | None = None
  ) -> jax.Array:
    """Returns the stack's output, float32 [N, H, W, out_channels].

    Args:
      x: images [N, H, W, channels] in [0, 1].
      train: use and update batch statistics, where there are any.
      mask: where the images are; see `Restorer.estimate`.

    Raises:
      ValueError: x has another number of channels.
    """
    if x.shape[-1] != self.channels:
      raise ValueError(f"DnCNN takes {self.channels} channels, got shape {x.shape}")
    x = self.some_layers(x, range(self.depth), train, mask)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))

  def estimate(
    self, degraded: jax.Array, train: bool = False, mask: jax.Array | None = None
  ) -> jax.Array:
    """Returns d - R(d), float32 [N, H, W, channels]; see `Restorer`."""
    return degraded - self(degraded, train, mask)

  @nn.nowrap
  def folded(self) -> "DnCNN":
    """Returns the network without batch norm."""
    return self.clone(batch_norm=False)

  @nn.compact
  def some_layers(
    self,
    x: jax.Array,
    which: range,
    train: bool = False,
    mask: jax.Array | None = None,
  ) -> jax.Array:
    """Returns what the layers `which` make of the output of those before them."""
    last = self.depth - 1
    for i in which:
      x = layers.ConvNorm(
        self.width if i < last else self.out_channels or self.channels,
        3,
        pad=1,
        norm=self.batch_norm and 0 < i < last,
        kernel_init=layers.he_normal_fan_in,
        dtype=self.dtype,
        name=f"layer{i}",
      )(x, train)
      if i < last:
        x = nn.relu(x)
        if mask is not None:
          # What a layer makes of the border is no part of the next layer's zeros.
          x = x * mask.astype(x.dtype)
    return x


# Layers whose activations are recomputed together: with 20 layers, the inputs of 5
# groups are kept, and the 4 activations of one group at a time.
_GROUP = 4


def apply_rematerialized(module: DnCNN, params: Any, x: jax.Array) -> jax.Array:
  """Returns `module.apply({"params": params}, x)`, keeping few activations.

  The backward pass computes them again, group by group of layers. Gradients are the
  same but for rounding; docs/speed.md says what it costs.

  Args:
    module: without batch norm.
    params: its parameters.
    x: as for `module`.
  """
  for first in range(0, module.depth, _GROUP):
    last = min(first + _GROUP, module.depth)
    group = {f"layer{i}": params[f"layer{i}"] for i in range(first, last)}
    x = _group(module, first, last)(group, x)
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


# Cached, as `cpu.choose` is: it knows a function again only if it is the same object.
@functools.lru_cache(maxsize=64)
def _group(
  module: DnCNN, first: int, last: int
) -> Callable[[Any, jax.Array], jax.Array]:
  """Returns the layers from `first` to before `last`, as a function that recomputes."""

  def apply(params: Any, x: jax.Array) -> jax.Array:
    which = range(first, last)
    return module.apply({"params": params}, x, which, method="some_layers")

  return cpu.choose(jax.checkpoint(apply), cpu.rematerialized(apply))
