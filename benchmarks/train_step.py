"""One training step of the method against PyTorch, ResNet-50 at 224 pixels.

  python benchmarks/train_step.py [--modes=oracle,end_to_end] [--batch=4] [--json=FILE]

From a uint8 batch to updated parameters: flip, noise (sigma from the discrete mixture),
restore, fidelity map, confidence, steered backbone, channel modules, loss, backward,
SGD. The JAX side is the project's own task in its own jitted step; PyTorch's is the
method written plainly (tests/torch_method.py), frozen parts detached, as it comes
("eager") and with all from the batch to the loss, and back, through `torch.compile` at
its defaults ("compiled"; `--no_compiled` leaves it out). The sides take turns in one
process; medians are printed. First calls, in which JAX and `torch.compile` compile, are
told apart. float32 on a CPU; on a GPU bfloat16 against PyTorch's float32 (TF32
allowed).

Peak memory is that of a process of its own that runs the step twice: on a CPU its
largest resident size less its size before, on a GPU what its allocator counted. JAX
compiles in it; `torch.compile` finds what it compiled for the times, and calls the C++
compiler in other processes anyway. FLOPs are PyTorch's count of the step's
convolutions and matrix products; the rate is set against a measured matrix product.
"""

import argparse
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import side_by_side
import torch
import torch_method
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from torch_reference import torchvision

from fidelity_jax import (
  degradations,
  metrics,
  models,
  optimizer,
  platform,
  tasks,
  train,
)
from fidelity_jax.method import Method

MODES = ("oracle", "pretrained", "end_to_end")
CLASSES = 257
SIGMAS = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]


def make_batch(count: int, size: int) -> dict[str, np.ndarray]:
  """Returns a batch as the input pipeline hands it over."""
  rng = np.random.default_rng(0)
  index = np.arange(count, dtype=np.int32)
  return {
    "image": rng.integers(0, 256, (count, size, size, 3), np.uint8),
    "label": rng.integers(0, CLASSES, count).astype(np.int32),
    "index": index,
    "epoch": np.zeros_like(index),
  }


def jax_step(mode: str, batch: dict[str, np.ndarray], remat: bool):
  """Returns a function that runs one training step, on the project's own modules."""
  platform.set_up()
  size = batch["image"].shape[1]
  dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
  classifier = models.create({"name": "resnet50"}, CLASSES, dtype).folded()
  dncnn = models.DnCNN(dtype=dtype)
  images = jnp.zeros((1, size, size, 3))
  frozen = {
    "classifier": side_by_side.variables_of(classifier, images),
    "restorer": side_by_side.variables_of(dncnn, images),
  }
  estimator = side_by_side.variables_of(dncnn, images)
  if mode == "pretrained":
    frozen["estimator"] = estimator
  method = Method(
    classifier=classifier,
    restorer=dncnn,
    calibration=models.Calibration(
      classifier.feature_size, classifier.num_taps, dtype=dtype
    ),
    estimator=None if mode == "oracle" else dncnn,
    rematerialize=remat,
  )
  task = tasks.CalibrationTask(
    method=method,
    inputs=tasks.Inputs(
      degradations.from_config({"kind": "awgn", "level": SIGMAS}), 0, "benchmark"
    ),
    image_size=size,
    label_smoothing=0.1,
    frozen=jax.tree.map(lambda x: x.astype(dtype), frozen),
    initial={"estimator": estimator} if mode == "end_to_end" else {},
    trained_parents=("estimator",) if mode == "end_to_end" else (),
  )
  tx = optimizer.create("sgd", lambda step: 1e-3)
  params, model_state = jax.jit(task.init)(jax.random.key(0), task.initial)
  values = {name: jnp.zeros(len(batch["label"])) for name in ("loss", "accuracy")}
  ones = jnp.ones(len(batch["label"]))
  averages = metrics.zeros_like(metrics.averages(values, ones))
  state = [
    train.TrainState(
      step=jnp.int32(0),
      params=params,
      model_state=model_state,
      opt_state=tx.init(params),
      averages=averages,
      bad_step=jnp.int32(-1),
    )
  ]
  # All on a named device, as the step returns it, or the second call compiles anew.
  device = jax.devices()[0]
  state[0] = jax.device_put(state[0], device)
  step = jax.jit(
    train.make_train_step(task, tx, jax.random.key(0)),
    donate_argnums=0,
    compiler_options=platform.compiler_options(),
  )
  batch = jax.device_put(batch, device)
  frozen = jax.device_put(task.frozen, device)

  def run():
    state[0] = jax.block_until_ready(step(state[0], frozen, batch))

  return run


def torch_step(
  mode: str, batch: dict[str, np.ndarray], device: str, compiled: bool = False
):
  """Returns the same for plain PyTorch, eager or through `torch.compile`."""
  network = torchvision().models.resnet50(num_classes=CLASSES)
  backbone, head = torch_method.split(network)
  source = "oracle" if mode == "oracle" else "degraded"
  method = torch_method.Method(backbone, head, 2048, source=source).to(device).eval()
  frozen = [method.restoration, method.feature_extractor, method.classifier]
  if mode == "pretrained":
    frozen.append(method.fidelity)
  for module in frozen:
    module.requires_grad_(False)
  trained = [p for p in method.parameters() if p.requires_grad]
  sgd = torch.optim.SGD(trained, lr=1e-3, momentum=0.9, nesterov=True)
  images = torch.from_numpy(batch["image"]).to(device)
  labels = torch.from_numpy(batch["label"]).long().to(device)
  sigmas = torch.tensor(SIGMAS, device=device)

  def loss():
    clean = images.permute(0, 3, 1, 2).float() / 255
    flip = torch.rand(len(clean), device=device) < 0.5
    clean = torch.where(flip[:, None, None, None], clean.flip(3), clean)
    sigma = sigmas[torch.randint(len(sigmas), (len(clean), 1, 1, 1), device=device)]
    degraded = (clean + sigma * torch.randn_like(clean)).clamp(0, 1)
    logits = method(degraded, clean)
    wrong = 0.1 / (CLASSES - 1)
    target = torch.full_like(logits, wrong)
    target[torch.arange(len(labels)), labels] = 0.9
    return functional.cross_entropy(logits, target)

  if compiled:
    loss = side_by_side.compiled(loss)

  def run():
    value = loss()
    sgd.zero_grad()
    value.backward()
    sgd.step()
    if device == "cuda":
      torch.cuda.synchronize()

  return run


def resident() -> int:
  """Returns the largest resident size of this process so far, in bytes (Linux)."""
  # Not getrusage's figure, which starts at the parent process's.
  lines = pathlib.Path("/proc/self/status").read_text().splitlines()
  return 1024 * next(int(line.split()[1]) for line in lines if "VmHWM" in line)


def peak_bytes(side: str, make) -> int:
  """Returns the peak memory in bytes of making and running two steps, in this process.

  Args:
    side: one of `side_by_side.SIDES`.
    make: returns that side's step.
  """
  before = resident()
  step = make()
  step()
  step()
  if not side_by_side.has_gpu():
    return resident() - before
  if side == "jax":
    return jax.devices()[0].memory_stats()["peak_bytes_in_use"]
  return torch.cuda.max_memory_allocated()


def measure_memory(side: str, mode: str, args: argparse.Namespace) -> int:
  """Returns a side's peak memory in bytes, from a process of its own."""
  command = [sys.executable, __file__, f"--memory_of={side}", f"--modes={mode}"]
  command += [f"--batch={args.batch}", f"--size={args.size}"]
  if args.remat:
    command.append("--remat")
  # The timing process holds memory of the same GPU.
  environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
  result = subprocess.run(command, check=True, capture_output=True, env=environment)
  return int(result.stdout)


def main() -> None:
  """Prints a paragraph per mode, and writes --json."""
  parser = side_by_side.parser(__doc__, "modes", MODES)
  parser.add_argument(
    "--remat", action="store_true", help="rematerialize the estimator (end_to_end)"
  )
  parser.add_argument("--no_memory", action="store_true", help="skip peak memory")
  parser.add_argument(
    "--memory_of", choices=side_by_side.SIDES, help="only print a side's memory"
  )
  side_by_side.add_no_compiled(parser)
  args = parser.parse_args()
  gpu = side_by_side.has_gpu()
  torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
  batch = make_batch(args.batch, args.size)

  def make(side: str, mode: str):
    if side == "jax":
      return jax_step(mode, batch, args.remat)
    compiled = side == side_by_side.COMPILED
    return torch_step(mode, batch, "cuda" if gpu else "cpu", compiled)

  if args.memory_of:
    print(peak_bytes(args.memory_of, lambda: make(args.memory_of, args.modes[0])))
    return

  peak = side_by_side.matmul_rate(jnp.bfloat16 if gpu else jnp.float32)
  results = {"device": side_by_side.device_name(), **vars(args), "steps": {}}
  results["matmul_flops"] = peak
  print(
    f"{results['device']}; matrix product {peak / 1e9:.0f} GFLOP/s; batch "
    f"{args.batch}, {args.size} px"
  )
  for mode in args.modes:
    sides = {side: make(side, mode) for side in side_by_side.chosen(args)}
    times = side_by_side.interleave(sides, args.repeats)
    row = results["steps"][mode] = side_by_side.with_ratios(times)
    with FlopCounterMode(display=False) as counter:
      sides["eager"]()
    row["flops"] = counter.get_total_flops()
    for name in times:
      rate = row["flops"] / row[name]["seconds"]
      line = f"{mode:11} {name:9} {row[name]['seconds']:7.2f} s {rate / 1e9:7.0f}"
      line += f" GFLOP/s ({rate / peak:4.0%} of matrix product)"
      if not args.no_memory:
        row[name]["peak_bytes"] = measure_memory(name, mode, args)
        line += f" {row[name]['peak_bytes'] / 2**30:5.2f} GiB"
      print(line, flush=True)
    print(f"{mode:11} {side_by_side.ratios(row)}")
    print(f"{mode:11} {side_by_side.firsts(row)}", flush=True)
    side_by_side.save(results, args.json)


if __name__ == "__main__":
  with side_by_side.nothing_compiled():
    main()
