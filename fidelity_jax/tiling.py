"""Applies a network to a whole image of any size, window by window, without seams.

For networks that keep the size of their input, do the same everywhere, pad with zeros,
and see no further than a radius: DnCNN, as restorer and as fidelity estimator. What
windows give is then what the whole image would give, but for rounding: a window that
touches the image's border has the same zeros beyond it, and elsewhere what is nearer
than the radius to a window's edge is not used.

`apply` chooses windows for networks that take any size; `apply_fixed` is for programs
that take one size alone, such as exported ones.
"""

import collections
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np

# Sides of windows are multiples of this, so that images of many sizes share programs.
_STEP = 64
# With 64 channels of float32, each activation of such a window takes 64 MiB. 20 layers
# of 3x3 compute a fifth more than without overlap.
_TILE = 512
# Batches under way: one is copied back while the next is computed.
_AHEAD = 2

# A network: from windows float32 [1, h, w, C] and a mask float32 [1, h, w, 1] that is 1
# in the image and 0 beyond its border (None: all is in the image) to [1, h, w, K]. Of
# several, one after the other, each has to be given zeros beyond the border.
Network = Callable[[np.ndarray, np.ndarray | None], jax.Array]
# A program: from windows float32 [n, S, S, C] to [n, S, S, K].
Program = Callable[[np.ndarray], jax.Array | np.ndarray]


class _Span(NamedTuple):
  """Where a window is along one axis of the image.

  Attributes:
    seen: what the network sees.
    used: the part of it that is used.
    within: that part, from the window's start.
  """

  seen: slice
  used: slice
  within: slice


def apply(
  network: Network, image: np.ndarray, radius: int, tile: int | None = None
) -> np.ndarray:
  """Returns what a network makes of an image, [H, W, K].

  Along an axis that is longer than `tile` the image is cut into as few windows as there
  can be, of one length; a shorter one is padded to a multiple of 64 and masked. So all
  windows of an image have one shape, and images of all sizes together have at most
  (tile / 64)^2, each with and without a mask, to compile for. Two windows are on the
  device at a time.

  Args:
    network: see `Network`.
    image: float32 [H, W, C].
    radius: the network's, see `models.Restorer.radius`; of two networks, one after the
      other, the sum.
    tile: the largest side of a window, a multiple of 64 above twice the radius; None:
      512, or four times the radius where that is more.

  Raises:
    ValueError: the tile is no such number.
  """
  if tile is None:
    tile = max(_TILE, _round_up(4 * radius))
  if tile % _STEP or tile <= 2 * radius:
    raise ValueError(f"tile {tile} is no multiple of {_STEP} above {2 * radius}")
  height, width, _ = image.shape
  rows, columns = (_spans(size, radius, tile) for size in (height, width))
  beyond = [
    (0, max(0, s[0].seen.stop - n)) for s, n in ((rows, height), (columns, width))
  ]
  mask = None
  if any(map(any, beyond)):
    image = np.pad(image, (*beyond, (0, 0)))
    mask = np.zeros((1, rows[0].seen.stop, columns[0].seen.stop, 1), np.float32)
    mask[:, :height, :width] = 1
  return _assembled(lambda windows: network(windows, mask), image, rows, columns, 1)


def apply_fixed(
  program: Program, image: np.ndarray, radius: int, side: int
) -> np.ndarray:
  """Returns what a program that takes one size makes of an image, [H, W, K].

  The image is cut into as few windows as there can be. As it is no smaller than these,
  none ends beyond its border, and no mask is needed. They are computed in batches, of
  which the last is filled up to a power of two: whatever the images, there are a few
  sizes to compile for, and no batch has more pixels than the largest window of `apply`
  (a single one may).

  Args:
    program: see `Program`; does with each window what it would do with it alone.
    image: float32 [H, W, C], at least `side` x `side`.
    radius: as for `apply`.
    side: S, of the windows.

  Raises:
    ValueError: the image is smaller, or too little of a window would be used.
  """
  height, width, _ = image.shape
  if min(height, width) < side or 2 * radius >= side:
    raise ValueError(
      f"windows of {side}x{side}, radius {radius}, do not cover {width}x{height} pixels"
    )
  rows, columns = (_cut(size, radius, side) for size in (height, width))
  most = 1 << max(0, (_TILE**2 // side**2).bit_length() - 1)
  return _assembled(program, image, rows, columns, most)


def _assembled(
  program: Program,
  image: np.ndarray,
  rows: list[_Span],
  columns: list[_Span],
  most: int,
) -> np.ndarray:
  """Returns the parts of the windows' outputs that are used, put together.

  Args:
    program: what takes the windows, at most `most` at a time.
    image: float32, as large as the windows reach.
    rows: the windows' spans; what they use is the result's height.
    columns: likewise.
    most: a power of two.
  """
  result = None
  for spans, outputs in _batches(program, image, rows, columns, most):
    if result is None:
      shape = (rows[-1].used.stop, columns[-1].used.stop, outputs.shape[-1])
      result = np.empty(shape, outputs.dtype)
    # Without what the batch was filled up with.
    for (y, x), output in zip(spans, np.asarray(outputs), strict=False):
      result[y.used, x.used] = output[y.within, x.within]
  return result


def _batches(
  program: Program,
  image: np.ndarray,
  rows: list[_Span],
  columns: list[_Span],
  most: int,
) -> Iterator[tuple[list[tuple[_Span, _Span]], jax.Array | np.ndarray]]:
  """Yields windows' spans and their outputs, while later ones are computed."""
  waiting = collections.deque()
  places = itertools.product(rows, columns)
  while spans := list(itertools.islice(places, most)):
    windows = np.stack([image[y.seen, x.seen] for y, x in spans])
    waiting.append((spans, program(filled(windows))))
    if len(waiting) == _AHEAD:
      yield waiting.popleft()
  yield from waiting


def filled(batch: np.ndarray) -> np.ndarray:
  """Returns a batch [n, ...] with zeros up to a power of two, so that few compile."""
  count = len(batch)
  room = (1 << (count - 1).bit_length()) - count
  return np.pad(batch, [(0, room), *[(0, 0)] * (batch.ndim - 1)]) if room else batch


def _round_up(size: int) -> int:
  return -(-size // _STEP) * _STEP


def _spans(size: int, radius: int, tile: int) -> list[_Span]:
  """Returns the windows along an axis; a single one may end beyond the image."""
  if size <= tile:
    return [_Span(slice(0, _round_up(size)), slice(0, size), slice(0, size))]
  # The first and the last reach `radius` further, as they touch the border.
  count = -(-(size - 2 * radius) // (tile - 2 * radius))
  side = _round_up(-(-(size - 2 * radius) // count) + 2 * radius)
  return _cut(size, radius, side)


def _cut(size: int, radius: int, side: int) -> list[_Span]:
  """Returns windows of one side along an axis that is no shorter."""
  spans, done = [], 0
  while done < size:
    start = min(max(0, done - radius), size - side)
    end = size if start == size - side else start + side - radius
    spans.append(
      _Span(
        slice(start, start + side), slice(done, end), slice(done - start, end - start)
      )
    )
    done = end
  return spans
