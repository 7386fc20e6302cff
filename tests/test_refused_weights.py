"""Weights that cannot be used: each ends in one line, through both commands."""

import json
import os
import pickle

import numpy as np
import pytest
import safetensors.numpy
from conftest import TOY, flip, one_line, overrides

from fidelity_jax import port
from fidelity_jax.port.__main__ import main as port_main

DEMO = "--config=configs/oracle.py:scratch"


# Weights for the demo's classifier, each with one fault.
def _torch_file(change):
  def make(path):
    import torch

    torch.save(change(torch, {"conv1.weight": torch.ones(8, 3, 7, 7)}), path)

  return make


def _zip_damage(path):
  import torch

  torch.save({"conv1.weight": torch.arange(1000.0)}, path)
  content = bytearray(path.read_bytes())
  content[content.index(np.arange(1000, dtype="<f4").tobytes()) + 100] ^= 1
  path.write_bytes(content)


def _encrypted(path):
  import torch

  torch.save({"conv1.weight": torch.ones(3)}, path)
  content = bytearray(path.read_bytes())
  # The flag in the local headers and in the directory at the end.
  for mark, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
    start = -1
    while (start := content.find(mark, start + 1)) >= 0:
      content[start + place] |= 1
  path.write_bytes(content)


def _quantized(torch, state):
  tensor = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
  return state | {"a.weight": tensor}


def _nested(torch, state):
  tensors = [torch.ones(2), torch.ones(3)]
  return state | {"a.weight": torch.nested.nested_tensor(tensors)}


@pytest.mark.parametrize(
  ("make", "words"),
  [
    (lambda path: path.write_bytes(b""), "neither a PyTorch checkpoint"),
    (lambda path: path.write_bytes(b"PK\3\4" + b"x" * 50), "neither"),
    (lambda path: path.write_bytes(pickle.dumps({"a": 1}, 2)), "pickle"),
    (lambda path: os.mkfifo(path), "there is no file"),
    (lambda path: path.symlink_to("/dev/zero"), "there is no file"),
    (lambda path: path.mkdir(), "without port.json"),
    (_zip_damage, ("is not what its checksum says", "get the file again")),
    (_encrypted, "is encrypted"),
    (_torch_file(lambda t, s: [1, 2]), "holds a list"),
    (_torch_file(lambda t, s: {}), "holds a dict"),
    (_torch_file(lambda t, s: {3: t.ones(3)}), "calls a tensor 3"),
    (_torch_file(lambda t, s: s | {"lr": 0.1}), "a float called 'lr'"),
    (_torch_file(lambda t, s: s), "is not recognized"),
    (_torch_file(lambda t, s: {"a": t.ones(3, 3).to_sparse()}), "that is sparse, a"),
    (_torch_file(_quantized), "that is quantized, a.weight"),
    (
      _torch_file(lambda t, s: {"a": t.ones(3, device="meta")}),
      "that is on the device meta",
    ),
    (
      _torch_file(lambda t, s: {"a": t.ones(1).expand(300_000, 300_000)}),
      "more than 16 times as large as the file",
    ),
    (_torch_file(lambda t, s: {"a": t.ones(3, dtype=t.complex64)}), "complex"),
    (_torch_file(_nested), "that is nested, a.weight"),
    (
      _torch_file(lambda t, s: {"model.0.weight": t.ones(8, 3, 3, 3, dtype=t.int64)}),
      "int64 (should be floating-point)",
    ),
  ],
)
def test_weights(refused, tmp_path, make, words):
  path = tmp_path / "weights.pth"
  make(path)
  target = tmp_path / "ported"
  refused([path, f"--to={target}"], 2, words, command=port_main)
  assert not target.exists()
  fields = {"parents.classifier.model.weights": path}
  arguments = [DEMO, f"--workdir={tmp_path / 'w'}", *overrides(fields)]
  refused(arguments, 2, words)


def _ported(directory, stage_sizes=(1, 1), width=8, poison=None):
  """Writes a ported toy ResNet."""
  import jax

  from fidelity_jax import models

  config = {"name": "resnet", "block": "basic"}
  config |= {"stage_sizes": stage_sizes, "width": width}
  module = models.create(config, 16)
  images = np.zeros((1, 32, 32, 3), np.float32)
  variables = jax.jit(module.init)(jax.random.key(5), images)
  variables = jax.tree.map(np.array, variables)
  if poison is not None:
    variables["params"]["head"]["logits"]["kernel"][0, 0] = poison
  described = {"model": config, "num_classes": 16, "class_names": None}
  port.save({"classifier": port.Part(variables, described)}, directory, "a test")


@pytest.mark.parametrize(
  ("given", "words"),
  [
    (dict(stage_sizes=(1, 1, 1)), "has no place in it"),
    (dict(stage_sizes=(2, 1)), "layer1_1"),
    (dict(stage_sizes=(1,)), "is missing"),
    (dict(width=16), "is (16,), not (8,)"),
    (dict(poison=np.nan), "not finite, in params/head/logits/kernel"),
    (dict(poison=np.inf), "not finite, in params/head/logits/kernel"),
  ],
)
def test_weights_of_another_network(refused, tmp_path, given, words):
  _ported(tmp_path / "ported", **given)
  fields = TOY | {
    "parents.classifier.model.weights": tmp_path / "ported",
    "parents.classifier.model.new_head": False,
    "parents.classifier.epochs": 0,
  }
  if "poison" in given:
    arguments = [tmp_path / "ported", f"--to={tmp_path / 'again'}"]
    refused(arguments, 2, words, command=port_main)
  refused([DEMO, f"--workdir={tmp_path / 'w'}", *overrides(fields)], 2, words)
  assert not list((tmp_path / "w").glob("*/finished.json"))


def _edit(change):
  def damage(directory):
    path = directory / "port.json"
    value = json.loads(path.read_text())
    path.write_text(json.dumps(change(value)))

  return damage


@pytest.mark.parametrize(
  ("damage", "words"),
  [
    (_edit(lambda v: {}), "port.json is damaged"),
    (_edit(lambda v: []), "port.json is damaged"),
    (_edit(lambda v: None), "port.json is damaged"),
    (_edit(lambda v: v | {"parts": 3}), "port.json is damaged"),
    (_edit(lambda v: v | {"source": "elsewhere"}), "port.json is damaged"),
    (lambda d: (d / "port.json").write_bytes(b"\xff"), "port.json is damaged"),
    (lambda d: (d / "classifier.safetensors").unlink(), "classifier.safetensors"),
    (lambda d: flip(d / "classifier.safetensors"), "is not what its checksum says"),
    (lambda d: os.truncate(d / "classifier.safetensors", 99), "checksum"),
  ],
)
def test_damaged_ported_directories(refused, tmp_path, damage, words):
  _ported(tmp_path / "ported")
  damage(tmp_path / "ported")
  arguments = [tmp_path / "ported", f"--to={tmp_path / 'again'}"]
  refused(arguments, 1, words, command=port_main)


def test_class_names_of_a_ported_directory_are_used(refused, tmp_path):
  _ported(tmp_path / "ported")
  names = tmp_path / "names.txt"
  names.write_text("\n".join(f"class {i}" for i in range(16)))
  arguments = [tmp_path / "ported", f"--to={tmp_path / 'named'}"]
  assert port_main([*map(str, arguments), f"--class_names={names}"]) == 0
  part = port.load_part(tmp_path / "named", "classifier")
  assert part.config["class_names"][3] == "class 3"
  names.write_text("one\n")
  arguments.append(f"--class_names={names}")
  refused(arguments, 2, "names 1 classes", command=port_main)
  names.unlink()
  refused(arguments, 2, "cannot read class names", command=port_main)


def test_safetensors(refused, tmp_path):
  path = tmp_path / "a.safetensors"
  for content in (b"", b"\xff" * 40, b"\x02\0\0\0\0\0\0\0{}"):
    path.write_bytes(content)
    refused([path, f"--to={tmp_path / 't'}"], 2, "a.safetensors", command=port_main)
  state = {"conv1.weight": np.ones((8, 3, 7, 7), np.complex64)}
  safetensors.numpy.save_file(state, path)
  refused([path, f"--to={tmp_path / 't'}"], 2, "a.safetensors", command=port_main)


@pytest.mark.slow
def test_the_demo_with_another_classifier(command, tmp_path):
  """Weights of another network are told from damaged ones; its own may be kept."""
  arguments = ["--config=configs/oracle.py:demo", f"--workdir={tmp_path / 'w'}"]
  fields = {"parents.classifier.model.name": "resnet18"}
  result = command(*arguments, *overrides(fields), "--dry_run", check=2)
  assert "model.name 'efficientnet_lite0' (the config's is 'resnet18')" in one_line(
    result.stderr
  )
  # Whose head is not trained at all, though the demo's is trained alone first.
  fields = {"parents.classifier.epochs": 0}
  result = command(*arguments, *overrides(fields), "--dry_run", check=0)
  assert "classifier-efficientnet_lite0" in result.stdout
