"""Model cards: what networks are for, what they were measured to do, their origin.

The form is Hugging Face's: Markdown after YAML that its tools read.
"""

import os
from collections.abc import Iterable, Sequence
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


def card(
  run: Run,
  file: str,
  licence: str,
  source: str | None,
  record: exported.Record | None = None,
) -> str:
  """Returns the card of an export.

  Args:
    run: what was exported.
    file: name of the file, or of the directory.
    licence: of the weights.
    source: digest of the checkpoint that the run came from, None for an experiment.
    record: of the file; None for a directory.
  """
  rows = results(run)
  suffix = os.path.splitext(file)[1] if record else ""
  sections = [
    f"---\n{yaml.safe_dump(_metadata(run, rows, suffix, licence), sort_keys=False)}---",
    f"# {run.name}",
    _introduction(run),
    "## Input and output",
    _tensors(run, record),
    "## Use",
    f"{_NEEDS[suffix]}\n\n```python\n{_code(run, file, suffix)}```",
    "## Classes",
    _classes(run),
    "## Trained for",
    _training(run, rows),
    "## Results",
    _results(rows),
    "## Licence",
    f"Of the weights: {licence}. Of the images that they were trained on: {UNKNOWN}. "
    f"Of weights that training started from: {UNKNOWN}. Unknown means that nobody told "
    "the program that wrote this card; it does not mean that there are no conditions. "
    "fidelity_jax itself is under Apache-2.0.",
    "## Origin",
    _origin(run, source, record),
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


def _metadata(
  run: Run, rows: Sequence[Row], suffix: str, licence: str
) -> dict[str, Any]:
  """Returns what stands in the card's YAML."""
  classifies = run.method.classifier is not None
  task = "image-classification" if classifies else "image-to-image"
  tags = ["jax", _KINDS[suffix], "degraded-images"]
  tags += ["image-restoration"] if run.method.restorer is not None else []
  tags += ["fidelity-map"] if run.method.calibration is not None else []
  found: dict[str, Any] = {
    "license": licence,
    "library_name": "fidelity_jax",
    "pipeline_tag": task,
    "tags": tags,
  }
  measured = [
    {
      "task": {"type": task},
      "dataset": {
        "name": f"{row.dataset}, {row.condition.name}",
        "type": row.dataset,
        "config": row.condition.name,
        "split": "test",
      },
      "metrics": [_metric(row)],
    }
    for row in rows
  ]
  if measured:
    found["model-index"] = [{"name": run.name, "results": measured}]
  return found


def _metric(row: Row) -> dict[str, Any]:
  if row.accuracy is not None:
    return {"type": "accuracy", "name": "accuracy", "value": row.accuracy / 100}
  if row.psnr is not None:
    return {"type": "psnr", "name": "PSNR, dB", "value": row.psnr}
  return {"type": "mae", "name": "error of the map", "value": row.map_error}


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


def _training(run: Run, rows: Sequence[Row]) -> str:
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
  if not rows:
    return f"{found} Nothing was measured."
  names = dict.fromkeys(row.condition.name for row in rows)
  return f"{found} Measured on {', '.join(names)} images of it, and on no others."


def _results(rows: Sequence[Row]) -> str:
  if not rows:
    return "Not evaluated."
  unit = "accuracy, %" if rows[0].accuracy is not None else "PSNR, dB"
  unit = "error of the map" if rows[0].map_error is not None else unit
  digits = 4 if rows[0].map_error is not None else 2
  cells = [
    (
      row.condition.name,
      f"{row.value:.{digits}f}",
      f"{row.low:.{digits}f} to {row.high:.{digits}f}",
      f"{row.images} x {row.rounds}",
    )
    for row in rows
  ]
  header = ("condition", unit, "95 % interval", "test images x draws of noise")
  return f"{titles.title(rows[0])}:\n\n{_table(header, cells)}"


def _origin(run: Run, source: str | None, record: exported.Record | None) -> str:
  versions = record.versions if record else environment.versions()
  rows = [
    (role, f"`{stage.name}`", f"`{stage.finished().product}`")
    for role, stage in run.stages.items()
  ]
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
