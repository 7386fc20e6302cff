"""Table 5.1's evaluation, shared, against row by row and against eager PyTorch.

  python benchmarks/evaluation.py [--rows=clean,oracle] [--images=4] [--batch=2]

Twelve rows under eight conditions, a draw of noise each, with ResNet-50 and DnCNN-20 at
224 pixels in float32, on the CPU. Three sides measure the same demo images with the
same random weights:

- "shared": this package, all rows together, as a study does;
- "alone": this package, an evaluation for each row, of which none uses another's work;
- "torch": eager PyTorch as the authors' released code goes about it, row by row and
  condition by condition: a DataLoader whose two workers decode and degrade image by
  image, then restore, map and classify, everything anew for each row. Where the level
  varies over the image it is degraded by the loops of benchmarks/plain.py. The
  workers live on from condition to condition, which spares them their start.

Only the rows' classification is timed; what an evaluation measures besides (PSNR, SSIM,
the quality of maps) stands apart. Stages are real ones, in a temporary workdir.
Networks are loaded and programs compiled before the clock runs. The logits have to
agree: of "shared" and "alone" on all images, of "shared" and "torch" on clean ones,
where both sides see the same.

Another pass of "shared" waits for each call to tell where the time goes. FLOPs are
PyTorch's count of convolutions and matrix products, those of shared work counted once;
their rate is set against a measured matrix product.
"""

import argparse
import collections
import contextlib
import io
import pathlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import plain
import side_by_side
import torch
import torch_method
import torch_reference
from torch.utils.flop_counter import FlopCounterMode

from fidelity_jax import (
  checkpoints,
  data,
  degradations,
  evaluate,
  locations,
  plan,
  sharding,
  stages,
  study,
  tensors,
)
from fidelity_jax.configs import table_5_1
from fidelity_jax.datasets import Datasets
from fidelity_jax.port import recognizing
from fidelity_jax.subjects import Subject

SETUPS = ("clean", "degraded", "restored")
SOURCES = ("oracle", "pretrained", "end_to_end")
ROWS = (
  *(name for setup in SETUPS for name in (setup, f"{setup}-restoration")),
  *(name for source in SOURCES for name in (source, f"{source}-ensemble")),
)
WORKERS = 2
# Largest relative error of logits, in float32 through some 70 layers.
TOLERANCE = 1e-3
# What is computed once for several rows, by the first word of its key in `Tensors`.
PARTS = {
  "restored": "restoring",
  "map": "estimating maps",
  "oracle": "true maps",
  "plain": "plain features",
  "calibrated": "calibrated features",
}
NETWORKS = ("restoring", "estimating maps", "plain features", "calibrated features")


class Reference:
  """The networks of Table 5.1 in PyTorch, with random weights.

  Attributes:
    states: tensors of the classifiers by what they are trained on, and of the methods
      by source, in the names of the authors' checkpoints; NumPy.
  """

  def __init__(self, backbone: str, depth: int, num_classes: int):
    """Makes them.

    Args:
      backbone: torchvision's name of a network.
      depth: convolutions of restorer and estimators.
      num_classes: of the classifiers.
    """
    self.states: dict[str, dict[str, np.ndarray]] = {}
    self._classifiers, self._methods = {}, {}
    for seed, name in enumerate(SETUPS):
      network = torch_reference.build(backbone, num_classes, seed).float().eval()
      self.states[name] = torch_reference.state_dict(network)
      self._classifiers[name] = torch_method.split(network)
    features, head = self._classifiers["clean"]
    with torch.no_grad():
      size = features(torch.zeros(1, 3, 64, 64)).shape[1]
    dncnn = {"depth": depth}
    self._restorer = _stack(depth, 10)
    for seed, source in enumerate(SOURCES, 20):
      seen = "oracle" if source == "oracle" else "degraded"
      options = {"source": seen, "ensemble": True, "dncnn": dncnn}
      method = torch_method.Method(features, head, size, **options)
      method.restoration = self._restorer
      if source != "oracle":
        method.fidelity = _stack(depth, seed)
      for name in ("cnn_layers_weight", "cnn_layers_bias"):
        torch_reference.randomize(getattr(method, name), seed)
      for name in ("mul_fc", "cat_fc", "ensemble"):
        torch_reference.randomize(getattr(method, name), seed)
      self._methods[source] = method.eval()
      self.states[source] = torch_reference.state_dict(method)

  def logits(
    self, row: str, degraded: torch.Tensor, clean: torch.Tensor
  ) -> torch.Tensor:
    """Returns a row's logits [N, K] of images [N, 3, H, W] in [0, 1]."""
    name, _, what = row.partition("-")
    if name in SETUPS:
      features, head = self._classifiers[name]
      images = self._restore(degraded) if what else degraded
      return head(features(plain.normalized(images)).flatten(1))
    return plain.steered(self._methods[name], degraded, clean, bool(what))

  def _restore(self, degraded):
    return (degraded - self._restorer(degraded)).clamp(0, 1)

  def _calibrated(self, method, restored, confidence):
    return method.channel(method.steered_features(restored, confidence), confidence)

  def flops(self, size: int) -> dict[str, int]:
    """Returns the floating-point operations of an image of a side, by part."""
    image, method = torch.zeros(1, 3, size, size), self._methods["pretrained"]
    calls = {
      "restoring": lambda: self._restore(image),
      "estimating maps": lambda: method.fidelity(image),
      "plain features": lambda: method.plain_features(image),
      "calibrated features": lambda: self._calibrated(method, image, image[:, :1]),
    }
    found = {}
    for part, call in calls.items():
      with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
      found[part] = counter.get_total_flops()
    return found


def _stack(depth: int, seed: int) -> torch_method.Stack:
  stack = torch_method.Stack(depth)
  torch_reference.randomize(stack, seed)
  with torch.no_grad():
    # A residual as small as noise: else most restored pixels are black or white.
    stack.model[-1].weight *= 0.05
  return stack.eval()


class _Degraded(torch.utils.data.Dataset):
  """(condition, index) -> a degraded image and the clean one, [3, H, W] in [0, 1]."""

  def __init__(self, dataset: data.Dataset, size: int):
    self._dataset, self._size = dataset, size

  def __getitem__(self, place: tuple[degradations.Condition, int]):
    condition, index = place
    pixels = np.empty((self._size, self._size, 3), np.uint8)
    # Not torchvision's, which may differ by a grey level: logits are compared.
    data.crops.central(self._dataset.picture(index).pixels(), pixels)
    clean = torch.from_numpy(pixels).permute(2, 0, 1).float().div(255)
    return plain.degrade(condition, clean), clean


class Theirs:
  """The side "torch".

  Attributes:
    waited: seconds of the last run in which the networks waited for the loader.
  """

  def __init__(self, reference: Reference, dataset: data.Dataset, args):
    """Starts the workers."""
    self._reference, self._rounds = reference, args.rounds
    self.waited = 0.0
    self._places = plain.Places(len(dataset), args.batch)
    self._loader = torch.utils.data.DataLoader(
      _Degraded(dataset, args.size),
      batch_sampler=self._places,
      num_workers=WORKERS,
      persistent_workers=True,
      # JAX's threads do not survive a fork.
      multiprocessing_context="spawn",
    )

  def _batches(self, condition):
    self._places.condition = condition
    return iter(self._loader)

  @torch.inference_mode()
  def warm_up(self, rows: Sequence[str], condition: degradations.Condition) -> None:
    """Runs a batch through each row, and the workers through a condition."""
    degraded, clean = next(iter(list(self._batches(condition))))
    for row in rows:
      self._reference.logits(row, degraded, clean)

  def run(
    self, rows: Sequence[str], conditions: Sequence[degradations.Condition]
  ) -> tuple[dict[str, dict[str, float]], dict[str, np.ndarray]]:
    """Returns seconds by row and condition, and logits of clean images by row."""
    seconds, logits = {row: {} for row in rows}, {}
    passes = plain.by_row(
      rows, conditions, self._rounds, self._batches, self._reference.logits
    )
    for done in passes:
      seconds[done.row][done.condition.name] = done.seconds
      if done.condition.kind == "clean":
        logits[done.row] = done.logits
    self.waited = sum(done.seconds - sum(done.calls) for done in passes)
    return seconds, logits


class Ours:
  """The sides of this package: stages in a workdir, and their evaluation.

  Attributes:
    rows: what is measured of each row, by its name.
    further: what an evaluation measures besides.
    dataset: the test images.
  """

  def __init__(self, workdir: pathlib.Path, args: argparse.Namespace):
    """Plans; no stage is there yet."""
    work = study.read(make_config(args))
    datasets = Datasets()
    self._workdir = workdir
    self._plan = plan.make(work.experiments, workdir, datasets)
    test = datasets.load(work.experiments[0].dataset, "test")
    places = np.linspace(0, len(test) - 1, args.images).astype(int)
    self.dataset = test.select(places)
    self.rows: dict[str, Subject] = {}
    self.further: list[Subject] = []
    for one in self._plan.experiments:
      for subject in one.subjects():
        if subject.compared.method in ("restoration", "estimation"):
          self.further.append(subject)
        elif (name := _row(one.name, subject)) in args.rows:
          self.rows[name] = subject

  def finish_stages(self, states: dict[str, dict[str, np.ndarray]]) -> None:
    """Writes all stages, as if their training had ended with given weights."""
    found = {
      name: recognizing.recognize(state, f"the benchmark's {name}")
      for name, state in states.items()
    }
    for stage in self._plan.stages:
      variables = _variables(stage, found)
      stage.begin()
      saved = checkpoints.Checkpoints(stage.directory / "checkpoints")
      done = checkpoints.Progress(best_step=0, best_score=0.0)
      saved.save(0, variables, {"none": np.zeros(1)}, done)
      saved.wait()
      product = saved.check_product(0, variables)
      saved.close()
      stage.finish(0, "none", 0.0, product)
    layout = sharding.make_layout()
    self._networks = tensors.Networks(self.dataset.num_classes, layout)
    for one in self._plan.experiments:
      for subject in one.subjects():
        jax.block_until_ready(
          [p.variables for p in self._networks.of(subject).values()]
        )

  def run(
    self, subjects: Sequence[Subject], count: int | None = None
  ) -> tuple[float, evaluate.Evaluation]:
    """Measures subjects anew, on the first `count` images.

    Returns:
      The seconds, and the evaluation.
    """
    shutil.rmtree(self._workdir / "measurements", ignore_errors=True)
    dataset = self.dataset.select(range(count or len(self.dataset)))
    evaluation = evaluate.Evaluation(subjects, dataset, self._workdir)
    evaluation.networks = self._networks
    start = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):
      evaluation.measure()
    return time.perf_counter() - start, evaluation


def make_config(args: argparse.Namespace) -> Any:
  """Returns Table 5.1's config at the paper's size, on demo images, untrained."""
  config = table_5_1.get_config()
  for name, value in data.default_config("demo").items():
    config.dataset[name] = value
  config.dataset.per_class, config.dataset.image_size = 16, args.size
  config.precision = "float32"
  config.parents.classifier.model.name = args.backbone
  config.parents.classifier.model.weights = None
  for role in ("restorer", "estimator"):
    config.parents[role].model.depth = args.depth
    config.parents[role].patch_size = config.parents[role].patch_stride = 16
  config.evaluation.rounds = args.rounds
  config.evaluation.batch_size = args.batch
  # Logits are compared.
  config.evaluation.keep = "predictions"
  config.only = ",".join(dict.fromkeys(row.partition("-")[0] for row in args.rows))
  return config


def _row(experiment: str, subject: Subject) -> str | None:
  """Returns the name of the row that a subject is in an experiment, None for none."""
  compared = subject.compared
  if experiment in SETUPS:
    return f"{experiment}-restoration" if compared.restored else experiment
  if compared.method == "classifier":
    # The method's experiments ask for the clean classifier, too.
    return None
  return f"{experiment}-ensemble" if compared.ensemble else experiment


def _variables(stage: stages.Stage, found: dict[str, dict[str, Any]]) -> Any:
  """Returns what a stage is to have been trained to."""
  kind, config = stage.kind.name, stage.config
  if kind == "classifier":
    return found[config.source][kind].variables
  if kind in ("restorer", "estimator"):
    return found["pretrained"][kind].variables
  steered = stage.networks()["calibration"].config.fidelity.source
  roles = [kind]
  if kind == "calibration" and steered == "end_to_end":
    roles.append("estimator")
  return {"params": {r: found[steered][r].variables["params"] for r in roles}}


class Calls(NamedTuple):
  """Seconds and numbers of calls by part."""

  seconds: dict[str, float]
  count: dict[str, int]


def timed_tensors(calls: Calls) -> type[tensors.Tensors]:
  """Returns `Tensors` that wait for every call and note how long it took."""

  class Timed(tensors.Tensors):
    def __init__(self, *args):
      start = time.perf_counter()
      super().__init__(*args)
      jax.block_until_ready(self.degraded)
      self._note("degrading", time.perf_counter() - start)

    def _note(self, part: str, seconds: float) -> None:
      calls.seconds[part] += seconds
      calls.count[part] += 1

    def _once(self, key: tuple, make: Callable[[], Any]) -> Any:
      if key not in self._made:
        start = time.perf_counter()
        self._made[key] = jax.block_until_ready(make())
        self._note(PARTS[key[0]], time.perf_counter() - start)
      return self._made[key]

    def values(self, subject: Subject, keep: bool = False) -> dict[str, jax.Array]:
      start, before = time.perf_counter(), sum(calls.seconds.values())
      found = jax.block_until_ready(super().values(subject, keep))
      within = sum(calls.seconds.values()) - before
      further = subject.compared.method in ("restoration", "estimation")
      part = "further measures" if further else "ensembles and heads"
      self._note(part, time.perf_counter() - start - within)
      return found

  return Timed


def profile(ours: Ours) -> dict[str, Any]:
  """Returns seconds and calls by part of a pass that measures everything."""
  calls = Calls(collections.Counter(), collections.Counter())
  with mock.patch.object(evaluate, "Tensors", timed_tensors(calls)):
    total, _ = ours.run([*ours.rows.values(), *ours.further])
  seconds = dict(calls.seconds)
  seconds["host"] = total - sum(seconds.values())
  return {"total_seconds": total, "seconds": seconds, "calls": dict(calls.count)}


def check_agreement(
  what: str, value: np.ndarray, reference: np.ndarray, tolerance: float = TOLERANCE
) -> float:
  """Returns the relative error of logits; exits if it shows another computation."""
  error = torch_reference.relative_error(value, reference)
  if not error <= tolerance:
    raise SystemExit(
      f"{what}: the sides compute different things (relative error {error:.2g}, more "
      f"than {tolerance})."
    )
  return error


def measure(ours: Ours, theirs: Theirs, args: argparse.Namespace) -> dict[str, Any]:
  """Times the three sides in turn and compares what they found."""
  rows = list(ours.rows)
  conditions = next(iter(ours.rows.values())).conditions
  everything = [*ours.rows.values(), *ours.further]
  warm = {
    "jax": lambda: ours.run(everything, args.batch),
    "torch": lambda: theirs.warm_up(rows, conditions[-1]),
  }
  results: dict[str, Any] = {"warm_up_seconds": {}}
  for side, function in warm.items():
    start = time.perf_counter()
    function()
    results["warm_up_seconds"][side] = time.perf_counter() - start
  taken = {side: [] for side in ("shared", "alone", "torch")}
  details: dict[str, Any] = {"alone": [], "torch": []}
  error, waited = {"alone": 0.0, "torch": 0.0}, []
  for _ in range(args.repeats):
    seconds, evaluation = ours.run(list(ours.rows.values()))
    taken["shared"].append(seconds)
    logits = {row: evaluation.logits(subject) for row, subject in ours.rows.items()}
    details["alone"].append({})
    for row, subject in ours.rows.items():
      seconds, evaluation = ours.run([subject])
      details["alone"][-1][row] = seconds
      for name, value in evaluation.logits(subject).items():
        found = check_agreement(f"{row}, {name}, alone", value, logits[row][name])
        error["alone"] = max(error["alone"], found)
    taken["alone"].append(sum(details["alone"][-1].values()))
    seconds, clean = theirs.run(rows, conditions)
    details["torch"].append(seconds)
    taken["torch"].append(sum(sum(one.values()) for one in seconds.values()))
    waited.append(theirs.waited)
    for row in rows:
      found = check_agreement(f"{row}, clean", logits[row]["clean"][0], clean[row])
      error["torch"] = max(error["torch"], found)
  median = {side: statistics.median(times) for side, times in taken.items()}
  results["seconds"] = median
  results["seconds_per_image"] = {s: t / args.images for s, t in median.items()}
  results["ratio"] = {s: median[s] / median["shared"] for s in ("alone", "torch")}
  by_condition = {
    c.name: statistics.median(sum(one[r][c.name] for r in rows) for one in seconds)
    for c in conditions
    for seconds in [details["torch"]]
  }
  results["torch_by_condition"] = by_condition
  results["torch_waited"] = statistics.median(waited)
  uniform = statistics.median(
    by_condition[c.name] for c in conditions if c.vary is None
  )
  slow = sum(
    max(0.0, by_condition[c.name] - uniform) for c in conditions if c.vary is not None
  )
  # If images of varying level cost no more than others.
  results["ratio"]["torch_without_loops"] = (median["torch"] - slow) / median["shared"]
  results["relative_error"] = error
  results["details"] = details
  return results


def report(results: dict[str, Any], args: argparse.Namespace) -> None:
  """Prints the results."""
  warm, per_image = results["warm_up_seconds"], results["seconds_per_image"]
  print(f"compilation and first batch, seconds: {_listed(warm)}")
  print(f"seconds per image: {_listed(per_image)}")
  ratio = results["ratio"]
  print(
    f"ratio to shared: alone {ratio['alone']:.2f}, torch {ratio['torch']:.2f} "
    f"({ratio['torch_without_loops']:.2f} if varying levels cost torch no more)"
  )
  conditions = {k: v / args.images for k, v in results["torch_by_condition"].items()}
  print(f"torch, seconds per image by condition: {_listed(conditions)}")
  print(
    "torch, seconds per image that its networks waited for the loader: "
    f"{results['torch_waited'] / args.images:.2f}"
  )
  error = results["relative_error"]
  print(
    f"largest relative error of logits: alone {error['alone']:.1g}, torch, clean "
    f"images, {error['torch']:.1g}"
  )
  total = results["profile"]["total_seconds"]
  print(f"shared, waiting for each call, with the further measures: {total:.2f} s")
  for part, seconds in results["profile"]["seconds"].items():
    calls = results["profile"]["calls"].get(part)
    often = f" {calls:5d} calls" if calls else ""
    print(f"  {part:20} {seconds:8.2f} s {seconds / total:5.1%}{often}")
  networks = results["networks"]
  print(
    f"networks: {networks['flops'] / args.images / 1e9:.0f} GFLOP per image in "
    f"{networks['seconds'] / args.images:.2f} s, {networks['rate'] / 1e9:.0f} GFLOP/s, "
    f"{networks['rate'] / results['matmul_flops']:.0%} of a matrix product's "
    f"{results['matmul_flops'] / 1e9:.0f}"
  )
  for part, rate in networks["rates"].items():
    share = rate / results["matmul_flops"]
    print(f"  {part:20} {rate / 1e9:6.0f} GFLOP/s {share:5.0%}")


def _listed(values: dict[str, float]) -> str:
  return ", ".join(f"{name} {value:.2f}" for name, value in values.items())


def networks(
  found: dict[str, Any], flops: dict[str, int], args: argparse.Namespace
) -> dict[str, Any]:
  """Returns FLOPs, seconds and rates of the networks in a profile."""
  present = [part for part in NETWORKS if part in found["calls"]]
  work = {p: found["calls"][p] * args.batch * flops[p] for p in present}
  seconds = {p: found["seconds"][p] for p in present}
  total, took = sum(work.values()), sum(seconds.values())
  rates = {p: work[p] / seconds[p] for p in present}
  return {"flops": total, "seconds": took, "rate": total / took, "rates": rates}


def main() -> None:
  """Prints the comparison, and writes --json."""
  parser = side_by_side.parser(__doc__, "rows", ROWS)
  parser.set_defaults(batch=2, repeats=1)
  parser.add_argument("--images", type=int, default=4, help="a multiple of --batch")
  parser.add_argument("--rounds", type=int, default=1, help="draws of noise")
  parser.add_argument("--backbone", default="resnet50", help="a ResNet")
  parser.add_argument("--depth", type=int, default=20, help="of DnCNN")
  args = parser.parse_args()
  if args.images % args.batch or args.images <= 0:
    parser.error("--images must be a multiple of --batch")
  jax.config.update("jax_platforms", "cpu")
  peak = side_by_side.matmul_rate(jnp.float32)
  results = {"device": side_by_side.device_name(), **vars(args), "matmul_flops": peak}
  print(
    f"{results['device']}; matrix product {peak / 1e9:.0f} GFLOP/s; {len(args.rows)} "
    f"rows, {args.images} images in batches of {args.batch}, {args.size} px",
    flush=True,
  )
  with tempfile.TemporaryDirectory() as directory:
    ours = Ours(locations.expand(directory), args)
    reference = Reference(args.backbone, args.depth, ours.dataset.num_classes)
    ours.finish_stages(reference.states)
    theirs = Theirs(reference, ours.dataset, args)
    results |= measure(ours, theirs, args)
    results["profile"] = profile(ours)
  flops = reference.flops(args.size)
  results["networks"] = networks(results["profile"], flops, args)
  report(results, args)
  side_by_side.save(results, args.json)


if __name__ == "__main__":
  main()
