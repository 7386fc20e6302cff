"""PyTorch's files read without it: bit for bit as by it, hostile ones refused."""

import collections
import gc
import io
import pathlib
import pickle
import struct
import time
import tracemalloc
import warnings
import zipfile

import numpy as np
import pytest
import torch
import torch_reference as reference

from fidelity_jax import errors
from fidelity_jax.port import pth, reading

FORMS = pytest.mark.parametrize("form", ["zip", "legacy"])
DTYPES = (
  *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
  *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
  *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"),
  "float8_e8m0fnu",
)


def save(content, path, form="zip", **kwargs):
  kwargs["_use_new_zipfile_serialization"] = form == "zip"
  torch.save(content, path, **kwargs)
  return path


def random(dtype: str, *shape: int) -> torch.Tensor:
  """Returns a tensor of any bits, including those of NaNs."""
  dtype = getattr(torch, dtype)
  count = int(np.prod(shape)) * dtype.itemsize
  high = 2 if dtype is torch.bool else 256
  bits = np.random.default_rng(0).integers(high, size=count, dtype=np.uint8)
  tensor = torch.empty(shape, dtype=dtype)
  tensor.reshape(-1).view(torch.uint8).copy_(torch.from_numpy(bits))
  return tensor


def raw(tensor: torch.Tensor) -> bytes:
  tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
  return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(ours, theirs):
  """Compares what was read with tensors and containers of PyTorch."""
  if isinstance(theirs, torch.Tensor):
    array = ours.numpy()
    assert array.shape == tuple(theirs.shape)
    assert f"torch.{array.dtype}" == str(theirs.dtype)
    assert array.tobytes() == raw(theirs)
  elif isinstance(theirs, dict):
    assert list(ours) == list(theirs)
    assert_same(list(ours.values()), list(theirs.values()))
  elif isinstance(theirs, list | tuple):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
      assert_same(one, other)
  else:
    assert ours == theirs and type(ours) is type(theirs)


def assert_read_as_by_torch(path):
  with pth.opened(path) as content:
    assert_same(content, torch.load(path, map_location="cpu", weights_only=True))


@FORMS
def test_dtypes(form, tmp_path):
  content = {name: random(name, 3, 5) for name in DTYPES}
  path = save(content, tmp_path / "a.pth", form)
  with pth.opened(path) as ours:
    assert_same(ours, content)
  if form == "zip":  # PyTorch cannot read all of them back from the other.
    assert_read_as_by_torch(path)


@FORMS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int64", "float8_e5m2"])
def test_views(form, dtype, tmp_path):
  whole, image = random(dtype, 6, 8), random(dtype, 2, 3, 4, 5)
  row = whole[2]
  content = [
    *(whole, whole.T, whole[1:4, 2:7:2], whole[::2, 3], whole[5, 7], row.view(2, 4).T),
    *(image.to(memory_format=torch.channels_last), image.permute(2, 0, 3, 1)),
    *(image[1:], image[:, :, 3:, 4:], image[1, 2, 3, 4], image[:, 1:2]),
    *(whole[:0], whole[6:, 8:], random(dtype, 0), random(dtype, 3, 0, 2)),
    *(torch.Size((3, 4)), torch.as_strided(whole, (1, 4), (2**62, 2), 3)),
    *(row.expand(9, 8), row[:1].expand(20), torch.as_strided(row, (5, 4), (1, 1))),
  ]
  path = save(content, tmp_path / "a.pth", form)
  with pth.opened(path) as ours:
    assert_same(ours, content)
  if (form, dtype) != ("legacy", "float8_e5m2"):  # Which PyTorch cannot read.
    assert_read_as_by_torch(path)


@FORMS
def test_shared_storages_are_read_once(form, tmp_path):
  whole = random("float32", 40, 50)
  content = {"embed": whole, "tied": whole, "part": whole[3:7].T}
  path = save(content, tmp_path / "a.pth", form)
  state = reading.read_state(path)
  assert np.shares_memory(state["embed"], state["tied"])
  assert np.shares_memory(state["embed"], state["part"])
  assert not state["embed"].flags.writeable
  assert_read_as_by_torch(path)


@FORMS
def test_checkpoints_of_training(form, tmp_path):
  """A module with buffers and versions, an optimizer, a schedule, parameters."""
  network = torch.nn.Sequential(
    torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 2)
  )
  network.register_buffer("sixteen", torch.ones(3, dtype=torch.float16))
  optimizer = torch.optim.Adam(network.parameters())
  sum(parameter.sum() for parameter in network.parameters()).backward()
  optimizer.step()
  schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 7])
  network[0].weight.told = "an attribute"
  content = {
    "model": network.state_dict(),
    "kept": network.state_dict(keep_vars=True),
    "optimizer": optimizer.state_dict(),
    "schedule": schedule.state_dict(),
    "epoch": 3,
    "best": (0.5, -1, 2**40, None, True, "übung", [collections.OrderedDict(a=1)]),
  }
  assert content["model"]._metadata
  path = save(content, tmp_path / "a.pth", form)
  theirs = torch.load(path, weights_only=True)
  with pth.opened(path) as ours:
    assert_same(ours, theirs)
  state = reading.read_state(path)
  assert list(state) == list(content["model"])
  np.testing.assert_array_equal(state["0.weight"], network[0].weight.detach().numpy())


@FORMS
def test_state_by_the_addresses_of_parameters(form, tmp_path):
  """Optimizers kept it so before PyTorch 1.5."""
  address = 140234567890123
  moments = {"step": 7, "exp_avg": random("float32", 2, 3)}
  optimizer = {"state": {address: moments}, "param_groups": [{"params": [address]}]}
  flags = {True: 1, None: 2, -3: 3, 2**64 - 1: 4}
  content = {"state_dict": {"a": torch.ones(3)}, "optimizer": optimizer}
  path = save(content | {"flags": flags}, tmp_path / "a.pth", form)
  assert_read_as_by_torch(path)
  np.testing.assert_array_equal(reading.read_state(path)["a"], np.ones(3))


@FORMS
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_networks_in_every_protocol(form, protocol, tmp_path):
  network = reference.torchvision().models.resnet18(num_classes=3)
  content = {"net": network.state_dict(), "name": "x" * 300}
  path = save(content, tmp_path / "a.pth", form, pickle_protocol=protocol)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # PyTorch's, which expects the second.
    theirs = torch.load(path, weights_only=protocol == 2)
  with pth.opened(path) as content:
    assert_same(content, theirs)


def test_signs_that_views_change(tmp_path):
  numbers = torch.view_as_complex(random("float32", 3, 2).nan_to_num())
  conjugated, negated = numbers.conj(), numbers.conj().imag
  assert conjugated.is_conj() and negated.is_neg()
  assert_read_as_by_torch(save([conjugated], tmp_path / "a.pth"))
  assert_read_as_by_torch(save([negated], tmp_path / "a.pth"))


def rewrite(path, change=lambda name, data: data, method=zipfile.ZIP_STORED):
  """Writes a zip file anew; `change` returns an entry's new content."""
  with zipfile.ZipFile(path) as archive:
    parts = {name: archive.read(name) for name in archive.namelist()}
  with zipfile.ZipFile(path, "w", method) as archive:
    for name, data in parts.items():
      archive.writestr(name, change(name.partition("/")[2], data))
  return path


def test_big_endian(tmp_path):
  names = [name for name in DTYPES if not name.startswith(("uint", "float8"))]
  content = [random(name, 3, 5).T[1:] for name in (*names, "uint8")]
  content += [random(name, 9)[::2] for name in names]
  content += [random(name, 1)[0] for name in names]
  path = save(content, tmp_path / "a.pth")

  def swap(name, data):
    if name == "byteorder":
      return b"big"
    if not name.startswith("data/"):
      return data
    tensor = content[int(name.removeprefix("data/"))]
    size = tensor.element_size() // (2 if tensor.is_complex() else 1)
    return np.frombuffer(data, f"u{size}").byteswap().tobytes()

  with pth.opened(path) as before:
    expected = [tensor.numpy().tobytes() for tensor in before]
  assert_read_as_by_torch(rewrite(path, swap))
  with pth.opened(path) as after:
    assert [tensor.numpy().tobytes() for tensor in after] == expected


def test_compressed_zip(tmp_path):
  path = save({"a": torch.arange(5000.0), "b": random("int16", 9)}, tmp_path / "a.pth")
  before = reading.read_state(path)
  after = reading.read_state(rewrite(path, method=zipfile.ZIP_DEFLATED))
  for name in before:
    np.testing.assert_array_equal(after[name], before[name])
  with pytest.raises(errors.UsageError, match="compressed in a way"):
    reading.read_state(rewrite(path, method=zipfile.ZIP_BZIP2))


def test_tensors_of_accelerators_and_of_python_2(tmp_path):
  """Places are dropped; Python 2 wrote byte strings and lists of pairs."""
  storage = b"(U\x07storagectorch.cuda\nHalfStorage\nU\x010U\x06cuda:1K\x06tQ"
  tensor = b"ctorch._utils\n_rebuild_tensor\n(" + storage + b"K\x01K\x05\x85K\x01\x85tR"
  # XLA's tensors are copies.
  copy = b"ctorch._utils\n_rebuild_device_tensor_from_cpu_tensor\n(" + tensor
  copy += b"ctorch\nfloat16\nU\x05xla:0\x89tR"
  pairs = b"](U\x01a" + tensor + b"e](U\x01b" + copy + b"e](U\x01cK\x07e"
  content = b"\x80\x02ccollections\nOrderedDict\n](" + pairs + b"e\x85R."
  numbers = np.arange(6, dtype=np.float16)
  path = zipped(tmp_path, content, {"0": numbers.tobytes()})
  with pth.opened(path) as content:
    assert list(content) == ["a", "b", "c"] and content["c"] == 7
    for name in "ab":
      assert content[name].numpy().dtype == np.float16
      np.testing.assert_array_equal(content[name].numpy(), numbers[1:])


# Files that PyTorch would not write.


def zipped(folder, content: bytes, storages=None, **entries) -> pathlib.Path:
  path = folder / "a.pth"
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("a/data.pkl", content)
    for key, data in {**(storages or {}), **entries}.items():
      archive.writestr(f"a/data/{key}", data)
  return path


def legacy(folder, content: bytes, keys=(), rest=b"") -> pathlib.Path:
  head = [pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {})]
  path = folder / "a.pth"
  path.write_bytes(b"".join(head) + content + pickle.dumps(list(keys), 2) + rest)
  return path


def refusal(path, traced=True) -> str:
  """Returns the line that a file is refused with, at once and in little memory."""
  if traced:  # Many objects take ten times as long when they are traced.
    tracemalloc.start()
  start = time.process_time()
  try:
    with pytest.raises(errors.UsageError) as caught:
      reading.read_state(path)
    assert time.process_time() - start < 5
    assert tracemalloc.get_traced_memory()[1] < 2e7
  finally:
    tracemalloc.stop()
  message = str(caught.value)
  assert message.startswith(str(path)) and "\n" not in message and len(message) < 600
  return message


def storage(key=b"X\1\0\0\x000", size=b"K\4", kind=b"ctorch\nFloatStorage\n"):
  return b"(X\7\0\0\0storage" + kind + key + b"X\3\0\0\0cpu" + size + b"tQ"


def tensor(offset=b"K\0", shape=b"K\4\x85", strides=b"K\1\x85", of=None) -> bytes:
  of = storage() if of is None else of
  return b"ctorch._utils\n_rebuild_tensor\n(" + of + offset + shape + strides + b"tR"


def state(*parts: bytes) -> bytes:
  """Returns the pickle of a state dict with the tensor "a"."""
  return b"\x80\2}X\1\0\0\0a" + b"".join(parts) + b"s."


LONG = b"\x8a\x09" + (2**64).to_bytes(9, "little")
FLOAT = b"G" + struct.pack(">d", 0.5)
# A tuple of the same tuple twice, 60 deep.
NESTED = b")" + b"q\0h\0\x86" * 60
MANY = b"(" + b"K\1" * 100_000
CODE = {
  "a function": (b"cos\nsystem\nX\2\0\0\0ls\x85R", "os.system"),
  "a builtin": (b"cbuiltins\neval\nX\1\0\0\x001\x85R", "builtins.eval"),
  "Python 2's name": (b"c__builtin__\neval\n(X\1\0\0\x001tR", "__builtin__.eval"),
  "an object": (b"ccopyreg\n_reconstructor\n(cos\nPathLike\nNNtR", "copyreg"),
  "a name in two strings": (b"X\2\0\0\0osX\6\0\0\0system\x93", "os.system"),
  "a name with dots": (b"X\7\0\0\0torch.uX\3\0\0\0os.\x93", "torch.u.os."),
  "a neighbour": (b"ctorch._utils\n_import_dotted_name\n", "_import_dotted_name"),
  "a class of this module": (
    b"cfidelity_jax.port.unpickling\nTensor\n",
    "unpickling.Tensor",
  ),
  "a long name": (b"c" + b"a" * 5000 + b"\nb\n", "aaaa"),
  "an escape": (b"X\2\0\0\0\x1b\nX\1\0\0\0b\x93", r"\x1b\n.b"),
  "NEWOBJ": (b"ccollections\nOrderedDict\n)\x81", "opcode NEWOBJ"),
  "INST": (b"(ios\nsystem\n", "opcode INST"),
  "OBJ": (b"(ccollections\nOrderedDict\no", "opcode OBJ"),
  "an extension": (b"\x82\1", "opcode EXT1"),
  "a textual id": (b"P0\n", "opcode PERSID"),
  "a large integer": (b"\x8b\0\0\1\0" + b"\1" * 65536, "opcode LONG4"),
}
WRONG = {
  "a call of a call": (b"ctorch\nSize\n)\x85R)R", "calls a tuple"),
  "a call of a type": (b"ctorch\nFloatStorage\n)R", "calls a "),
  "more arguments": (b"ctorch\nSize\n(K\1K\2tR", "argument"),
  "too many arguments": (
    b"ctorch._utils\n_rebuild_sparse_tensor\n" + MANY + b"tR",
    "with too much",
  ),
  "arguments that are none": (b"ctorch\nSize\n]R", "with too much"),
  "state of a function": (b"ctorch\nSize\n}b", "fills a function"),
  "state of a tensor": (tensor() + b"}b", "fills a Tensor"),
  "an item of a list": (b"]K\1K\2s", "fills a list"),
  "an element of a dictionary": (b"}K\1a", "fills a dict"),
  "an element of a function": (b"ctorch\nSize\nK\1a", "fills a function"),
  "a memo that is empty": (b"h\7", "checkpoint: 7"),
  "an empty stack": (b"\x8700000", ""),
  "no mark": (b"t", "checkpoint: "),
  "an id that is a number": (b"K\1Q", "a storage"),
  "an id that is short": (b"X\7\0\0\0storage\x85Q", "a storage"),
  "an id of a module": (b"(X\6\0\0\0moduleNNNtQ", "a storage"),
  "an id of another type": (storage(kind=b"K\1"), "a storage"),
  "a key that is a number": (storage(key=b"K\0"), "a storage"),
  "a size that is text": (storage(size=b"X\1\0\0\0a"), "a storage"),
  "a size that is negative": (storage(size=b"J\xff\xff\xff\xff"), "a storage"),
  "a size that is huge": (storage(size=LONG), "a storage"),
  "two sizes": (storage() + storage(size=b"K\5") + b"\x86", "a storage"),
  "another size": (tensor(of=storage(size=b"K\5")), "has 16 bytes instead of 20"),
  "another dtype": (storage(kind=b"ctorch\nDoubleStorage\n"), "instead of 32"),
  "no such storage": (storage(key=b"X\1\0\0\x001"), "part 'data/1' is missing"),
  "a storage that is none": (tensor(of=b"K\0"), "has no storage"),
  "a shape beyond": (tensor(shape=b"K\5\x85"), "beyond its storage"),
  "an offset beyond": (tensor(offset=b"K\1"), "beyond its storage"),
  "an offset far beyond": (tensor(offset=LONG), "beyond its storage"),
  "strides beyond": (tensor(shape=b"K\2\x85", strides=b"K\4\x85"), "beyond"),
  "a negative stride": (tensor(strides=b"J\xff\xff\xff\xff\x85"), "make no sense"),
  "a negative shape": (tensor(shape=b"J\xff\xff\xff\xff\x85"), "make no sense"),
  "a shape of text": (tensor(shape=b"X\1\0\0\0a"), "make no sense"),
  "more strides": (tensor(strides=b"K\1K\1\x86"), "make no sense"),
  "many dimensions": (tensor(shape=MANY + b"tq\1", strides=b"h\1"), "make no sense"),
  "nothing of a huge size": (
    tensor(shape=b"K\0" + LONG + b"\x86", strides=b"K\1K\1\x86"),
    "makes no sense",
  ),
  "a text that ends early": (b"X\xff\xff\xff\x7fa", "checkpoint: "),
  "a text that is longer than memory": (b"\x8d" + b"\xff" * 7 + b"\x7fa", "checkpoint"),
  "bytes that are longer": (b"\x8e" + b"\xff" * 7 + b"\x7fa", "checkpoint: "),
  "a text that is none": (b"X\1\0\0\0\xff", "checkpoint: "),
  "no opcode": (b"\xff", "checkpoint: "),
  "a name that is a list": (b"]X\1\0\0\0a\x93", "no string"),
  "a name that is nested": (NESTED + b"X\1\0\0\0a\x93", "no string"),
  "an id that is nested": (NESTED + b"Q", "a storage"),
  "a nested shape": (tensor(shape=NESTED, strides=NESTED), "make no sense"),
  "a key that is nested": (b"}" + NESTED + b"Ns", "key that is of type tuple"),
  "a key of an ordered dictionary": (
    b"ccollections\nOrderedDict\n]" + NESTED + b"N\x86a\x85R",
    "key that is of type tuple",
  ),
  "a key that collides": (b"}" + LONG + b"Ns", "key that is a large number"),
  "a key that is a list": (b"}]Ns", "key that is of type list"),
  "a key with a fraction": (b"}" + FLOAT + b"Ns", "key that is of type float"),
}

# What the older form says where it differs.
LEGACY = {
  "another size": "storage '0' is cut off, or of another size",
  "another dtype": "storage '0' is cut off, or of another size",
  "no such storage": "",
}


@FORMS
@pytest.mark.parametrize("case", [*CODE, *WRONG])
def test_hostile_pickles(form, case, tmp_path):
  body, words = (CODE | WRONG)[case]
  if form == "zip":
    path = zipped(tmp_path, state(body), {"0": bytes(16)})
  else:
    content = state(body.replace(b"tQ", b"NtQ"))
    path = legacy(tmp_path, content, "0", struct.pack("<q", 4) + bytes(16))
    words = LEGACY.get(case, words)
  message = refusal(path)
  assert words in message
  assert case in WRONG or "is refused" in message


@pytest.mark.parametrize(
  ("body", "words"),
  [
    (b"]" * 3_000_000, "takes more than"),
    (b"}" * 3_000_000, "takes more than"),
    (b"]q\0" + b"(" + b"h\0" * 2_000_000, "takes more than"),
    (b"ccollections\nOrderedDict\nq\0" + b"h\0)R" * 1_000_000, "takes more than"),
    (b"}r\xff\xff\xff\xffj\xff\xff\xff\xff", "fills a str"),
    (b"]q\0" + b"](h\0h\0h\0h\0eq\0" * 999, "fills a str"),
    # A list of pairs that is made a dictionary again and again.
    (
      b"".join([b"](", b"X\1\0\0\0aN\x86" * 99_999, b"eq\0"])
      + b"ccollections\nOrderedDict\nq\1"
      + b"h\1h\0\x85R" * 99_999,
      "takes more than",
    ),
    (b"X\0\0\x90\0" + b"a" * 0x900000, "has 9437"),
  ],
)
def test_pickles_that_ask_for_much(body, words, tmp_path):
  path = zipped(tmp_path, b"\x80\2" + body + b"X\0\0\0\0K\1K\1s.")
  assert words in refusal(path, traced=len(body) < 100)


def colliding(size: int, count: int) -> list[int]:
  """Returns `count` whole numbers, the last of which probes past the others.

  In a dictionary of `size` places the others have the places that CPython tries one
  after the other, each i followed by 5 i + 1.
  """
  place, shifted, places = 0, size, {}
  while len(places) < count - 1:
    places[place] = None
    shifted >>= 5
    place = (5 * place + shifted + 1) % size
  return [*places, size]


@pytest.mark.parametrize("of", ["keys", "memo"])
def test_numbers_that_collide(of, tmp_path):
  numbers = colliding(2**17, 87_000)
  numbers += numbers[-1:] * 200_000
  if of == "keys":
    items = b"".join(b"J" + struct.pack("<i", number) + b"N" for number in numbers)
    body = b"}(" + items + b"u"
  else:
    body = b"N" + b"".join(b"r" + struct.pack("<I", number) for number in numbers)
  path = zipped(tmp_path, state(body))
  assert "called 'a' among its tensors" in refusal(path, traced=False)


@pytest.mark.parametrize("opening", [b"](", b"(", b"}K\1"])
def test_deep_containers(opening, tmp_path):
  closing = {b"](": b"e", b"(": b"t", b"}K\1": b"s"}[opening]
  count = 150_000
  body = opening * count + b"N" + closing * count
  with pth.opened(zipped(tmp_path, state(body))) as content:
    assert list(content) == ["a"]
  assert "among its tensors" in refusal(tmp_path / "a.pth", traced=False)


def test_wrappers_without_end(tmp_path):
  opening, within = b"}q\0X\5\0\0\0model", b"h\0s"
  for body in (opening + within + b".", opening * 999 + within + b"s" * 998 + b"."):
    assert "holds a dict called 'model'" in refusal(zipped(tmp_path, b"\x80\2" + body))


def test_names_of_several_lines(tmp_path):
  body = b"\x80\2}X\4\0\0\0a\nb\x1b" + tensor() + b"s."
  message = refusal(zipped(tmp_path, body, {"0": bytes(16)}))
  assert r"calls a tensor 'a\nb\x1b'" in message


def test_long_names(tmp_path):
  path = tmp_path / "a.pth"
  for content in (
    {"a" * 100_000: 3},
    {"a" * 100_000: torch.ones(3, dtype=torch.complex64)},
    {"a" * 100_000: torch.ones(3, device="meta")},
    {"\n" * 100_000: torch.ones(3)},
  ):
    refusal(save(content, path))


def test_wrappers_of_names(tmp_path):
  path = tmp_path / "a.pth"
  wrapping = "_orig_mod.module._orig_mod."
  content = {f"{wrapping}a": torch.ones(3), f"{wrapping}module.b": torch.ones(3)}
  assert list(reading.read_state(save(content, path))) == ["a", "module.b"]
  content["_orig_mod.module.c"] = torch.ones(3)
  expected = ["_orig_mod.a", "_orig_mod.module.b", "c"]
  assert list(reading.read_state(save(content, path))) == expected
  (name,) = reading.read_state(save({"module." * 900_000 + "a": torch.ones(3)}, path))
  assert name == "a"


def deflated(data_sizes: dict[str, int], declared=None) -> bytes:
  """Returns a zip file with a tensor on each of some storages of zeros."""
  out = io.BytesIO()
  items = b"".join(
    b"X\1\0\0\0"
    + key.encode()
    + tensor(
      shape=b"K\1\x85",
      of=storage(b"X\1\0\0\0" + key.encode(), b"J" + struct.pack("<i", size // 4)),
    )
    + b"s"
    for key, size in (declared or data_sizes).items()
  )
  with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
    archive.writestr("a/data.pkl", b"\x80\2}" + items + b".")
    for key, size in data_sizes.items():
      archive.writestr(f"a/data/{key}", bytes(size))
  return out.getvalue()


def test_zip_bombs(tmp_path):
  path = tmp_path / "a.pth"
  bomb = deflated({"0": 2**26})
  path.write_bytes(bomb)
  assert "more than 16 times as large" in refusal(path)
  # Each is bearable, all together are not.
  path.write_bytes(deflated({str(i): 20_000 for i in range(9)}))
  assert "more than 16 times as large" in refusal(path)
  # The directory says less than what comes out of it, or more than the file has.
  small = deflated({"0": 2**26}, {"0": 4096})
  place = small.rindex(b"PK\1\2")
  for size, words in ((4096, "checksum"), (2**31, "bytes instead of 4096")):
    changed = bytearray(small)
    changed[place + 24 : place + 28] = struct.pack("<I", size)
    path.write_bytes(changed)
    assert words in refusal(path)


def test_zip_bombs_of_what_is_stored(tmp_path):
  """Entries that share their bytes, that are longer than the file, or are too many."""
  path = zipped(tmp_path, state(tensor()), {"0": bytes(16)})
  content = bytearray(path.read_bytes())
  place = content.rindex(b"PK\1\2")
  changed = content.copy()
  changed[place + 20 : place + 28] = struct.pack("<II", 2**31, 2**31)
  path.write_bytes(changed)
  assert "has 2147483648 bytes instead of 16" in refusal(path)
  huge = state(tensor(of=storage(size=b"J" + struct.pack("<i", 2**29))))
  path = zipped(tmp_path, huge, {"0": bytes(16)})
  changed = bytearray(path.read_bytes())
  place = changed.rindex(b"PK\1\2")
  changed[place + 20 : place + 28] = struct.pack("<II", 2**31, 2**31)
  path.write_bytes(changed)
  assert "more than 16 times as large" in refusal(path)

  long = state(tensor(of=storage(size=b"M" + struct.pack("<H", len(content)))))
  path = zipped(tmp_path, long, {"0": bytes(16)})
  changed = bytearray(path.read_bytes())
  place = changed.rindex(b"PK\1\2")
  changed[place + 20 : place + 28] = struct.pack("<II", *[4 * len(content)] * 2)
  path.write_bytes(changed)
  assert "is larger than the file" in refusal(path)

  entry = struct.pack("<4s4B4H3L5H2L", b"PK\1\2", 20, 0, 20, *[0] * 15)
  entry = entry[:28] + struct.pack("<H", 1) + entry[30:] + b"a"
  directory = entry * 300_000
  end = (b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, len(directory), 0, 0)
  path.write_bytes(directory + struct.pack("<4s4H2LH", *end))
  assert f"its directory is {len(directory)} bytes" in refusal(path)


@FORMS
def test_tensors_that_are_expanded_become_little(form, tmp_path):
  path = save({"a": torch.ones(1).expand(300_000, 300_000)}, tmp_path / "a.pth", form)
  assert "more than 16 times as large" in refusal(path)


@FORMS
def test_tensors_that_share_much_become_little(form, tmp_path):
  """Each view of half-precision numbers becomes an array of its own."""
  whole = torch.zeros(100_000, dtype=torch.float16)
  content = {f"a{i}": whole[: 99_000 + i] for i in range(100)}
  path = save(content, tmp_path / "a.pth", form)
  assert "more than 16 times as large" in refusal(path)


@FORMS
def test_truncated_and_flipped_files(form, tmp_path):
  """However a file is damaged, it is read or refused; nothing else happens."""
  content = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.ones(3).half()}
  path = save({"state_dict": content, "epoch": 3}, tmp_path / "a.pth", form)
  whole = path.read_bytes()
  for length in range(0, len(whole), 7):
    path.write_bytes(whole[:length])
    refusal(path)
  rng = np.random.default_rng(0)
  refused = 0
  for place in rng.integers(len(whole), size=400):
    changed = bytearray(whole)
    changed[place] ^= 1 << rng.integers(8)
    path.write_bytes(changed)
    try:
      reading.read_state(path)
    except errors.UsageError as error:
      refused += 1
      assert "\n" not in str(error)
  # A bit may be in a date, in a name or in a number.
  assert 40 < refused < 400


def test_damage_to_the_numbers_of_a_zip_file_is_noticed(tmp_path):
  path = save({"a": torch.arange(99.0)}, tmp_path / "a.pth")
  data = bytearray(path.read_bytes())
  data[data.index(np.arange(99, dtype="<f4").tobytes()) + 50] ^= 1
  path.write_bytes(data)
  assert "part 'data/0' is not what its checksum says" in refusal(path)


def test_other_files(tmp_path):
  path = tmp_path / "a.pth"
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("a/b", "c")
  assert "without FOLDER/data.pkl" in refusal(path)
  save({"a": torch.ones(4)}, path)
  rewrite(path, lambda name, data: b"middle" if name == "byteorder" else data)
  assert "its byte order is 'middle'" in refusal(path)
  path.write_bytes(b"0\0" + bytes(255) + b"ustar\x0000" + bytes(1000))
  assert "is a tar file" in refusal(path)
  path.write_bytes(pickle.dumps({"a": 1}, 2))
  assert "does not begin as PyTorch's do" in refusal(path)
  legacy(tmp_path, state(tensor()))
  assert "storages are missing" in refusal(path)
  legacy(tmp_path, b"\x80\2}.", [("0",)])
  assert "key that is of type tuple" in refusal(path)


def test_memory(tmp_path):
  """Numbers are held once; what is not among the wanted tensors is not read."""
  size = 4_000_000
  content = {"model": {"a": torch.rand(size)}, "optimizer": [torch.rand(size)] * 2}
  path = save(content | {"other": torch.rand(size)}, tmp_path / "a.pth")
  tracemalloc.start()
  state = reading.read_state(path)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  np.testing.assert_array_equal(state["a"], content["model"]["a"].numpy())
  assert peak < 4 * size + 2**20


def test_what_was_converted_is_let_go(tmp_path):
  size = 4_000_000
  path = save({"a": torch.ones(size).half()}, tmp_path / "a.pth")
  gc.disable()
  tracemalloc.start()
  state = reading.read_state(path)
  current = tracemalloc.get_traced_memory()[0]
  tracemalloc.stop()
  gc.enable()
  assert state["a"].nbytes == 4 * size <= current < 4 * size + 2**20
