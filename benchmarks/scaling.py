"""Training steps on 1, 2, 4 and 8 devices: their time, and what these send each other.

  python benchmarks/scaling.py --dry                     # small networks
  python benchmarks/scaling.py [--steps=oracle,end_to_end] [--devices=1,2,4,8]
  python benchmarks/scaling.py --topology=v5e:16x16      # pip install libtpu==0.0.42.*

Steps are those of the configs, lowered from shapes alone: the classifier, calibration
by the oracle map, and calibration end-to-end. Devices are simulated on a CPU and share
its cores, so that the time of a step should stay what it is: what it grows by is what
splitting it costs here. Real devices have interconnects: docs/scaling.md.

Each row is a process of its own with a time limit. XLA's devices on a CPU wait for one
another in a collective operation, each on a thread; where the threads of a pool are
taken by other work, the last of them may never come. So every device computes on one
thread, is called when all are done with the step before, and a process that hangs is
killed and reported.

With --topology, XLA compiles for TPUs that are not there, and nothing is timed.
"""

import argparse
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from fidelity_jax import cpu, footprint, plan, sharding, stages, tasks, throughput
from fidelity_jax.configs import common

STEPS = ("classifier", "oracle", "end_to_end")
# Caltech-256's classes and its background; the embedded photographs'.
CLASSES = {"": 257, "scratch": 16}
DEVICES = (1, 2, 4, 8)
# One thread computes for each device, and no device is called ahead of the others.
FLAGS = (
  "--xla_force_host_platform_device_count={devices} --xla_cpu_multi_thread_eigen=false"
)


def stage_of(name: str, size: str, fields: dict[str, object]) -> stages.Stage:
  """Returns a stage as its config describes it, of no images and no weights.

  Args:
    name: one of `STEPS`.
    size: "" for the paper's, "scratch" for small networks.
    fields: of its config, by dotted name, and their values.
  """
  if name == "classifier":
    config = common.one_classifier("clean", size)
  else:
    config = common.method(name, size)
  config.update_from_flattened_dict(fields)
  plan.resolve(config)
  return _stage(config)


def _stage(config: ConfigDict) -> stages.Stage:
  roles = tasks.KINDS[config.kind].trained_from(config)
  parents = {role: _stage(config.parents[role]) for role in roles}
  content = stages.Content("", None, {})
  return stages.Stage(config, parents, content, {}, pathlib.Path(config.kind))


def topology(name: str, model: int) -> sharding.Layout:
  """Returns a layout on devices that are not here, such as those of "v5e:16x16"."""
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  from jax.experimental import topologies

  found = topologies.get_topology_desc(platform="tpu", topology_name=name)
  devices = np.asarray(found.devices).reshape(-1, model)
  return sharding.Layout(jax.sharding.Mesh(devices, ("data", "model")))


def row(args: argparse.Namespace) -> dict[str, object]:
  """Returns what there is to say of one step, in the process of its own."""
  (name,) = args.steps
  if args.topology:
    layout = topology(args.topology, args.model)
  else:
    config = sharding.default_config()
    config.model = args.model
    layout = sharding.make_layout(config)
  mesh = layout.mesh
  size = "scratch" if args.dry else ""
  fields = {"precision": args.precision, "batch_size": args.batch}
  stage = stage_of(name, size, fields)
  step = footprint.lower(stage, CLASSES[size], layout)
  start = time.perf_counter()
  compiled = footprint.compile(step)
  seen = footprint.measure(step, compiled)
  found = {
    "device": mesh.devices.flat[0].device_kind,
    "devices": mesh.size,
    "batch": args.batch,
    "compile_seconds": time.perf_counter() - start,
    "flops": seen.flops or counted(stage, CLASSES[size]),
    "trained_bytes": step.trained_bytes,
    "memory": {
      part: getattr(seen, part)
      for part in ("parameters", "optimizer", "frozen", "batch", "activations", "total")
    },
    "collectives": [
      {
        "kind": o.kind,
        "devices": o.devices,
        "arrays": [[a.dtype, a.shape] for a in o.arrays],
        "bytes": o.bytes,
        "sent": o.sent,
      }
      for o in seen.collectives
    ],
    "reduced_bytes": seen.exchanged,
    "sent_bytes": sum(o.sent for o in seen.collectives),
  }
  if not args.topology:
    found["seconds"] = timed(step, compiled, args.repeats)
  return found


def counted(stage: stages.Stage, num_classes: int) -> float | None:
  """Returns the operations of a step; XLA counts them for devices that are here."""
  with cpu.left_out():
    step = footprint.lower(stage, num_classes, sharding.make_layout(size=1))
  return throughput.flops(step.lowered)


def timed(step: footprint.Step, compiled: jax.stages.Compiled, repeats: int) -> float:
  """Returns the median time of a step in seconds, after one that is not counted."""
  zeros = lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding)
  state, frozen, batch = jax.tree.map(zeros, (step.state, step.frozen, step.batch))
  taken = []
  for _ in range(repeats + 1):
    start = time.perf_counter()
    state = jax.block_until_ready(compiled(state, frozen, batch))
    taken.append(time.perf_counter() - start)
  return statistics.median(taken[1:])


def in_a_process(
  args: argparse.Namespace, name: str, devices: int
) -> dict[str, object] | str:
  """Returns a row from a process of its own, or why there is none."""
  command = [sys.executable, __file__, "--row", f"--steps={name}"]
  command += [f"--devices={devices}"]
  command += [f"--batch={args.batch}", f"--repeats={args.repeats}"]
  command += [f"--precision={args.precision}", *["--dry"] * args.dry]
  command += [f"--model={args.model}"]
  command += [f"--topology={args.topology}"] * bool(args.topology)
  flags = FLAGS.format(devices=devices)
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_CPU_ENABLE_ASYNC_DISPATCH": "false",
    "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}",
  }
  # In a session of its own, so that it ends with all that it started.
  process = subprocess.Popen(
    command,
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )
  try:
    stdout, stderr = process.communicate(timeout=args.limit)
  except subprocess.TimeoutExpired:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return f"not done after {args.limit:g} s"
  except BaseException:
    os.killpg(process.pid, signal.SIGKILL)
    raise
  if process.returncode:
    last = (stderr.strip().splitlines() or ["no message"])[-1]
    return f"exit status {process.returncode}: {last}"
  return json.loads(stdout.splitlines()[-1])


def described(found: dict[str, object]) -> str:
  """Returns the cells of a row after its name."""
  operations = found["collectives"]
  kinds = sorted({o["kind"] for o in operations})
  count = ", ".join(f"{sum(o['kind'] == k for o in operations)} {k}" for k in kinds)
  seconds = f"{1e3 * found['seconds']:.1f}" if "seconds" in found else "-"
  cells = [
    found["devices"],
    found["batch"],
    seconds,
    count or "none",
    f"{found['reduced_bytes']:,}",
    f"{found['trained_bytes']:,}",
    f"{found['sent_bytes']:,.0f}",
    f"{found['memory']['total'] / 2**20:.1f}",
    f"{found['flops'] / 1e9:.4g}",
  ]
  return " | ".join(map(str, cells))


def parse() -> argparse.Namespace:
  """Returns the options."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  names = lambda text: text.split(",")
  counts = lambda text: [int(n) for n in text.split(",")]
  parser.add_argument("--steps", type=names, default=list(STEPS))
  parser.add_argument("--devices", type=counts, default=list(DEVICES))
  parser.add_argument("--dry", action="store_true", help="the networks of :scratch")
  parser.add_argument("--batch", type=int, help="images in the global batch")
  parser.add_argument("--precision", choices=("float32", "bfloat16"))
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--limit", type=float, help="seconds for each row")
  parser.add_argument("--topology", help="compile for TPUs, such as v5e:16x16")
  parser.add_argument("--model", type=int, default=1, help="devices that share kernels")
  parser.add_argument("--json", type=pathlib.Path, help="file for the results")
  parser.add_argument("--row", action="store_true", help=argparse.SUPPRESS)
  args = parser.parse_args()
  if unknown := sorted(set(args.steps) - set(STEPS)):
    parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(STEPS)}")
  args.batch = args.batch or (16 if args.dry else 256 if args.topology else 8)
  args.precision = args.precision or ("bfloat16" if args.topology else "float32")
  args.limit = args.limit or (120 if args.dry else 1800)
  if not args.topology:
    args.devices = [n for n in args.devices if n % args.model == 0]
    if bad := [n for n in args.devices if args.batch % (n // args.model)]:
      parser.error(f"--batch={args.batch} does not split over {bad[0]} devices")
  return args


def main() -> None:
  """Prints a table line per step and number of devices, and writes --json."""
  args = parse()
  if args.row:
    print(json.dumps(row(args)))
    return
  print(
    "| step | devices | batch | ms | operations | bytes reduced | float32 gradients "
    "| bytes sent | MiB per device | GFLOP |\n|" + "---|" * 10
  )
  results, failed = {**vars(args), "rows": {}}, False
  for name in args.steps:
    for devices in [1] if args.topology else args.devices:
      found = in_a_process(args, name, devices)
      results["rows"].setdefault(name, []).append(found)
      failed |= isinstance(found, str)
      cells = found if isinstance(found, str) else described(found)
      print(f"| {name} | {cells} |", flush=True)
      if args.json:
        args.json.write_text(json.dumps(results, indent=2, default=str) + "\n")
  sys.exit(failed)


if __name__ == "__main__":
  main()
