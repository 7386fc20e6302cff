"""Collective operations in HLO, and those of the training steps on eight devices."""

import json

import pytest
from conftest import ROOT, TOY, TOY_ESTIMATOR

from fidelity_jax import collectives

# What XLA prints, shortened: of a CPU, a GPU and a TPU.
_HLO = """\
HloModule jit_step, is_scheduled=true, num_partitions=8

%region (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b), metadata={op_name="all-reduce(x)"}
}

ENTRY %main {
  %all-reduce = (f32[3,3,4,16]{3,2,1,0}, f32[], /*index=2*/bf16[5]{0}) \
all-reduce(%a, %b, %c), channel_id=1, replica_groups=[1,8]<=[8], to_apply=%region
  %get = f32[] get-tuple-element(%all-reduce), index=1
  %one = f32[64]{0} all-reduce(%d), replica_groups={{0},{1},{2}}, to_apply=%region
  %pair = f32[64]{0:T(256)S(1)} all-reduce(%d), replica_groups={{0,1},{2,3}}
  %all-gather-start.2 = (f32[2,7]{1,0}, f32[8,7]{1,0}) all-gather-start(%e), \
replica_groups=[2,4]<=[8], dimensions={0}
  %all-gather-done.2 = f32[8,7]{1,0} all-gather-done(%all-gather-start.2)
  %scattered = s32[3]{0} reduce-scatter(%f), replica_groups={}, to_apply=%region
  %moved = u8[10]{0} collective-permute(%g), source_target_pairs={{0,1},{1,0}}
  %rows = f32[6]{0} all-reduce(%d), \
replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=4] {'axis_0'}, to_apply=%region
  %part = f32[6]{0} all-reduce(%d), \
replica_groups=mesh['a'=8] {'a':(2)4}, use_global_device_ids=true
  %none = f32[6]{0} all-reduce(%d), replica_groups=mesh['a'=8,'b'=1] {'b'}
  ROOT %out = f32[] fusion(%all-reduce, %one), calls=%region
}
"""


def test_operations_are_read():
  first, pair, gathered, scattered, moved, *named = collectives.read(_HLO)
  assert first.kind == "all-reduce"
  assert first.arrays == (
    collectives.Array("f32", (3, 3, 4, 16)),
    collectives.Array("f32", ()),
    collectives.Array("bf16", (5,)),
  )
  assert (first.devices, first.bytes) == (8, 4 * 576 + 4 + 10)
  assert first.sent == 2 * 7 / 8 * first.bytes
  # Alone, a device sends nothing; in pairs it sends what it has.
  assert (pair.devices, pair.bytes, pair.sent) == (2, 256, 256)
  # Begun and finished, counted once.
  assert (gathered.kind, gathered.devices) == ("all-gather", 4)
  assert (gathered.bytes, gathered.sent) == (4 * 56, 3 / 4 * 4 * 56)
  assert (scattered.bytes, scattered.sent) == (8 * 12, 7 * 12)
  assert (moved.kind, moved.devices, moved.sent) == ("collective-permute", 2, 10)
  # Groups by the axes of a mesh; those of one device send nothing.
  assert [(o.kind, o.devices) for o in named] == [("all-reduce", 2), ("all-reduce", 4)]
  assert collectives.total([first, pair]) == first.bytes + pair.bytes


def test_one_device_sends_nothing():
  assert collectives.read("HloModule jit_step, is_scheduled=true\n") == []
  assert collectives.read("") == []


@pytest.mark.parametrize(
  "dtype, size", [("pred", 1), ("bf16", 2), ("u4", 1), ("f8e4m3fn", 1), ("c64", 8)]
)
def test_sizes_of_elements(dtype, size):
  assert collectives.Array(dtype, (1,)).bytes == size


# Prints, for steps compiled for eight devices, what they reduce and what they train.
_STEPS = """
import importlib.util, json, sys
import jax
from fidelity_jax import cpu, footprint, sharding
spec = importlib.util.spec_from_file_location("scaling", sys.argv[1])
scaling = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scaling)
fields = json.loads(sys.argv[2])
found = {}
# As it is on accelerators, without what is special for CPUs.
with cpu.left_out():
  for name in scaling.STEPS:
    stage = scaling.stage_of(name, "scratch", fields[name])
    step = footprint.lower(stage, 16, sharding.make_layout(size=16))
    seen = footprint.measure(step)
    shapes = lambda tree: [x.shape for x in jax.tree.leaves(tree)]
    found[name] = {
      "devices": step.devices,
      "trained": shapes(step.state.params),
      "bytes": step.trained_bytes,
      "statistics": shapes(step.state.model_state),
      "frozen": seen.frozen,
      "operations": [
        [o.kind, o.devices, a.dtype, a.shape]
        for o in seen.collectives for a in o.arrays
      ],
      "reduced": seen.exchanged,
    }
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def steps(command) -> dict:
  along = TOY | TOY_ESTIMATOR
  classifier = {
    name.removeprefix("parents.classifier."): value
    for name, value in TOY.items()
    if name.startswith(("parents.classifier.", "dataset."))
  }
  fields = {"classifier": classifier, "oracle": TOY, "end_to_end": along}
  for name, given in fields.items():
    fields[name] = given | {"batch_size": 16}
  result = command(
    ROOT / "benchmarks" / "scaling.py",
    json.dumps(fields),
    program=("-c", _STEPS),
    env={"XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
    check=0,
  )
  return json.loads(result.stdout)


def _sorted(shapes) -> list[tuple[int, ...]]:
  """Returns shapes in an order of their own; XLA transposes and drops axes of 1."""
  return sorted(tuple(sorted(n for n in shape if n > 1)) for shape in shapes)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["oracle", "end_to_end"])
def test_only_gradients_and_scalars_are_reduced(steps, name):
  """Calibration: 4 bytes per trained parameter, three scalars, nothing else."""
  step = steps[name]
  assert step["frozen"] > step["bytes"] > 0 and not step["statistics"]
  assert {(kind, n, dtype) for kind, n, dtype, _ in step["operations"]} == {
    ("all-reduce", 8, "f32")
  }
  # The loss and accuracy, summed over examples, and how many these are.
  scalars = [()] * 3
  reduced = [shape for *_, shape in step["operations"]]
  assert _sorted(reduced) == _sorted([*step["trained"], *scalars])
  assert step["reduced"] == step["bytes"] + 4 * len(scalars)


@pytest.mark.slow
def test_an_estimator_that_trains_along_is_reduced_too(steps):
  more = steps["end_to_end"]["reduced"] - steps["oracle"]["reduced"]
  # Three 3x3 convolutions: 3 -> 4 -> 4 -> 3 channels.
  assert more == 4 * (3 * 9 * 4 + 4 + 4 * 9 * 4 + 4 + 4 * 9 * 3 + 3)


@pytest.mark.slow
def test_batch_norm_adds_two_numbers_per_channel(steps):
  """Classifier: gradients, scalars, and every channel's mean and variance.

  Over the global batch. The sums that batch norm's backward pass takes are the
  gradients of its parameters.
  """
  step = steps["classifier"]
  assert {(kind, n, dtype) for kind, n, dtype, _ in step["operations"]} == {
    ("all-reduce", 8, "f32")
  }
  # Of every batch norm a mean and a variance.
  means = step["statistics"][::2]
  assert len(means) == 6 and step["statistics"][1::2] == means
  reduced = [shape for *_, shape in step["operations"]]
  scalars = [()] * 3
  assert _sorted(reduced) == _sorted([*step["trained"], *means * 2, *scalars])
  channels = sum(n for (n,) in means)
  assert step["reduced"] == step["bytes"] + 4 * (2 * channels + len(scalars))
