"""What a user runs, whole: this package's command against a plain PyTorch program.

  python benchmarks/end_to_end.py [--images=40] [--tested=8] [--sides=jax,torch]

Both train the calibration modules for an epoch on the oracle map, validate and save
them, and evaluate four methods under eight conditions: the frozen classifier on
degraded and on restored images, the calibrated one without and with its ensemble.
ResNet-50 and DnCNN-20 at 224 pixels in float32, on the CPU. Processes of their own,
one after the other, over the same photographs in the same folders:

- "jax": `python -m fidelity_jax.main --config=configs/oracle.py`, in an empty workdir
  and with an empty cache;
- "jax_kept": the same once more in another workdir: the programs that "jax" compiled
  are kept;
- "torch": benchmarks/torch_program.py, which goes about it as the authors' released
  code does: two workers decode and degrade image by image, and rows are evaluated one
  by one, condition by condition, everything anew for each;
- "torch_compiled": the same with torch.compile for the restorer and the four stages of
  the ResNet.

All weights are random, in one file in the names of the authors' checkpoints. Both sides
read it: only the epoch is trained, at a low rate, as random networks have steep losses;
all else is taken over.

What differs: images are cropped, flipped and degraded by other draws. This package
also reports (PSNR and SSIM of all images, tables, a picture of three images, whose
networks run once more), checks images and weights before it begins, and validates what
it takes over, too, all in batches that are filled up to 32 images. It shares between
methods what they have in common.

Where the time went is each side's own account: `times.jsonl` in the workdir, and the
program's results.json. "Start-up" is all that neither names: interpreter, imports,
plan. "Compilation" is by how much the first call of the networks took longer than the
others where nothing is compiled. PyTorch waits for the first batch of each of its 32
passes; with more --tested that is less of its time.

Both sides have to evaluate the same images under the same conditions, and their logits
of clean images have to agree as far as they can: of the frozen classifier those of the
runs themselves, where grey levels may differ by one; of all four methods those of the
weights that PyTorch trained, on pixels that are the same,
computed by this package once the clock has stopped.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

import evaluation
import jax
import numpy as np
import side_by_side
import torch

from fidelity_jax import data, files, runs, stages, timing

ROOT = pathlib.Path(__file__).parents[1]
SIDES = ("jax", "jax_kept", "torch", "torch_compiled")
PHASES = (
  "start-up",
  "networks taken over",
  "compilation",
  "training",
  "validation",
  "checkpoints",
  "evaluation",
  "report",
)
# Largest relative error of what sets the logits of images apart, where pixels may
# differ by a grey level.
TOLERANCE = 0.02


class Found(NamedTuple):
  """What a side did.

  Attributes:
    seconds: by phase; "in all"; and "processor", that of all its processes.
    labels: of the evaluated images, in their order.
    conditions: names, by method.
    logits: [N, K] of clean images, by method.
    loss: the epoch's mean.
  """

  seconds: dict[str, float]
  labels: np.ndarray
  conditions: dict[str, set[str]]
  logits: dict[str, np.ndarray]
  loss: float


def write_photos(folder: pathlib.Path, args: argparse.Namespace) -> int:
  """Writes photographs to folders train, val and test of class folders.

  Returns:
    The number of classes, which are those that are trained on.
  """
  config = data.default_config("folder" if args.photos else "demo")
  config.path = args.photos or None
  classes = None
  for split, name in (("train", "train"), ("validation", "val"), ("test", "test")):
    dataset = data.load(config, split, workdir_cache=folder.parent / "checked")
    count = args.images if split == "train" else args.tested
    known = np.arange(len(dataset))
    if classes is not None:
      known = known[np.isin(dataset.labels, list(classes))]
    if len(known) < count:
      raise SystemExit(
        f"{count} photographs are asked for, and {split} has {len(known)}"
      )
    places = known[np.linspace(0, len(known) - 1, count).round().astype(int)]
    classes = classes or set(dataset.labels[places].tolist())
    for label in classes:
      (folder / name / dataset.class_names[label]).mkdir(parents=True)
    for place in places.tolist():
      suffix = pathlib.Path(dataset.keys[place]).suffix or ".png"
      home = folder / name / dataset.class_names[dataset.labels[place]]
      (home / f"{place:06d}{suffix}").write_bytes(dataset.records[place])
  return len(classes)


def write_weights(path: pathlib.Path, classes: int, args: argparse.Namespace) -> None:
  """Writes random weights of all networks."""
  reference = evaluation.Reference(args.backbone, args.depth, classes)
  state = reference.states["oracle"]
  torch.save({name: torch.from_numpy(value) for name, value in state.items()}, path)


def run(command: list[str], log: pathlib.Path, **environment: str) -> dict[str, float]:
  """Runs a process; returns the seconds that it took, and its processor's.

  Raises:
    SystemExit: it failed.
  """
  inherited = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
  usage = lambda: resource.getrusage(resource.RUSAGE_CHILDREN)
  before, start = usage(), time.perf_counter()
  with log.open("w") as file:
    status = subprocess.call(
      [sys.executable, *command],
      cwd=ROOT,
      env=inherited | environment,
      stdout=file,
      stderr=subprocess.STDOUT,
    )
  took, after = time.perf_counter() - start, usage()
  if status:
    end = "\n".join(log.read_text().splitlines()[-20:])
    raise SystemExit(f"{' '.join(command)}\nended with exit status {status}:\n{end}")
  used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
  return {"in all": took, "processor": used}


def make_fields(args: argparse.Namespace, place: pathlib.Path) -> dict[str, Any]:
  """Returns the fields of configs/oracle.py that are set."""
  weights = place / "method.pth"
  untrained = {"weights": weights, "epochs": 0, "warmup_epochs": 0}
  classifier = {"name": args.backbone, "new_head": False}
  fields = {
    "dataset.name": "folder",
    "dataset.path": place / "photos",
    "dataset.image_size": args.size,
    "precision": "float32",
    "batch_size": args.batch,
    "epochs": 1,
    "warmup_epochs": 0,
    "learning_rate": args.rate,
    "model.weights": weights,
    "evaluation.rounds": args.rounds,
    "evaluation.batch_size": args.batch,
    "evaluation.examples": 1,
    # Logits are compared.
    "evaluation.keep": "predictions",
    "parents.classifier.batch_size": args.batch,
    "parents.restorer.batch_size": args.batch,
    "parents.restorer.model.depth": args.depth,
    # Whole images.
    "parents.restorer.patch_size": args.size,
    "parents.restorer.patch_stride": args.size,
  }
  fields |= {f"parents.classifier.model.{k}": v for k, v in classifier.items()}
  for stage, model in (
    ("parents.classifier", "parents.classifier.model"),
    ("parents.restorer", "parents.restorer.model"),
    ("ensemble", "ensemble"),
  ):
    for name, value in untrained.items():
      fields[f"{model if name == 'weights' else stage}.{name}"] = value
  return fields


def run_ours(place: pathlib.Path, args: argparse.Namespace, kept: bool) -> Found:
  """Runs this package's command.

  Args:
    place: has the photographs and the weights.
    args: the settings.
    kept: with what was compiled before.
  """
  workdir, cache = place / "workdir", place / "cache"
  shutil.rmtree(workdir, ignore_errors=True)
  if not kept:
    shutil.rmtree(cache, ignore_errors=True)
  command = ["-m", "fidelity_jax.main", "--config=configs/oracle.py"]
  command += [f"--config.{k}={v}" for k, v in make_fields(args, place).items()]
  log = place / "ours.txt"
  places = {"FIDELITY_JAX_CACHE": str(cache), "JAX_PLATFORMS": "cpu"}
  seconds = run([*command, f"--workdir={workdir}"], log, **places)
  (results,) = workdir.glob("oracle-*/experiment.json")
  predictions = results.with_name("predictions-oracle.npz")
  # Written just before and after the picture is made.
  drawn = results.with_name("examples-oracle.npz").stat().st_mtime
  drawn -= predictions.stat().st_mtime
  (record,) = files.read_json_lines(results.with_name("times.jsonl"))
  (epoch,) = stages.records(next(workdir.glob("calibration-*/metrics.jsonl")))
  arrays = np.load(predictions)
  found = Found(
    seconds | phases_of(record["seconds"], drawn, seconds["in all"]),
    arrays["labels"],
    {},
    {},
    epoch["train/loss"],
  )
  for key in arrays.files:
    method, _, condition = key.partition("/")
    if condition:
      found.conditions.setdefault(method, set()).add(condition)
    if condition == "clean":
      found.logits[method] = arrays[key][0]
  return found


def phases_of(
  parts: dict[str, dict[str, float]], drawn: float, total: float
) -> dict[str, float]:
  """Returns the phases of a run of this package.

  Args:
    parts: as times.jsonl has them.
    drawn: seconds of the evaluation in which the picture was made.
    total: seconds of the whole process.
  """
  compilation = sum(kinds.get(timing.COMPILATION, 0.0) for kinds in parts.values())
  whole = lambda *names: sum(
    sum(seconds for kind, seconds in kinds.items() if kind != timing.COMPILATION)
    for part, kinds in parts.items()
    if part.startswith(names)
  )
  (trained,) = (k for part, k in parts.items() if part.startswith("calibration-"))
  measured = {
    "networks taken over": whole("classifier-", "restorer-", "ensemble-"),
    "compilation": compilation,
    "training": trained.get("steps", 0.0),
    "validation": trained.get("validation", 0.0),
    "checkpoints": trained.get("checkpoints", 0.0),
    "evaluation": whole("evaluation") - drawn,
    "report": whole("report") + drawn,
  }
  return {"start-up": total - sum(measured.values()), **measured}


def run_theirs(
  place: pathlib.Path, args: argparse.Namespace, classes: int, compiled: bool
) -> Found:
  """Runs the PyTorch program.

  Args:
    place: has the photographs and the weights.
    args: the settings.
    classes: their number.
    compiled: with torch.compile.
  """
  out = place / "theirs"
  shutil.rmtree(out, ignore_errors=True)
  out.mkdir()
  command = ["benchmarks/torch_program.py", str(place / "photos"), f"--out={out}"]
  command += [f"--weights={place / 'method.pth'}", f"--classes={classes}"]
  same = ("backbone", "depth", "size", "batch", "rounds", "rate")
  command += [f"--{name}={getattr(args, name)}" for name in same]
  command += ["--compiled"] if compiled else []
  seconds = run(
    command, place / "theirs.txt", TORCHINDUCTOR_CACHE_DIR=str(out / "kept")
  )
  results = json.loads((out / "results.json").read_text())
  for what, asked in (("trained", args.images), ("tested", args.tested)):
    if results[what] != asked:
      raise SystemExit(f"PyTorch's program {what} {results[what]} images, not {asked}")
  arrays = np.load(out / "logits.npz")
  told = {name: results["seconds"].get(name, 0.0) for name in PHASES}
  told["networks taken over"] = results["seconds"]["networks"]
  told["compilation"] = results["seconds"]["first calls"]
  told["start-up"] = seconds["in all"] - sum(told.values())
  return Found(
    seconds | told,
    arrays["labels"],
    {row: set(found) for row, found in results["accuracy"].items()},
    {row: arrays[row] for row in results["accuracy"]},
    results["loss"],
  )


def check_agreement(what: str, value: np.ndarray, reference: np.ndarray) -> float:
  """Returns the relative error of what sets the logits [N, K] of images apart.

  Random networks say nearly the same of all images, which would hide any difference.

  Raises:
    SystemExit: it shows another computation.
  """
  mean = reference.mean(0)
  return evaluation.check_agreement(what, value - mean, reference - mean, TOLERANCE)


def check_same_work(name: str, found: Found, other: Found) -> float:
  """Returns the largest relative error of the frozen classifier's logits.

  Raises:
    SystemExit: two sides did different things.
  """
  if not np.array_equal(found.labels, other.labels):
    raise SystemExit(f"{name}: the sides evaluate different images")
  if found.conditions != other.conditions:
    raise SystemExit(
      f"{name}: the sides evaluate different things: {found.conditions}, "
      f"{other.conditions}"
    )
  frozen = [method for method in other.logits if method.startswith("classifier")]
  return max(
    check_agreement(f"{name}, {method}", found.logits[method], other.logits[method])
    for method in frozen
  )


def check_trained(out: pathlib.Path) -> float:
  """Returns the largest relative error of this package with PyTorch's weights.

  Args:
    out: where the program left them, and the logits of clean images.

  Raises:
    SystemExit: the logits are others.
  """
  trained = runs.find(out / "trained.pth", map_name="l1")
  alone = dataclasses.replace(trained.method, ensemble=None)
  names = {
    "degraded_logits": "classifier",
    "restored_logits": "classifier-restored",
    "logits": "oracle-restored-ensemble",
  }

  @jax.jit
  def compute(variables, images):
    outputs = trained.method.outputs(variables, images, images)
    found = {row: outputs[name] for name, row in names.items()}
    return found | {"oracle-restored": alone.logits(variables, images, images)}

  arrays = np.load(out / "logits.npz")
  images = arrays["clean"].transpose(0, 2, 3, 1)
  found = compute(trained.variables, images)
  return max(
    check_agreement(f"{row}, trained", np.asarray(value), arrays[row][: len(images)])
    for row, value in found.items()
  )


def measure(place: pathlib.Path, args: argparse.Namespace) -> dict[str, Any]:
  """Runs the sides in turn; returns medians, ratios and errors."""
  classes = write_photos(place / "photos", args)
  write_weights(place / "method.pth", classes, args)
  all_seconds: dict[str, list[dict[str, float]]] = {side: [] for side in args.sides}
  results: dict[str, Any] = {"classes": classes, "loss": {}, "relative_error": {}}
  for _ in range(args.repeats):
    first = None
    for side in args.sides:
      if side.startswith("jax"):
        found = run_ours(place, args, side == "jax_kept")
      else:
        found = run_theirs(place, args, classes, side == "torch_compiled")
        results["relative_error"][f"{side}, trained"] = check_trained(place / "theirs")
      all_seconds[side].append(found.seconds)
      results["loss"][side] = found.loss
      if first is not None:
        results["relative_error"][side] = check_same_work(side, found, first)
      first = first or found
      print(f"{side}: {found.seconds['in all']:.1f} s", flush=True)
  median = lambda records, name: statistics.median(one[name] for one in records)
  results["sides"] = {
    side: {name: median(records, name) for name in records[0]}
    for side, records in all_seconds.items()
  }
  for seconds in results["sides"].values():
    seconds["training per image"] = seconds["training"] / args.images
    seconds["evaluation per image"] = seconds["evaluation"] / args.tested
  if "torch" in args.sides:
    theirs = results["sides"]["torch"]
    names = ("training", "evaluation", "in all", "processor")
    results["ratio"] = {
      side: {name: seconds[name] / theirs[name] for name in names}
      for side, seconds in results["sides"].items()
      if side != "torch"
    }
  return results


def report(results: dict[str, Any]) -> None:
  """Prints the results."""
  sides = results["sides"]
  print("seconds".ljust(24) + "".join(side.rjust(16) for side in sides))
  per_image = ("training per image", "evaluation per image")
  for name in (*PHASES, "in all", "processor", *per_image):
    digits = 2 if name in per_image else 1
    cells = (f"{seconds[name]:.{digits}f}".rjust(16) for seconds in sides.values())
    print(name.ljust(24) + "".join(cells))
  for side, ratio in results.get("ratio", {}).items():
    listed = ", ".join(f"{name} {value:.2f}" for name, value in ratio.items())
    print(f"{side}, ratio to torch: {listed}")
  losses = ", ".join(f"{side} {loss:.4f}" for side, loss in results["loss"].items())
  print(f"mean loss of the epoch: {losses}")
  errors = (f"{name} {error:.1g}" for name, error in results["relative_error"].items())
  print(f"relative error of clean images' logits less their mean: {', '.join(errors)}")


def parse() -> argparse.Namespace:
  """Returns the command line's settings."""
  parser = side_by_side.parser(__doc__, "sides", SIDES)
  photos = pathlib.Path(__file__).parents[2] / "shared" / "caltech101"
  parser.set_defaults(
    sides=["jax", "torch"], repeats=1, photos=str(photos) if photos.is_dir() else None
  )
  parser.add_argument("--images", type=int, default=40, help="that are trained on")
  parser.add_argument(
    "--tested", type=int, default=8, help="that are evaluated; as many are validated"
  )
  parser.add_argument(
    "--photos", help="a folder of class folders; empty: the embedded photographs"
  )
  parser.add_argument("--rounds", type=int, default=1, help="draws of noise")
  parser.add_argument("--rate", type=float, default=1e-5, help="of learning")
  parser.add_argument("--backbone", default="resnet50", help="a ResNet of torchvision")
  parser.add_argument("--depth", type=int, default=20, help="of DnCNN")
  args = parser.parse_args()
  for name in ("images", "tested"):
    count = getattr(args, name)
    if count % args.batch or count < 2 * args.batch:
      parser.error(f"--{name} must be two batches of --batch, or more of them")
  if "jax_kept" in args.sides and args.sides[0] != "jax":
    parser.error("--sides: jax_kept comes after jax")
  return args


def main() -> None:
  """Prints the comparison, and writes --json."""
  args = parse()
  jax.config.update("jax_platforms", "cpu")
  results = {"device": side_by_side.device_name(), **vars(args)}
  print(
    f"{results['device']}; {args.images} images trained on, {args.tested} evaluated, "
    f"{args.size} px, batches of {args.batch}, {args.backbone}, DnCNN-{args.depth}",
    flush=True,
  )
  with tempfile.TemporaryDirectory() as directory:
    results |= measure(pathlib.Path(directory), args)
  report(results)
  side_by_side.save(results, args.json)


if __name__ == "__main__":
  main()
