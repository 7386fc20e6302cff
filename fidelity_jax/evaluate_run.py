r"""Evaluates a run on a labelled folder of other images.

  fidelity_jax evaluate RUN FOLDER --out=DIR [--degradation=KIND | --as_is] [--rounds=N]

RUN is an experiment's directory, as runs/demo/oracle-1a2b3c4d, a checkpoint or an
exported file. FOLDER has a sub-folder for each class, named as the run's classes are;
some classes may be absent. Of a run whose classes nobody named, the sub-folders are
named by their numbers, or are as many, in the classes' order. If FOLDER has sub-folders
train, val and test, test is taken.

All methods of the run are shown side by side: of an exported file the whole method
alone. The images are degraded as the run was made for, by noise where it does not say,
or by another KIND; with --as_is they are taken as they are: then their own degradation
counts, and what needs the clean images is left out.
"""

import argparse
import dataclasses
import pathlib
import shlex
import sys
from collections.abc import Sequence

import msgspec
from ml_collections import ConfigDict

from fidelity_jax import (
  boundary,
  data,
  degradations,
  errors,
  files,
  given,
  inference,
  locations,
  measurements,
  plan,
  platform,
  progress,
  report,
  results,
  runs,
  schema,
  sharding,
  signals,
  stages,
  study,
  subjects,
)
from fidelity_jax.data import classes

# What is measured against clean images, or steered by them.
_NEED_CLEAN = ("restoration", "estimation", "oracle")


@dataclasses.dataclass(frozen=True)
class _Chosen(plan.Planned):
  """An experiment of which only some is measured, or one that nobody here trained."""

  chosen: tuple[subjects.Subject, ...]

  def subjects(self) -> list[subjects.Subject]:
    """Returns what is measured."""
    return list(self.chosen)


def evaluate(
  model: inference.Model,
  folder: str,
  out: pathlib.Path,
  as_is: bool = False,
  rounds: int | None = None,
  degradation: str | None = None,
  command: str = "",
) -> None:
  """Evaluates a run's methods on a labelled folder, and writes a report.

  Args:
    model: the run, see `inference.load`.
    folder: see the module.
    out: directory for report.html, results.json and so on, and for measurements, which
      are not repeated; made where absent.
    as_is: do not degrade the images.
    rounds: draws of noise per image, None for the experiment's own.
    degradation: a kind, or several joined by "+"; None for what the run is about.
    command: for the record.

  Raises:
    UsageError: the folder has other classes, the run does not classify, or there is no
      such degradation.
    RunError: something cannot be read or written.
  """
  if not model.class_names:
    raise errors.UsageError(
      f"{model.name} does not classify, it only restores images: name a run with a "
      "classifier."
    )
  for kind in [] if degradation is None else degradation.split("+"):
    errors.check_choice("kind in --degradation", kind, degradations.KINDS)
  if not locations.expand(folder).exists():
    raise errors.UsageError(f"{folder}: there is no such folder.")
  if any(out.glob("*/config.json")) or (out / "experiment.json").exists():
    raise errors.UsageError(
      f"--out={out} has other experiments in it: name a directory for this one alone."
    )
  with files.locked(out):
    report.check(out)
    files.check_directory(out / measurements.DIRECTORY, write=True)
    planned = _planned(model, folder, degradation, as_is)
    config = planned.config
    dataset = _with_classes(data.load(config.dataset, "test"), model, folder)
    config.evaluation.rounds = rounds or config.evaluation.rounds
    # Batches are filled up.
    config.evaluation.batch_size = min(config.evaluation.batch_size, len(dataset))
    work = study.Study(
      name=model.name,
      shows=f"{model.name} on {folder}{', as it is' if as_is else ''}",
      sections=("tables", "curves"),
      class_name=None,
      experiments=[config],
      shard=None,
      lone=True,
    )
    signals.work_begins()
    tests = {planned.name: dataset}
    content = results.gather(work, plan.Plan([planned]), tests, {}, out, out, command)
    report.write(out, _as_it_is(content) if as_is else content)


def _planned(
  model: inference.Model, folder: str, degradation: str | None, as_is: bool
) -> plan.Planned:
  """Returns a run as an experiment on a folder.

  Raises:
    UsageError: the run does nothing without clean images, or the degradation is too
      much for its images.
  """
  own = model.run and model.run.planned
  dataset = data.default_config("folder")
  dataset.image_size, dataset.path = model.image_size, folder
  dataset.fractions = (0.0, 0.0, 1.0)
  if own:
    config = own.config.copy_and_resolve_references()
    dataset.max_pixels = config.dataset.max_pixels
    config.dataset = dataset
    with config.unlocked():
      # Not the devices that it was trained on.
      config.mesh = sharding.default_config()
  else:
    config = given.config_for(model, dataset)
  if as_is or degradation:
    # It may be a list.
    del config.degradation
    config.degradation = ConfigDict({"kind": "clean" if as_is else degradation})
  elif not own and model.about is None:
    progress.say(
      f"{model.name} does not say what degradation it is for: {given.DEGRADATION} is "
      "taken; --degradation=KIND names another."
    )
  schema.check_degradation(config, model.image_size, "config")
  if own:
    last, further = own.last, own.further
    found = subjects.of_experiment(config, last, further)
  else:
    last, further = None, {}
    found = given.of_model(model, config)
  if as_is:
    found = [s for s in found if s.compared.method not in _NEED_CLEAN]
  if not found:
    raise errors.UsageError(
      f"{model.name} is steered by the true fidelity map, which is made from the clean "
      "images: leave --as_is out, or name a run on an estimated map."
    )
  return _Chosen(config, last, further, tuple(found))


def _as_it_is(content: report.Content) -> report.Content:
  """Returns what a report shows, without calling images clean that may not be."""
  replace, name = msgspec.structs.replace, "as_is"
  condition = lambda row: replace(row.condition, name=name)
  return dataclasses.replace(
    content,
    rows=[
      replace(row, degradation=name, condition=condition(row)) for row in content.rows
    ],
    comparisons=[
      replace(c, condition=name, group=c.group.removesuffix("clean") + name)
      for c in content.comparisons
    ],
  )


def _with_classes(
  dataset: data.Dataset, model: inference.Model, folder: str
) -> data.Dataset:
  """Returns a folder's dataset whose labels count the classes that a classifier knows.

  Where nobody named these, as many sub-folders stand for them in their own order.

  Raises:
    UsageError: it has others.
  """
  known, names = list(model.class_names), list(dataset.class_names)
  others = [name for name in names if name not in known]
  if others and not model.classes_named and len(names) == len(known):
    # As torchvision's ImageFolder and this package count them.
    known = sorted(names)
    shown = ", ".join(f"{i} is {name!r}" for i, name in enumerate(known[:12]))
    progress.say(
      f"nobody named the {len(known)} classes of {model.name}: the sub-folders, sorted "
      f"as text, are taken for them: {shown}{', ...' if len(known) > 12 else ''}."
    )
  elif not model.classes_named and not others:
    progress.say(
      f"nobody named the classes of {model.name}: the sub-folders' names are taken for "
      f"their numbers, 0 to {len(known) - 1}."
    )
  elif others and not model.classes_named:
    raise errors.UsageError(
      f"nobody named the {len(known)} classes of {model.name}, and {folder} has "
      f"{len(names)} sub-folders: name them by numbers, 0 to {len(known) - 1}, or have "
      "one for each class, in the classes' order."
    )
  return classes.relabelled(dataset, known, model.name)


def _tables(report_md: str) -> str:
  """Returns a report's first section, which has the tables of results."""
  return "## " + report_md.split("\n## ")[1]


def parser() -> boundary.Parser:
  """Returns the command's parser."""
  made = boundary.Parser(
    prog="fidelity_jax evaluate",
    description="Evaluate a run on a labelled folder of images.",
  )
  made.add_argument(
    "run", metavar="RUN", help="an experiment's directory, a checkpoint, an export"
  )
  made.add_argument("folder", metavar="FOLDER", help="with a sub-folder per class")
  made.add_argument("--out", required=True, metavar="DIR", help="directory to write")
  how = made.add_mutually_exclusive_group()
  how.add_argument(
    "--as_is",
    action="store_true",
    help="take the images as they are, degraded by whatever degraded them",
  )
  how.add_argument(
    "--degradation",
    metavar="KIND",
    help=f"degrade them by another kind: {', '.join(degradations.KINDS)}, or several "
    "joined by + (what the run was made for; awgn if it does not say)",
  )
  made.add_argument("--rounds", type=int, help="draws of noise per image")
  runs.add_wiring(made)
  return made


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit status."""
  arguments = sys.argv[1:] if arguments is None else arguments
  return boundary.run(lambda: _evaluate(parser().parse_args(arguments), arguments))


def _evaluate(args: argparse.Namespace, arguments: Sequence[str]) -> None:
  signals.interrupt("while it looked at its inputs", "nothing is lost")
  platform.set_up()
  platform.keep_compiled()
  if args.rounds is not None and not 1 <= args.rounds <= 1_000_000:
    raise errors.UsageError(f"--rounds={args.rounds}: write a number from 1 on.")
  out = locations.expand(args.out, write=True)
  stages.check_workdir(out)
  command = shlex.join(["fidelity_jax", "evaluate", *arguments])
  how = args.as_is, args.rounds, args.degradation
  model = inference.load(args.run, **runs.wiring_of(args))
  evaluate(model, args.folder, out, *how, command)
  print(_tables(files.read_bytes(out / "report.md").decode()))
  print(f"report.html, tables and pictures: in {out}.")
