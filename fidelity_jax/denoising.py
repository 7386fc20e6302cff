"""A denoiser alone, on images of any size: restoring, and how well it does.

The protocol is the one that denoisers are published with: Gaussian noise that is
neither clipped nor rounded, PSNR and SSIM of the output clipped to [0, 1]. Rounding the
output to 8 bits first, as some do, takes 0.005 dB off 29 dB.

PSNR and SSIM are scikit-image's: those of `tasks.base` and `quality`, which training
and evaluation use for images of one size, would be compiled for each size anew.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import skimage.metrics
from flax import linen as nn

from fidelity_jax import exported, platform, runs, tiling
from fidelity_jax.errors import UsageError

PyTree = Any

# SSIM's window is 11 pixels wide.
_SSIM_SIDE = 11


@dataclasses.dataclass(frozen=True, eq=False)
class Denoiser:
  """A restorer that is ready to be used.

  Attributes:
    apply: from a whole image, float32 [H, W, channels], to the restored one, likewise,
      in [0, 1]. Clean values would be in [0, 1]; noise may go beyond.
    channels: 1 or 3.
    digest: tells whether two are the same, 64 hexadecimal digits.
  """

  apply: Callable[[np.ndarray], np.ndarray]
  channels: int
  digest: str


def load(place: str | Path) -> Denoiser:
  """Returns the denoiser of a checkpoint, an experiment or an exported file.

  That of an exported file raises UsageError for images that are smaller than the size
  that it was exported for.

  Args:
    place: see `runs.find`; or a file that `fidelity_jax export` wrote.

  Raises:
    UsageError, Missing, RunError: see `runs.find` and `exported.load`; UsageError also
      if there is no denoiser of grey or RGB images.
  """
  if exported.is_file(place):
    made = exported.load(place)
    made.check_whole()
    whole = lambda image: made.whole(["restored"], image)["restored"]
    return Denoiser(whole, 3, made.record.digest)
  run = runs.find(place)
  network = run.method.restorer
  if network is None:
    raise UsageError(f"{place} has no denoiser in it")
  out_channels = network.out_channels or network.channels
  if network.channels not in (1, 3) or out_channels != network.channels:
    raise UsageError(
      f"{place}: from {network.channels} channels to {out_channels}, which is no "
      "denoiser of grey or RGB images"
    )
  variables = run.variables["restorer"]
  whole = lambda image: apply_whole(network, variables, image, "restore")
  return Denoiser(whole, network.channels, run.digest)


@functools.cache
def _compiled(network: nn.Module, method: str) -> Callable:
  # Networks of one structure share programs.
  def apply(variables, images, mask):
    return network.apply(variables, images, mask=mask, method=method)

  return jax.jit(apply, compiler_options=platform.compiler_options())


def apply_whole(
  network: nn.Module, variables: PyTree, image: np.ndarray, method: str = "__call__"
) -> np.ndarray:
  """Returns what a restorer or an estimator makes of a whole image, [H, W, K].

  Args:
    network: has a `radius`; see `models.Restorer`.
    variables: for its `apply`.
    image: float32 [H, W, C], of any size: large ones are computed in windows.
    method: the network's, which takes images and a mask.
  """
  compute = functools.partial(_compiled(network, method), variables)
  return tiling.apply(compute, image, network.radius)


def restore(denoiser: Denoiser, image: np.ndarray) -> np.ndarray:
  """Restores an image of any size.

  A one-channel denoiser restores each channel of a colour image by itself; of a grey
  image that a colour denoiser restores, the channels' mean is returned.

  Args:
    denoiser: the denoiser.
    image: float32 [H, W, C], C = 1 or 3; clean values would be in [0, 1].

  Returns:
    float32 [H, W, C] in [0, 1].

  Raises:
    ValueError: the image has another number of channels.
    UsageError: it is too small for an exported file, see `load`.
  """
  given, taken, apply = image.shape[-1], denoiser.channels, denoiser.apply
  if given not in (1, 3):
    raise ValueError(f"images have 1 or 3 channels, not {given}")
  if given == taken:
    return apply(image)
  if taken == 1:
    return np.concatenate([apply(image[..., c : c + 1]) for c in range(given)], -1)
  return apply(np.repeat(image, taken, -1)).mean(-1, keepdims=True)


def add_noise(image: np.ndarray, sigma: float, seed: int, name: str) -> np.ndarray:
  """Returns an image with Gaussian noise, neither clipped nor rounded, float32.

  Args:
    image: float32 [H, W, C] in [0, 1].
    sigma: standard deviation in units of 1/255.
    seed: of all noise, at least 0.
    name: the image's; the noise depends on (seed, name, shape) alone.
  """
  words = np.frombuffer(hashlib.sha256(name.encode()).digest(), np.uint32)
  rng = np.random.default_rng([seed, *map(int, words)])
  noise = rng.standard_normal(image.shape, np.float32)
  return image + np.float32(sigma / 255) * noise


def psnr(reference: np.ndarray, image: np.ndarray) -> float:
  """Returns the PSNR over all pixels and channels in dB, for images in [0, 1].

  Identical images, whose PSNR is infinite, count as 100 dB, as in `tasks.base.psnr`.
  """
  error = skimage.metrics.mean_squared_error(reference, image)
  return -10 * math.log10(max(error, 1e-10))


def ssim(reference: np.ndarray, image: np.ndarray) -> float:
  """Returns the SSIM of Wang et al. (2004), for images in [0, 1].

  NaN if a side is shorter than the window of 11 pixels, which `quality.ssim` cuts to
  fit: what it then gives is not comparable. Of larger images both give the same.
  """
  if min(reference.shape[:2]) < _SSIM_SIDE:
    return math.nan
  return float(
    skimage.metrics.structural_similarity(
      reference,
      image,
      gaussian_weights=True,
      sigma=1.5,
      use_sample_covariance=False,
      data_range=1,
      channel_axis=-1,
    )
  )
