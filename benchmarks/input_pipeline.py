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
import io
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

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import psutil  # noqa: E402
import simplejpeg  # noqa: E402
from PIL import Image  # noqa: E402
from torchvision import transforms  # noqa: E402

from fidelity_jax import data  # noqa: E402
from fidelity_jax.data import crops, images, pipeline  # noqa: E402

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

  def __init__(self, make):
    before = set(psutil.Process().children())
    self.batches = make()
    next(self.batches)
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


def parts(dataset: data.Dataset, cached: data.Dataset, size: int) -> dict[str, float]:
  """Returns the milliseconds of one core that each way to do a part takes per image."""
  out = np.empty((size, size, 3), np.uint8)
  chosen = range(0, len(dataset), max(len(dataset) // 300, 1))
  encoded = [dataset.records[i] for i in chosen]
  pictures = [images.decode(record) for record in encoded]
  boxes = [
    crops.random_box(*picture.shape[:2], pipeline.generator(0, 2, 0, i))
    for i, picture in enumerate(pictures)
  ]
  cuts = [
    picture[top:bottom, left:right]
    for picture, (left, top, right, bottom) in zip(pictures, boxes, strict=True)
  ]
  enlarged = [cut for cut in cuts if max(cut.shape[:2]) <= size]
  print(f"{len(enlarged) / len(cuts):.0%} of the crops are enlarged, the rest shrunk")
  pillow = lambda cut: np.asarray(
    Image.fromarray(cut).resize((size, size), Image.Resampling.BILINEAR)
  )
  ways = {
    "decode: Pillow": (
      lambda record: np.asarray(Image.open(io.BytesIO(record)).convert("RGB")),
      encoded,
    ),
    "decode: OpenCV": (
      lambda record: cv2.imdecode(np.frombuffer(record, np.uint8), cv2.IMREAD_COLOR),
      encoded,
    ),
    "decode: simplejpeg": (simplejpeg.decode_jpeg, encoded),
    "decode: this pipeline": (images.decode, encoded),
    "decode: cached": (lambda i: cached.records[i].max(), list(chosen)),
    "enlarge: Pillow": (pillow, enlarged),
    "enlarge: OpenCV": (lambda cut: crops._resize(cut, out), enlarged),
    "resize: Pillow": (pillow, cuts),
    "resize: this pipeline": (lambda cut: crops._resize(cut, out), cuts),
  }
  best = {}
  for _ in range(7):
    for name, (way, items) in ways.items():
      begin = time.process_time()
      for item in items:
        way(item)
      took = 1e3 * (time.process_time() - begin) / max(len(items), 1)
      best[name] = min(took, best.get(name, took))
  return best


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
    print(f"cache of {len(dataset)} images built in {built:.1f} s")
    results = {"seconds to build the cache": built}
    results["milliseconds per image"] = parts(dataset, cached, options.size)
    for name, took in results["milliseconds per image"].items():
      print(f"{name:24s} {took:.3f} ms", flush=True)
    results |= compare(options, dataset, cached)
    results["share of time waiting"] = {}
    for step_ms in map(float, options.step_ms.split(",")):
      for name, source in (("decoding", dataset), ("cached", cached)):
        with our_batches(source, options.size, 0) as batches:
          share = waits(batches, step_ms, 40)
        results["share of time waiting"][f"{name}, {step_ms:g} ms"] = share
        print(f"steps of {step_ms:g} ms, {name}: waits {100 * share:.1f} % of the time")
    demo = data.load(data.default_config("demo"), "train", workdir_cache=folder)
    with our_batches(demo, 64, 0) as batches:
      share = waits(batches, 20, 100)
    results["share of time waiting"]["demo, 20 ms"] = share
    print(f"steps of 20 ms, demo at 64 px: waits {100 * share:.1f} % of the time")
  if options.out:
    pathlib.Path(options.out).write_text(json.dumps(results, indent=2) + "\n")


def compare(options, dataset: data.Dataset, cached: data.Dataset) -> dict:
  """Returns and prints images per second of every loader."""
  size, workers = options.size, options.workers
  makers = {
    "torchvision, float32": lambda: torch_batches(dataset, size, workers, True),
    "torchvision, uint8": lambda: torch_batches(dataset, size, workers, False),
    "processes": lambda: our_batches(dataset, size, workers),
    "threads": lambda: our_batches(dataset, size, 0),
    "threads, reduced decode": lambda: our_batches(
      dataset, size, 0, reduced_decode=True
    ),
    "processes, cached": lambda: our_batches(cached, size, workers),
    "threads, cached": lambda: our_batches(cached, size, 0),
  }
  loaders = {name: Loader(make) for name, make in makers.items()}
  measured = {name: [] for name in makers}
  skip = 8 * max(workers, 1)
  for _ in range(options.repetitions):
    for name, loader in loaders.items():
      measured[name].append(loader.measure(skip, options.batches))
  for loader in loaders.values():
    if isinstance(loader.batches, data.BatchIterator):
      loader.batches.close()
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
      print(f"{title:18s} {name:24s} {value:7.0f}   {against}", flush=True)
  return results


if __name__ == "__main__":
  main()
