"""The restorer's training patches, cut on the device."""

import jax
import jax.numpy as jnp


def starts(length: int, size: int, stride: int) -> tuple[int, ...]:
  """Returns the first pixels of patches along one axis, the last flush with the edge.

  Args:
    length: of the image along the axis, in pixels.
    size: of a patch, in pixels.
    stride: distance between patches, in pixels.

  Returns:
    0, stride, 2 stride, ... and length - size, strictly ascending.

  Raises:
    ValueError: the patch is larger than the image, or size or stride is below 1.
  """
  if not 1 <= size <= length or stride < 1:
    raise ValueError(f"no patches of {size} at stride {stride} in {length} pixels")
  return (*range(0, length - size, stride), length - size)


def extract_patches(images: jax.Array, size: int = 50, stride: int = 25) -> jax.Array:
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


def patch_index(
  index: jax.Array, height: int, width: int, size: int = 50, stride: int = 25
) -> jax.Array:
  """Numbers patches over the whole dataset, one key (and noise level) per patch.

  Args:
    index: int32 [N], each image's index in its dataset.
    height: of the images, in pixels.
    width: of the images, in pixels.
    size: side of a patch, in pixels.
    stride: distance between patches, in pixels.

  Returns:
    int32 [N * P] in the order of `extract_patches`: index * P + p.
  """
  rows, columns = starts(height, size, stride), starts(width, size, stride)
  count = len(rows) * len(columns)
  numbers = index[:, None] * count + jnp.arange(count, dtype=index.dtype)
  return numbers.reshape(-1)
