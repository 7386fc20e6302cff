"""Special code for CPUs, to be deleted in one piece.

XLA's CPU compiler was measured against PyTorch. What was slower is computed in other
ways here; docs/cpu.md says what each is for and which benchmark shows whether a newer
jaxlib still needs it. `choose` is the only way in. A program that is lowered for
another platform, by `jax.export` on a CPU too, has nothing of this module in it.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

Pads = tuple[tuple[int, int], tuple[int, int]]

# Up to this many pixels, from this many channels on, with kernels of up to 9 weights,
# the gradient with respect to the input is faster by patches; strided ones always are.
_FEW_PIXELS, _MANY_CHANNELS = 14 * 14, 96
# From up to this many channels to one, shifted products are faster.
_TO_ONE = 32
# The kernel's gradient is faster so with up to this many channels out and at least
# this many in.
_FEW_OUT, _ENOUGH_IN = 4, 16
# With fewer images than this, those of up to so many bytes in all are cut into strips
# for the kernel's gradient.
_MANY_IMAGES, _CHEAP_TO_COPY = 8, 4 * 2**20


# Cached, so that JAX traces what is called again with equal shapes only once.
@functools.lru_cache(maxsize=1024)
def choose(
  plain: Callable[..., Any],
  on_cpu: Callable[..., Any],
  dtype: Any = None,
  **options: Hashable,
) -> Callable[..., Any]:
  """Returns a function that is `on_cpu` in programs for CPUs, `plain` in all others.

  The choice is made when a program is lowered, by the platform that it is lowered for.
  If that is one platform, nothing of the other function is left, nor of its gradient.
  The result keeps its arguments alone for its gradient, and supports reverse-mode
  differentiation only.

  Args:
    plain: a differentiable function of arrays, or trees of them.
    on_cpu: the same function, computed in another way.
    dtype: of the arrays, where `on_cpu` is for float32 and float64 only: if it is
      another one, `plain` is returned.
    **options: keyword arguments of both.
  """
  plain, on_cpu = (functools.partial(f, **options) for f in (plain, on_cpu))
  if dtype not in (None, jnp.float32, jnp.float64):
    return plain

  # JAX differentiates a conditional by keeping what each of its branches needs. So the
  # choice is made within a forward and within a backward pass.
  @jax.custom_vjp
  def chosen(*arguments):
    return lax.platform_dependent(*arguments, cpu=on_cpu, default=plain)

  def pull(function, arguments, g):
    return jax.vjp(function, *arguments)[1](g)

  backward = functools.partial(
    lax.platform_dependent,
    cpu=functools.partial(pull, on_cpu),
    default=functools.partial(pull, plain),
  )
  chosen.defvjp(lambda *arguments: (chosen(*arguments), arguments), backward)
  return chosen


@contextlib.contextmanager
def left_out(instead: Mapping[Callable, Callable] | None = None) -> Iterator[None]:
  """Leaves this module out of all programs that are traced meanwhile.

  For compilers of JAX's programs that know nothing of platforms.

  Args:
    instead: other forms of plain functions.
  """

  def plain_alone(plain, on_cpu, dtype=None, **options):
    del on_cpu, dtype
    return functools.partial((instead or {}).get(plain, plain), **options)

  global choose
  chosen, choose = choose, plain_alone
  try:
    yield
  finally:
    choose = chosen


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv2d(
  x: jax.Array, kernel: jax.Array, strides: tuple[int, int], pads: Pads
) -> jax.Array:
  """Returns what `models.conv.conv2d` does, with padding in numbers.

  1x1 kernels become matrix products; kernels with one channel in or out, sums of
  shifted images; 3x3 kernels on images smaller than themselves, products of patches.
  The input's gradient goes by patches on small images of many channels and for strided
  kernels, the kernel's by products with few channels out, and of few images by strips.
  The rest is XLA's. Inputs that the kernel's gradient needs wait for it in one layout.
  """
  return _fast_convolve(x, kernel, strides, pads)


def _conv2d_forward(x, kernel, strides, pads):
  return _fast_convolve(x, kernel, strides, pads), (x, kernel)


def _conv2d_backward(strides, pads, residuals, g):
  x, kernel = residuals
  return (
    _input_gradient(x, g, kernel, strides, pads),
    _kernel_gradient(x, g, kernel, strides, pads),
  )


conv2d.defvjp(_conv2d_forward, _conv2d_backward)


def _is_pointwise(kernel: jax.Array, pads: Pads) -> bool:
  return kernel.shape[:2] == (1, 1) and pads == ((0, 0), (0, 0))


def _convolve(x, kernel, strides, pads) -> jax.Array:
  """Returns XLA's own convolution."""
  return lax.conv_general_dilated(
    x, kernel, strides, pads, dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


def _fast_convolve(x, kernel, strides, pads) -> jax.Array:
  """Returns the convolution by the algorithm that was measured fastest."""
  if _is_pointwise(kernel, pads):
    # XLA does not recognize the matrix product in this one.
    visited = x[:, :: strides[0], :: strides[1]]
    return lax.dot_general(visited, kernel[0, 0], (((3,), (0,)), ((), ())))
  if math.prod(x.shape[1:3]) < math.prod(kernel.shape[:2]) <= 9:
    return _convolve_patches(x, kernel, strides, pads)
  if _is_small(kernel, strides):
    if kernel.shape[2] == 1:
      return _convolve_from_one(x, kernel, pads)
    if kernel.shape[3] == 1 and kernel.shape[2] <= _TO_ONE:
      return _convolve_to_one(x, kernel, pads)
  return _convolve(x, kernel, strides, pads)


def _is_small(kernel: jax.Array, strides: tuple[int, int]) -> bool:
  return math.prod(kernel.shape[:2]) <= 9 and strides == (1, 1)


def _windows(
  x: jax.Array, size: tuple[int, int], pads: Pads, strides: tuple[int, int] = (1, 1)
) -> list[jax.Array]:
  """Returns the pixels [N, h, w, ...] that each weight of a kernel sees, in order."""
  # Not jnp.pad, which cannot crop: pads may be negative.
  border = [(0, 0, 0), *((*pad, 0) for pad in pads), *[(0, 0, 0)] * (x.ndim - 3)]
  x = lax.pad(x, jnp.zeros((), x.dtype), border)
  rows, columns = x.shape[1] - size[0] + 1, x.shape[2] - size[1] + 1
  dy, dx = strides
  return [
    x[:, i : i + rows : dy, j : j + columns : dx]
    for i, j in itertools.product(*map(range, size))
  ]


def _convolve_from_one(x, kernel, pads) -> jax.Array:
  """Returns the convolution of one channel: a sum of shifted images times weights."""
  weights = kernel.reshape(-1, kernel.shape[3])
  windows = _windows(x, kernel.shape[:2], pads)
  return sum(map(jnp.multiply, windows, weights))


def _convolve_to_one(x, kernel, pads) -> jax.Array:
  """Returns the convolution to one channel: pixels times weights, shifted, added up."""
  weights = kernel.reshape(-1, kernel.shape[2])
  windows = _windows(x @ weights.T, kernel.shape[:2], pads)
  # Channel i of the product belongs to weight i of the kernel.
  return sum(window[..., i : i + 1] for i, window in enumerate(windows))


def _convolve_for_input(x, kernel, strides, pads) -> jax.Array:
  """Returns the same by the algorithm whose transpose with respect to x is fastest."""
  many = kernel.shape[2] >= _MANY_CHANNELS and math.prod(x.shape[1:3]) <= _FEW_PIXELS
  small_kernel = 1 < math.prod(kernel.shape[:2]) <= 9
  if small_kernel and (many or strides != (1, 1)):
    return _convolve_patches(x, kernel, strides, pads)
  return _fast_convolve(x, kernel, strides, pads)


def _convolve_patches(x, kernel, strides, pads) -> jax.Array:
  """Returns the convolution as one product of all patches with the kernel."""
  kh, kw, channels, out = kernel.shape
  patches = jnp.concatenate(_windows(x, (kh, kw), pads, strides), axis=-1)
  return patches @ kernel.reshape(kh * kw * channels, out)


def _mirrored(kernel: jax.Array, pads: Pads) -> tuple[jax.Array, Pads]:
  """Returns the kernel and pads of the transposed convolution, strides being 1."""
  sizes = kernel.shape[:2]
  pads = tuple(
    (k - 1 - low, k - 1 - high) for k, (low, high) in zip(sizes, pads, strict=True)
  )
  return kernel[::-1, ::-1].swapaxes(2, 3), pads


def _input_gradient(x, g, kernel, strides, pads) -> jax.Array:
  """Returns the gradient of the input by the algorithm measured fastest."""
  if _is_small(kernel, strides) and 1 in kernel.shape[2:]:
    kernel, pads = _mirrored(kernel, pads)
    return _fast_convolve(g, kernel, strides, pads)
  to_input = jax.linear_transpose(
    lambda x: _convolve_for_input(x, kernel, strides, pads), x
  )
  return to_input(g)[0]


def _kernel_gradient(x, g, kernel, strides, pads) -> jax.Array:
  """Returns the gradient of the kernel by the algorithm measured fastest."""
  if not g.size:
    return jnp.zeros_like(kernel)
  # XLA wants x in another layout here. Left to itself it rearranges x in the forward
  # pass, and keeps both.
  x = _after(g, x)
  if _is_pointwise(kernel, pads):
    return _product(x[:, :: strides[0], :: strides[1]], g)[None, None]
  few = kernel.shape[3] <= _FEW_OUT and kernel.shape[2] >= _ENOUGH_IN
  if few and _is_small(kernel, strides):
    return _kernel_gradient_of_few(x, g, kernel, pads)
  x, g, pads = _strips(x, g, kernel, strides, pads)
  to_kernel = jax.linear_transpose(lambda k: _convolve(x, k, strides, pads), kernel)
  return to_kernel(g)[0]


def _strips(x, g, kernel, strides, pads) -> tuple[jax.Array, jax.Array, Pads]:
  """Returns x, g and pads with images cut into strips of rows, each an image.

  Eigen copies values of one place in all images at a time, which are faster to copy if
  there are as many as a vector has. The kernel's gradient is the same.
  """
  count, parts = len(x), -(-_MANY_IMAGES // len(x))
  if parts == 1 or g.shape[1] % parts or x.nbytes > _CHEAP_TO_COPY:
    return x, g, pads
  rows, (above_and_below, beside) = g.shape[1] // parts, pads
  border = [(0, 0, 0), (*above_and_below, 0), (0, 0, 0), (0, 0, 0)]
  x = lax.pad(x, jnp.zeros((), x.dtype), border)
  step, seen = rows * strides[0], (rows - 1) * strides[0] + kernel.shape[0]
  x = jnp.stack([x[:, i * step : i * step + seen] for i in range(parts)], 1)
  x, g = (a.reshape(count * parts, -1, *a.shape[-2:]) for a in (x, g))
  return x, g, ((0, 0), beside)


def _kernel_gradient_of_few(x, g, kernel, pads) -> jax.Array:
  """Returns the gradient of the kernel as products of the shifted g with x."""
  (kh, kw, channels, out), (_, pads) = kernel.shape, _mirrored(kernel, pads)
  g = jnp.moveaxis(jnp.stack(_windows(g, (kh, kw), pads), axis=1), 4, 2)
  # [N, kh kw out, H, W]: a product per image, which XLA spreads over threads.
  g = g.reshape(x.shape[0], kh * kw * out, *x.shape[1:3])
  products = lax.dot_general(g, x, (((2, 3), (1, 2)), ((0,), (0,))))
  gradient = jnp.sum(products, axis=0).reshape(kh, kw, out, channels)
  return gradient[::-1, ::-1].swapaxes(2, 3)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns the sum over pixels of outer products: [..., A], [..., B] to [A, B]."""
  pixels = tuple(range(a.ndim - 1))
  # The left side is the one that gets transposed in memory: let it be the narrower.
  if a.shape[-1] > b.shape[-1]:
    return _product(b, a).T
  return lax.dot_general(a, b, ((pixels, pixels), ((), ())))


def pixel_sums(*features: jax.Array) -> tuple[jax.Array, ...]:
  """Returns what `models.layers.pixel_sums` does: sums of rows, and then of these.

  A row's pixels lie side by side, and are read once for all sums. XLA's sum over all
  pixels reads memory many times as slowly. Features may have any rank from 2 up.
  """
  zeros = tuple(jnp.zeros((), x.dtype) for x in features)
  add = lambda a, b: tuple(map(jnp.add, a, b))
  rows = lax.reduce(features, zeros, add, (features[0].ndim - 2,))
  rows = [r.reshape(-1, r.shape[-1]) for r in rows]
  return tuple(jnp.ones(len(r), r.dtype) @ r for r in rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def depthwise(
  x: jax.Array, kernel: jax.Array, strides: tuple[int, int], pads: Pads
) -> jax.Array:
  """Returns what `models.conv.depthwise` does: a sum of shifted images times weights.

  XLA's own visits one channel after the other. Here all of a pixel's channels are one
  vector, in the gradients too.
  """
  windows = _windows(x, kernel.shape[:2], pads, strides)
  return sum(map(jnp.multiply, windows, kernel.reshape(-1, kernel.shape[3])))


def _depthwise_backward(strides, pads, residuals, g):
  (x, kernel), (dy, dx) = residuals, strides
  # A window starts in its own block of strides and reaches so many blocks further.
  reach = [(k - 1) // step for k, step in zip(kernel.shape[:2], strides, strict=True)]

  def gradient_at(row, column):
    """Returns the gradient of the pixels at (row, column) of all blocks."""
    seen = kernel[row::dy, column::dx][::-1, ::-1]
    if not seen.size:  # No window reaches these.
      count, height, width, channels = g.shape
      return jnp.zeros((count, height + reach[0], width + reach[1], channels), g.dtype)
    around = tuple((n - 1, far) for n, far in zip(seen.shape[:2], reach, strict=True))
    return depthwise(g, seen, (1, 1), around)

  to_input = _interleave(gradient_at, strides, pads, x.shape[1:3])
  windows = _windows(x, kernel.shape[:2], pads, strides)
  sums = pixel_sums(*(window * g for window in windows))
  return to_input, jnp.stack(sums).reshape(kernel.shape)


depthwise.defvjp(lambda x, k, *o: (depthwise(x, k, *o), (x, k)), _depthwise_backward)


def _interleave(
  part: Callable[[int, int], jax.Array],
  strides: tuple[int, int],
  pads: Pads,
  size: tuple[int, int],
) -> jax.Array:
  """Returns the image [N, *size, C] that has part(i, j) at pixel (i, j) of its blocks.

  Args:
    part: returns [N, h, w, C], a pixel of each block.
    strides: size of a block.
    pads: how far the first block begins before the image; and after it, which is not
      needed.
    size: of the image. What blocks have beyond is cut off, what they lack is 0.
  """
  # A row of pixels of one block after the other is contiguous memory.
  rows = [
    jnp.concatenate([part(i, j) for j in range(strides[1])], 3)
    for i in range(strides[0])
  ]
  x = jnp.stack(rows, 2)
  count, height, dy, width, _ = x.shape
  x = x.reshape(count, height * dy, width * strides[1], -1)
  edges = [
    (-low, low + whole - reached, 0)
    for (low, _), whole, reached in zip(pads, size, x.shape[1:3], strict=True)
  ]
  return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *edges, (0, 0, 0)])


def conv2d_reflected(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Returns the convolution by a 3x3 kernel with reflected borders.

  Copying images to pad them costs as much as to convolve them, and more in the backward
  pass. What lies outside reaches the outermost rows and columns only: it is added to a
  convolution with zeros around.
  """
  if x.shape[3] == 1:
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    return conv2d(x, kernel, (1, 1), ((0, 0), (0, 0)))
  y = conv2d(x, kernel, (1, 1), ((1, 1), (1, 1)))
  for edge, outside in ((0, 1), (-1, -2)):
    row, column = x[:, outside], x[:, :, outside]
    row = jnp.pad(row, ((0, 0), (1, 1), (0, 0)), mode="reflect")
    # The row has added what lies outside of the corners.
    column = jnp.pad(column, ((0, 0), (1, 1), (0, 0)))
    y = y.at[:, edge].add(_convolve_line(row, kernel[edge]))
    y = y.at[:, :, edge].add(_convolve_line(column, kernel[:, edge]))
  return y


def _convolve_line(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Returns the convolution [N, L, out] of [N, L + 2, in] and [3, in, out]."""
  length = x.shape[1] - 2
  patches = jnp.concatenate([x[:, i : i + length] for i in range(3)], axis=-1)
  return patches @ kernel.reshape(-1, kernel.shape[2])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def spread(bias: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Returns a bias [C] at every pixel of `shape`, [..., C].

  Its gradient, a sum over all pixels, is `pixel_sums`.
  """
  return jnp.broadcast_to(bias, shape)


def _spread_backward(_shape, _residuals, g):
  return pixel_sums(g)


spread.defvjp(lambda bias, shape: (spread(bias, shape), None), _spread_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def max_pool(x: jax.Array, window: int, stride: int, pads: Pads) -> jax.Array:
  """Returns the max pool of [N, H, W, C] with a square window.

  XLA's gradient visits every window one element at a time. Here it is a handful of
  comparisons and sums of whole, strided arrays; it goes to the first maximum of a
  window in reading order.
  """
  return nn.max_pool(x, (window, window), (stride, stride), pads)


def _max_pool_forward(x, window, stride, pads):
  return max_pool(x, window, stride, pads), x


def _max_pool_backward(window, stride, pads, x, g):
  """Returns the gradient of the input, given that of the output, g [N, h, w, C]."""
  count, height, width, channels = g.shape
  winner = _argmax(x, (height, width), window, stride, pads)
  # In blocks of stride x stride pixels, a window starts at its own block's first pixel
  # and reaches so many blocks further; windows outside the image have no winner.
  reach = (window - 1) // stride
  height, width = height + reach, width + reach
  border = [(0, 0), (reach, reach), (reach, reach), (0, 0)]
  winner = jnp.pad(winner, border, constant_values=window**2)
  g = jnp.pad(g, border)

  def gradient_at(row, column):
    """Returns the gradient of the pixels at (row, column) of all blocks."""
    total = jnp.zeros((count, height, width, channels), g.dtype)
    # Backwards, so that windows add up in reading order.
    for i in reversed(range(row, window, stride)):
      for j in reversed(range(column, window, stride)):
        # The window whose pixel (i, j) this is starts so many blocks earlier.
        y, x = reach - (i - row) // stride, reach - (j - column) // stride
        there = (slice(None), slice(y, y + height), slice(x, x + width))
        total += jnp.where(winner[there] == i * window + j, g[there], 0)
    return total

  return (_interleave(gradient_at, (stride, stride), pads, x.shape[1:3]),)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def _argmax(x, size, window, stride, pads) -> jax.Array:
  """Returns each window's first maximum as row * window + column, uint8 [N, h, w, C].

  It is not found by comparing x with the pooled maximum: a value that XLA computes
  twice, in two fusions, may differ in the last bit.
  """
  low = jnp.asarray(-jnp.inf, x.dtype)
  x = lax.pad(x, low, [(0, 0, 0), *((*pad, 0) for pad in pads), (0, 0, 0)])
  rows, columns = ((n - 1) * stride + 1 for n in size)
  best, winner = None, None
  for i, j in itertools.product(range(window), repeat=2):
    seen = x[:, i : i + rows : stride, j : j + columns : stride]
    if best is None:
      best, winner = seen, jnp.zeros(seen.shape, jnp.uint8)
    else:
      higher = seen > best
      best = jnp.where(higher, seen, best)
      winner = jnp.where(higher, jnp.uint8(i * window + j), winner)
  return winner


def rematerialized(
  function: Callable[[Any, jax.Array], jax.Array],
) -> Callable[[Any, jax.Array], jax.Array]:
  """Returns a function whose backward pass calls it again.

  `jax.checkpoint` separates the two calls by an optimization barrier. XLA drops that
  on CPUs, recognizes the second call as the first, and keeps everything after all.

  Args:
    function: of parameters and features [N, H, W, C] to features of the same rank.
  """

  def backward(residuals, g):
    params, x = residuals
    return jax.vjp(function, params, _after(g, x))[1](g)

  result = jax.custom_vjp(function)
  result.defvjp(lambda params, x: (function(params, x), (params, x)), backward)
  return result


def _after(gradient: jax.Array, x: jax.Array) -> jax.Array:
  """Returns x, not to be had before the gradient is known; both [N, ., ., .].

  An optimization barrier says nothing to XLA on CPUs. This changes x only where an
  image's first gradient is not finite, to what comes of that: not a number.
  """
  return jnp.where(jnp.isfinite(gradient[:, :1, :1, :1]), x, jnp.nan)


_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)


def threefry(
  key0: jax.Array, key1: jax.Array, counter0: jax.Array, counter1: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Threefry-2x32 with 20 rounds, as `jax.extend.random.threefry2x32_p` computes it.

  That primitive runs the rounds as a loop over memory on CPUs; written out, they fuse
  into the arithmetic that uses the words. Keys are uint32 scalars, counters and results
  uint32 arrays of one shape.
  """
  schedule = (key0, key1, key0 ^ key1 ^ _PARITY)
  a, b = counter0 + schedule[0], counter1 + schedule[1]
  for group in range(5):
    for rotation in _ROTATIONS[group % 2]:
      a = a + b
      b = (b << np.uint32(rotation)) | (b >> np.uint32(32 - rotation))
      b = a ^ b
    a = a + schedule[(group + 1) % 3]
    b = b + schedule[(group + 2) % 3] + np.uint32(group + 1)
  return a, b
