"""How far training should scale, worked out from what its steps send: docs/scaling.md.

  python benchmarks/scaling.py --topology=v5e:16x16 --batch=2048 --json=steps.json
  python benchmarks/scaling_model.py steps.json [--share=0.4]

Nothing is measured. A step takes the time of its operations at a share of the chip's
peak, of its bytes on the interconnect as a ring all-reduce sends them, and of waiting
in each collective operation for the last of them to arrive; none of this overlaps.
"""

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Iterator

from fidelity_jax import chips

# Images per device.
SIZES = (1, 8, 64)
# Of the paper's calibration and classifier stages.
PAPER_BATCH = 64
EFFICIENCIES = (0.5, 0.9)


@dataclasses.dataclass(frozen=True)
class Machine:
  """Devices and what connects them; sources are in docs/scaling.md.

  Attributes:
    name: what it is called.
    chip: its chips' name, as in `chips`.
    devices: how many.
    bandwidth: bytes per second that each sends in a ring all-reduce.
    wait: seconds that a collective operation takes at least.
  """

  name: str
  chip: str
  devices: int
  bandwidth: float
  wait: float


def slice_of_v5e(rows: int, columns: int) -> Machine:
  """Returns a v5e slice: 45 GB/s per link and direction, 1 us per hop.

  An axis of 16 chips is a ring, whose chips send in both directions; shorter ones are
  lines. An all-reduce goes along both axes, to scatter and to gather.
  """
  sides = (rows, columns)
  ring = min(sides) == 16
  hops = sum(n // 2 if n == 16 else n - 1 for n in sides)
  # A slice of one row has one axis only.
  axes = sum(n > 1 for n in sides)
  bandwidth = axes * (2 if ring else 1) * 45e9
  count = rows * columns
  return Machine(f"v5e-{count}", "TPU v5e", count, bandwidth, 2 * hops * 1e-6)


V5E = slice_of_v5e(16, 16)
H200 = Machine("8 x H200", "NVIDIA H200", 8, 370e9, 20e-6)
SLICES = [slice_of_v5e(*sides) for sides in ((2, 4), (4, 4), (4, 8), (8, 8))]


@dataclasses.dataclass(frozen=True)
class Step:
  """A training step.

  Attributes:
    name: which.
    flops: of one image.
    reduced: bytes that are reduced.
    operations: collective operations, one after the other.
  """

  name: str
  flops: float
  reduced: int
  operations: int


@dataclasses.dataclass(frozen=True)
class Time:
  """What a step takes, in seconds.

  Attributes:
    computing: its operations.
    sending: its bytes.
    waiting: in collective operations.
  """

  computing: float
  sending: float
  waiting: float

  @property
  def total(self) -> float:
    """All of it, one after the other."""
    return self.computing + self.sending + self.waiting

  @property
  def efficiency(self) -> float:
    """Throughput per device over that of one device alone."""
    return self.computing / self.total


def time(step: Step, machine: Machine, images: float, share: float) -> Time:
  """Returns what a step takes.

  Args:
    step: the step.
    machine: where.
    images: per device.
    share: of the chip's peak that it computes at.
  """
  n, rate = machine.devices, share * chips.peak(machine.chip, "bfloat16")
  return Time(
    computing=images * step.flops / rate,
    sending=2 * (n - 1) / n * step.reduced / machine.bandwidth,
    waiting=step.operations * machine.wait,
  )


def enough(step: Step, machine: Machine, efficiency: float, share: float) -> float:
  """Returns how many images per device an efficiency takes."""
  one = time(step, machine, 1, share)
  overhead = one.sending + one.waiting
  return efficiency / (1 - efficiency) * overhead / one.computing


def read(path: pathlib.Path) -> list[Step]:
  """Returns the steps in a file that scaling.py --json wrote."""
  rows = json.loads(path.read_text())["rows"]
  return [
    Step(
      name,
      found["flops"] / found["batch"],
      found["reduced_bytes"],
      len(found["collectives"]),
    )
    for name, (found, *_) in rows.items()
  ]


def tables(steps: list[Step], share: float) -> Iterator[str]:
  """Yields the lines of the page's tables."""
  for machine in (V5E, H200):
    yield f"| {machine.name} | images | computing | sending | waiting | efficiency |"
    yield "|---|---|---|---|---|---|"
    for step in steps:
      for images in SIZES:
        t = time(step, machine, images, share)
        parts = " | ".join(
          f"{1e3 * x:.2f}" for x in (t.computing, t.sending, t.waiting)
        )
        yield f"| {step.name} | {images} | {parts} | {t.efficiency:.0%} |"
    yield ""
  yield (
    "| images per chip for | "
    + " | ".join(f"{m.name}, {e:.0%}" for m in (V5E, H200) for e in EFFICIENCIES)
    + " |"
  )
  yield "|---|---|---|---|---|"
  for step in steps:
    found = [enough(step, m, e, share) for m in (V5E, H200) for e in EFFICIENCIES]
    yield f"| {step.name} | " + " | ".join(f"{n:.1f}" for n in found) + " |"
  yield ""
  yield f"| batch {PAPER_BATCH} on | " + " | ".join(m.name for m in SLICES) + " |"
  yield "|---|---|---|---|---|"
  for step in steps:
    found = [time(step, m, PAPER_BATCH / m.devices, share).efficiency for m in SLICES]
    yield f"| {step.name} | " + " | ".join(f"{e:.0%}" for e in found) + " |"


def main() -> None:
  """Prints the tables."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("steps", type=pathlib.Path, help="from scaling.py --json")
  parser.add_argument("--share", type=float, default=0.4, help="of peak")
  args = parser.parse_args()
  print("\n".join(tables(read(args.steps), args.share)))


if __name__ == "__main__":
  main()
