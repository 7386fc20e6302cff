"""Degradations: images per second against plain PyTorch, at 224 pixels.

  python benchmarks/degradations.py [--kinds=awgn,motion_blur] [--out=results.json]

The other side is each definition of docs/method.md, section 3, written directly in
PyTorch for one image in one thread, as a DataLoader worker would run it, then stacked
into a batch. Where the level varies over the image it loops: over rows or columns when
it varies along one axis ("1d"), over pixels when it varies in two dimensions ("2d").
"1d-pixels" is the former by the latter's general loop. Loops that take seconds an image
are timed on one image and scaled to the batch.

The JAX side is one jitted call for the batch of 64 on all cores. The two alternate
within every repetition; medians are printed. The last lines set the slowest
degradation against DnCNN-20's forward pass over the same batch.
"""

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch
from plain import Plain

from fidelity_jax import degradations
from fidelity_jax.degradations.blur import motion_offsets
from fidelity_jax.models import DnCNN

SIZE = 224
BATCH = 64
VARIATIONS = ("uniform", "discrete", "1d", "1d-pixels", "2d")


def specification(kind: str, variation: str) -> dict:
  """The spec that `Plain`'s method of the same name follows."""
  levels = degradations.KINDS[kind].levels
  if variation == "uniform":
    return {"kind": kind, "level": levels[-1]}
  if variation == "discrete":
    return {"kind": kind, "level": list(levels)}
  return {"kind": kind, "level": (levels[-1], 0), "vary": variation[:2]}


def timed(function) -> float:
  """Seconds that a call takes."""
  start = time.perf_counter()
  function()
  return time.perf_counter() - start


def compare(kind: str, variation: str, repeats: int) -> dict:
  """Times both sides, alternating; seconds are per batch."""
  images = np.random.default_rng(0).random((BATCH, SIZE, SIZE, 3), np.float32)
  degradation = degradations.from_config(specification(kind, variation))
  function = jax.jit(degradation)
  keys = jax.random.split(jax.random.key(0), BATCH)
  on_device = jnp.asarray(images)
  ours = lambda: jax.block_until_ready(function(keys, on_device))

  levels = degradations.KINDS[kind].levels
  plain = Plain(kind, levels[-1], SIZE, levels)
  varying = variation[0] in "12"
  name = f"vary_{variation}".replace("-", "_") if varying else variation
  method = getattr(plain, name)
  chw = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
  count = {"1d": 4, "1d-pixels": 1, "2d": 1}.get(variation, BATCH)
  theirs = lambda: torch.stack([method(image) for image in chw[:count]])

  ours()
  if count > 1:
    theirs()
  pairs = [(timed(ours), timed(theirs) * BATCH / count) for _ in range(repeats)]
  jax_seconds = statistics.median(pair[0] for pair in pairs)
  torch_seconds = statistics.median(pair[1] for pair in pairs)
  return {
    "kind": kind,
    "variation": variation,
    "jax_images_per_second": BATCH / jax_seconds,
    "torch_images_per_second": BATCH / torch_seconds,
    "ratio": torch_seconds / jax_seconds,
    "jax_seconds": jax_seconds,
  }


def restorer_seconds() -> float:
  """DnCNN-20's forward pass over a batch, timed on two images and scaled."""
  count = 2
  model = DnCNN()
  images = jnp.zeros((count, SIZE, SIZE, 3))
  variables = model.init(jax.random.key(0), images)
  apply = jax.jit(model.apply)
  call = lambda: jax.block_until_ready(apply(variables, images))
  call()
  return statistics.median(timed(call) for _ in range(3)) * BATCH / count


def main() -> None:
  """Runs the comparison and prints a table."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  kinds = [kind for kind in degradations.KINDS if kind != "clean"]
  parser.add_argument("--kinds", default=",".join(kinds))
  parser.add_argument("--variations", default=",".join(VARIATIONS))
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--out")
  args = parser.parse_args()
  # What a DataLoader worker is given.
  torch.set_num_threads(1)

  # The eye kernel above is the definition's at 45 degrees.
  assert motion_offsets(45.0, 10) == tuple((k, k) for k in range(11))
  results = []
  print(f"{'kind':17} {'variation':9} {'JAX img/s':>10} {'PyTorch':>9} {'ratio':>7}")
  for kind in args.kinds.split(","):
    for variation in args.variations.split(","):
      result = compare(kind, variation, args.repeats)
      results.append(result)
      print(
        f"{kind:17} {variation:9} {result['jax_images_per_second']:10.0f} "
        f"{result['torch_images_per_second']:9.2f} {result['ratio']:7.1f}",
        flush=True,
      )

  restorer = restorer_seconds()
  print(f"DnCNN-20 forward, batch of {BATCH}: {restorer:.1f} s; of that, degrading is")
  for result in results:
    share = 100 * result["jax_seconds"] / restorer
    print(f"  {result['kind']:17} {result['variation']:9} {share:6.2f} %")
  if args.out:
    with open(args.out, "w") as file:
      json.dump({"restorer_seconds": restorer, "results": results}, file, indent=2)


if __name__ == "__main__":
  main()
