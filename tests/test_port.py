"""Foreign checkpoints: recognized by content, converted, refused with names."""

import hashlib
import json
import os
import pathlib
import pickle
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch_reference as reference

from fidelity_jax import errors, files, models, port
from fidelity_jax.port import __main__ as command
from fidelity_jax.port import recognizing

torch = pytest.importorskip("torch")
SHARED = pathlib.Path(__file__).parents[2] / "shared" / "parity"


def save_torch(state, path):
  torch.save({k: torch.from_numpy(np.array(v)) for k, v in state.items()}, path)
  return path


@pytest.fixture(scope="module")
def resnet18():
  return reference.state_dict(reference.build("resnet18", 5))


def assert_same(ours, theirs):
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def sequential(layers: int, channels: int, batch_norm: bool, bias: bool, epsilon=1e-5):
  """Returns a random DnCNN as its publishers build it, in float64."""
  nn = torch.nn
  conv = lambda i, o: nn.Conv2d(i, o, 3, padding=1, bias=bias)
  parts = [conv(channels, 8), nn.ReLU()]
  for _ in range(layers - 2):
    norm = [nn.BatchNorm2d(8, eps=epsilon)] if batch_norm else []
    parts += [conv(8, 8), *norm, nn.ReLU()]
  network = nn.Sequential(*parts, conv(8, channels))
  reference.randomize(network)
  return network.double().eval()


def prefixed(prefix, state):
  return {prefix + name: value for name, value in state.items()}


def test_torchvision_network_from_pth_and_safetensors(resnet18, tmp_path):
  from_pth = port.load(save_torch(resnet18, tmp_path / "a.pth"))
  safetensors.numpy.save_file(resnet18, tmp_path / "a.safetensors")
  from_safetensors = port.load(tmp_path / "a.safetensors")
  assert list(from_pth) == list(from_safetensors) == ["classifier"]
  part = from_pth["classifier"]
  assert_same(part.variables, from_safetensors["classifier"].variables)
  assert part.config == {
    "model": {"name": "resnet18"},
    "num_classes": 5,
    "class_names": None,
  }
  kernel = part.variables["params"]["backbone"]["layer3_0"]["downsample"]["conv"]
  np.testing.assert_array_equal(
    kernel["kernel"][0, 0], resnet18["layer3.0.downsample.0.weight"][:, :, 0, 0].T
  )


def test_files_that_training_scripts_write(resnet18, tmp_path):
  """Wrapped, prefixed, without counters, and in half precision."""
  plain = port.load(save_torch(resnet18, tmp_path / "plain.pth"))["classifier"]
  old = {k: v for k, v in resnet18.items() if "num_batches" not in k}
  wrapped = {"epoch": 3, "state_dict": prefixed("module.", old)}
  as_torch = {k: torch.from_numpy(v) for k, v in wrapped["state_dict"].items()}
  torch.save({**wrapped, "state_dict": as_torch}, tmp_path / "wrapped.pth")
  got = port.load(tmp_path / "wrapped.pth")["classifier"]
  assert_same(got.variables, plain.variables)

  half = {k: v.astype(ml_dtypes.bfloat16) for k, v in old.items()}
  safetensors.numpy.save_file(half, tmp_path / "half.safetensors")
  got = port.load(tmp_path / "half.safetensors")["classifier"]
  rounded = lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32)
  assert_same(got.variables, jax.tree.map(rounded, plain.variables))
  tensors = {k: v.bfloat16() for k, v in as_torch.items()}
  torch.save(tensors, tmp_path / "half.pth")
  assert_same(port.load(tmp_path / "half.pth")["classifier"].variables, got.variables)


def test_any_basic_or_bottleneck_resnet_is_recognized():
  network = reference.build("resnet34", 3)
  part = recognizing.recognize(reference.state_dict(network), "f.pth")
  config = part["classifier"].config["model"]
  assert config == {
    "name": "resnet",
    "stage_sizes": [3, 4, 6, 3],
    "width": 64,
    "block": "basic",
  }
  images = reference.images(1, 64)
  with torch.no_grad():
    inputs = torch.from_numpy(images.transpose(0, 3, 1, 2)).double()
    expected = network.eval()(inputs).numpy()
  module = models.create(config, 3)
  logits, _ = jax.jit(module.apply)(part["classifier"].variables, images)
  assert reference.relative_error(logits, expected) < 1e-5


def test_googlenet_with_and_without_auxiliary_heads():
  state = reference.state_dict(reference.build("googlenet", 4))
  part = recognizing.recognize(state, "f.pth")["classifier"]
  assert part.config["model"] == {
    "name": "googlenet",
    "aux_heads": True,
    "transform_input": True,
  }
  assert {"aux1", "aux2"} < part.variables["params"].keys()
  bare = {k: v for k, v in state.items() if not k.startswith("aux")}
  part = recognizing.recognize(bare, "f.pth", transform_input=False)["classifier"]
  assert part.config["model"]["aux_heads"] is False
  assert part.config["model"]["transform_input"] is False
  assert set(part.variables["params"]) == {"backbone", "head"}
  # Fine-tuning from it starts fresh auxiliary heads.
  module = models.create({"name": "googlenet"}, 9)
  fresh = jax.tree.map(
    lambda x: np.full(x.shape, 7.0, np.float32),
    jax.eval_shape(module.init, jax.random.key(0), reference.images(1, 64)),
  )
  merged = models.transfer(fresh, part.variables, new_head=True)
  assert (merged["params"]["aux1"]["fc1"]["kernel"] == 7).all()
  assert (merged["params"]["head"]["logits"]["kernel"] == 7).all()
  assert_same(merged["params"]["backbone"], part.variables["params"]["backbone"])


def test_vgg16_features_take_imagenet_input():
  """The feature-only VGG-16 was trained on other units of input."""
  state = reference.state_dict(reference.build("vgg16", 2))
  for name in state:
    if name.startswith("classifier."):
      state[name] = np.full_like(state[name], np.nan)
  parts = recognizing.recognize(state, "f.pth")
  assert list(parts) == ["backbone"]
  conv = parts["backbone"].variables["params"]["backbone"]["conv1_1"]
  pixels = np.random.default_rng(0).uniform(size=(1, 9, 9, 3)).astype(np.float32)
  apply = lambda x, kernel, bias: np.asarray(
    jax.lax.conv_general_dilated(
      x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    + bias
  )
  theirs = apply(
    (pixels - np.float32([0.48235, 0.45882, 0.40784])) * 255,
    state["features.0.weight"].transpose(2, 3, 1, 0),
    state["features.0.bias"],
  )
  classifier = models.create(parts["backbone"].config["model"], 2)
  ours = apply(classifier.normalize(pixels), conv["kernel"], conv["bias"])
  assert reference.relative_error(ours, theirs) < 1e-5


def test_a_network_without_its_head_is_a_backbone(resnet18, tmp_path):
  whole = port.load(save_torch(resnet18, tmp_path / "whole.pth"))["classifier"]
  bare = {k: v for k, v in resnet18.items() if not k.startswith("fc.")}
  parts = port.load(save_torch(bare, tmp_path / "bare.pth"))
  assert list(parts) == ["backbone"]
  for collection, tree in parts["backbone"].variables.items():
    assert_same(tree, {"backbone": whole.variables[collection]["backbone"]})
  state = resnet18 | {"fc.weight": np.float32(1)}
  with pytest.raises(
    errors.UsageError, match=r"fc\.weight \(\) \(should have 2 axes\)"
  ):
    port.load(save_torch(state, tmp_path / "scalar.pth"))


def test_class_names(resnet18, tmp_path):
  path = save_torch(resnet18, tmp_path / "a.pth")
  names = tmp_path / "names.txt"
  names.write_text("bear\ncup\n zebra \n\nübung\nox\n", encoding="utf-8")
  part = port.load(path, class_names=names)["classifier"]
  assert part.config["class_names"] == ["bear", "cup", "zebra", "übung", "ox"]
  names.write_text("bear\ncup\n")
  with pytest.raises(errors.UsageError, match=r"2 classes, but .* has 5"):
    port.load(path, class_names=names)


def test_what_does_not_fit_is_named(resnet18, tmp_path):
  state = dict(resnet18)
  del state["layer2.1.bn2.weight"]
  state["layer9"] = np.zeros(3, np.float32)
  state["layer1.0.conv2.weight"] = np.zeros((64, 64, 5, 5), np.float32)
  with pytest.raises(errors.UsageError) as caught:
    port.load(save_torch(state, tmp_path / "a.pth"))
  message = str(caught.value)
  assert "looks like resnet18" in message and "\n" not in message
  assert "missing layer2.1.bn2.weight;" in message
  assert "unexpected layer9;" in message
  assert (
    "misshapen layer1.0.conv2.weight (64, 64, 5, 5) (should be (64, 64, 3, 3))"
    in message
  )


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("layout", ["KAIR", "KAIR with batch norm", "DnCNN-PyTorch"])
def test_published_denoisers(layout, channels, tmp_path):
  if layout == "DnCNN-PyTorch":
    network = sequential(17, channels, True, False)
    state = prefixed("module.dncnn.", reference.state_dict(network))
  else:
    network = sequential(7, channels, layout != "KAIR", True, epsilon=1e-4)
    state = prefixed("model.", reference.state_dict(network))
  source = save_torch(state, tmp_path / "net.pth")
  part = port.load_part(source, "restorer")
  assert part.config == {
    "depth": 17 if layout == "DnCNN-PyTorch" else 7,
    "width": 8,
    "channels": channels,
    "out_channels": channels,
  }
  assert_same(part.variables, port.load_part(source, "estimator").variables)
  images = reference.images(2, 15)[..., :channels]
  with torch.no_grad():
    expected = network(torch.from_numpy(images.transpose(0, 3, 1, 2)).double()).numpy()
  ours = models.DnCNN(**part.config).apply(part.variables, images)
  assert reference.relative_error(ours, expected.transpose(0, 2, 3, 1)) < 1e-5


def test_a_denoiser_among_other_tensors(tmp_path):
  for prefix in ("model.", "module.dncnn."):
    state = prefixed(prefix, reference.state_dict(sequential(4, 3, False, True)))
    state |= {"module.foo": np.zeros(3), "module.head.weight": np.zeros((2, 2))}
    with pytest.raises(errors.UsageError, match=r"unexpected .*foo, .*head\.weight"):
      port.load(save_torch(state, tmp_path / "a.pth"))


@pytest.mark.parametrize("name", ["07.weight", "9" * 5000 + ".weight", "٣.weight"])
def test_names_that_are_no_numbers(name):
  state = prefixed("model.", reference.state_dict(sequential(4, 3, False, True)))
  state[f"model.{name}"] = np.zeros((8, 8, 3, 3), np.float32)
  with pytest.raises(errors.UsageError) as caught:
    recognizing.recognize(state, "f.pth")
  assert f"unexpected {name[:100]}" in str(caught.value)
  assert len(str(caught.value)) < 200


def test_long_names(resnet18):
  for state in (
    {"a" * 100_000: np.zeros(3)},
    resnet18 | {"a" * 100_000: np.zeros(3)},
    {"model.0.weight": np.zeros((8, 3, 3, 3)), "a" * 100_000: np.zeros(3)},
    {"a" * 100_000: np.zeros(0)},
  ):
    with pytest.raises(errors.UsageError) as caught:
      recognizing.recognize(state, "f.pth")
    assert "a" * 60 in str(caught.value) and len(str(caught.value)) < 500


def test_denoisers_that_do_not_fit(tmp_path):
  state = prefixed("model.", reference.state_dict(sequential(4, 3, True, True)))
  path = tmp_path / "a.pth"
  for name, match in (
    ("model.3.running_mean", r"missing 3\.running_mean"),
    ("model.2.weight", r"is no DnCNN: unexpected 2\.bias"),
  ):
    broken = {k: v for k, v in state.items() if k != name}
    with pytest.raises(errors.UsageError, match=match):
      port.load(save_torch(broken, path))
  for name, shape, match in (
    ("2.weight", (8, 9, 3, 3), r"misshapen 2\.weight \(8, 9, 3, 3\)"),
    ("2.bias", (9,), r"misshapen 2\.bias \(should be \(8,\)\)"),
    ("3.running_var", (9,), r"misshapen 3\.\* \(should be \(8,\)\)"),
  ):
    broken = state | {f"model.{name}": np.zeros(shape, np.float32)}
    with pytest.raises(errors.UsageError, match=match):
      port.load(save_torch(broken, path))


def stack(convs: int, channels: int = 4) -> dict:
  layers = []
  for i in range(convs):
    inputs, outputs = (channels if i else 1), (channels if i < convs - 1 else 1)
    layers += [torch.nn.Conv2d(inputs, outputs, 3), torch.nn.ReLU()]
  network = torch.nn.Sequential(*layers[:-1])
  reference.randomize(network)
  return reference.state_dict(network)


def two_layers(inputs, hidden, outputs) -> dict:
  nn = torch.nn
  network = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, 6))
  network[2] = nn.Linear(hidden, outputs)
  reference.randomize(network)
  return reference.state_dict(network)


def fgnic(resnet18, convs: int) -> dict:
  """Returns an end-to-end FG-NIC checkpoint on a ResNet-18."""
  state = {}
  for name, value in resnet18.items():
    layout = f"feature_extractor.{name}"
    if name.startswith("fc."):
      layout = name.replace("fc.", "classifier.")
    state[layout] = value
  denoiser = lambda: reference.state_dict(sequential(6, 3, False, True))
  state |= prefixed("restoration.model.", denoiser())
  state |= prefixed("fidelity.model.", denoiser())
  for tap in range(3):
    state |= prefixed(f"cnn_layers_weight.{tap}.", stack(convs))
    state |= prefixed(f"cnn_layers_bias.{tap}.", stack(convs))
  state |= prefixed("mul_fc.", two_layers(512, 256, 512))
  state |= prefixed("cat_fc.", two_layers(1024, 256, 512))
  state |= prefixed("ensemble.", two_layers(1, 256, 512))
  return state


@pytest.mark.parametrize("convs", [2, 3])
def test_fgnic_checkpoint(resnet18, convs, tmp_path):
  state = fgnic(resnet18, convs)
  parts = port.load(save_torch(state, tmp_path / "model.pth"))
  assert set(parts) == {
    "restorer",
    "estimator",
    "classifier",
    "calibration",
    "ensemble",
  }
  assert parts["classifier"].config["model"] == {"name": "resnet18"}
  assert parts["classifier"].config["num_classes"] == 5
  config = parts["calibration"].config
  assert config == {
    "spatial_multiplication": True,
    "spatial_addition": True,
    "channel_multiplication": True,
    "channel_concatenation": True,
    "num_taps": 3,
    "num_convs": convs,
    "channels": 4,
    "feature_size": 512,
    "ratio": 0.5,
  }
  assert parts["ensemble"].config == {"feature_size": 512, "ratio": 0.5}
  params = parts["calibration"].variables["params"]
  last = f"conv_{convs - 1}"
  np.testing.assert_array_equal(
    params["addition_2"][last]["kernel"][..., 0].transpose(2, 0, 1),
    state[f"cnn_layers_bias.2.{2 * convs - 2}.weight"][0],
  )
  np.testing.assert_array_equal(
    params["channel_concatenation"]["hidden"]["kernel"], state["cat_fc.0.weight"].T
  )
  np.testing.assert_array_equal(
    params["channel_multiplication"]["output"]["bias"], state["mul_fc.2.bias"]
  )
  ensemble = parts["ensemble"].variables["params"]["weights"]
  np.testing.assert_array_equal(
    ensemble["hidden"]["kernel"], state["ensemble.0.weight"].T
  )


@pytest.mark.parametrize(
  "prefix, part",
  [
    ("restoration.", "restorer"),
    ("fidelity.", "estimator"),
    ("feature_extractor.", "backbone"),
    ("classifier.", "head"),
    ("cnn_layers_weight.", "calibration"),
    ("cnn_layers_", "calibration"),
    ("mul_fc.", "calibration"),
    ("cat_fc.", "calibration"),
    ("ensemble.", "ensemble"),
  ],
)
def test_pieces_of_an_fgnic_checkpoint(resnet18, prefix, part, tmp_path):
  state = fgnic(resnet18, 2)
  piece = {k: v for k, v in state.items() if k.startswith(prefix)}
  whole = port.load(save_torch(state, tmp_path / "whole.pth"))
  parts = port.load(save_torch(piece, tmp_path / "piece.pth"))
  assert list(parts) == [part]
  home = "classifier" if part in ("backbone", "head") else part
  for collection, tree in parts[part].variables.items():
    for name, child in tree.items():
      assert_same(child, whole[home].variables[collection][name])


@pytest.mark.parametrize("name, hidden", [("alexnet", (1, 4)), ("vgg16", (0, 3))])
def test_head_of_several_layers(name, hidden, tmp_path):
  """A small head in AlexNet's and VGG's numbering, as FG-NIC stores it alone."""
  sizes = dict(zip((*hidden, 6), ((6, 8), (5, 6), (3, 5)), strict=True))
  rng = np.random.default_rng(0)
  state = {"ensemble.0.weight": np.ones((4, 1)), "ensemble.0.bias": np.ones(4)}
  state |= {"ensemble.2.weight": np.ones((8, 4)), "ensemble.2.bias": np.ones(8)}
  for i, shape in sizes.items():
    state[f"classifier.{i}.weight"] = rng.normal(size=shape)
    state[f"classifier.{i}.bias"] = rng.normal(size=shape[:1])
  part = port.load(save_torch(state, tmp_path / "a.pth"))["head"]
  assert part.config["num_classes"] == 3
  kernels = part.variables["params"]["head"]
  for ours, theirs in zip(("fc1", "fc2", "logits"), sizes, strict=True):
    np.testing.assert_array_equal(
      kernels[ours]["kernel"], state[f"classifier.{theirs}.weight"].T.astype(np.float32)
    )


def test_fgnic_checkpoint_that_does_not_fit(resnet18, tmp_path):
  state = fgnic(resnet18, 2)
  path = tmp_path / "a.pth"
  del state["mul_fc.2.bias"]
  with pytest.raises(errors.UsageError, match=r"missing mul_fc\.2\.bias"):
    port.load(save_torch(state, path))
  state = {**fgnic(resnet18, 2), "restoration.conv.weight": np.zeros(3)}
  match = r"no DnCNN: unexpected restoration\.conv\.weight"
  with pytest.raises(errors.UsageError, match=match):
    port.load(save_torch(state, path))
  state = {**fgnic(resnet18, 2), "memory": np.zeros(3)}
  with pytest.raises(errors.UsageError, match="unexpected memory"):
    port.load(save_torch(state, path))


@pytest.mark.parametrize(
  ("name", "shape"),
  [
    ("feature_extractor.conv1.weight", (0, 3, 7, 7)),
    ("classifier.weight", (0, 4)),
    ("restoration.model.0.weight", (0, 0, 3, 3)),
    ("ensemble.2.weight", (0, 0)),
    ("mul_fc.0.weight", (4, 0)),
  ],
)
def test_tensors_without_numbers(resnet18, name, shape):
  state = fgnic(resnet18, 2) | {name: np.zeros(shape, np.float32)}
  with pytest.raises(errors.UsageError) as caught:
    recognizing.recognize(state, "f.pth")
  assert f"without numbers are {name} {shape}" in str(caught.value)


def test_a_backbone_without_numbers(resnet18):
  for name in ("fc.weight", "conv1.weight"):
    state = resnet18 | {name: np.zeros((0, *resnet18[name].shape[1:]), np.float32)}
    with pytest.raises(errors.UsageError, match=f"without numbers are {name}"):
      recognizing.recognize(state, "f.pth")


@pytest.mark.parametrize("name", ["mul_fc", "cat_fc", "ensemble"])
def test_a_feature_that_is_too_short(name):
  sizes = {"mul_fc": (1, 4, 1), "cat_fc": (1, 4, 2), "ensemble": (1, 4, 1)}[name]
  state = prefixed(f"{name}.", two_layers(*sizes))
  with pytest.raises(errors.UsageError, match=r"feature of [01] \(should be at least"):
    recognizing.recognize(state, "f.pth")


@pytest.mark.parametrize("convs", [1, 2, 10, 11])
def test_how_many_convolutions_calibration_stacks_have(convs):
  state = prefixed("cnn_layers_weight.0.", stack(convs))
  if 2 <= convs <= 10:
    parts = recognizing.recognize(state, "f.pth")
    assert parts["calibration"].config["num_convs"] == convs
  else:
    match = rf"{convs} convolutions \(should be 2 to 10\)"
    with pytest.raises(errors.UsageError, match=match):
      recognizing.recognize(state, "f.pth")


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared")
def test_the_parity_manifest_is_a_whole_model(tmp_path):
  manifest = SHARED / "resnet50_oracle_l1.manifest.json"
  shapes = json.loads(manifest.read_text())
  state = {k: np.zeros(v, np.float32) for k, v in shapes.items()}
  parts = recognizing.recognize(state, "f.pth")
  assert set(parts) == {"restorer", "classifier", "calibration", "ensemble"}
  assert parts["restorer"].config["depth"] == 20
  assert parts["classifier"].config["model"] == {"name": "resnet50"}


class Payload:
  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_a_pickle_that_wants_to_run_code_is_refused(form, tmp_path):
  target, path = tmp_path / "ran", tmp_path / "evil.pth"
  content = {"conv1.weight": Payload(target)}
  if form == "torch":
    torch.save(content, path)
  else:
    path.write_bytes(pickle.dumps(content, protocol=2))
  with pytest.raises(errors.UsageError) as caught:
    port.load(path)
  assert not target.exists()
  assert "refused" in str(caught.value) and "mkdir" in str(caught.value)
  assert "\n" not in str(caught.value)
  # The file is what it seems: an ordinary unpickling would have run it.
  torch.load(path, weights_only=False) if form == "torch" else pickle.loads(
    path.read_bytes()
  )
  assert target.exists()


def test_unreadable_files(tmp_path):
  with pytest.raises(errors.UsageError, match="there is no file"):
    port.load(tmp_path / "absent.pth")
  text = tmp_path / "text.pth"
  text.write_text("hello")  # Not even a pickle.
  with pytest.raises(errors.UsageError, match="neither a PyTorch checkpoint nor"):
    port.load(text)
  text.rename(tmp_path / "text.safetensors")
  with pytest.raises(errors.UsageError, match="no readable safetensors"):
    port.load(tmp_path / "text.safetensors")
  save_torch({"weight": np.zeros(3)}, tmp_path / "small.pth")
  with pytest.raises(errors.UsageError, match=r"not recognized: .*weight"):
    port.load(tmp_path / "small.pth")
  torch.save([1, 2], tmp_path / "list.pth")
  with pytest.raises(errors.UsageError, match="holds a list"):
    port.load(tmp_path / "list.pth")
  whole = (tmp_path / "small.pth").read_bytes()
  (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
  with pytest.raises(errors.UsageError, match=r"cut\.pth"):
    port.load(tmp_path / "cut.pth")
  with pytest.raises(errors.UsageError, match="several files of weights"):
    port.load(tmp_path)
  (tmp_path / "empty").mkdir()
  with pytest.raises(errors.UsageError, match=r"without port\.json"):
    port.load(tmp_path / "empty")


def test_no_file_needs_torch(tmp_path):
  state = prefixed("model.", reference.state_dict(sequential(3, 1, False, True)))
  paths = [tmp_path / name for name in ("a.safetensors", "a.pth", "older.pth")]
  safetensors.numpy.save_file(state, paths[0])
  save_torch(state, paths[1])
  content = torch.load(paths[1], weights_only=True)
  torch.save(content, paths[2], _use_new_zipfile_serialization=False)
  code = (
    "import sys; sys.modules['torch'] = None; from fidelity_jax import port\n"
    "for path in sys.argv[1:]: print(list(port.load(path)))"
  )
  command = [sys.executable, "-c", code, *map(str, paths)]
  run = subprocess.run(command, capture_output=True, text=True)
  assert run.stdout == "['dncnn']\n" * 3, run.stderr


def test_command_writes_a_directory_that_loads_again(resnet18, tmp_path, capsys):
  source = save_torch(fgnic(resnet18, 2), tmp_path / "model.pth")
  target = tmp_path / "ported"
  assert command.main([str(source), f"--to={target}"]) == 0
  assert "classifier: 11," in capsys.readouterr().out
  assert {p.name for p in target.iterdir()} == {
    "port.json",
    *(f"{part}.safetensors" for part in port.load(source)),
  }
  for name, part in port.load(source).items():
    again = port.load_part(target, name)
    assert again.config == part.config
    assert_same(again.variables, part.variables)
  index = files.read_json(target / "port.json", "")
  assert index["checkpoint"] == str(source)
  # Once more replaces it; another directory is never replaced.
  denoiser = prefixed("model.", reference.state_dict(sequential(3, 1, False, True)))
  assert (
    command.main([str(save_torch(denoiser, tmp_path / "d.pth")), f"--to={target}"]) == 0
  )
  assert {p.name for p in target.iterdir()} == {"port.json", "dncnn.safetensors"}
  with pytest.raises(errors.UsageError, match=r"holds no classifier; known: dncnn"):
    port.load_part(target, "classifier")
  (tmp_path / "mine").mkdir()
  assert command.main([str(source), f"--to={tmp_path / 'mine'}"]) == 2
  assert "exists and is no ported checkpoint" in capsys.readouterr().err
  assert not list(tmp_path.glob(".*"))
  assert command.main([str(tmp_path / "absent.pth"), "--to=x"]) == 2
  (target / "dncnn.safetensors").write_bytes(b"")
  with pytest.raises(errors.RunError, match="damaged"):
    port.load(target)


def test_a_port_that_is_stopped_leaves_the_one_before(tmp_path, monkeypatch):
  """However it stops; a signal raises, too."""
  conv = {"kernel": np.ones((3, 3, 1, 1), np.float32)}
  part = lambda source: {"dncnn": port.Part({"params": {source: conv}}, {})}
  target = tmp_path / "ported"
  port.save(part("first"), target, "first")
  replace = os.replace

  def stopped(source, destination):
    if destination == target and source.suffix == ".tmp":
      raise KeyboardInterrupt
    replace(source, destination)

  with monkeypatch.context() as patch:
    patch.setattr(os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
      port.save(part("second"), target, "second")
  assert list(port.load(target)["dncnn"].variables["params"]) == ["first"]
  assert [path.name for path in tmp_path.iterdir()] == ["ported"]
  port.save(part("second"), target, "second")
  assert list(port.load(target)["dncnn"].variables["params"]) == ["second"]
  assert [path.name for path in tmp_path.iterdir()] == ["ported"]


def test_a_directory_is_replaced_from_within(tmp_path, monkeypatch):
  conv = {"kernel": np.ones((3, 3, 1, 1), np.float32)}
  part = lambda source: {"dncnn": port.Part({"params": {source: conv}}, {})}
  target = tmp_path / "ported"
  port.save(part("first"), target, "first")
  monkeypatch.chdir(target)
  port.save(part("second"), pathlib.Path("."), "second")
  assert list(port.load(target)["dncnn"].variables["params"]) == ["second"]
  assert [path.name for path in tmp_path.iterdir()] == ["ported"]


def test_a_directory_tells_whether_its_input_is_scaled(tmp_path):
  conv = {"kernel": np.ones((3, 3, 1, 1), np.float32)}
  port.save({"dncnn": port.Part({"params": conv}, {})}, tmp_path / "ported", "a test")
  with pytest.raises(errors.UsageError, match="is ported, and says itself"):
    port.load(tmp_path / "ported", transform_input=False)


def test_content_digests_follow_the_content(tmp_path):
  state = {"model.0.weight": np.ones((4, 1, 3, 3), np.float32)}
  state["model.2.weight"] = np.ones((1, 4, 3, 3), np.float32)
  file, target = tmp_path / "a.safetensors", tmp_path / "ported"
  safetensors.numpy.save_file(state, file)
  port.save(port.load(file), target, "elsewhere")
  digests = [port.content_digest(file), port.content_digest(target)]
  assert len(set(digests)) == 2 and all(len(digest) == 64 for digest in digests)
  assert digests[0] == hashlib.sha256(file.read_bytes()).hexdigest()
  moved = [file.rename(tmp_path / "b.safetensors"), target.rename(tmp_path / "moved")]
  assert [port.content_digest(str(path)) for path in moved] == digests
  port.save(port.load(moved[0]), target, "what it came from does not count")
  assert port.content_digest(target) == digests[1]
  safetensors.numpy.save_file({k: 2 * v for k, v in state.items()}, moved[0])
  port.save(port.load(moved[0]), moved[1], "elsewhere")
  assert not {port.content_digest(path) for path in moved} & set(digests)
  with pytest.raises(errors.UsageError, match="there is no file"):
    port.content_digest(file)
  # A directory with one file of weights is that file.
  assert port.content_digest(tmp_path) == port.content_digest(moved[0])


def test_a_directory_that_an_earlier_version_ported(tmp_path):
  index = files.seal({"source": "a.pth", "parts": {}})
  files.write_json(tmp_path / "port.json", index)
  for function in (port.load, port.content_digest):
    with pytest.raises(errors.RunError, match=r"another version.*port its checkpoint"):
      function(tmp_path)
