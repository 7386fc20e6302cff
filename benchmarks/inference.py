"""The whole method as it is deployed, against PyTorch: images per second.

  python benchmarks/inference.py [--batches=1,8,32] [--repeats=5] [--json=FILE]

From a degraded image to logits and the fidelity map: restore, estimate the map, steer
the backbone by it, blend with the plain feature, classify. ResNet-50, DnCNN-20, 224
pixels, ensemble, float32. Six sides with the same weights: the package's own function
under `jax.jit`; the .jax file that `fidelity_jax export` writes; the .onnx file in
onnxruntime; eager PyTorch in inference mode (tests/torch_method.py), with its usual
memory format and with channels last; the former through `torch.compile` at its defaults
(`--no_compiled` leaves it out). What all say of the same images is compared before
anything is timed; they take turns in one process, and medians are printed, in brackets
the ratios to the faster eager side of PyTorch and to the compiled one. First calls, in
which some compile, are told apart. Without jax2onnx and onnxruntime the .onnx file is
left out.
"""

import argparse
import copy
import functools
import importlib.util
import pathlib
from collections.abc import Callable

import jax
import jax.export
import numpy as np
import side_by_side
import torch
import torch_method
from torch_reference import torchvision

from fidelity_jax import export, models, platform, runs
from fidelity_jax.method import Method
from fidelity_jax.port import recognizing

CLASSES = 257
# Largest difference from PyTorch, relative to the largest value.
_TOLERANCE = 1e-3

Side = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


class Deployed(torch_method.Method):
  """The method, which keeps the map that it classified by."""

  def fidelity_map(self, *images):
    self.seen = super().fidelity_map(*images)
    return self.seen


def reference(args) -> Deployed:
  """Returns the method in PyTorch, with weights whose activations keep their size."""
  torch.manual_seed(0)
  network = getattr(torchvision().models, args.backbone)(num_classes=CLASSES)
  features = network.fc.in_features
  backbone, head = torch_method.split(network)
  dncnn = {"depth": args.depth}
  method = Deployed(
    backbone, head, features, source="degraded", ensemble=True, dncnn=dncnn
  )
  with torch.no_grad():
    # Near what training gives: a small residual, and a map of a restored image's size.
    method.restoration.model[-1].weight.mul_(0.1)
    method.fidelity.model[-1].bias.fill_(0.06)
  return method.eval()


def package_run(method: Deployed, args) -> runs.Run:
  """Returns the same networks as a run, as `runs.find` would return them."""
  state = {k: v.detach().numpy() for k, v in method.state_dict().items()}
  parts = recognizing.recognize(state, "the reference")
  classifier = models.create(parts["classifier"].config["model"], CLASSES)
  folded, variables = models.fold(classifier, parts["classifier"].variables)
  dncnn = lambda role: models.DnCNN(**parts[role].config)
  known = {"feature_size": folded.feature_size}
  steering = parts["calibration"].config | {"num_taps": folded.num_taps}
  ours = Method(
    folded,
    dncnn("restorer"),
    models.Calibration(**known | steering),
    models.Ensemble(**known | parts["ensemble"].config),
    dncnn("estimator"),
  )
  loaded = {role: part.variables for role, part in parts.items()}
  loaded["classifier"] = variables
  names = tuple(map(str, range(CLASSES)))
  return runs.Run("benchmark", ours, jax.device_put(loaded), args.size, names, "")


def make_sides(args) -> dict[str, Side]:
  """Returns functions from degraded images to logits and fidelity map, by name."""
  theirs = reference(args)
  run = package_run(theirs, args)
  program = export.Program(run)

  def of_jax(function) -> Side:
    def call(images):
      found = jax.block_until_ready(function(images))
      return found["logits"], found["fidelity_map"]

    return call

  options = platform.compiler_options()
  network = jax.export.deserialize(bytearray(export.to_jax(program)))
  sides = {
    "jit": of_jax(jax.jit(program, compiler_options=options)),
    "jax_file": of_jax(jax.jit(network.call, compiler_options=options)),
  }
  if all(map(importlib.util.find_spec, ("jax2onnx", "onnxruntime"))):
    import onnxruntime

    session = onnxruntime.InferenceSession(export.to_onnx(program))
    names = [output.name for output in session.get_outputs()]

    def of_onnx(images):
      # All that it has, as the others compute it.
      found = dict(zip(names, session.run(names, {"degraded": images}), strict=True))
      return found["logits"], found["fidelity_map"]

    sides["onnx_file"] = of_onnx
  sides["torch"] = of_torch(theirs, torch.contiguous_format)
  sides["torch_nhwc"] = of_torch(copy.deepcopy(theirs), torch.channels_last)
  if not args.no_compiled:
    network = side_by_side.compiled(copy.deepcopy(theirs))
    sides[side_by_side.COMPILED] = of_torch(network, torch.contiguous_format)
  return sides


def of_torch(method: torch.nn.Module, layout: torch.memory_format) -> Side:
  """Returns a side of PyTorch, a `Deployed`, its tensors in one memory format."""
  method.to(memory_format=layout)

  def call(images):
    with torch.inference_mode():
      degraded = torch.from_numpy(images).permute(0, 3, 1, 2)
      logits = method(degraded.contiguous(memory_format=layout))
    return logits.numpy(), method.seen.permute(0, 2, 3, 1).numpy()

  return call


def check_agreement(sides: dict[str, Side], images: np.ndarray) -> dict[str, float]:
  """Returns how far each side is from PyTorch, relative to its largest value.

  Raises:
    SystemExit: they compute different things.
  """
  wanted, found = sides["torch"](images), {}
  for name, side in sides.items():
    pairs = zip(side(images), wanted, strict=True)
    far = [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs]
    # Python's own `max` may pass over NaN, which is not less, either.
    found[name] = float(np.max(far))
    if not found[name] < _TOLERANCE:
      raise SystemExit(f"{name} and torch compute different things: {found[name]}")
  return found


def main() -> None:
  """Prints a table line per batch size, and writes --json."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  sizes = lambda text: [int(size) for size in text.split(",")]
  parser.add_argument("--batches", type=sizes, default=[1, 8, 32])
  parser.add_argument("--size", type=int, default=224, help="side of the images")
  parser.add_argument("--backbone", default="resnet50", help="a ResNet")
  parser.add_argument("--depth", type=int, default=20, help="of both DnCNNs")
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--json", type=pathlib.Path, help="file for the results")
  side_by_side.add_no_compiled(parser)
  args = parser.parse_args()
  results = {"device": side_by_side.device_name(), **vars(args), "batches": {}}
  sides = make_sides(args)
  print(f"{results['device']}; {args.backbone}, DnCNN-{args.depth}, {args.size} px")
  names = list(sides)
  print(f"| images a second, batch | {' | '.join(names)} |")
  print(f"|---|{'---|' * len(names)}")
  rng = np.random.default_rng(0)
  for batch in args.batches:
    images = rng.random((batch, args.size, args.size, 3), np.float32)
    runs_of = {k: functools.partial(side, images) for k, side in sides.items()}
    first = side_by_side.first_calls(runs_of)
    # A side that fails does so for good.
    sides = {name: sides[name] for name in first}
    far = check_agreement(sides, images)
    runs_of = {name: runs_of[name] for name in sides}
    row = side_by_side.interleave(runs_of, args.repeats)
    for name, times in row.items():
      times["images_per_second"] = batch / times["seconds"]
      times["difference"] = far[name]
      times["first_seconds"] = first[name]
    eager = max(row[name]["images_per_second"] for name in row if "torch" in name)
    compiled = row.get(side_by_side.COMPILED, {}).get("images_per_second")
    for times in row.values():
      times["ratio"] = times["images_per_second"] / eager
      if compiled:
        times["compiled_ratio"] = times["images_per_second"] / compiled
    results["batches"][str(batch)] = row
    cells = [_cell(row[name]) if name in row else "" for name in names]
    print(f"| {batch} | {' | '.join(cells)} |", flush=True)
  for batch, row in results["batches"].items():
    taken = [f"{name} {times['first_seconds']:.1f} s" for name, times in row.items()]
    print(f"batch {batch}, first call: {', '.join(taken)}")
  side_by_side.save(results, args.json)


def _cell(times: dict[str, float]) -> str:
  ratios = [times[k] for k in ("ratio", "compiled_ratio") if k in times]
  listed = ", ".join(f"{ratio:.2f}" for ratio in ratios)
  return f"{times['images_per_second']:.2f} ({listed})"


if __name__ == "__main__":
  with side_by_side.nothing_compiled():
    main()
