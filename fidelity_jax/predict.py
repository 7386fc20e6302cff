r"""Classifies images, and draws what the networks make of them.

  fidelity_jax predict RUN IMAGE|FOLDER|GLOB|- ... [--out=DIR] [--format=table]

RUN is an experiment's directory (runs/demo/pretrained-1a2b3c4d, or without the digest),
a checkpoint or a directory or file (.jax, .onnx) that `fidelity_jax export` wrote. "-"
reads names of images from standard input, one a line. With --out, a picture for each
image: as given, restored, the fidelity map, and the predictions; what is there already,
of the same content, is not computed again.
"""

import argparse
import contextlib
import csv
import functools
import io
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Self

import tqdm

from fidelity_jax import (
  boundary,
  errors,
  files,
  inference,
  locations,
  overlap,
  photos,
  platform,
  progress,
  runs,
  signals,
  streams,
)

_RECORDS = "predictions.jsonl"
_MADE_OF = "predict.json"


def find(places: Iterable[str], out: pathlib.Path | None = None) -> list[photos.Found]:
  """Returns the images that a command line names.

  Args:
    places: see `photos.find`; "-" stands for those on standard input, one a line, which
      need not all be there.
    out: a folder to leave out, in which each name gets a picture.

  Raises:
    UsageError: a place is empty or is not there, is `out` itself, or two images have
      one picture.
  """
  found = []
  for place in places:
    if place == "-":
      lines = (line.strip(b"\r\n") for line in sys.stdin.buffer)
      paths = [pathlib.Path(os.fsdecode(line)) for line in lines if line]
      found += [photos.Found(path, path.name) for path in paths]
      continue
    if out is not None and out.is_dir() and locations.expand(place).resolve() == out:
      raise errors.UsageError(f"--out={out} has the images in it: name another.")
    found += photos.find([place], out)
  if not found:
    raise errors.UsageError("no image is named.")
  known: dict[str, pathlib.Path] = {}
  for one in found if out else ():
    if known.setdefault(one.name, one.path) != one.path:
      raise errors.UsageError(
        f"{known[one.name]} and {one.path} would have one picture: name the folder "
        "above them instead."
      )
  return found


class _Kept:
  """What is written to --out: a picture for each image, and a line of JSON."""

  def __init__(self, out: pathlib.Path, made_of: Any):
    """Opens the directory, which may have a part of it already.

    Raises:
      UsageError: it holds what was made of something else.
      RunError: it cannot be written.
    """
    self._out = out
    with errors.while_doing(f"making the directory {out}"):
      out.mkdir(parents=True, exist_ok=True)
    files.check_directory(out, write=True)
    record, digest = out / _MADE_OF, files.digest(made_of)
    if not record.exists():
      files.write_json(record, {"made_of": digest})
    elif files.read_json(record, "delete it.").get("made_of") != digest:
      raise errors.UsageError(
        f"{out} has predictions of another run or with other settings: name another "
        "directory with --out."
      )
    path = out / _RECORDS
    # By the image's name and content.
    self.done: dict[tuple[str, str], dict[str, Any]] = {}
    if path.exists():
      # The last line may not be whole.
      for line in files.read_bytes(path).decode(errors="replace").splitlines():
        try:
          known = json.loads(line)
          if self.picture(known["name"]).is_file():
            self.done[known["name"], known["sha256"]] = known
        except (ValueError, LookupError, TypeError):
          continue
      whole = "".join(json.dumps(known) + "\n" for known in self.done.values())
      files.write_bytes(path, whole.encode())
    self._file = open(path, "a", encoding="utf-8")

  def picture(self, name: str) -> pathlib.Path:
    """Returns the path of an image's picture."""
    return self._out / f"{name}.png"

  def add(
    self, found: photos.Found, sha256: str, told: dict[str, Any], png: bytes
  ) -> None:
    """Writes an image's picture, then its line."""
    path = self.picture(found.name)
    record = {"name": found.name, "sha256": sha256, **told}
    with errors.while_doing(f"writing {path}"):
      path.parent.mkdir(parents=True, exist_ok=True)
      files.write_bytes(path, png)
      self._file.write(json.dumps(record) + "\n")
      self._file.flush()

  def __enter__(self) -> Self:
    """Returns itself."""
    return self

  def __exit__(self, *_: object) -> None:
    """Closes the file of lines."""
    self._file.close()


def record(found: photos.Found, result: inference.Result, top: int) -> dict[str, Any]:
  """Returns what is told of one image, JSON-able.

  Args:
    found: the image.
    result: for it alone.
    top: how many classes to tell.
  """
  told: dict[str, Any] = {"file": streams.named(str(found.path))}
  if result.logits is not None:
    told["top"] = _told(result.top(top)[0])
    frozen = {"restored": result.restored_logits, "input": result.degraded_logits}
    for seen, logits in frozen.items():
      if logits is not None:
        told[f"on_{seen}"] = _told(result.top(1, logits)[0])[0]
  if result.fidelity_map is not None:
    told["mean_map"] = round(float(result.fidelity_map.mean()), 6)
  return told


def _told(classes: list[tuple[str, float]]) -> list[dict[str, Any]]:
  return [{"label": name, "probability": round(p, 6)} for name, p in classes]


Write = Callable[[dict[str, Any] | None], str]


def _as_csv(top: int) -> Write:
  """Returns what makes a line of a record, and the header of None."""
  numbers = range(1, top + 1)

  def line(cells: Iterable[Any]) -> str:
    csv.writer(text := io.StringIO(), lineterminator="").writerow(cells)
    return text.getvalue()

  def write(told: dict[str, Any] | None) -> str:
    if told is None:
      named = [f"{what}_{i}" for i in numbers for what in ("label", "probability")]
      return line(["file", *named, "on_restored", "on_input", "mean_map"])
    cells = [x for one in told.get("top", ()) for x in one.values()]
    cells += [""] * (2 * top - len(cells))
    others = [told.get(k, {}).get("label", "") for k in ("on_restored", "on_input")]
    return line([told["file"], *cells, *others, told.get("mean_map", "")])

  return write


def _as_json(told: dict[str, Any] | None) -> str:
  return "" if told is None else json.dumps(told)


def _as_table(found: Iterable[photos.Found]) -> Write:
  width = min(max(len(str(one.path)) for one in found), 48)

  def line(file: str, *cells: str) -> str:
    shown = file if len(file) <= width else f"…{file[1 - width :]}"
    return f"{shown:{width}}  " + "  ".join(f"{c:24.24}" for c in cells).rstrip()

  def write(told: dict[str, Any] | None) -> str:
    if told is None:
      return line("image", "prediction", "frozen, on restored", "frozen, on input")
    shown = [told.get("top", [None])[0], told.get("on_restored"), told.get("on_input")]
    cells = [
      f"{one['probability']:4.0%} {one['label']}" if one else "-" for one in shown
    ]
    return line(streams.plain(told["file"]), *map(streams.plain, cells))

  return write


class _Job:
  """Predicts images that are not predicted yet; tells of all."""

  def __init__(
    self, model: inference.Model, args: argparse.Namespace, kept: _Kept | None
  ):
    self._model, self._args, self._kept = model, args, kept
    self._clean = None if args.clean is None else locations.expand(args.clean)

  def __call__(
    self, found: Sequence[photos.Found]
  ) -> Iterator[tuple[dict[str, Any] | None, str]]:
    """Yields for each image a record, or None and what is wrong with it.

    Decoding, computing and drawing overlap.
    """
    done = {one: self._known(one) for one in found}
    waiting = [one for one in found if done[one] is None]
    names = {str(one.path): one for one in waiting}
    clean = self._clean and (lambda path: self._clean_of(names[path]))
    streamed = self._model.stream([one.path for one in waiting], clean)
    drawn = overlap.mapped(self._drawn, zip(waiting, streamed, strict=True), threads=1)
    with contextlib.closing(drawn):
      for one in found:
        if (told := done[one]) is not None:
          told = {k: v for k, v in told.items() if k not in ("name", "sha256")}
          yield told | {"file": streams.named(str(one.path))}, ""
          continue
        told, png, problem = next(drawn)
        if png is not None:
          self._kept.add(one, self._digest(one), told, png)
        yield told, problem

  def _clean_of(self, found: photos.Found) -> pathlib.Path:
    return self._clean / found.name

  def _digest(self, found: photos.Found) -> str:
    """Returns what tells whether an image, or its clean one, was exchanged."""
    paths = [found.path, *([self._clean_of(found)] if self._clean else [])]
    return files.digest([files.sha256(path) for path in paths])

  def _known(self, found: photos.Found) -> dict[str, Any] | None:
    if self._kept is None or not self._kept.done:
      return None
    try:
      return self._kept.done.get((found.name, self._digest(found)))
    except OSError:
      # It is named when it is read.
      return None

  def _drawn(
    self, given: tuple[photos.Found, inference.Streamed]
  ) -> tuple[dict[str, Any] | None, bytes | None, str]:
    """Returns an image's record and its picture, or what is wrong with it."""
    from fidelity_jax.report import pictures, predicted

    found, streamed = given
    if streamed.result is None:
      return None, None, streamed.problem
    told, png = record(found, streamed.result, self._args.top), None
    if self._kept is not None:
      whole = None
      if self._args.full:
        clean = self._clean_of(found) if self._clean else None
        try:
          whole = self._model.whole(found.path, clean)
        except errors.UsageError as error:
          return None, None, f"{found.path}: {error}"
      shown = streamed.result, self._model.map_name, found.name, whole
      png = pictures.png(functools.partial(predicted.draw, *shown))
    return told, png, ""


def parser() -> boundary.Parser:
  """Returns the command's parser."""
  made = boundary.Parser(
    prog="fidelity_jax predict",
    description="Classify images; draw restored images and fidelity maps.",
  )
  made.add_argument(
    "run", metavar="RUN", help="an experiment's directory, a checkpoint, an export"
  )
  made.add_argument(
    "images",
    nargs="+",
    metavar="IMAGE",
    help="images, folders, patterns, or - for names on standard input",
  )
  made.add_argument("--out", metavar="DIR", help="draw a picture of each image there")
  made.add_argument(
    "--full",
    action="store_true",
    help="show the whole image restored and mapped, not the square that is classified",
  )
  made.add_argument(
    "--format", choices=("table", "jsonl", "csv"), default="table", help="(table)"
  )
  made.add_argument("--top", type=int, default=5, help="classes to tell (5)")
  made.add_argument(
    "--clean",
    metavar="DIR",
    help="clean images of the same names, for runs on the true fidelity map",
  )
  runs.add_wiring(made)
  return made


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit status."""
  return boundary.run(lambda: _predict(parser().parse_args(arguments)))


def _predict(args: argparse.Namespace) -> None:
  kept = "finished pictures are kept" if args.out else "nothing is kept"
  signals.interrupt("while it predicted", kept)
  platform.set_up()
  platform.keep_compiled()
  if args.top < 1:
    raise errors.UsageError(f"--top={args.top}: write a number from 1 on.")
  if args.full and args.out is None:
    raise errors.UsageError("--full draws whole images: say where with --out=DIR.")
  out = None if args.out is None else locations.expand(args.out, write=True).resolve()
  chosen = find(args.images, out)
  wiring = runs.wiring_of(args)
  model = inference.load(args.run, **wiring)
  _check(model, args)
  writes = {"jsonl": _as_json, "csv": _as_csv(args.top), "table": _as_table(chosen)}
  of = [model.digest, wiring, args.top, args.clean is not None, args.full]
  with contextlib.nullcontext() if out is None else _Kept(out, of) as kept:
    try:
      problems = _tell(
        _Job(model, args, kept)(chosen), writes[args.format], len(chosen)
      )
    except BrokenPipeError:
      # Whoever reads the lines has seen enough.
      return
  if out is not None:
    progress.say(f"pictures and {_RECORDS}: in {args.out}.")
  if problems:
    raise errors.RunError(
      f"{len(problems)} of {len(chosen)} images could not be used, the first: "
      f"{problems[0]}"
    )


def _check(model: inference.Model, args: argparse.Namespace) -> None:
  """Raises UsageError if a model cannot do what is asked for."""
  if model.needs_clean and args.clean is None:
    raise errors.UsageError(
      f"{model.name} is steered by the true fidelity map, which is made from the clean "
      "images: name their folder with --clean=DIR, or use a run on an estimated map "
      "(pretrained, end_to_end)."
    )
  if args.clean is not None:
    if not model.needs_clean:
      raise errors.UsageError(f"{model.name} needs no clean images: leave --clean out.")
    if not locations.expand(args.clean).is_dir():
      raise errors.UsageError(f"--clean={args.clean}: there is no such folder.")
  if args.full:
    model.check_whole()


def _tell(
  results: Iterator[tuple[dict[str, Any] | None, str]], write: Write, total: int
) -> list[str]:
  """Prints a line for each image; returns what was wrong with those that have none."""
  problems, bar = [], progress.Progress("predict", total, unit="image")

  def say(line: str) -> None:
    if line:
      # Beside a live line of progress.
      tqdm.tqdm.write(line, file=sys.stdout)

  say(write(None))
  with contextlib.closing(results), contextlib.closing(bar):
    for number, (told, problem) in enumerate(results, 1):
      if told is None:
        problems.append(problem)
        progress.say(problem)
      else:
        say(write(told))
      if bar.due() or number == total:
        bar.update(number)
  return problems
