"""Input pipeline: images per second against torchvision in a PyTorch DataLoader.

  python benchmarks/input_pipeline.py [--folder=../shared/caltech101] [--workers=2]

Both sides read the same JPEGs, draw random-resized crops of the same distribution and
make batches of 64, with the same number of worker processes. The other side is
torchvision's transforms on PIL images: once the usual recipe (crop, flip, ToTensor,
Normalize: float32 out), once the crop alone (uint8 out). This side is decode, crop and
resize, uint8 out; flip and normalization are the device's. All loaders stay open and
take turns within every repetition, each after its full buffers were drained; medians
are printed, per second and per second of one core (all processes counted: this one
hardly depends on what else the machine does). The last part lets a consumer that takes
a given time per step count how long it waits for its batches.
"""

import argparse
import itertools
import json
import os
import pathlib
import statistics
import tempfile
import time

import torch

for _name in ("nms", "qnms"):
  # torchvision's wheels mention two operators at import that a CPU-only torch lacks.
  if not hasattr(torch.ops.torchvision, _name):
    torch.library.define(
      f"torchvision::{_name}",
      "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    )

import numpy as np  # noqa: E402
import psutil  # noqa: E402
from PIL import Image  # noqa: E402
from torchvision import transforms  # noqa: E402

from fidelity_jax import data  # noqa: E402
from fidelity_jax.data import images  # noqa: E402

BATCH = 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class TorchImages(torch.utils.data.Dataset):
  """The same files through torchvision's transforms on PIL images."""

  def __init__(self, dataset: data.Dataset, size: int, recipe: bool):
    root = pathlib.Path(dataset.records.root)
    self.paths = [str(root / path) for path in dataset.records.paths]
    self.labels = dataset.labels.tolist()
    crop = [transforms.RandomResizedCrop(size)]
    rest = [transforms.PILToTensor()]
    if recipe:
      rest = [
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
      ]
    self.transform = transforms.Compose(crop + rest)

  def __len__(self) -> int:
    return len(self.paths)

  def __getitem__(self, index: int):
    with open(self.paths[index], "rb") as file:
      image = Image.open(file).convert("RGB")
    return self.transform(image), self.labels[index]


def torch_batches(dataset: data.Dataset, size: int, workers: int, recipe: bool):
  """Yields torchvision's batches without end."""
  source = TorchImages(dataset, size, recipe)
  sampler = torch.utils.data.RandomSampler(source, True, num_samples=10**7)
  loader = torch.utils.data.DataLoader(
    source,
    batch_size=BATCH,
    sampler=sampler,
    num_workers=workers,
    multiprocessing_context="spawn" if workers else None,
  )
  return iter(loader)


def our_batches(dataset: data.Dataset, size: int, workers: int, **options):
  """Yields this project's batches without end."""
  return data.train_iterator(
    dataset,
    image_size=size,
    batch_size=BATCH,
    seed=0,
    epochs=10**6,
    num_workers=workers,
    **options,
  )


class Loader:
  """An iterator of batches and the worker processes that it started."""

  def __init__(self, batches):
    before = set(psutil.Process().children())
    self.batches = batches
    next(batches)
    self.processes = [*(set(psutil.Process().children()) - before), psutil.Process()]

  def _cpu_seconds(self) -> float:
    times = [process.cpu_times() for process in self.processes]
    return sum(each.user + each.system for each in times)

  def measure(self, skip: int, count: int) -> tuple[float, float]:
    """Returns images per second, and per second of one core, of `count` batches."""
    for _ in itertools.islice(self.batches, skip):
      pass
    begin, begin_cpu = time.perf_counter(), self._cpu_seconds()
    for _ in itertools.islice(self.batches, count):
      pass
    made = BATCH * count
    return (
      made / (time.perf_counter() - begin),
      made / max(self._cpu_seconds() - begin_cpu, 1e-9),
    )


def decode_times(dataset: data.Dataset, cached: data.Dataset) -> dict[str, float]:
  """Returns milliseconds per image to decode, and to read from the cache."""
  chosen = range(0, len(dataset), max(len(dataset) // 400, 1))
  times = {"decode": [], "Pillow decode": [], "cached": []}
  for i in chosen:
    encoded = dataset.records[i]
    begin = time.perf_counter()
    images.decode(encoded)
    middle = time.perf_counter()
    with open(os.path.join(dataset.records.root, dataset.records.paths[i]), "rb") as f:
      np.asarray(Image.open(f).convert("RGB"))
    late = time.perf_counter()
    cached.records[i].sum()
    times["decode"].append(middle - begin)
    times["Pillow decode"].append(late - middle)
    times["cached"].append(time.perf_counter() - late)
  return {name: 1e3 * statistics.median(each) for name, each in times.items()}


def waits(batches, step_ms: float, steps: int) -> float:
  """Returns the share of a consumer's time that it waits for batches."""
  next(batches)
  waited = 0.0
  begin = time.perf_counter()
  for _ in range(steps):
    time.sleep(step_ms / 1e3)
    asked = time.perf_counter()
    next(batches)
    waited += time.perf_counter() - asked
  return waited / (time.perf_counter() - begin)


def main():
  """Prints one line per loader, then the waiting times."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  default = pathlib.Path(__file__).parents[2] / "shared" / "caltech101"
  parser.add_argument("--folder", default=str(default))
  parser.add_argument("--workers", type=int, default=os.cpu_count())
  parser.add_argument("--size", type=int, default=224)
  parser.add_argument("--repetitions", type=int, default=5)
  parser.add_argument("--batches", type=int, default=24)
  parser.add_argument("--step_ms", default="20,50,100,200")
  parser.add_argument("--out")
  options = parser.parse_args()

  config = data.default_config("folder")
  config.path = options.folder
  with tempfile.TemporaryDirectory() as folder:
    dataset = data.load(config, "train", workdir_cache=folder)
    config.cache = "disk"
    begin = time.perf_counter()
    cached = data.load(config, "train", workdir_cache=folder)
    built = time.perf_counter() - begin
    results = compare(options, dataset, cached)
    results["seconds to build the cache"] = built
    print(f"cache of {len(dataset)} images built in {built:.1f} s")
    results["milliseconds per image"] = times = decode_times(dataset, cached)
    print("median ms per image:", {k: round(v, 3) for k, v in times.items()})
    results["share of time waiting"] = {}
    for step_ms in map(float, options.step_ms.split(",")):
      for name, source in (("decoding", dataset), ("cached", cached)):
        with our_batches(source, options.size, 0) as batches:
          share = waits(batches, step_ms, 40)
        results["share of time waiting"][f"{name}, {step_ms:g} ms"] = share
        print(f"steps of {step_ms:g} ms, {name}: waits {100 * share:.1f} % of the time")
  if options.out:
    pathlib.Path(options.out).write_text(json.dumps(results, indent=2) + "\n")


def compare(options, dataset: data.Dataset, cached: data.Dataset) -> dict:
  """Returns and prints images per second of every loader."""
  size, workers = options.size, options.workers
  loaders = {
    "torchvision, float32": torch_batches(dataset, size, workers, True),
    "torchvision, uint8": torch_batches(dataset, size, workers, False),
    "processes": our_batches(dataset, size, workers),
    "threads": our_batches(dataset, size, 0),
    "threads, reduced decode": our_batches(dataset, size, 0, reduced_decode=True),
    "processes, cached": our_batches(cached, size, workers),
    "threads, cached": our_batches(cached, size, 0),
  }
  started = {name: Loader(batches) for name, batches in loaders.items()}
  measured = {name: [] for name in loaders}
  skip = 12 * max(workers, 1)
  for _ in range(options.repetitions):
    for name, loader in started.items():
      measured[name].append(loader.measure(skip, options.batches))
  for batches in loaders.values():
    if isinstance(batches, data.BatchIterator):
      batches.close()
  print(f"{len(dataset)} images, {size} px, {workers} workers; images per second:")
  results = {}
  for kind, title in enumerate(("of time", "of one core's time")):
    medians = {
      name: statistics.median(each[kind] for each in pairs)
      for name, pairs in measured.items()
    }
    results[f"images per second {title}"] = medians
    for name, value in medians.items():
      against = ", ".join(
        f"{value / medians[other]:.2f}x {other}" for other in list(loaders)[:2]
      )
      print(f"{title:18s} {name:24s} {value:7.0f}   {against}")
  return results


if __name__ == "__main__":
  main()
