"""Backbones: frozen inference and a training step against PyTorch.

  python benchmarks/backbones.py [--nets=resnet50,vgg16] [--batch=4] [--json=out.json]

PyTorch's side is torchvision, and efficientnet_lite_pytorch for EfficientNet-Lite0, as
it comes ("eager") and through `torch.compile` at its defaults ("compiled": the network,
not loss and optimizer; `--no_compiled` leaves it out). Same batch, same machine, one
run; the sides take turns and medians are printed. First calls, in which JAX and
`torch.compile` compile, are told apart.
"forward" is inference of the frozen network, batch norm folded on the JAX side, as the
frozen stages run it. "train" is forward, backward and an SGD step in training mode,
dropout and auxiliary heads included. float32 on a CPU; on a GPU bfloat16 against
PyTorch's float32 (TF32 allowed). A ratio below 1 means that JAX is faster.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import side_by_side
import torch
import torch_reference
from torch.nn import functional

from fidelity_jax import models, platform

NETS = ("alexnet", "vgg16", "googlenet", "resnet18", "resnet50", "efficientnet_lite0")
CLASSES = 257
# Weight of an auxiliary head's loss.
AUXILIARY = 0.3


def jax_sides(name: str, images: np.ndarray, labels: np.ndarray, dtype: jnp.dtype):
  """Returns {"forward", "train"}: functions that run one on this batch."""
  module = models.create({"name": name}, CLASSES, dtype)
  variables = side_by_side.variables_of(module, images)
  folded, frozen = models.fold(module, variables)
  frozen = jax.tree.map(lambda x: x.astype(dtype), frozen)
  tx = optax.sgd(1e-3, momentum=0.9, nesterov=True)
  images, labels = jnp.asarray(images), jnp.asarray(labels)
  entropy = optax.softmax_cross_entropy_with_integer_labels

  def train_step(state, images, labels):
    params, stats, opt_state = state

    def loss(params):
      (logits, aux), updates = module.apply(
        {"params": params, "batch_stats": stats},
        images,
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": jax.random.key(1)},
      )
      total = entropy(logits, labels) + sum(AUXILIARY * entropy(a, labels) for a in aux)
      return total.mean(), updates.get("batch_stats", {})

    grads, stats = jax.grad(loss, has_aux=True)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), stats, opt_state

  params = variables["params"]
  state = [(params, variables.get("batch_stats", {}), tx.init(params))]
  options = platform.compiler_options()
  forward = lambda variables, x: folded.apply(variables, x)[0]
  predict = jax.jit(forward, compiler_options=options)
  step = jax.jit(train_step, donate_argnums=0, compiler_options=options)

  def train():
    state[0] = jax.block_until_ready(step(state[0], images, labels))

  return {
    "forward": lambda: jax.block_until_ready(predict(frozen, images)),
    "train": train,
  }


def torch_sides(
  name: str, images: np.ndarray, labels: np.ndarray, device: str, compiled: bool
):
  """Returns the same two functions for its publisher's network."""
  options = {"init_weights": True} if name == "googlenet" else {}
  network = torch_reference.make(name, CLASSES, **options).to(device)
  images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device)
  labels = torch.from_numpy(labels).long().to(device)
  optimizer = torch.optim.SGD(
    network.parameters(), lr=1e-3, momentum=0.9, nesterov=True
  )
  if compiled:
    network = side_by_side.compiled(network)

  def done():
    if device == "cuda":
      torch.cuda.synchronize()

  def forward():
    network.eval()
    with torch.no_grad():
      network(images)
    done()

  def train():
    network.train()
    optimizer.zero_grad()
    output = network(images)
    if isinstance(output, torch.Tensor):
      loss = functional.cross_entropy(output, labels)
    else:
      losses = [functional.cross_entropy(logits, labels) for logits in output]
      loss = losses[0] + AUXILIARY * sum(losses[1:])
    loss.backward()
    optimizer.step()
    done()

  return {"forward": forward, "train": train}


def main() -> None:
  """Prints two lines per network and measurement, and writes --json."""
  parser = side_by_side.parser(__doc__, "nets", NETS)
  side_by_side.add_no_compiled(parser)
  args = parser.parse_args()
  gpu = side_by_side.has_gpu()
  device, dtype = ("cuda", jnp.bfloat16) if gpu else ("cpu", jnp.float32)
  torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
  rng = np.random.default_rng(0)
  images = rng.standard_normal((args.batch, args.size, args.size, 3), np.float32)
  labels = rng.integers(0, CLASSES, args.batch).astype(np.int32)
  results = {"device": side_by_side.device_name(), **vars(args), "times": {}}
  print(f"{results['device']}; batch {args.batch}, {args.size} px; seconds")
  for name in args.nets:
    of_side = {"jax": jax_sides(name, images, labels, dtype)}
    for side in side_by_side.chosen(args)[1:]:
      compiled = side == side_by_side.COMPILED
      of_side[side] = torch_sides(name, images, labels, device, compiled)
    results["times"][name] = {}
    for what in of_side["jax"]:
      sides = {side: functions[what] for side, functions in of_side.items()}
      times = side_by_side.interleave(sides, args.repeats)
      row = results["times"][name][what] = side_by_side.with_ratios(times)
      seconds = " ".join(f"{side} {t['seconds']:7.3f}" for side, t in times.items())
      print(f"{name:18} {what:8} {seconds} {side_by_side.ratios(row)}")
      print(f"{name:18} {what:8} {side_by_side.firsts(row)}", flush=True)
    side_by_side.save(results, args.json)


if __name__ == "__main__":
  with side_by_side.nothing_compiled():
    main()
