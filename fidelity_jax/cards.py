"""Model cards: what networks are for, what they were measured to do, their origin.

The form is Hugging Face's: Markdown after YAML that its tools read. What networks'
weights do not tell is in the YAML, too, from which the card of a copy is made.
"""

import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
import yaml

from fidelity_jax import (
  degradations,
  environment,
  errors,
  exported,
  files,
  given,
  titles,
)
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
# What a card calls a metric, and the digits of its values.
_SHOWN = {
  "accuracy": ("accuracy, %", 2),
  "psnr": ("PSNR, dB", 2),
  "mae": ("error of the map", 4),
}


class Result(msgspec.Struct):
  """What was measured under one condition.

  Attributes:
    condition: its name.
    metric: of `_SHOWN`.
    value: accuracy in percent, PSNR in dB, or the map's mean error.
    low: lower end of the 95 % interval.
    high: upper end.
    images: number of test images.
    rounds: draws of noise.
  """

  condition: str
  metric: str
  value: float
  low: float
  high: float
  images: int
  rounds: int


class Known(msgspec.Struct):
  """What is known of networks that their weights do not tell, "fidelity_jax" in YAML.

  Attributes:
    name: the experiment's, or the checkpoint's.
    training: what they were trained for, in sentences.
    dataset: name of the images that they were measured on; "" for none.
    measured: what the use of them that was measured is called; "" for none.
    results: what it gave.
    stages: role, name, and digest of what it gave, of each stage.
    about: for whoever measures them again; None for a checkpoint.
  """

  name: str
  training: str
  dataset: str = ""
  measured: str = ""
  results: list[Result] = []
  stages: list[tuple[str, str, str]] = []
  about: exported.About | None = None


def licence_of(front: Mapping[str, Any]) -> str:
  """Returns the licence that a card's YAML has, "unknown" if none."""
  found = front.get("license", UNKNOWN)
  return found if isinstance(found, str) else ", ".join(map(str, found))


def kept(path: pathlib.Path) -> tuple[dict[str, Any], Known | None]:
  """Returns what a copy of a card says, too.

  Args:
    path: the card's; there need not be any.

  Returns:
    (its YAML, whoever wrote it, and the part of that which an export wrote, if any).

  Raises:
    RunError: it cannot be read, or its YAML is none.
  """
  if not path.is_file():
    return {}, None
  try:
    with errors.while_doing(f"reading {path}"):
      text = files.read_bytes(path).decode("utf-8-sig")
    head = re.match(r"(?ms)---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", text)
    if head is None:
      return {}, None
    front = msgspec.convert(yaml.safe_load(head[1]) or {}, dict[str, Any])
    known = front.get("fidelity_jax")
    return front, msgspec.convert(known, Known) if known else None
  except (yaml.YAMLError, msgspec.ValidationError, UnicodeDecodeError) as error:
    reason = " ".join(str(error).split())
    raise errors.RunError(
      f"{path} is not as an export writes it ({reason:.200}): mend the YAML at its "
      "top, or move it away, and licence and results with it."
    ) from error


def card(
  run: Run,
  file: str,
  licence: str,
  source: str | None,
  known: Known,
  record: exported.Record | None = None,
  front: Mapping[str, Any] | None = None,
) -> str:
  """Returns the card of an export.

  Args:
    run: what was exported.
    file: name of the file, or of the directory.
    licence: of the weights.
    source: digest of the checkpoint that the run came from, None for an experiment.
    known: what the weights do not tell.
    record: of the file; None for a directory.
    front: YAML of that checkpoint's card, which goes along.
  """
  suffix = os.path.splitext(file)[1] if record else ""
  found = dict(front or {})
  if licence != found.get("license"):
    # Of a licence without a name of Hugging Face's.
    found = {k: v for k, v in found.items() if not k.startswith("license_")}
  found = {"license": licence} | found | _front(run, suffix, known, found)
  found["license"] = licence
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
    _training(known),
    "## Results",
    _results(known, "model-index" in found),
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


def known_of(run: Run) -> Known:
  """Returns what is known of a run."""
  rows = results(run)
  return Known(
    name=run.name,
    training=_trained(run),
    dataset=rows[0].dataset if rows else "",
    measured=titles.title(rows[0]) if rows else "",
    results=[_result(row) for row in rows],
    stages=[
      (role, stage.name, stage.finished().product) for role, stage in run.stages.items()
    ],
    about=given.about(run),
  )


def _result(row: Row) -> Result:
  metric = "accuracy" if row.accuracy is not None else "mae"
  metric = "psnr" if row.psnr is not None else metric
  measured = row.value, row.low, row.high, row.images, row.rounds
  return Result(row.condition.name, metric, *measured)


def _front(
  run: Run, suffix: str, known: Known, others: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns what is ours of the card's YAML.

  Args:
    run: what was exported.
    suffix: of the file, "" for a directory.
    known: what the weights do not tell.
    others: YAML that goes along.
  """
  classifies = run.method.classifier is not None
  task = "image-classification" if classifies else "image-to-image"
  tags = ["jax", _KINDS[suffix], "degraded-images"]
  tags += ["image-restoration"] if run.method.restorer is not None else []
  tags += ["fidelity-map"] if run.method.calibration is not None else []
  more = others.get("tags") or []
  more = [more] if isinstance(more, str) else more
  tags += [tag for tag in more if tag not in _KINDS.values()]
  found = {
    "library_name": "fidelity_jax",
    "pipeline_tag": task,
    "tags": list(dict.fromkeys(tags)),
    "fidelity_jax": msgspec.to_builtins(known),
  }
  if known.results:
    measured = [_measured(one, task, known) for one in known.results]
    found["model-index"] = [{"name": known.name, "results": measured}]
  return found


def _measured(result: Result, task: str, known: Known) -> dict[str, Any]:
  """Returns a result as Hugging Face has it: an accuracy is of 1."""
  scale = 100 if result.metric == "accuracy" else 1
  metric = {"type": result.metric, "value": result.value / scale}
  return {
    "task": {"type": task},
    "dataset": {
      "name": f"{known.dataset}, {result.condition}",
      "type": known.dataset,
      "config": result.condition,
      "split": "test",
    },
    "metrics": [metric | {"name": _SHOWN[result.metric][0]}],
  }


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


def _training(known: Known) -> str:
  if not known.results:
    return f"{known.training} Nothing was measured here."
  names = ", ".join(dict.fromkeys(one.condition for one in known.results))
  return f"{known.training} Measured on {names} images of it, and on no others."


def _results(known: Known, others: bool) -> str:
  """Returns a table of what was measured; `others` may have measured more."""
  if not known.results:
    return "Others' are in this card's `model-index`." if others else "Not evaluated."
  name, digits = _SHOWN[known.results[0].metric]
  cells = [
    (
      one.condition,
      f"{one.value:.{digits}f}",
      f"{one.low:.{digits}f} to {one.high:.{digits}f}",
      f"{one.images} x {one.rounds}",
    )
    for one in known.results
  ]
  header = ("condition", name, "95 % interval", "test images x draws of noise")
  return f"{known.measured}:\n\n{_table(header, cells)}"


def _origin(known: Known, source: str | None, record: exported.Record | None) -> str:
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
