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
import glob
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from fidelity_jax import (
  boundary,
  errors,
  files,
  inference,
  platform,
  progress,
  signals,
  streams,
)
from fidelity_jax.data.images import SUFFIXES

_RECORDS = "predictions.jsonl"
_MADE_OF = "predict.json"


def find(places: Iterable[str]) -> dict[str, str]:
  """Returns the images that a command line names: paths, by names that differ.

  Args:
    places: of images; of folders, whose images are searched recursively; patterns, as
      "photos/*.jpg"; or "-" for standard input, one a line.

  Returns:
    Paths in order. The name of a folder's image is its path in the folder.

  Raises:
    UsageError: a place is empty or is not there, or two images have one name.
  """
  found: dict[str, str] = {}
  for place in places:
    if place == "-":
      lines = (line.strip() for line in sys.stdin)
      pairs = [(os.path.basename(line), line) for line in lines if line]
    else:
      pairs = _at(str(files.expand(place)))
    for name, path in pairs:
      if found.setdefault(name, path) != path:
        raise errors.UsageError(
          f"{found[name]} and {path} are two images of one name: name the folder above "
          "them instead."
        )
  if not found:
    raise errors.UsageError("no image is named.")
  return found


def _at(place: str) -> list[tuple[str, str]]:
  if os.path.isdir(place):
    inside = [
      os.path.relpath(os.path.join(folder, file), place)
      for folder, _, names in os.walk(place)
      for file in names
      if os.path.splitext(file)[1].lower() in SUFFIXES and not file.startswith(".")
    ]
    if not inside:
      raise errors.UsageError(f"{place} has no images in it.")
    return [(name, os.path.join(place, name)) for name in sorted(inside)]
  if os.path.exists(place):
    return [(os.path.basename(place), place)]
  if matching := sorted(glob.glob(place, recursive=True)):
    return [(os.path.basename(path), path) for path in matching]
  raise errors.UsageError(f"there is no {place}: name an image, a folder or a pattern.")


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
          if self.picture(known["file"]).is_file():
            self.done[known["file"]] = known
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
    path = self.picture(record["file"])
    with errors.while_doing(f"writing {path}"):
      path.parent.mkdir(parents=True, exist_ok=True)
      files.write_bytes(path, png)
      self._file.write(json.dumps(record) + "\n")
      self._file.flush()

  def close(self) -> None:
    """Closes the file of lines."""
    self._file.close()


def record(name: str, result: inference.Result, top: int) -> dict[str, Any]:
  """Returns what is told of one image, JSON-able.

  Args:
    name: the image's.
    result: for it alone.
    top: how many classes to tell.
  """
  told: dict[str, Any] = {"file": name}
  if result.logits is not None:
    told["top"] = _told(result.top(top)[0])
    told["on_input"] = _told(result.top(1, result.degraded_logits)[0])[0]
    if result.restored_logits is not None:
      told["on_restored"] = _told(result.top(1, result.restored_logits)[0])[0]
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


def _as_table(names: Iterable[str]) -> Callable[[dict[str, Any] | None], None]:
  width = min(max(map(len, names), default=4), 48)

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
  model: inference.Model, args: argparse.Namespace, kept: _Kept | None, names: dict
) -> Iterator[dict[str, Any] | str]:
  """Yields a record for each image, or what is wrong with it."""
  from fidelity_jax.report import pictures, predicted

  done = kept.done if kept else {}
  waiting = {name: path for name, path in names.items() if name not in done}
  clean = _clean(args.clean, {path: name for name, path in waiting.items()})
  found = model.stream(waiting.values(), clean)
  for name in names:
    if name in done:
      yield done[name]
      continue
    streamed = next(found)
    if streamed.result is None:
      yield streamed.problem
      continue
    told = record(name, streamed.result, args.top)
    if kept:
      path = names[name]
      whole = model.whole(path, clean(path) if clean else None) if args.full else None
      shown = streamed.result, model.map_name, name, whole
      kept.add(told, pictures.png(functools.partial(predicted.draw, *shown)))
    yield told


def _clean(
  place: str | None, names: dict[str, str]
) -> Callable[[str], str | os.PathLike] | None:
  """Returns what tells an image's clean one."""
  if place is None:
    return None
  root = files.expand(place)
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
  names = find(args.images)
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
  write = {"jsonl": _as_json, "csv": _as_csv(args.top), "table": _as_table(names)}
  write = write[args.format]
  problems, bar = [], progress.Progress("predict", len(names), unit="image")
  write(None)
  for number, found in enumerate(_predicted(model, args, kept, names), 1):
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
      f"{len(problems)} of {len(names)} images could not be used, the first: "
      f"{problems[0]}"
    )
