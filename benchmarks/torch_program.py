"""The method as a plain PyTorch program: an epoch on the oracle map, and an evaluation.

  python benchmarks/torch_program.py PHOTOS --weights=method.pth --out=DIR

It is what benchmarks/end_to_end.py sets this package's commands against, and knows
nothing of them. PHOTOS has folders train, val and test of class folders. Two workers
decode and degrade image by image; the calibration modules are trained for an epoch,
then validated and saved; then four rows are evaluated under eight conditions, row by
row and condition by condition, everything anew for each. The method is that of
tests/torch_method.py. DIR gets the trained weights, the logits of clean images, and
results.json, which says where the time went.
"""

import argparse
import itertools
import json
import pathlib
import statistics
import time
from typing import NamedTuple

import numpy as np
import plain
import torch
import torch_method
import torch_reference
from torch import nn
from torch.nn import functional

datasets = torch_reference.torchvision().datasets
transforms = torch_reference.torchvision().transforms

WORKERS = 2
LEVELS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
ROWS = (
  "classifier",
  "classifier-restored",
  "oracle-restored",
  "oracle-restored-ensemble",
)
TRAINED = ("cnn_layers_weight", "cnn_layers_bias", "mul_fc", "cat_fc")


class Condition(NamedTuple):
  """What is done to images; see `plain.degrade`."""

  name: str
  kind: str
  level: float | tuple[float, ...]
  vary: str | None = None

  def rounds_needed(self, rounds: int) -> int:
    """Returns how many of some draws differ."""
    return 1 if self.kind == "clean" else rounds


MIXTURE = Condition("mixture", "awgn", LEVELS, "mixture")
CONDITIONS = (
  Condition("clean", "clean", 0.0),
  *(Condition(f"awgn-{level}", "awgn", level) for level in LEVELS[1:]),
  *(Condition(f"awgn-{vary}", "awgn", (0.5, 0.0), vary) for vary in ("1d", "2d")),
)


class Photos(torch.utils.data.Dataset):
  """(condition, index) -> (degraded, clean, label); images [3, S, S] in [0, 1]."""

  def __init__(self, folder: pathlib.Path, size: int, train: bool):
    steps = [transforms.Resize(size), transforms.CenterCrop(size)]
    if train:
      steps = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    transform = transforms.Compose([*steps, transforms.ToTensor()])
    self._photos = datasets.ImageFolder(folder, transform, allow_empty=True)
    self.labels = np.array(self._photos.targets)

  def __len__(self) -> int:
    return len(self._photos)

  def __getitem__(self, place: tuple[Condition, int]):
    condition, index = place
    clean, label = self._photos[index]
    return plain.degrade(condition, clean), clean, label


class Loader:
  """The batches of a folder of photographs."""

  def __init__(self, folder: pathlib.Path, args, train: bool = False):
    self.photos = Photos(folder, args.size, train)
    self._places = plain.Places(len(self.photos), args.batch, shuffle=train)
    self._loader = torch.utils.data.DataLoader(
      self.photos,
      batch_sampler=self._places,
      num_workers=WORKERS,
      persistent_workers=True,
    )

  def batches(self, condition: Condition):
    """Returns an iterator over batches of (degraded, clean, label)."""
    self._places.condition = condition
    return iter(self._loader)


def make_method(args) -> torch_method.Method:
  """Returns the networks, of which only the calibration modules train."""
  network = torch_reference.make(args.backbone, args.classes)
  features, head = torch_method.split(network)
  method = torch_method.Method(
    features, head, head.in_features, ensemble=True, dncnn={"depth": args.depth}
  )
  method.load_state_dict(torch.load(args.weights))
  method.eval().requires_grad_(False)
  for name in TRAINED:
    getattr(method, name).requires_grad_(True)
  if args.compiled:
    stages = [getattr(features, f"layer{i}") for i in range(1, 5)]
    # They take nearly all of the time, and each is compiled once.
    for module in (method.restoration, *stages):
      module.compile()
  return method


def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
  """Returns the cross-entropy with smoothed labels; wrong classes share a tenth."""
  target = torch.full_like(logits, 0.1 / (logits.shape[1] - 1))
  target[torch.arange(len(labels)), labels] = 0.9
  return functional.cross_entropy(logits, target)


def train(method: nn.Module, loader: Loader, rate: float) -> tuple[list[float], float]:
  """Trains for an epoch; returns the seconds of each step, and the mean loss."""
  parameters = [p for p in method.parameters() if p.requires_grad]
  sgd = torch.optim.SGD(parameters, lr=rate, momentum=0.9, nesterov=True)
  calls, losses = [], []
  for degraded, clean, labels in loader.batches(MIXTURE):
    before = time.perf_counter()
    loss = loss_of(plain.steered(method, degraded, clean, False), labels)
    sgd.zero_grad()
    loss.backward()
    sgd.step()
    losses.append(loss.item())
    calls.append(time.perf_counter() - before)
  return calls, statistics.fmean(losses)


@torch.inference_mode()
def validate(method: nn.Module, loader: Loader) -> list[float]:
  """Validates; returns the seconds that the networks took of each batch."""
  calls, losses = [], []
  for degraded, clean, labels in loader.batches(MIXTURE):
    before = time.perf_counter()
    logits = plain.steered(method, degraded, clean, False)
    losses.append(loss_of(logits, labels).item())
    calls.append(time.perf_counter() - before)
  return calls


def logits_of(
  method: torch_method.Method, row: str, degraded: torch.Tensor, clean: torch.Tensor
) -> torch.Tensor:
  """Returns the logits [N, K] of a row."""
  if row.startswith("oracle"):
    return plain.steered(method, degraded, clean, row.endswith("ensemble"))
  images = method.restore(degraded) if row.endswith("restored") else degraded
  return method.classifier(method.plain_features(plain.normalized(images)))


def run(args: argparse.Namespace) -> dict[str, object]:
  """Runs the program; returns where the time went, and what was found."""
  seconds: dict[str, float] = {}
  since = time.perf_counter()

  def charge(name: str, calls: list[float] | None = None) -> None:
    """Charges the time since the last charge to a name.

    Args:
      name: of what was done.
      calls: seconds of the networks' calls in it. By how much the first took longer
        than the others is charged apart: memory is new, or something is compiled.
    """
    nonlocal since
    now = time.perf_counter()
    apart = plain.late(calls) if calls else 0.0
    seconds["first calls"] = seconds.get("first calls", 0.0) + apart
    seconds[name] = seconds.get(name, 0.0) + now - since - apart
    since = now

  method = make_method(args)
  charge("networks")
  calls, loss = train(method, Loader(args.photos / "train", args, True), args.rate)
  trained = len(calls) * args.batch
  charge("training", calls)
  calls = validate(method, Loader(args.photos / "val", args))
  charge("validation", calls)
  torch.save(method.state_dict(), args.out / "trained.pth")
  charge("checkpoints")
  test = Loader(args.photos / "test", args)
  logits, waited, accuracy = {}, 0.0, {}
  for row in ROWS:
    passes = plain.by_row(
      [row],
      CONDITIONS,
      args.rounds,
      test.batches,
      lambda *of: logits_of(method, *of),
    )
    charge("evaluation", [call for done in passes for call in done.calls])
    logits[row] = passes[0].logits
    waited += sum(done.seconds - sum(done.calls) for done in passes)
    accuracy[row] = {
      done.condition.name: float(np.mean(done.logits.argmax(-1) == test.photos.labels))
      for done in passes
    }
  few = itertools.islice(test.batches(CONDITIONS[0]), 2)
  clean = torch.cat([clean for _, clean, _ in few])
  np.savez(args.out / "logits.npz", labels=test.photos.labels, clean=clean, **logits)
  charge("other")
  return {
    "seconds": seconds,
    "waited": waited,
    "trained": trained,
    "loss": loss,
    "tested": len(test.photos.labels),
    "accuracy": accuracy,
  }


def main() -> None:
  """Runs the program and writes its results."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("photos", type=pathlib.Path, metavar="PHOTOS")
  parser.add_argument("--weights", required=True, help="of all networks, a state dict")
  parser.add_argument("--out", type=pathlib.Path, required=True)
  parser.add_argument("--classes", type=int, required=True)
  parser.add_argument("--backbone", default="resnet50", help="a ResNet of torchvision")
  parser.add_argument("--depth", type=int, default=20, help="of DnCNN")
  parser.add_argument("--size", type=int, default=224, help="side of the images")
  parser.add_argument("--batch", type=int, default=4)
  parser.add_argument("--rounds", type=int, default=1, help="draws of noise")
  parser.add_argument("--rate", type=float, default=1e-3, help="of learning")
  parser.add_argument("--compiled", action="store_true", help="with torch.compile")
  args = parser.parse_args()
  results = run(args)
  text = json.dumps(results, indent=2) + "\n"
  (args.out / "results.json").write_text(text)


if __name__ == "__main__":
  main()
