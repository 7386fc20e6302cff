"""Where arrays live on simulated devices, and that it changes no result."""

import json

import pytest
from conftest import STEADY, TOY, check_same, overrides

# One compute thread per device: a collective operation needs a thread of each.
_FLAGS = "--xla_cpu_multi_thread_eigen=false --xla_force_host_platform_device_count="


def _devices(count: int) -> dict[str, str]:
  return {"XLA_FLAGS": f"{_FLAGS}{count}", "JAX_CPU_ENABLE_ASYNC_DISPATCH": "false"}


# Prints what becomes of meshes and of arrays on eight devices.
_EIGHT = """
import json, sys, zlib
import jax, numpy as np
from fidelity_jax import checkpoints, errors, sharding

def layout(size=None, **fields):
  config = sharding.default_config()
  config.update(fields)
  return sharding.make_layout(config, size)

def refused(**fields):
  try:
    layout(**fields)
  except errors.UsageError as error:
    return str(error)

def split(of, **arrays):
  shapes = {k: jax.ShapeDtypeStruct(s, "float32") for k, s in arrays.items()}
  return {k: list(where.spec) for k, where in of.of(shapes).items()}

meshes = {
  "all": layout(), "six": layout(6), "seven": layout(7), "two by four": layout(model=4),
  "odd batch": layout(9, model=2), "rest": layout(data=2, model=-1),
  "some": layout(data=2, model=2),
}
shapes = dict(kernel=(3, 3, 64, 128), dense=(256, 32), even=(64, 64), odd=(999, 3),
              bias=(64,), scalar=())
large = dict(min_size=100, model=4)
rules = lambda *rules: layout(rules=rules, **large)
value = np.random.default_rng(0).standard_normal((40, 24, 3)).astype("float32")
checkpoints._BLOCK = 1000
sums = []
for of in (rules(("x", "model")), rules((".", "data")), rules((".", "data+model"))):
  array = of.place({"x": value})["x"]
  sums.append([len(set(map(str, (s.index for s in array.addressable_shards)))),
               checkpoints._own_crc(array), checkpoints.checksums({"x": array})["x"]])
print(json.dumps({
  "meshes": {k: list(of.mesh.shape.values()) for k, of in meshes.items()},
  "refused": [refused(model=3), refused(data=-1, model=-1), refused(data=4, model=4)],
  "default": split(layout(**large), **shapes),
  "whole": split(layout(model=4), **shapes),
  "one wide": split(layout(min_size=100), **shapes),
  "fsdp": split(rules((".*", "data")), **shapes),
  "both": split(rules(("^kernel$", "data+model"), ("d.*e", ""), (".", "model")),
                **shapes),
  "crc": zlib.crc32(value.tobytes()), "zeros": [
    checkpoints._zeros_crc(n) == zlib.crc32(bytes(n)) for n in (0, 4, 1000, 2001)],
  "sums": sums,
}))
"""


@pytest.fixture(scope="module")
def eight(command) -> dict:
  result = command(program=("-c", _EIGHT), env=_devices(8), check=0)
  return json.loads(result.stdout)


def test_meshes_take_the_devices_there_are(eight):
  assert eight["meshes"] == {
    "all": [8, 1],
    # As many devices as split a batch evenly.
    "six": [6, 1],
    "seven": [7, 1],
    "two by four": [2, 4],
    "odd batch": [3, 2],
    "rest": [2, 4],
    "some": [2, 2],
  }
  three, both, many = eight["refused"]
  assert "mesh.model=3: 8 devices cannot be divided by 3" in three
  assert "one of them can be the rest" in both
  assert "16 devices, and there are 8" in many


def test_rules_say_what_is_split(eight):
  def kernels(axes):
    first = [None] * 3
    return {"kernel": [*first, axes], "dense": [axes], "even": [None, axes]}

  # No axis of `odd` can be halved, and the others are small.
  others = {"odd": [], "bias": [], "scalar": []}
  assert eight["default"] == kernels("model") | others
  # By default only what is large, and only where there is something to split over.
  assert list(eight["whole"].values()) == list(eight["one wide"].values()) == [[]] * 6
  assert eight["fsdp"] == kernels("data") | others
  # The first rule that matches counts.
  both = kernels("model") | {"kernel": kernels(["data", "model"])["kernel"]}
  assert eight["both"] == both | {"dense": []} | others


def test_checksums_do_not_depend_on_how_arrays_are_split(eight):
  assert [parts for parts, *_ in eight["sums"]] == [4, 2, 8]
  assert {crc for _, *sums in eight["sums"] for crc in sums} == {eight["crc"]}
  assert eight["zeros"] == [True] * 4


@pytest.mark.parametrize(
  ("field", "value", "said"),
  [
    ("model", 0, "config.mesh.model = 0 must be a number of devices"),
    ("model", 64, "cannot be divided by 64"),
    ("data", "-2", "config.mesh.data = -2"),
    ("rules", "(('(','model'),)", "regular expression"),
    ("rules", "(('.','depth'),)", "'data+model'"),
    ("rules", "((1,'model'),)", "regular expression"),
    ("rules", "(('.*',['data','model']),)", "'data+model'"),
    ("rules", "(('a{99999999999999999999}','model'),)", "regular expression"),
    ("min_size", 0, "min_size"),
    ("modle", 2, 'Did you mean "model"'),
  ],
)
def test_impossible_meshes_are_refused(refused, tmp_path, field, value, said):
  arguments = ["--config=configs/oracle.py:scratch", f"--workdir={tmp_path}"]
  refused([*arguments, f"--config.mesh.{field}={value}"], 2, said)


_MESHES = {
  "2": (2, {}),
  "4": (4, {}),
  "8": (8, {}),
  "2x2": (4, {"mesh.model": 2}),
  "4x2": (8, {"mesh.model": 2}),
  "2x4": (8, {"mesh.model": 4}),
  "1x8": (8, {"mesh.model": 8}),
  "fsdp": (8, {"mesh.rules": "(('.*','data'),)"}),
  "fsdp 2x4": (8, {"mesh.model": 4, "mesh.rules": "(('.*','data+model'),)"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", _MESHES)
def test_meshes_give_what_one_device_gives(command, steady_run, tmp_path, name):
  """Losses, parameters, and what is evaluated, of all stages of the toy: 54 steps."""
  count, fields = _MESHES[name]
  fields = TOY | STEADY | {"mesh.min_size": 64} | fields
  arguments = ["--config=configs/oracle.py:scratch", f"--workdir={tmp_path}"]
  command(*arguments, *overrides(fields), env=_devices(count), check=0)
  check_same(tmp_path, steady_run)
