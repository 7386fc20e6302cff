"""What fidelity_jax/cpu.py gains: each of its forms against the plain one.

  python benchmarks/cpu.py [--cases=bias,words] [--batch=4] [--size=224] [--json=FILE]

Every case is a program as the package writes it, compiled twice with the package's
compiler options: as it is, and with what cpu.py replaces left to XLA. The two
alternate; medians in milliseconds of wall-clock time, and the compiler's count of
temporary memory, are printed. A form whose plain side is as good is no longer needed.
benchmarks/convolutions.py has the convolutions one by one.
"""

import functools

import jax
import jax.numpy as jnp
import side_by_side

from fidelity_jax import cpu, models, platform
from fidelity_jax.degradations import random_words
from fidelity_jax.models import calibration, conv, dncnn, layers, pooling

CASES = (
  "network",
  "depthwise",
  "norm",
  "reflect",
  "bias",
  "max_pool",
  "remat",
  "words",
)


def gradients(function):
  """Returns a function of arrays and g, the gradient of the function's result."""
  return lambda g, *arrays: jax.vjp(function, *arrays)[1](g)


def make(case: str, batch: int, size: int):
  """Returns a case's function and its arguments."""
  image = lambda channels, shrink=1: jax.random.uniform(
    jax.random.key(channels), (batch, size // shrink, size // shrink, channels)
  )
  if case == "network":
    # So small that the last stage has fewer pixels than a kernel has weights.
    module = models.create({"name": "resnet18"}, 257, jnp.float32).folded()
    variables = side_by_side.variables_of(module, image(3, shrink=4))
    apply = lambda variables, x: module.apply(variables, x)[0]
    return gradients(apply), (jnp.ones((batch, 257)), variables, image(3, shrink=4))
  if case == "depthwise":
    x, kernel = image(96, shrink=2), jax.random.normal(jax.random.key(0), (3, 3, 1, 96))
    convolve = lambda x, kernel: conv.depthwise(x, kernel, (2, 2))
    return gradients(convolve), (convolve(x, kernel), x, kernel)
  if case == "norm":
    x, ones = image(256, shrink=4), jnp.ones(256)
    normalize = lambda *arrays: layers.normalize(*arrays, 1e-5)[0]
    return gradients(normalize), (x, x, ones, ones)
  if case == "reflect":
    module = calibration.ConvStack()
    variables = side_by_side.variables_of(module, image(1))
    return gradients(module.apply), (image(1), variables, image(1))
  if case == "bias":
    x = image(64)
    return gradients(lambda bias: conv.add_bias(x, bias)), (x, jnp.zeros(64))
  if case == "max_pool":
    pool = lambda x: pooling.max_pool(x, 2, 2)
    return gradients(pool), (image(64, shrink=2), image(64))
  if case == "remat":
    # A choice made for the other side must not be found again.
    dncnn._group.cache_clear()
    module = models.DnCNN(depth=12)
    params = side_by_side.variables_of(module, image(3))["params"]
    apply = functools.partial(dncnn.apply_rematerialized, module)
    return gradients(apply), (image(3), params, image(3))
  return lambda key: random_words.normal(key, (batch, size, size, 3)), (
    jax.random.key(0),
  )


def compile_case(case: str, args):
  """Returns a function that runs a case, and its temporary memory in bytes."""
  function, arrays = make(case, args.batch, args.size)
  # A function of its own each time, or the trace would come from a cache.
  jitted = jax.jit(
    lambda *a: function(*a), compiler_options=platform.compiler_options()
  )
  compiled = jitted.lower(*arrays).compile()
  run = lambda: jax.block_until_ready(compiled(*arrays))
  return run, compiled.memory_analysis().temp_size_in_bytes


def main() -> None:
  """Prints a table line per case, and writes --json."""
  args = side_by_side.parser(__doc__, "cases", CASES).parse_args()
  results = {"device": side_by_side.device_name(), **vars(args), "cases": {}}
  print(f"{results['device']}; batch {args.batch}, {args.size} px")
  print(
    "| case | cpu.py, ms | plain, ms | cpu.py, MB | plain, MB |\n|---|---|---|---|---|"
  )
  for case in args.cases:
    own, own_bytes = compile_case(case, args)
    with cpu.left_out():
      xla, xla_bytes = compile_case(case, args)
    row = side_by_side.interleave({"cpu": own, "plain": xla}, args.repeats)
    row["cpu"]["temp_bytes"], row["plain"]["temp_bytes"] = own_bytes, xla_bytes
    results["cases"][case] = row
    cells = [f"{1e3 * side['seconds']:.1f}" for side in row.values()]
    cells += [f"{side['temp_bytes'] / 1e6:.0f}" for side in row.values()]
    print(f"| {case} | {' | '.join(cells)} |", flush=True)
  side_by_side.save(results, args.json)


if __name__ == "__main__":
  main()
