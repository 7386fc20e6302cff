"""Model cards: what networks are for, what they were measured to do, their origin.

The form is Hugging Face's: Markdown after YAML that its tools read. What networks'
weights do not tell is in the YAML, too, from which the card of a copy is made.
"""

import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
import yaml

from fidelity_jax import degradations, environment, errors, exported, files, titles
from fidelity_jax.rows import Row, read
from fidelity_jax.runs import Run

UNKNOWN = "unknown"
# Classes that are named one by one.
_NAMED = 50
_KINDS = {".jax": "stablehlo", ".onnx": "onnx", "": "safetensors"}
_CODE = {
  ".jax": """\
import jax
import numpy as np
from jax import export

with open("{file}", "rb") as file:
  network = jax.jit(export.deserialize(bytearray(file.read())).call)
{images}
outputs = network({names})
print({{name: array.shape for name, array in outputs.items()}})
""",
  ".onnx": """\
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("{file}")
{images}
names = [output.name for output in session.get_outputs()]
outputs = dict(zip(names, session.run(names, {{{pairs}}})))
print({{name: array.shape for name, array in outputs.items()}})
""",
  "": """\
import jax
import numpy as np
from fidelity_jax import runs

run = runs.find("{file}")
{images}
outputs = jax.jit(run.method.outputs)(run.variables, {names})
print({{name: array.shape for name, array in outputs.items()}})
""",
}
_NEEDS = {
  ".jax": (
    "It needs `pip install jax flatbuffers` and nothing else, on a CPU, an NVIDIA GPU "
    "or a TPU. JAX promises that its versions read such a file for 6 months after the "
    "one that wrote it, and up to 3 weeks before it "
    "(<https://docs.jax.dev/en/latest/export/export.html#compatibility-guarantees>)."
  ),
  ".onnx": "It needs `pip install onnxruntime`.",
  "": "It needs fidelity_jax.",
}
# What a card calls a metric, what its values are multiplied by, and their digits.
_SHOWN = {
  "accuracy": ("accuracy, %", 100, 2),
  "psnr": ("PSNR, dB", 1, 2),
  "mae": ("error of the map", 1, 4),
}


class _Arguments(msgspec.Struct):
  """A value's 95 % interval, the number of test images, and of draws of noise."""

  low: float
  high: float
  images: int
  rounds: int


class _Metric(msgspec.Struct, omit_defaults=True):
  """A measured value; an accuracy is of 1. Cards of others have no such arguments."""

  type: str
  value: float
  name: str = ""
  args: _Arguments | None = None


class _Measured(msgspec.Struct):
  """What was measured under one condition, `dataset["config"]`."""

  task: dict[str, str]
  dataset: dict[str, str]
  metrics: list[_Metric]


class _Index(msgspec.Struct):
  """All that was measured of networks of one name."""

  name: str
  results: list[_Measured]


class _Known(msgspec.Struct):
  """What else a card says of networks that their weights do not.

  Attributes:
    name: the experiment's, or the checkpoint's.
    training: what they were trained for, in sentences.
    measured: what the use of them that was measured is called; "" for none.
    stages: role, name, and digest of what it gave, of each stage.
  """

  name: str
  training: str
  measured: str
  stages: list[tuple[str, str, str]]


class _Front(msgspec.Struct, rename={"index": "model-index"}):
  """A card's YAML: Hugging Face's fields, and what else we have to say."""

  license: str = UNKNOWN
  library_name: str = ""
  pipeline_tag: str = ""
  tags: list[str] = []
  index: list[_Index] = []
  fidelity_jax: _Known | None = None


def metadata(path: pathlib.Path) -> dict[str, Any]:
  """Returns the YAML of a card; nothing if there is no card.

  Raises:
    RunError: it cannot be read, or is not as an export writes it.
  """
  if not path.is_file():
    return {}
  try:
    with errors.while_doing(f"reading {path}"):
      # The first of two documents; the other is no YAML, and is not looked at.
      found = next(yaml.safe_load_all(files.read_bytes(path)), None)
    msgspec.convert(found, _Front)
  except (yaml.YAMLError, msgspec.ValidationError, UnicodeDecodeError) as error:
    reason = " ".join(str(error).split())
    raise errors.RunError(
      f"{path} is not as an export writes it ({reason:.200}): mend the YAML at its "
      "top, or move it away, and licence and results with it."
    ) from error
  return found


def card(
  run: Run,
  file: str,
  licence: str,
  source: str | None,
  record: exported.Record | None = None,
  kept: Mapping[str, Any] | None = None,
) -> str:
  """Returns the card of an export.

  Args:
    run: what was exported.
    file: name of the file, or of the directory.
    licence: of the weights.
    source: digest of the checkpoint that the run came from, None for an experiment.
    record: of the file; None for a directory.
    kept: what that checkpoint's card says, see `metadata`. What its weights do not tell
      is taken from there.
  """
  suffix, kept = os.path.splitext(file)[1] if record else "", dict(kept or {})
  if licence != kept.get("license"):
    # Of a licence without a name of Hugging Face's.
    kept = {k: v for k, v in kept.items() if not k.startswith("license_")}
  front = _front(run, suffix, licence, msgspec.convert(kept, _Front))
  known = front.fidelity_jax
  measured = [one for index in front.index for one in index.results]
  found = kept | {k: v for k, v in msgspec.to_builtins(front).items() if v}
  if "model-index" in kept:
    # As it is: others say more in it.
    found["model-index"] = kept["model-index"]
  sections = [
    f"---\n{yaml.safe_dump(found, sort_keys=False)}---",
    f"# {known.name}",
    _introduction(run),
    "## Input and output",
    _tensors(run, record),
    "## Use",
    f"{_NEEDS[suffix]}\n\n```python\n{_code(run, file, suffix)}```",
    "## Classes",
    _classes(run),
    "## Trained for",
    _training(known, measured),
    "## Results",
    _results(known, measured),
    "## Licence",
    f"Of the weights: {licence}. Of the images that they were trained on: {UNKNOWN}. "
    f"Of weights that training started from: {UNKNOWN}. Unknown means that nobody told "
    "the program that wrote this card; it does not mean that there are no conditions. "
    "fidelity_jax itself is under Apache-2.0.",
    "## Origin",
    _origin(known, source, record),
  ]
  return "\n\n".join(sections) + "\n"


def results(run: Run) -> list[Row]:
  """Returns the measured rows of a run's own networks, used as the run uses them.

  Empty if it was not evaluated.

  Raises:
    RunError: results.json is damaged.
  """
  if run.directory is None or not (run.directory / "results.json").is_file():
    return []
  path, again = run.directory / "results.json", "run its experiment again."
  try:
    rows = [read(row) for row in files.read_json(path, again)["rows"]]
  except (LookupError, TypeError, AttributeError, msgspec.ValidationError) as error:
    raise errors.RunError(f"{path} is damaged ({error}): {again}") from error
  own = {s.name for stage in run.stages.values() for s in stage.lineage()}
  return [row for row in rows if own.issuperset(row.stages.values()) and _of(row, run)]


def _of(row: Row, run: Run) -> bool:
  """Returns whether a row is about all of a run's networks together."""
  method = run.method
  if method.calibration is not None:
    same = bool(row.ensemble) == (method.ensemble is not None)
    return same and row.method == run.stages["calibration"].config.fidelity.source
  restored = (row.restorer is not None) == (method.restorer is not None)
  if method.classifier is not None:
    return row.method == "classifier" and restored
  kind = "restoration" if method.estimator is None else "estimation"
  return row.method == kind and restored


def _front(run: Run, suffix: str, licence: str, kept: _Front) -> _Front:
  """Returns what stands in the card's YAML."""
  classifies = run.method.classifier is not None
  task = "image-classification" if classifies else "image-to-image"
  tags = ["jax", _KINDS[suffix], "degraded-images"]
  tags += ["image-restoration"] if run.method.restorer is not None else []
  tags += ["fidelity-map"] if run.method.calibration is not None else []
  others = [tag for tag in kept.tags if tag not in _KINDS.values()]
  rows = results(run)
  measured = [
    _Measured(
      {"type": task},
      {
        "name": f"{row.dataset}, {row.condition.name}",
        "type": row.dataset,
        "config": row.condition.name,
        "split": "test",
      },
      [_metric(row)],
    )
    for row in rows
  ]
  known = _Known(
    name=run.name,
    training=_trained(run),
    measured=titles.title(rows[0]) if rows else "",
    stages=[
      (k, stage.name, stage.finished().product) for k, stage in run.stages.items()
    ],
  )
  return _Front(
    license=licence,
    library_name="fidelity_jax",
    pipeline_tag=task,
    tags=list(dict.fromkeys([*tags, *others])),
    index=[_Index(run.name, measured)] if measured else kept.index,
    fidelity_jax=kept.fidelity_jax or known,
  )


def _metric(row: Row) -> _Metric:
  kind, name, scale = "mae", "error of the map", 1
  if row.accuracy is not None:
    kind, name, scale = "accuracy", "accuracy", 100
  elif row.psnr is not None:
    kind, name = "psnr", "PSNR, dB"
  args = _Arguments(row.low / scale, row.high / scale, row.images, row.rounds)
  return _Metric(kind, row.value / scale, name, args)


def _introduction(run: Run) -> str:
  method = run.method
  if method.calibration is not None:
    source = "the true" if run.needs_clean else "an estimated"
    said = (
      "Classifies degraded images. A denoiser restores the image; small modules steer "
      f"a frozen classifier by {source} fidelity map, which says pixel by pixel how "
      "far the restored image can be trusted."
    )
    if run.needs_clean:
      said += (
        " The true map is made from the clean image, which is an input, too: this is "
        "for experiments, not for use."
      )
    return said
  if method.classifier is not None:
    before = " after a denoiser restored them" if method.restorer is not None else ""
    return f"Classifies images{before}."
  also = " and estimates how far it is off" if method.estimator is not None else ""
  return f"Restores degraded images{also}."


def _tensors(run: Run, record: exported.Record | None) -> str:
  size = run.image_size
  lines = [
    f"RGB images of {size} x {size} pixels, float32 [N, {size}, {size}, 3] with values "
    "in [0, 1], any N."
  ]
  if run.method.classifier is not None:
    backbone = run.method.classifier.backbone
    lines[0] += (
      f" Normalization by the mean {backbone.mean} and the standard deviation "
      f"{backbone.std} is part of the network."
    )
  if record is not None:
    rows = [("input", *item) for item in record.inputs.items()]
    rows += [("output", *item) for item in record.outputs.items()]
    cells = [(kind, f"`{name}`", str(shape)) for kind, name, shape in rows]
    lines.append(_table(("", "name", "shape, float32"), cells))
    lines.append(f"The networks compute in {record.precision}.")
  return "\n\n".join(lines)


def _code(run: Run, file: str, suffix: str) -> str:
  names = ["degraded", *(["clean"] if run.needs_clean else [])]
  size = run.image_size
  images = [f"{name} = np.zeros((1, {size}, {size}, 3), np.float32)" for name in names]
  return _CODE[suffix].format(
    file=file,
    images="\n".join(images),
    names=", ".join(names),
    pairs=", ".join(f'"{name}": {name}' for name in names),
  )


def _classes(run: Run) -> str:
  if not run.class_names:
    return "None."
  shown = ", ".join(_plain(name) for name in run.class_names[:_NAMED])
  more = len(run.class_names) - _NAMED
  end = f" and {more} more" if more > 0 else ""
  return f"{len(run.class_names)}, in the order of the logits: {shown}{end}."


def _trained(run: Run) -> str:
  """Returns what the networks were trained for."""
  roles = ("calibration", "classifier", "estimator", "restorer")
  config = next((run.stages[r].config for r in roles if r in run.stages), None)
  if config is None:
    return f"Dataset and degradation: {UNKNOWN} (the networks came as a checkpoint)."
  steps = degradations.from_config(config.degradation).steps
  said = [
    f"{step.kind} ({step.record()['variation']}, levels {step.record()['levels']})"
    for step in steps
  ]
  found = f"Dataset {config.dataset.name}, degradation {' then '.join(said)}."
  if "classifier" in run.stages:
    source = run.stages["classifier"].config.source
    found += f" The classifier was trained on {source} images of it."
  return found


def _training(known: _Known, measured: Sequence[_Measured]) -> str:
  if not measured:
    return f"{known.training} Nothing was measured."
  names = dict.fromkeys(one.dataset.get("config", UNKNOWN) for one in measured)
  return (
    f"{known.training} Measured on {', '.join(names)} images of it, and on no others."
  )


def _results(known: _Known, measured: Sequence[_Measured]) -> str:
  found = [(one.dataset, metric) for one in measured for metric in one.metrics]
  if not found:
    return "Not evaluated."
  kind = found[0][1].type
  header, scale, digits = _SHOWN.get(kind, (kind, 1, 4))
  shown = lambda value: f"{round(scale * value, 9):.{digits}f}"
  cells = []
  for dataset, metric in found:
    if metric.type == kind:
      row, args = [dataset.get("config", UNKNOWN), shown(metric.value)], metric.args
      told = [UNKNOWN, UNKNOWN]
      if args is not None:
        told = [
          f"{shown(args.low)} to {shown(args.high)}",
          f"{args.images} x {args.rounds}",
        ]
      cells.append(row + told)
  header = ("condition", header, "95 % interval", "test images x draws of noise")
  title = f"{known.measured}:\n\n" if known.measured else ""
  return title + _table(header, cells)


def _origin(known: _Known, source: str | None, record: exported.Record | None) -> str:
  versions = record.versions if record else environment.versions()
  rows = [(role, f"`{stage}`", f"`{product}`") for role, stage, product in known.stages]
  lines = [_table(("network", "stage", "digest of what it gave"), rows)] if rows else []
  if source:
    lines.append(f"SHA-256 of the checkpoint: `{source}`.")
  if record:
    lines.append(f"SHA-256 of the file: `{record.digest}`.")
  lines.append(", ".join(f"{name} {version}" for name, version in versions.items()))
  return "\n\n".join(lines)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  lines = [header, ["---"] * len(header), *rows]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(name: str) -> str:
  """Returns a class's name without what Markdown or a terminal would act on."""
  shown = "".join(c if c.isprintable() else "?" for c in name)
  return "".join(f"\\{c}" if c in r"\`*_[]<>|#" else c for c in shown)
