"""Resizing that agrees with `torch.nn.functional.interpolate`.

Conventions: align_corners=False, no antialiasing. Output index i lies at source
coordinate (i + 1/2) n_in / n_out - 1/2.

  bilinear  the two neighbours; the coordinate is clamped below at 0.
  bicubic   four neighbours, Keys' kernel with a = -0.75; neighbours outside the
            image repeat its edge.
  nearest   source index floor(i n_in / n_out), in exact arithmetic. PyTorch computes
            it in floating point and lands one lower at a few sizes where
            i n_in / n_out is a whole number (2 -> 82 or 225^2 -> 1024, for example).

Weights are computed in float64 when the function is traced. PyTorch's float32 weights
lose up to n_in 2^-24 of a pixel, which shows on axes of tens of thousands of samples.
Shorter inputs than float32 are resized in float32 and rounded once: in bfloat16 the
weights of a pixel would not add up to 1.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from fidelity_jax import errors

METHODS = ("bilinear", "bicubic", "nearest")

_CUBIC_A = -0.75
# Up to this many weights an axis is resized by a matrix product, which needs no
# scatter in its gradient; longer axes gather, since the matrix is nearly all zeros.
_MATRIX_LIMIT = 1 << 18


def check_method(method: str) -> str:
  """Returns `method` if it names a resize method.

  Raises:
    UsageError: `method` is not one of `METHODS`.
  """
  return errors.check_choice("resize method", method, METHODS)


def resize2d(
  x: jax.Array, size: tuple[int, int], method: str = "bilinear"
) -> jax.Array:
  """Resizes the two spatial axes.

  Args:
    x: float [N, H, W, C].
    size: (height, width) of the result, each at least 1.
    method: "bilinear", "bicubic" or "nearest".

  Returns:
    [N, height, width, C], dtype as given. Bicubic may overshoot the input's range.

  Raises:
    UsageError: unknown method, an empty input or a size below 1.
  """
  # Rows first: they are contiguous, and a smaller image is left for the columns.
  rows = _resize_axis(_widened(x), 1, size[0], method)
  return _resize_axis(rows, 2, size[1], method).astype(x.dtype)


def resize1d(x: jax.Array, length: int, method: str = "bilinear") -> jax.Array:
  """Resizes the last axis, as an image of one row.

  Args:
    x: float [N, L].
    length: length of the result, at least 1.
    method: "bilinear", "bicubic" or "nearest".

  Returns:
    [N, length], dtype as given.

  Raises:
    UsageError: unknown method, an empty input or a length below 1.
  """
  return _resize_axis(_widened(x), 1, length, method).astype(x.dtype)


def _widened(x: jax.Array) -> jax.Array:
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _resize_axis(x: jax.Array, axis: int, n_out: int, method: str) -> jax.Array:
  check_method(method)
  n_in = x.shape[axis]
  if n_in < 1 or n_out < 1:
    raise errors.UsageError(
      f"cannot resize an axis of {n_in} to {n_out}: both must be at least 1"
    )
  if n_in == n_out:
    return x
  indices, weights = _taps(n_in, n_out, method)
  if method != "nearest" and n_in * n_out <= _MATRIX_LIMIT:
    matrix = np.zeros((n_out, n_in))
    np.add.at(matrix, (np.arange(n_out)[:, None], indices), weights)
    # The default precision on accelerators would round the input.
    out = jax.lax.dot_general(
      x,
      jnp.asarray(matrix, x.dtype),
      (((axis,), (1,)), ((), ())),
      precision=jax.lax.Precision.HIGHEST,
    )
    return jnp.moveaxis(out, -1, axis)
  shape = [1] * x.ndim
  shape[axis] = n_out
  out = 0
  for tap in range(indices.shape[1]):
    index = indices[:, tap]
    # As jnp.take, for which jax2onnx has one of its own without these options.
    part = x.at[(slice(None),) * axis + (index,)].get(
      mode="clip",
      indices_are_sorted=True,
      unique_indices=bool(np.all(np.diff(index) > 0)),
    )
    out += part * jnp.asarray(weights[:, tap].reshape(shape), x.dtype)
  return out


@functools.lru_cache(maxsize=256)
def _taps(n_in: int, n_out: int, method: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns source indices (int32) and weights (float64), each [n_out, taps].

  Each column of the indices is non-decreasing.
  """
  i = np.arange(n_out, dtype=np.int64)
  if method == "nearest":
    return (i * n_in // n_out).astype(np.int32)[:, None], np.ones((n_out, 1))
  source = (i + 0.5) * (n_in / n_out) - 0.5
  if method == "bilinear":
    source = np.maximum(source, 0)
    offsets = np.arange(0, 2)
  else:
    offsets = np.arange(-1, 3)
  low = np.floor(source).astype(np.int64)
  t = (source - low)[:, None]
  weights = 1 - np.abs(t - offsets) if method == "bilinear" else _cubic(t - offsets)
  indices = np.clip(low[:, None] + offsets, 0, n_in - 1)
  return indices.astype(np.int32), weights


def _cubic(distance: np.ndarray) -> np.ndarray:
  """Keys' interpolation kernel (1981) for |distance| <= 2."""
  d = np.abs(distance)
  near = ((_CUBIC_A + 2) * d - (_CUBIC_A + 3)) * d**2 + 1
  far = ((d - 5) * d + 8) * d * _CUBIC_A - 4 * _CUBIC_A
  return np.where(d <= 1, near, far)
