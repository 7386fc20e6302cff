"""Experiments: find or train each stage, evaluate, report."""

import contextlib
import os
import pathlib
import time
from collections.abc import Iterator

import jax
from ml_collections import ConfigDict

from fidelity_jax import (
  assembly,
  boundary,
  buckets,
  data,
  errors,
  files,
  footprint,
  hosts,
  locations,
  measurements,
  mirror,
  plan,
  platform,
  progress,
  report,
  results,
  sharding,
  signals,
  stages,
  streams,
  study,
  tasks,
  timing,
  train,
  workdirs,
)
from fidelity_jax.datasets import Datasets

# Seconds between looks at what other processes have finished.
_PATIENCE = 2.0
# Beside a report: where the time of each run went that came to its end.
_TIMES = "times.jsonl"


def run(
  config: ConfigDict,
  workdir: str,
  command: str = "",
  dry_run: bool = False,
  memory: bool = False,
) -> None:
  """Runs an experiment or a study: trains what is not trained yet, evaluates, reports.

  Args:
    config: an experiment's or a study's config, as those in configs/.
    workdir: directory for stages, results and pictures; made where absent.
    command: the command, for the record.
    dry_run: only print what there is to do.
    memory: and, then, what training steps hold and send.

  Raises:
    UsageError: the config asks for something impossible.
    RunError: something fails on the way.
    Stopped: on SIGTERM or SIGINT, once everything is saved.
  """
  with timing.run() as clock:
    _run(clock, config, workdir, command, dry_run, memory)


def _run(
  clock: timing.Clock,
  config: ConfigDict,
  workdir: str,
  command: str,
  dry_run: bool,
  memory: bool,
) -> None:
  work = study.read(config)
  for experiment in work.experiments:
    plan.resolve(experiment)
  datasets, remote = Datasets(), buckets.is_address(workdir)
  if remote:
    _check_bucket(work, workdir)
  if dry_run:
    place = locations.expand(workdir)
    stages.check_workdir(place)
    planned, _ = _plan(work, place, datasets)
    lines = [plan.describe(planned, datasets, place)]
    lines += [footprint.describe(planned.stages, datasets)] if memory else []
    if hosts.first():
      print("\n".join(lines))
    return
  platform.keep_compiled()
  with contextlib.ExitStack() as held:
    if remote:
      place = held.enter_context(mirror.Mirror(workdir))
    else:
      place = locations.expand(workdir)
    held.enter_context(files.locked(place, work.shard is not None, copies=remote))
    held.enter_context(_staying(place))
    streams.log_to(place / (f"log-{hosts.index()}.txt" if hosts.index() else "log.txt"))
    stages.check_workdir(place)
    files.check_file(place / "index.md")
    planned, tests = _plan(work, place, datasets)
    files.check_directory(place / measurements.DIRECTORY, write=True)
    where = workdirs.results_directory(place, work.name, planned, tests)
    report.check(where)
    files.check_file(where / _TIMES)
    signals.work_begins()
    held.enter_context(timing.part("between stages"))
    missing = _train(work, planned, datasets, place)
    with _one_at_a_time(work, place):
      with errors.while_doing(f"making the directory {where}"):
        where.mkdir(exist_ok=True)
      hosts.wait("results")
      with timing.part("evaluation"):
        content = results.gather(work, planned, tests, missing, where, place, command)
      with timing.part("report"):
        if hosts.first():
          if content is not None:
            report.write(where, content)
          workdirs.write_experiments(where, planned, datasets)
          workdirs.write_index(place)
        hosts.wait("report")
      if hosts.first():
        clock.settle()
        for line in timing.table(clock.parts):
          progress.say(line)
        timing.remember(where / _TIMES, clock.parts, command)
    what = "experiment.json" if content is None else "report.html, tables and pictures"
    progress.say(f"{what}: in {where}.")
    if missing:
      some = ", ".join(list(missing)[:3]) + ", ..." * (len(missing) > 3)
      raise errors.RunError(
        f"{len(missing)} of {len(planned.stages)} stages are missing ({some}), see "
        f"{where / 'report.md'} or above. {next(iter(missing.values()))} The same "
        "command goes on with what is there."
      )


def _check_bucket(work: study.Study, workdir: str) -> None:
  """Raises UsageError if it takes a common disk to do what is asked."""
  if work.shard is not None:
    raise errors.UsageError(
      f"config.shard: processes share a study on a disk, not in {workdir}: leave it "
      "out, or name a directory with --workdir."
    )
  usual = sharding.default_config()
  for one in work.experiments:
    whole = one.mesh.model == 1 and one.mesh.rules == usual.rules
    if hosts.several() and not whole:
      raise errors.UsageError(
        "config.mesh splits arrays, of which each process writes its part to a disk: "
        f"name one that all share in place of {workdir} with --workdir, or leave "
        "mesh.model and mesh.rules as they are."
      )


def _plan(
  work: study.Study, place: pathlib.Path, datasets: Datasets
) -> tuple[plan.Plan, dict[str, data.Dataset]]:
  """Returns what there is to do, checked, and the test images by experiment."""
  planned = plan.make(work.experiments, place, datasets)
  plan.check(planned.stages, datasets)
  tests = {
    one.name: datasets.load(one.config.dataset, "test")
    for one in planned.experiments
    if "evaluation" in one.config
  }
  results.check_class(work, planned, tests)
  for digest, dataset in {test.fingerprint: test for test in tests.values()}.items():
    tested = [one for one in planned.experiments if one.name in tests]
    tested = [one for one in tested if tests[one.name].fingerprint == digest]
    found = {stage.name: stage for one in tested for stage in one.stages}
    plan.warn_of_leaks(list(found.values()), datasets, dataset)
  return planned, tests


@contextlib.contextmanager
def _staying(directory: pathlib.Path) -> Iterator[None]:
  """Raises RunError in place of a failure caused by a removed workdir."""
  # While it is open, its inode is not reused.
  held = os.open(directory, os.O_RDONLY)
  try:
    yield
  except errors.UsageError:
    raise
  except Exception as error:
    there = directory.is_dir() and os.path.samestat(os.fstat(held), directory.stat())
    if not isinstance(error, errors.RunError):
      # A directory that is removed while it is written to may remain, without its lock.
      there = there and (directory / ".lock").exists()
    if not there:
      raise errors.RunError(
        f"workdir {directory} was removed while the run was working in it: run the "
        "same command again to begin anew."
      ) from error
    raise
  finally:
    os.close(held)


def _train(
  work: study.Study, planned: plan.Plan, datasets: Datasets, place: pathlib.Path
) -> dict[str, str]:
  """Trains all stages that are not finished, parents first.

  A stage that fails does not stop those that do not depend on it, but in a lone
  experiment. Processes that share a study train different stages: each begins with its
  own share and goes on with what nobody else trains.

  Returns:
    For each stage that is not there, why: a sentence.
  """
  everything = planned.stages
  waiting = list(everything)
  if work.shard is not None:
    number, count = work.shard
    own = {s.name for s in everything[number - 1 :: count]}
    # A stable sort: parents stay before children in each part.
    waiting.sort(key=lambda s: s.name not in own)
  missing: dict[str, str] = {}
  told = False
  while waiting:
    for stage in list(waiting):
      parents = [parent.name for parent in stage.parents.values()]
      if lost := [name for name in parents if name in missing]:
        missing[stage.name] = f"{stage.name} needs {lost[0]}."
        waiting.remove(stage)
        break
      if any(s.name in parents for s in waiting):
        continue
      signals.stop_if_received(f"before {stage.name}")
      with _lock(work, place, stage.name) as held:
        if not held:
          continue
        waiting.remove(stage)
        done = len(everything) - len(waiting)
        try:
          with timing.part(stage.name):
            complete(stage, datasets, f"[{done}/{len(everything)}] ")
        except Exception as error:  # Any failure of one stage.
          # Of several processes, one alone may have failed.
          if work.lone or hosts.several():
            raise
          _, reason = boundary.explain(error)
          reason = reason.rpartition(f"{stage.name}: ")[2].rstrip(".")
          missing[stage.name] = f"{stage.name} failed: {reason}."
          progress.say(missing[stage.name])
        if hosts.first():
          workdirs.write_index(place)
      break
    else:
      if not told:
        names = ", ".join(stage.name for stage in waiting)
        progress.say(f"{work.name}: waiting for other processes: {names}.")
        told = True
      signals.stop_if_received("waiting for other processes")
      time.sleep(_PATIENCE)
  return missing


@contextlib.contextmanager
def _lock(work: study.Study, place: pathlib.Path, name: str) -> Iterator[bool]:
  """Tries to hold what no two processes of a study should work on at a time.

  A process that works alone has the whole workdir.
  """
  if work.shard is None:
    yield True
    return
  with files.holding(place / ".locks" / name) as held:
    yield held


@contextlib.contextmanager
def _one_at_a_time(work: study.Study, place: pathlib.Path) -> Iterator[None]:
  """Waits until no other process of the study evaluates."""
  told = False
  while True:
    with _lock(work, place, "evaluation") as held:
      if held:
        yield
        return
    if not told:
      progress.say(f"{work.name}: another process evaluates; waiting for it.")
      told = True
    signals.stop_if_received("before the evaluation")
    time.sleep(_PATIENCE)


def _seen(stage: stages.Stage) -> stages.Finished:
  """Returns the record of a stage that the first process sees finished.

  Raises:
    RunError: this one does not, for long.
  """
  where = stage.directory.parent
  return files.seen(stage.check, f"{stage.name} is finished", where)


def complete(stage: stages.Stage, datasets: Datasets, prefix: str = "") -> None:
  """Trains a stage whose parents are finished, unless it is finished itself."""
  config = stage.config
  # Parents may have been trained again since it was checked.
  record = stage.check()
  if hosts.agree(record is not None):
    record = record or _seen(stage)
    progress.say(f"{prefix}{stage.name}: finished ({record.metric} {record.score:.4g})")
    return
  if hosts.first():
    stage.begin()
  hosts.wait(f"{stage.name} begins")
  train_data = datasets.load(config.dataset, "train")
  layout = sharding.make_layout(config.mesh, config.batch_size)
  used, there = layout.mesh.size, jax.device_count()
  if used < there:
    progress.say(
      f"{stage.name}: batch_size {config.batch_size} splits evenly over "
      f"{layout.parts} x {used // layout.parts} of {there} devices: the others wait."
      if config.mesh.data == -1
      else f"{stage.name}: the mesh has {used} of {there} devices: the others wait."
    )
  task = assembly.loaded_task(stage, train_data.num_classes, layout)
  trainer = train.Trainer(
    title=f"{prefix}{stage.name}",
    task=task,
    settings=train.Settings(
      seed=config.seed,
      purpose=config.kind,
      image_size=config.dataset.image_size,
      images_per_step=tasks.base.images_per_step(config),
      epochs=config.epochs,
      warmup_epochs=config.warmup_epochs,
      validation_rounds=config.validation_rounds,
      learning_rate=config.learning_rate,
      optimizer=config.optimizer,
      checkpoint_seconds=config.checkpoint_seconds,
      workers=config.dataset.workers,
      crop_area=config.dataset.crop_area,
      crop_aspect=config.dataset.crop_aspect,
      reduced_decode=config.dataset.reduced_decode,
      precision=config.precision,
      traced=config.profile.steps,
    ),
    train_data=train_data,
    validation_data=datasets.load(config.dataset, "validation"),
    directory=stage.directory,
    layout=layout,
  )
  result = trainer.run()
  if hosts.first():
    stage.finish(result.step, task.score, result.score, result.product)
  hosts.wait(stage.name)
  if hosts.several() and stage.check() is None:
    _seen(stage)
