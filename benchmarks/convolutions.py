"""Single convolutions: `models.conv.conv2d`, XLA's own, and PyTorch's, on a CPU.

  python benchmarks/convolutions.py [--shapes=dncnn,resnet] [--repeats=7] [--json=FILE]

Forward and both gradients (dx to the input, dk to the kernel), each as a jitted
function of its own with the package's compiler options. The three alternate; medians
in milliseconds of wall-clock time are printed. Says what fidelity_jax/cpu.py should
do itself and what it should leave to XLA.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import side_by_side
import torch
from torch.nn import functional

from fidelity_jax import platform
from fidelity_jax.models import conv

# By group: batch, side, channels in and out, kernel, stride.
SHAPES = {
  "dncnn": [(4, 224, 3, 64, 3, 1), (4, 224, 64, 64, 3, 1), (4, 224, 64, 3, 3, 1)],
  "calibration": [
    (4, 224, 1, 16, 3, 1),
    (4, 224, 16, 16, 3, 1),
    (4, 224, 16, 1, 3, 1),
    (8, 64, 1, 4, 3, 1),
    (8, 64, 4, 1, 3, 1),
  ],
  "resnet": [
    (4, 56, 64, 64, 3, 1),
    (4, 56, 64, 256, 1, 1),
    (4, 56, 128, 128, 3, 2),
    (4, 28, 512, 128, 1, 1),
    (4, 14, 256, 256, 3, 1),
    (4, 14, 256, 256, 3, 2),
    (4, 7, 512, 512, 3, 1),
    (4, 7, 512, 2048, 1, 1),
  ],
  "small": [
    (32, 32, 32, 32, 3, 1),
    (8, 16, 24, 24, 3, 1),
    (8, 4, 96, 192, 3, 2),
    (8, 2, 192, 192, 3, 1),
    (4, 2, 512, 512, 3, 1),
  ],
}
PARTS = ("forward", "dx", "dk")


def jax_parts(convolve, x, kernel, g):
  """Returns {"forward", "dx", "dk"}: functions that run one part."""
  functions = {
    "forward": lambda x, kernel, g: convolve(x, kernel),
    "dx": lambda x, kernel, g: jax.vjp(lambda x: convolve(x, kernel), x)[1](g),
    "dk": lambda x, kernel, g: jax.vjp(lambda k: convolve(x, k), kernel)[1](g),
  }
  options = platform.compiler_options()
  jitted = {n: jax.jit(f, compiler_options=options) for n, f in functions.items()}
  return {
    name: lambda f=f: jax.block_until_ready(f(x, kernel, g))
    for name, f in jitted.items()
  }


def torch_parts(x, kernel, g, stride: int, pad: int):
  """Returns the same for PyTorch, in its own layout."""
  x, g = (torch.from_numpy(np.moveaxis(a, 3, 1).copy()) for a in (x, g))
  kernel = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
  gradient = functools.partial(
    torch.ops.aten.convolution_backward,
    g,
    x,
    kernel,
    [0],
    [stride] * 2,
    [pad] * 2,
    [1, 1],
    False,
    [0, 0],
    1,
  )
  return {
    "forward": lambda: functional.conv2d(x, kernel, stride=stride, padding=pad),
    "dx": lambda: gradient([True, False, False]),
    "dk": lambda: gradient([False, True, False]),
  }


def main() -> None:
  """Prints a table line per convolution, and writes --json."""
  parser = side_by_side.parser(__doc__, "shapes", tuple(SHAPES))
  parser.set_defaults(repeats=7)
  args = parser.parse_args()
  results = {"device": side_by_side.device_name(), **vars(args), "milliseconds": {}}
  print(f"{results['device']}; milliseconds: conv2d, XLA, PyTorch")
  print("| N, side, in -> out, kernel | forward | dx | dk |\n|---|---|---|---|")
  rng = np.random.default_rng(0)
  for shape in (shape for group in args.shapes for shape in SHAPES[group]):
    batch, side, channels, out, size, stride = shape
    pad = size // 2
    x = rng.standard_normal((batch, side, side, channels), np.float32)
    kernel = rng.standard_normal((size, size, channels, out), np.float32)
    strides, pads = (stride, stride), ((pad, pad), (pad, pad))
    own = functools.partial(conv.conv2d, strides=strides, padding=pads)
    xla = functools.partial(
      jax.lax.conv_general_dilated,
      window_strides=strides,
      padding=pads,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    g = np.ones(jax.eval_shape(own, x, kernel).shape, np.float32)
    arrays = [jnp.asarray(a) for a in (x, kernel, g)]
    sides = {
      "conv2d": jax_parts(own, *arrays),
      "xla": jax_parts(xla, *arrays),
      "torch": torch_parts(x, kernel, g, stride, pad),
    }
    cells = []
    for part in PARTS:
      times = side_by_side.interleave(
        {name: side[part] for name, side in sides.items()}, args.repeats
      )
      row = {name: 1e3 * time["seconds"] for name, time in times.items()}
      results["milliseconds"][f"{shape} {part}"] = row
      cells.append(" ".join(f"{value:.2f}" for value in row.values()))
    name = f"{batch}, {side}, {channels} -> {out}, {size}x{size}"
    name += f", stride {stride}" if stride > 1 else ""
    print(f"| {name} | {' | '.join(cells)} |", flush=True)
  side_by_side.save(results, args.json)


if __name__ == "__main__":
  main()
