r"""Evaluates a finished experiment on a labelled folder of other images.

  fidelity_jax evaluate RUN FOLDER --out=DIR [--as_is] [--rounds=N]

RUN is an experiment's directory, as runs/demo/oracle-1a2b3c4d. FOLDER has a sub-folder
for each class, named as the run's classes are; some classes may be absent. If it has
sub-folders train, val and test, test is taken. All methods of the experiment are shown
side by side, under the conditions that it was made for; with --as_is, on the images as
they are: then their own degradation counts, and what needs the clean images is left
out.
"""

import argparse
import dataclasses
import pathlib
import shlex
import sys
from collections.abc import Sequence

import msgspec
import numpy as np
from ml_collections import ConfigDict

from fidelity_jax import (
  boundary,
  data,
  errors,
  files,
  measurements,
  plan,
  platform,
  report,
  results,
  runs,
  signals,
  stages,
  study,
  subjects,
)


class _AsItIs(plan.Planned):
  """An experiment on images that have no clean ones beside them."""

  def subjects(self) -> list[subjects.Subject]:
    """Returns what can be measured: what does not need clean images."""
    needing = ("restoration", "estimation", "oracle")
    return [s for s in super().subjects() if s.compared.method not in needing]


def evaluate(
  run: runs.Run,
  folder: str,
  out: pathlib.Path,
  as_is: bool = False,
  rounds: int | None = None,
  command: str = "",
) -> None:
  """Evaluates a run's methods on a labelled folder, and writes a report.

  Args:
    run: of an experiment.
    folder: see the module.
    out: directory for report.html, results.json and so on, and for measurements, which
      are not repeated; made where absent.
    as_is: do not degrade the images.
    rounds: draws of noise per image, None for the experiment's own.
    command: for the record.

  Raises:
    UsageError: the folder has other classes, or the run does not classify.
    RunError: something cannot be read or written.
  """
  planned = run.planned
  if planned is None or run.method.classifier is None:
    what = "only restores images" if planned else "is a checkpoint"
    raise errors.UsageError(
      f"{run.name} {what}: name the directory of an experiment that classifies "
      "(docs/weights.md tells how to make one of a checkpoint)."
    )
  if not files.expand(folder).exists():
    raise errors.UsageError(f"{folder}: there is no such folder.")
  if any(out.glob("*/config.json")) or (out / "experiment.json").exists():
    raise errors.UsageError(
      f"--out={out} has other experiments in it: name a directory for this one alone."
    )
  with files.locked(out):
    report.check(out)
    files.check_directory(out / measurements.DIRECTORY, write=True)
    config = planned.config.copy_and_resolve_references()
    config.dataset = _dataset_config(planned.config.dataset, folder)
    config.evaluation.rounds = rounds or config.evaluation.rounds
    make = plan.Planned
    if as_is:
      make, config.degradation = _AsItIs, ConfigDict({"kind": "clean"})
    chosen = make(config, planned.last, planned.further)
    dataset = _with_classes(data.load(config.dataset, "test"), run.class_names)
    work = study.Study(
      name=run.name,
      shows=f"{run.name} on {folder}{', as it is' if as_is else ''}",
      sections=("tables", "curves"),
      class_name=None,
      experiments=[config],
      shard=None,
      lone=True,
    )
    signals.work_begins()
    tests = {chosen.name: dataset}
    content = results.gather(work, plan.Plan([chosen]), tests, {}, out, out, command)
    report.write(out, _as_it_is(content) if as_is else content)


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


def _dataset_config(own: ConfigDict, folder: str) -> ConfigDict:
  config = data.default_config("folder")
  config.image_size, config.max_pixels = own.image_size, own.max_pixels
  config.path, config.fractions = folder, (0.0, 0.0, 1.0)
  return config


def _with_classes(dataset: data.Dataset, known: Sequence[str]) -> data.Dataset:
  """Returns a dataset whose labels count the classes that a classifier knows.

  Raises:
    UsageError: it has others.
  """
  if others := [name for name in dataset.class_names if name not in known]:
    raise errors.UsageError(
      f"{others[0]!r} is no class of this run ({errors.near(others[0], known)}): name "
      f"the sub-folders as its classes, which are {', '.join(known[:8])}"
      f"{', ...' if len(known) > 8 else ''}."
    )
  numbers = np.array([list(known).index(name) for name in dataset.class_names])
  labels = numbers[np.asarray(dataset.labels)].astype(dataset.labels.dtype)
  return dataclasses.replace(dataset, labels=labels, class_names=tuple(known))


def _tables(report_md: str) -> str:
  """Returns a report's first section, which has the tables of results."""
  return "## " + report_md.split("\n## ")[1]


def parser() -> boundary.Parser:
  """Returns the command's parser."""
  made = boundary.Parser(
    prog="fidelity_jax evaluate",
    description="Evaluate a finished experiment on a labelled folder of images.",
  )
  made.add_argument("run", metavar="RUN", help="an experiment's directory")
  made.add_argument("folder", metavar="FOLDER", help="with a sub-folder per class")
  made.add_argument("--out", required=True, metavar="DIR", help="directory to write")
  made.add_argument(
    "--as_is",
    action="store_true",
    help="take the images as they are, degraded by whatever degraded them",
  )
  made.add_argument("--rounds", type=int, help="draws of noise per image")
  return made


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit status."""
  arguments = sys.argv[1:] if arguments is None else arguments
  return boundary.run(lambda: _evaluate(parser().parse_args(arguments), arguments))


def _evaluate(args: argparse.Namespace, arguments: Sequence[str]) -> None:
  signals.interrupt("while it looked at its inputs", "nothing is lost")
  platform.set_up()
  if args.rounds is not None and not 1 <= args.rounds <= 1_000_000:
    raise errors.UsageError(f"--rounds={args.rounds}: write a number from 1 on.")
  out = files.expand(args.out)
  stages.check_workdir(out)
  command = shlex.join(["fidelity_jax", "evaluate", *arguments])
  evaluate(runs.find(args.run), args.folder, out, args.as_is, args.rounds, command)
  print(_tables(files.read_bytes(out / "report.md").decode()))
  print(f"report.html, tables and pictures: in {out}.")
