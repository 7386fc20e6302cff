r"""Restores image files with a denoiser alone.

  fidelity_jax restore WEIGHTS|RUN|FILE IMAGE... --out=DIR
    [--add_noise=25 [--seed=0] | --reference=DIR]

WEIGHTS is what `fidelity_jax port` reads: a denoiser's checkpoint or a ported
directory; RUN is an experiment's directory, whose restorer is taken; FILE is what
`fidelity_jax export` wrote, .jax or .onnx, for images no smaller than its own size.
IMAGE is a file, a folder or a pattern; docs/restore.md has examples. DIR gets the
restored images under the same names, and with --add_noise or --reference restored.csv
with each image's PSNR and SSIM before and after. The same command again restores what
is not there yet.
"""

import argparse
import contextlib
import math
import sys
from collections.abc import Iterator, Sequence

import numpy as np
import tqdm

from fidelity_jax import (
  boundary,
  denoising,
  locations,
  photos,
  platform,
  progress,
  signals,
)
from fidelity_jax.denoising_files import Failure, Row, restore_files
from fidelity_jax.errors import RunError, UsageError


def parser() -> boundary.Parser:
  """Returns the command's parser."""
  made = boundary.Parser(
    prog="fidelity_jax restore", description="Restore images with a denoiser alone."
  )
  made.add_argument(
    "run",
    metavar="RUN",
    help="a denoiser's checkpoint, an experiment's directory, an exported file",
  )
  made.add_argument(
    "images", nargs="+", metavar="IMAGE", help="a file, a folder, or a pattern"
  )
  made.add_argument("--out", required=True, metavar="DIR", help="directory to write")
  made.add_argument(
    "--add_noise",
    type=float,
    metavar="SIGMA",
    help="add Gaussian noise first, of this standard deviation on the scale to 255",
  )
  made.add_argument("--seed", type=int, default=0, help="of that noise (default 0)")
  made.add_argument(
    "--reference", metavar="DIR", help="folder of clean images of the same names"
  )
  return made


def _restore(args: argparse.Namespace) -> None:
  signals.interrupt("while it restored", "what is restored is kept")
  noise = args.add_noise
  if noise is not None and not 0 < noise <= 255:
    raise UsageError(f"--add_noise={noise:g}: write a number above 0, up to 255")
  if not 0 <= args.seed < 2**32:
    raise UsageError(f"--seed={args.seed}: write a number from 0 to 2^32 - 1")
  reference = None
  if args.reference is not None:
    if noise is not None:
      raise UsageError(
        "--add_noise and --reference: with added noise the images themselves are the "
        "references; leave one out"
      )
    reference = locations.expand(args.reference)
    if not reference.is_dir():
      raise UsageError(f"--reference={reference}: no such folder")
  out = locations.expand(args.out, write=True)
  found = photos.find(args.images, out)
  platform.set_up()
  platform.keep_compiled()
  denoiser = denoising.load(args.run)
  results = restore_files(
    denoiser, found, out, add_noise=noise, seed=args.seed, reference=reference
  )
  _report(results, len(found))


def _report(results: Iterator[Row | Failure], total: int) -> None:
  """Prints what becomes of each image, and the means at the end.

  Raises:
    RunError: images were passed over.
  """
  rows, failures = [], []
  live = progress.Progress("restoring", total, unit="image")
  with contextlib.closing(results), contextlib.closing(live):
    for result in results:
      if isinstance(result, Row):
        rows.append(result)
        tqdm.tqdm.write(_line(result.output, result[4:]), file=sys.stdout)
      else:
        failures.append(result)
        progress.say(f"{result.found.path}: passed over: {result.reason}")
      if live.due():
        live.update(len(rows) + len(failures))
  measured = [row for row in rows if not math.isnan(row.psnr)]
  if measured:
    # Images too small for an SSIM have none.
    values = np.ma.masked_invalid([row[4:] for row in measured])
    means = values.mean(0).filled(np.nan)
    tqdm.tqdm.write(_line(f"mean of {len(measured)} images", means), file=sys.stdout)
  if failures:
    first = failures[0].found.path
    raise RunError(
      f"{len(failures)} of {total} images were passed over, the first of them {first}: "
      "see above; the others are restored"
    )


def _line(title: str, quality: Sequence[float]) -> str:
  """Returns a title, and PSNR and SSIM before and after where there are any."""
  psnr_noisy, psnr, ssim_noisy, ssim = quality
  if not math.isnan(psnr):
    title += f"  PSNR {psnr_noisy:.2f} -> {psnr:.2f} dB"
  if not math.isnan(ssim):
    title += f"  SSIM {ssim_noisy:.4f} -> {ssim:.4f}"
  return title


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit status."""
  return boundary.run(lambda: _restore(parser().parse_args(arguments)))
