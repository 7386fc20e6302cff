"""What a compiled function sends between devices, read from its HLO.

XLA decides which collective operations a function on several devices needs; they stand
in what it compiles, `jax.stages.Compiled.as_text()`, and nowhere else.
"""

import dataclasses
import math
import re
from collections.abc import Iterable

_KINDS = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)
# `%name = type operation(operands), attributes`. Of an asynchronous pair, -done has the
# result's type alone; that of -start has operands and more in it. A type has neither a
# name (%) nor a string in it.
_OPERATION = re.compile(
  rf"^\s*(?:ROOT )?%?\S+ = (?P<type>[^%\"]*?) (?P<kind>{'|'.join(_KINDS)})"
  r"(?P<part>-start|-done)?\((?P<rest>.*)$"
)
_ARRAY = re.compile(r"\b(?P<dtype>[a-z]+[0-9]*[a-z0-9]*)\[(?P<shape>[0-9,<= ]*)\]")
_DONE = re.compile(r"^[^%]*%?(?P<name>[^\s,)]+)")
_LISTED = re.compile(r"replica_groups=\{\{(?P<first>[0-9,]*)\}")
_NAMED = re.compile(r"replica_groups=mesh\[(?P<sizes>[^\]]*)\] ?\{(?P<axes>[^}]*)\}")
_SIZE = re.compile(r"'(?P<name>[^']+)'=(?P<size>[0-9]+)")
# Of a part of an axis, such as 'a':(2)4, the last number is its size.
_AXIS = re.compile(r"'(?P<name>[^']+)'(?::\([0-9]+\)(?P<size>[0-9]+))?")
_COUNTED = re.compile(r"replica_groups=\[[0-9]+,(?P<size>[0-9]+)\]<=")
_DEVICES = re.compile(r"(?:num_partitions|replica_count)=(?P<count>[0-9]+)")
_BITS = {"pred": 8, "c64": 64, "c128": 128, "token": 0, "opaque": 0}


@dataclasses.dataclass(frozen=True)
class Array:
  """An array in a collective operation, as one device has it.

  Attributes:
    dtype: XLA's name, such as "f32" or "bf16".
    shape: its shape.
  """

  dtype: str
  shape: tuple[int, ...]

  @property
  def bytes(self) -> int:
    """Its size."""
    bits = _BITS.get(self.dtype)
    if bits is None:
      bits = int(re.search("[0-9]+", self.dtype).group())
    return -(-math.prod(self.shape) * bits // 8)


@dataclasses.dataclass(frozen=True)
class Collective:
  """A collective operation.

  Attributes:
    kind: "all-reduce", "all-gather", "reduce-scatter", "all-to-all",
      "collective-permute", ...
    arrays: what each device has of it afterwards; several where XLA combined some.
    devices: how many take part in it together.
  """

  kind: str
  arrays: tuple[Array, ...]
  devices: int

  @property
  def bytes(self) -> int:
    """The size of what is reduced, gathered, or passed on, per device."""
    total = sum(array.bytes for array in self.arrays)
    # Afterwards a device has its share of it.
    return total * self.devices if self.kind == "reduce-scatter" else total

  @property
  def sent(self) -> float:
    """Bytes that each device sends where the devices stand in a ring."""
    if self.kind in ("collective-permute", "collective-broadcast"):
      return self.bytes
    # A reduction is a scattered one and a gathering.
    rounds = 2 if self.kind == "all-reduce" else 1
    return rounds * (self.devices - 1) / self.devices * self.bytes


def read(hlo: str) -> list[Collective]:
  """Returns the collective operations of a compiled function.

  Those of a loop's body count once, as in `throughput.flops`. Operations among groups
  of one device, which send nothing, are left out.

  Args:
    hlo: `jax.stages.Compiled.as_text()`.
  """
  lines = hlo.splitlines()
  # The first line has as many partitions, or replicas, as there are devices.
  counts = [int(count) for count in _DEVICES.findall(lines[0])] if lines else []
  everyone = max(counts, default=1)
  found, sizes = [], {}
  for line in lines:
    if not (match := _OPERATION.match(line)):
      continue
    kind, part, rest = match["kind"], match["part"], match["rest"]
    if part == "-start":
      # Which devices take part stands here alone.
      sizes[line.split("=")[0].split()[-1].lstrip("%")] = _group(rest, everyone)
      continue
    if part == "-done":
      devices = sizes.get(_DONE.match(rest)["name"], everyone)
    else:
      devices = _group(rest, everyone)
    if devices > 1:
      found.append(Collective(kind, _arrays(match["type"]), devices))
  return found


def _arrays(text: str) -> tuple[Array, ...]:
  """Returns the arrays of a type, of which a tuple has several."""
  # Layouts, in braces, have brackets of their own on some platforms.
  text = re.sub(r"\{[^}]*\}|/\*.*?\*/", "", text)
  return tuple(
    Array(dtype, tuple(int(n.strip("<= ")) for n in shape.split(",") if n.strip()))
    for dtype, shape in _ARRAY.findall(text)
  )


def _group(attributes: str, everyone: int) -> int:
  """Returns how many devices take part in an operation together."""
  if match := _LISTED.search(attributes):
    return match["first"].count(",") + 1
  if match := _COUNTED.search(attributes):
    return int(match["size"])
  if match := _NAMED.search(attributes):
    sizes = dict(_SIZE.findall(match["sizes"]))
    taking = _AXIS.finditer(match["axes"])
    return math.prod(int(axis["size"] or sizes[axis["name"]]) for axis in taking)
  if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
    return len(set(re.findall("[0-9]+", pairs[1])))
  return everyone


def total(operations: Iterable[Collective]) -> int:
  """Returns the bytes of collective operations together; see `Collective.bytes`."""
  return sum(operation.bytes for operation in operations)
