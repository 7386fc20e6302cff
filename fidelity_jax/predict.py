r"""Classifies images, and draws what the networks make of them.

  fidelity_jax predict RUN IMAGE|FOLDER|GLOB|- ... [--out=DIR] [--format=table]

RUN is an experiment's directory (runs/demo/pretrained-1a2b3c4d, or without the digest),
a checkpoint or an exported file. "-" reads names of images from standard input, one a
line. With --out, a picture for each image: as given, restored, the fidelity map, and
the predictions; what is there already is not computed again.
"""

import argparse
import csv
import functools
import json
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from fidelity_jax import (
  boundary,
  errors,
  files,
  inference,
  photos,
  platform,
  progress,
  signals,
  streams,
)

_RECORDS = "predictions.jsonl"
_MADE_OF = "predict.json"


def find(places: Iterable[str], out: pathlib.Path | None = None) -> list[photos.Found]:
  """Returns the images that a command line names.

  Args:
    places: see `photos.find`; "-" stands for those on standard input, one a line.
    out: a folder to leave out, in which each name gets a picture.

  Raises:
    UsageError: a place is empty or is not there, or two images have one picture.
  """
  named = []
  for place in places:
    lines = (line.rstrip("\n") for line in sys.stdin) if place == "-" else (place,)
    named += [line for line in lines if line]
  found = photos.find(named, out)
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
    self.done: dict[str, dict[str, Any]] = {}
    if path.exists():
      # The last line may not be whole.
      for line in files.read_bytes(path).decode(errors="replace").splitlines():
        try:
          known = json.loads(line)
          if self.picture(known["name"]).is_file():
            self.done[known["name"]] = known
        except (ValueError, LookupError, TypeError):
          continue
      whole = "".join(json.dumps(known) + "\n" for known in self.done.values())
      files.write_bytes(path, whole.encode())
    self._file = open(path, "a", encoding="utf-8")

  def picture(self, name: str) -> pathlib.Path:
    """Returns the path of an image's picture."""
    return self._out / f"{name}.png"

  def add(self, record: dict[str, Any], png: bytes) -> None:
    """Writes an image's picture, then its line."""
    path = self.picture(record["name"])
    with errors.while_doing(f"writing {path}"):
      path.parent.mkdir(parents=True, exist_ok=True)
      files.write_bytes(path, png)
      self._file.write(json.dumps(record) + "\n")
      self._file.flush()

  def close(self) -> None:
    """Closes the file of lines."""
    self._file.close()


def record(found: photos.Found, result: inference.Result, top: int) -> dict[str, Any]:
  """Returns what is told of one image, JSON-able.

  Args:
    found: the image.
    result: for it alone.
    top: how many classes to tell.
  """
  told: dict[str, Any] = {"file": str(found.path), "name": found.name}
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


def _as_csv(top: int) -> Callable[[dict[str, Any] | None], None]:
  """Returns what writes a record as a line, and None as the header."""
  writer = csv.writer(sys.stdout, lineterminator="\n")
  numbers = range(1, top + 1)

  def write(told: dict[str, Any] | None) -> None:
    if told is None:
      named = [f"{what}_{i}" for i in numbers for what in ("label", "probability")]
      writer.writerow(["file", *named, "on_restored", "on_input", "mean_map"])
      return
    cells = [x for one in told.get("top", ()) for x in one.values()]
    cells += [""] * (2 * top - len(cells))
    others = [told.get(k, {}).get("label", "") for k in ("on_restored", "on_input")]
    writer.writerow([told["file"], *cells, *others, told.get("mean_map", "")])

  return write


def _as_json(told: dict[str, Any] | None) -> None:
  if told is not None:
    print(json.dumps(told))


def _as_table(found: Iterable[photos.Found]) -> Callable[[dict[str, Any] | None], None]:
  width = min(max(len(str(one.path)) for one in found), 48)

  def line(file, *cells):
    shown = file if len(file) <= width else f"…{file[1 - width :]}"
    print(f"{shown:{width}}  " + "  ".join(f"{cell:24.24}" for cell in cells).rstrip())

  def write(told: dict[str, Any] | None) -> None:
    if told is None:
      line("image", "prediction", "frozen, on restored", "frozen, on input")
      return
    shown = [told.get("top", [None])[0], told.get("on_restored"), told.get("on_input")]
    cells = [
      f"{one['probability']:4.0%} {one['label']}" if one else "-" for one in shown
    ]
    line(streams.plain(told["file"]), *map(streams.plain, cells))

  return write


def _predicted(
  model: inference.Model,
  args: argparse.Namespace,
  kept: _Kept | None,
  found: Sequence[photos.Found],
) -> Iterator[dict[str, Any] | str]:
  """Yields a record for each image, or what is wrong with it."""
  from fidelity_jax.report import pictures, predicted

  done = kept.done if kept else {}
  waiting = [one for one in found if one.name not in done]
  clean = _clean(args.clean, waiting)
  streamed = model.stream([one.path for one in waiting], clean)
  for one in found:
    if one.name in done:
      yield done[one.name]
      continue
    given = next(streamed)
    if given.result is None:
      yield given.problem
      continue
    told = record(one, given.result, args.top)
    if kept:
      truth = clean(given.path) if clean else None
      whole = model.whole(given.path, truth) if args.full else None
      shown = given.result, model.map_name, one.name, whole
      kept.add(told, pictures.png(functools.partial(predicted.draw, *shown)))
    yield told


def _clean(
  place: str | None, found: Iterable[photos.Found]
) -> Callable[[str], pathlib.Path] | None:
  """Returns what tells an image's clean one."""
  if place is None:
    return None
  root, names = files.expand(place), {str(one.path): one.name for one in found}
  return lambda path: root / names[path] if root.is_dir() else root


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
  return made


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit status."""
  return boundary.run(lambda: _predict(parser().parse_args(arguments)))


def _predict(args: argparse.Namespace) -> None:
  signals.interrupt("while it predicted", "finished pictures are kept")
  platform.set_up()
  if args.top < 1:
    raise errors.UsageError(f"--top={args.top}: write a number from 1 on.")
  if args.full and args.out is None:
    raise errors.UsageError("--full draws whole images: say where with --out=DIR.")
  out = None if args.out is None else files.expand(args.out)
  chosen = find(args.images, out)
  model = inference.load(args.run)
  if model.needs_clean and args.clean is None:
    raise errors.UsageError(
      f"{model.name} is steered by the true fidelity map, which is made from the clean "
      "images: name their folder with --clean=DIR, or use a run on an estimated map "
      "(pretrained, end_to_end)."
    )
  kept = None
  if args.out is not None:
    kept = _Kept(
      files.expand(args.out), [model.digest, args.top, args.clean, args.full]
    )
  write = {"jsonl": _as_json, "csv": _as_csv(args.top), "table": _as_table(chosen)}
  write = write[args.format]
  problems, bar = [], progress.Progress("predict", len(chosen), unit="image")
  write(None)
  for number, found in enumerate(_predicted(model, args, kept, chosen), 1):
    if isinstance(found, str):
      problems.append(found)
      progress.say(found)
    else:
      write(found)
    if bar.due():
      bar.update(number)
  bar.close()
  if kept:
    kept.close()
    progress.say(f"pictures and {_RECORDS}: in {args.out}.")
  if problems:
    raise errors.RunError(
      f"{len(problems)} of {len(chosen)} images could not be used, the first: "
      f"{problems[0]}"
    )
