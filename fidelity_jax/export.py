"""Networks as files that run elsewhere: `fidelity_jax export RUN --to=FILE`.

FILE.jax is a program in StableHLO with its weights, for JAX alone; FILE.onnx the same
for onnxruntime and others; a directory has the weights of each network, for this
package. docs/export.md says how to use them.
"""

from fidelity_jax import boundary

if __name__ == "__main__":
  # Before imports that take seconds.
  boundary.start()

import argparse
import contextlib
import dataclasses
import hashlib
import io
import logging
import os
import pathlib
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from fidelity_jax import (
  assembly,
  cards,
  cpu,
  environment,
  errors,
  exported,
  files,
  locations,
  models,
  platform,
  port,
  runs,
  signals,
)
from fidelity_jax.models import conv, pooling
from fidelity_jax.port import storing

PLATFORMS = ("cpu", "cuda", "tpu")
# What FlatBuffers and Protocol Buffers, of which these files are, can hold, less what a
# program takes beside its weights.
LIMIT = 2**31 - 2**24
# What leaves the networks, of what `Method.outputs` has.
_OUTPUTS = ("logits", "fidelity_map", "confidence", "restored")


def export(
  place: str | os.PathLike, to: str | os.PathLike, licence: str = "unknown"
) -> None:
  """Writes a run's networks into a file, or a directory, with a card.

  Beside a file it writes its record, x.jax.json, and its card, x.jax.md; into a
  directory, README.md. What an earlier export wrote there is replaced.

  Args:
    place: the run, see `runs.find`.
    to: ends in ".jax" or ".onnx", or is a directory: without an ending, with a slash
      at its end, or there already.
    licence: of the weights, as Hugging Face calls it. "unknown": of an exported
      directory what its card says. That card's results are kept, too.

  Raises:
    UsageError: there is no such run, or it is an exported file, no such format,
      something else is there, or the networks are too large for one file.
    RunError: the run is not finished or damaged, ONNX has not what it computes, or `to`
      cannot be written.
  """
  path, suffix = _checked(to)
  if suffix == ".onnx":
    _jax2onnx()
  named = locations.expand(place)
  if exported.is_file(named) and named.exists():
    raise errors.UsageError(
      f"{place} is a program with its weights inside, of which no other export can be "
      "made: name the run, the checkpoint or the exported directory that it came from."
    )
  run = runs.find(place)
  source = None if run.stages else port.content_digest(place)
  front, known = {}, None
  if port.is_ported(named):
    front, known = cards.kept(named / "README.md")
  if licence == cards.UNKNOWN:
    licence = cards.licence_of(front)
  known = known or cards.known_of(run)
  if not suffix:
    parts = _parts(run) if run.stages else port.load(place)
    card = cards.card(run, path.name, licence, source, known, front=front)
    port.save(parts, path, str(place), {"README.md": card})
    return
  if getattr(run.method.restorer, "channels", 3) != 3:
    raise errors.UsageError(
      f"{place} takes grey images, and programs in exported files take colours: "
      "export a directory, or restore by the checkpoint itself."
    )
  program = Program(run, precision="float32" if suffix == ".onnx" else None)
  if program.size > LIMIT:
    raise errors.UsageError(
      f"--to={to}: the weights have {program.size / 2**30:.2f} GiB, of which a file of "
      f"this kind holds {LIMIT / 2**30:.2f} at most: export a directory."
    )
  content = (to_jax if suffix == ".jax" else to_onnx)(program)
  record = exported.Record(
    name=run.name,
    digest=hashlib.sha256(content).hexdigest(),
    inputs=program.inputs,
    outputs=program.outputs,
    image_size=run.image_size,
    class_names=list(run.class_names),
    map_name=run.method.map_name,
    radius=run.method.radius,
    precision=program.precision,
    platforms=list(PLATFORMS) if suffix == ".jax" else ["onnx"],
    stages={role: stage.name for role, stage in run.stages.items()},
    products={role: s.finished().product for role, s in run.stages.items()},
    source=source,
    licence=licence,
    versions=environment.versions(),
    about=known.about,
    classes_named=run.classes_named,
  )
  card = cards.card(run, path.name, licence, source, known, record, front)
  # The record comes first: by it the others are known to be ours, also where writing
  # them stops. Beside another file, or none, it loads nothing.
  files.write_record(exported.record_path(path), record)
  files.write_bytes(exported.card_path(path), card.encode())
  files.write_bytes(path, content)


def _checked(to: str | os.PathLike) -> tuple[pathlib.Path, str]:
  """Returns the path to write to, after everything that can be known about it.

  And its ending, "" for a directory.
  """
  path = pathlib.Path(os.path.abspath(locations.expand(to, write=True)))
  with errors.while_doing(f"writing {path}"):
    is_directory = os.fspath(to).endswith(os.sep) or port.is_ported(path)
  suffix = "" if is_directory else path.suffix
  if suffix not in ("", *exported.SUFFIXES):
    raise errors.UsageError(
      f"--to={to}: name a file that ends in {' or '.join(exported.SUFFIXES)}, or a "
      "directory (no ending, or a slash at the end) for the weights of each network."
    )
  with errors.while_doing(f"writing {path}"):
    if not path.parent.is_dir():
      raise errors.UsageError(f"--to={to}: there is no directory {path.parent}.")
    files.check_directory(path.parent, write=True)
    for foreign in _foreign(path) if suffix else storing.foreign(path):
      raise errors.UsageError(
        f"--to={to}: something else is there already, {foreign}: name another place."
      )
  return path, suffix


def _foreign(path: pathlib.Path) -> list[pathlib.Path]:
  """Returns which of an exported file, its record and its card are not an export's."""
  record = exported.record_path(path)
  try:
    files.read_record(record, exported.Record, "")
    return []
  except errors.RunError:
    return [p for p in (path, record, exported.card_path(path)) if os.path.lexists(p)]


class Program:
  """A run's networks as a function of images.

  Attributes:
    precision: what it computes in, "float32" or "bfloat16".
    size: of the weights, bytes.
    inputs: shapes by name, "batch" for the number of images; see `exported.Record`.
    outputs: likewise.
    image_size: side of the images, pixels.
  """

  def __init__(self, run: runs.Run, precision: str | None = None):
    """Takes a run's networks.

    Args:
      run: the run.
      precision: to compute in; None: the run's own.
    """
    method, variables = run.method, run.variables
    if precision is not None:
      method = in_precision(method, precision)
      variables = jax.tree.map(lambda leaf: leaf.astype(precision), variables)
    # Which serves training alone.
    self._method = dataclasses.replace(method, rematerialize=False)
    self._variables = variables
    leaves = jax.tree.leaves(variables)
    self.size = sum(leaf.nbytes for leaf in leaves)
    short = any(leaf.dtype == jnp.bfloat16 for leaf in leaves)
    self.precision = "bfloat16" if short else "float32"
    self.image_size = run.image_size
    shape = ["batch", run.image_size, run.image_size, 3]
    names = ["degraded", *(["clean"] if run.needs_clean else [])]
    self.inputs: dict[str, list[int | str]] = {name: shape for name in names}
    outputs = jax.eval_shape(self, *self.shapes())
    self.outputs = {name: ["batch", *leaf.shape[1:]] for name, leaf in outputs.items()}

  def __call__(self, *images: Any) -> dict[str, Any]:
    """Returns what the networks say of images [N, S, S, 3], in the inputs' order."""
    found = self._method.outputs(self._variables, *images)
    return {name: found[name] for name in _OUTPUTS if name in found}

  def shapes(self) -> list[jax.ShapeDtypeStruct]:
    """Returns the shapes of the inputs, for any number of images."""
    (count,) = jax.export.symbolic_shape("batch")
    return [
      jax.ShapeDtypeStruct((count, *shape[1:]), jnp.float32)
      for shape in self.inputs.values()
    ]


def in_precision(network: Any, precision: str) -> Any:
  """Returns a `Method` or a Linen module that computes in another precision.

  Args:
    network: the module, or the method with all of its modules.
    precision: "float32" or "bfloat16".
  """
  changed = {}
  for field in dataclasses.fields(network):
    value = getattr(network, field.name, None)
    if field.name == "dtype":
      changed["dtype"] = jnp.dtype(precision)
    elif isinstance(value, nn.Module) and field.name != "parent":
      changed[field.name] = in_precision(value, precision)
  if isinstance(network, nn.Module):
    return network.clone(**changed)
  return dataclasses.replace(network, **changed)


def to_jax(program: Program) -> bytes:
  """Returns the program as `jax.export.deserialize` reads it."""
  make = jax.export.export(jax.jit(program), platforms=PLATFORMS)
  return bytes(make(*program.shapes()).serialize())


def to_onnx(program: Program) -> bytes:
  """Returns the program as an ONNX model.

  Raises:
    RunError: jax2onnx is not installed, or has nothing for an operation in it.
  """
  jax2onnx, names = _jax2onnx(), list(program.outputs)

  def ordered(*images):
    found = program(*images)
    return tuple(found[name] for name in names)

  # ONNX has no platforms to choose between. jax2onnx prints and warns as it goes.
  with cpu.left_out(_FOR_ONNX), contextlib.redirect_stdout(io.StringIO()):
    try:
      model = jax2onnx.to_onnx(
        ordered,
        inputs=[tuple(shape) for shape in program.inputs.values()],
        input_names=list(program.inputs),
        output_names=names,
        return_mode="proto",
      )
    except (errors.UsageError, errors.RunError):
      raise
    except Exception as error:  # It raises many types.
      if errors.circumstance(error):
        raise
      reason = " ".join(f"{type(error).__name__}: {error}".split())
      raise errors.RunError(
        f"jax2onnx cannot convert the networks to ONNX ({reason:.200}): export a .jax "
        "file."
      ) from error
  _broadcast(model.graph)
  return model.SerializeToString()


def _pool(x: jax.Array, window: int, stride: int, pads: cpu.Pads) -> jax.Array:
  """Returns `pooling.plain_pool` as jax2onnx takes it: padded before."""
  border = ((0, 0), *pads, (0, 0))
  x = jnp.pad(x, border, constant_values=-jnp.inf) if any(map(any, pads)) else x
  return nn.max_pool(x, window_shape=(window, window), strides=(stride, stride))


def _reflected(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Returns `conv.plain_reflected` in fewer operations, which each are long in ONNX."""
  for axis in (1, 2):
    last = x.shape[axis] - 1
    first, second = (
      jax.lax.slice_in_dim(x, i, i + 1, axis=axis) for i in (1, last - 1)
    )
    x = jax.lax.concatenate([first, x, second], axis)
  return conv.plain_convolve(x, kernel, (1, 1), ((0, 0), (0, 0)))


_FOR_ONNX = {pooling.plain_pool: _pool, conv.plain_reflected: _reflected}


def _broadcast(graph: Any) -> None:
  """Leaves broadcasting to operators that do it themselves.

  JAX's operators take arrays of one shape. With a batch of any size, an array is given
  that shape when the model runs, which keeps a bias from becoming part of its
  convolution.

  Args:
    graph: the GraphProto, changed in place.
  """
  makers = {name: node for node in graph.node for name in node.output}
  for node in graph.node:
    if node.op_type not in ("Add", "Sub", "Mul", "Div"):
      continue
    for i, name in enumerate(node.input):
      maker = makers.get(name)
      if maker is not None and maker.op_type == "Expand":
        node.input[i] = maker.input[0]
        # The other one has the whole shape.
        break
  dead = True
  while dead:
    used = {name for node in graph.node for name in node.input}
    used |= {output.name for output in graph.output}
    dead = [node for node in graph.node if used.isdisjoint(node.output)]
    for node in dead:
      graph.node.remove(node)
  for tensor in [t for t in graph.initializer if t.name not in used]:
    graph.initializer.remove(tensor)


def _jax2onnx() -> Any:
  # Of plugins that are not needed, and of shapes that it finds out later.
  for name in ("jax2onnx", "onnx_ir"):
    logging.getLogger(name).setLevel(logging.ERROR)
  try:
    import jax2onnx
  except ImportError as error:
    raise errors.RunError(
      "jax2onnx, which writes .onnx files, is not installed: pip install "
      "'fidelity_jax[onnx]'."
    ) from error
  return jax2onnx


def _parts(run: runs.Run) -> dict[str, port.Part]:
  """Returns the networks of a run's finished stages, as `port.load` returns them.

  The classifier is as it was trained, with its batch norms; others have these folded.
  """
  modules, variables = {}, {}
  for role, stage in run.stages.items():
    network, trained = assembly.trained(stage, len(run.class_names))
    if stage.kind.whole:
      # An estimator that trained along takes the place of the one it started from.
      for name, params in trained["params"].items():
        modules[name], variables[name] = getattr(network, name), {"params": params}
    elif role == "classifier":
      modules[role], variables[role] = network, trained
    else:
      modules[role], variables[role] = models.fold(network, trained)
  as_arrays = lambda tree: jax.tree.map(np.asarray, tree)
  return {
    role: port.Part(as_arrays(variables[role]), _described(run, role, module))
    for role, module in modules.items()
  }


def _described(run: runs.Run, role: str, module: nn.Module) -> dict[str, Any]:
  """Returns what describes a network, see `port.Part`, and what the run knows of it."""
  if role == "classifier":
    return {
      "model": models.registry.complete(run.stages[role].config.model),
      "num_classes": len(run.class_names),
      "class_names": list(run.class_names),
      "image_size": run.image_size,
    }
  if role in ("restorer", "estimator"):
    if not isinstance(module, models.DnCNN):
      raise errors.UsageError(
        f"the weights of a {type(module).__name__} cannot be written to a directory: "
        "export a .jax or .onnx file."
      )
    found = {
      "depth": module.depth,
      "width": module.width,
      "channels": module.channels,
      "out_channels": module.out_channels or module.channels,
    }
    return found | (_wiring(run) if role == "estimator" else {})
  fields = {field.name for field in dataclasses.fields(module)}
  found = {name: getattr(module, name) for name in fields - {"dtype", "name", "parent"}}
  if role == "calibration":
    found |= _wiring(run)
  return dict(sorted(found.items()))


def _wiring(run: runs.Run) -> dict[str, str]:
  return {name: getattr(run.method, name) for name in runs.WIRING}


def main(arguments: list[str] | None = None) -> int:
  """Runs the command line; returns the exit status."""
  parser = boundary.Parser(
    prog="fidelity_jax export",
    description="Write a run's networks into a file that runs elsewhere.",
  )
  parser.add_argument(
    "run",
    metavar="RUN",
    help="an experiment's directory, a checkpoint, or an exported directory",
  )
  parser.add_argument(
    "--to",
    required=True,
    metavar="FILE",
    help="FILE.jax (StableHLO), FILE.onnx, or a directory (safetensors)",
  )
  parser.add_argument(
    "--license",
    default=cards.UNKNOWN,
    help="of the weights, as Hugging Face calls it, such as apache-2.0 (default: "
    f"what an exported directory's card says, or {cards.UNKNOWN})",
  )
  return boundary.run(lambda: _export(parser.parse_args(arguments)))


def _export(args: argparse.Namespace) -> None:
  signals.interrupt("while it exported", "no file is half written")
  platform.set_up()
  export(args.run, args.to, args.license)
  print(f"written to {args.to}")


if __name__ == "__main__":
  boundary.leave(main())
