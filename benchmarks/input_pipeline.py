"""Input pipeline: images per second against torchvision in a PyTorch DataLoader.

  python benchmarks/input_pipeline.py [--folder=../shared/caltech101] [--workers=2]
  python benchmarks/input_pipeline.py --only waits --steps demo:64:8:46

Both sides read the same JPEGs, draw random-resized crops of the same distribution and
make batches of 64, with the same number of worker processes. The other side is
torchvision's transforms on PIL images: once the usual recipe (crop, flip, ToTensor,
Normalize: float32 out), once the crop alone (uint8 out). This side is decode, crop and
resize, uint8 out; flip and normalization are the device's. All loaders stay open and
take turns within every repetition, each after its full buffers were drained; medians
are printed, per second and per second of one core (all processes counted: this one
hardly depends on what else the machine does).

The last part is a consumer that takes a given time per step and counts how long it
waits for its batches, which come as in training: `train_iterator`, then
`prefetch_to_device`. An accelerator computes elsewhere, so the consumer sleeps; with
--busy it computes on this machine's cores, as training on a CPU does.
"""

import argparse
import contextlib
import dataclasses
import io
import itertools
import os
import pathlib
import statistics
import tempfile
import time

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import psutil
import side_by_side
import simplejpeg
import torch
from PIL import Image
from torch_reference import torchvision

from fidelity_jax import data
from fidelity_jax.data import crops, images

transforms = torchvision().transforms
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
    purpose="classifier",
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


def parts(datasets: dict[str, data.Dataset], size: int) -> dict[str, float]:
  """Returns the milliseconds of one core that each way to do a part takes per image."""
  dataset, cached = datasets["decoding"], datasets["cached"]
  out = np.empty((size, size, 3), np.uint8)
  chosen = range(0, len(dataset), max(len(dataset) // 300, 1))
  encoded = [dataset.records[i] for i in chosen]
  pictures = [images.decode(record) for record in encoded]
  boxes = [
    crops.random_box(*picture.shape[:2], np.random.default_rng(i))
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


@dataclasses.dataclass(frozen=True)
class Steps:
  """A training run as its input pipeline sees it.

  Attributes:
    dataset: "demo" or "folder".
    size: side of the images, in pixels.
    batch: images per step.
    milliseconds: that a step takes.
  """

  dataset: str
  size: int
  batch: int
  milliseconds: float

  @classmethod
  def parse(cls, text: str) -> "Steps":
    """Returns the steps that e.g. "folder:224:64:50" describes."""
    dataset, size, batch, milliseconds = text.split(":")
    if dataset not in ("demo", "folder"):
      raise ValueError(dataset)
    return cls(dataset, int(size), int(batch), float(milliseconds))


def compute(seconds: float) -> None:
  """Takes time and all cores that it can get."""
  deadline = time.perf_counter() + seconds
  square = jnp.ones((512, 512))
  while time.perf_counter() < deadline:
    jax.block_until_ready(square @ square)


def waits(batches, seconds: float, step, count: int) -> dict[str, float]:
  """Returns how a consumer waits for its batches.

  Args:
    batches: from `prefetch_to_device`.
    seconds: that a step takes.
    step: takes that time.
    count: number of steps.
  """
  step(seconds)
  for _ in range(3):
    next(batches)
    step(seconds)
  waited = []
  begin = time.perf_counter()
  for _ in range(count):
    step(seconds)
    asked = time.perf_counter()
    jax.block_until_ready(next(batches))
    waited.append(time.perf_counter() - asked)
  took = time.perf_counter() - begin
  return {
    "share": sum(waited) / took,
    "median ms": 1e3 * statistics.median(waited),
    "longest ms": 1e3 * max(waited),
  }


def all_waits(options, datasets: dict[str, dict[str, data.Dataset]]) -> dict:
  """Returns and prints how the consumers of all --steps wait."""
  results = {}
  step = compute if options.busy else time.sleep
  for steps in options.steps:
    for kind, dataset in datasets[steps.dataset].items():
      host = data.train_iterator(
        dataset,
        image_size=steps.size,
        batch_size=steps.batch,
        seed=0,
        purpose="classifier",
        epochs=10**6,
        num_workers=options.workers if options.processes else 0,
      )
      with contextlib.closing(data.prefetch_to_device(host)) as batches:
        found = waits(batches, steps.milliseconds / 1e3, step, options.wait_steps)
      name = (
        f"{steps.dataset}, {steps.size} px, batch {steps.batch}, "
        f"steps of {steps.milliseconds:g} ms, {kind}"
      )
      results[name] = found
      print(
        f"{name:60s} waits {found['share']:6.2%} of the time, a step "
        f"{found['median ms']:.2f} ms, at most {found['longest ms']:.2f} ms",
        flush=True,
      )
  return results


def main():
  """Prints one line per part, per loader, and per consumer that waits."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  default = pathlib.Path(__file__).parents[2] / "shared" / "caltech101"
  parser.add_argument("--folder", default=str(default))
  parser.add_argument("--workers", type=int, default=os.cpu_count())
  parser.add_argument("--size", type=int, default=224)
  parser.add_argument("--repetitions", type=int, default=5)
  parser.add_argument("--batches", type=int, default=24)
  parser.add_argument(
    "--only",
    choices=("parts", "loaders", "waits"),
    nargs="+",
    default=("parts", "loaders", "waits"),
  )
  parser.add_argument(
    "--steps",
    type=Steps.parse,
    nargs="+",
    metavar="demo|folder:SIZE:BATCH:MILLISECONDS",
    default=[
      Steps("demo", 64, 8, 46.0),
      *(Steps("folder", 224, 64, each) for each in (200.0, 100.0, 50.0, 25.0)),
    ],
  )
  parser.add_argument("--wait_steps", type=int, default=60)
  parser.add_argument("--busy", action="store_true", help="consumers use the cores too")
  parser.add_argument(
    "--processes", action="store_true", help="waits: worker processes, not threads"
  )
  parser.add_argument("--json", type=pathlib.Path, help="file for the results")
  options = parser.parse_args()

  results = {}
  with tempfile.TemporaryDirectory() as folder:
    datasets = load(options.folder, folder, results)
    if "parts" in options.only:
      results["milliseconds per image"] = parts(datasets["folder"], options.size)
      for name, took in results["milliseconds per image"].items():
        print(f"{name:24s} {took:.3f} ms", flush=True)
    if "loaders" in options.only:
      results |= compare(options, **datasets["folder"])
    if "waits" in options.only:
      results["waiting"] = all_waits(options, datasets)
  side_by_side.save(results, options.json)


def load(path: str, cache: str, results: dict) -> dict[str, dict[str, data.Dataset]]:
  """Returns the training sets by name, each decoding and cached."""
  datasets = {}
  for name in ("demo", "folder"):
    config = data.default_config(name)
    config.path = path if name == "folder" else None
    decoding = data.load(config, "train", workdir_cache=cache)
    config.cache = "disk"
    begin = time.perf_counter()
    cached = data.load(config, "train", workdir_cache=cache)
    built = time.perf_counter() - begin
    print(f"cache of {len(cached)} images ({name}) built in {built:.1f} s", flush=True)
    results[f"seconds to build the cache ({name})"] = built
    datasets[name] = {"decoding": decoding, "cached": cached}
  return datasets


def compare(options, decoding: data.Dataset, cached: data.Dataset) -> dict:
  """Returns and prints images per second of every loader."""
  size, workers = options.size, options.workers
  makers = {
    "torchvision, float32": lambda: torch_batches(decoding, size, workers, True),
    "torchvision, uint8": lambda: torch_batches(decoding, size, workers, False),
    "processes": lambda: our_batches(decoding, size, workers),
    "threads": lambda: our_batches(decoding, size, 0),
    "threads, reduced decode": lambda: our_batches(
      decoding, size, 0, reduced_decode=True
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
  print(f"{len(decoding)} images, {size} px, {workers} workers; images per second:")
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
