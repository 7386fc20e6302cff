"""The restorer's training patches, cut on the device."""

import jax
import jax.numpy as jnp


def starts(length: int, size: int, stride: int) -> tuple[int, ...]:
  """Returns the first pixels of patches along one axis, the last flush with the edge.

  Args:
    length: of the image along the axis, in pixels.
    size: of a patch, in pixels, at most `length`.
    stride: distance between patches, in pixels, at least 1.

  Returns:
    0, stride, 2 stride, ... and length - size, strictly ascending.
  """
  return (*range(0, length - size, stride), length - size)


def extract_patches(images: jax.Array, size: int, stride: int) -> jax.Array:
  """Cuts every image into overlapping square patches.

  A 224x224 image gives 8x8 = 64 patches of 50 at stride 25 (docs/method.md, section 6).

  Args:
    images: [N, H, W, C], any dtype.
    size: side of a patch, in pixels.
    stride: distance between patches, in pixels.

  Returns:
    [N * P, size, size, C], P patches of the first image (rows first), then of the
    next; patch p of image n is at n * P + p.
  """
  rows = starts(images.shape[1], size, stride)
  columns = starts(images.shape[2], size, stride)
  patches = [images[:, y : y + size, x : x + size] for y in rows for x in columns]
  return jnp.stack(patches, axis=1).reshape(-1, size, size, images.shape[3])
