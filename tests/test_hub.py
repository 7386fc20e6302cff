"""Pushing and pulling: huggingface_hub itself, against a stand-in for the hub."""

import json
import os
import shutil
import subprocess
import sys

import hub_server
import numpy as np
import pytest
import safetensors.numpy
from conftest import ROOT, experiment, flip, one_line
from flax import traverse_util
from test_export import expected, pictures

from fidelity_jax import (
  errors,
  export,
  exported,
  hub,
  huggingface,
  port,
  pull,
  push,
  runs,
)

pytest.importorskip("huggingface_hub")

# Commands one after the other; the library reads its settings when it is imported.
COMMANDS = """
import contextlib, io, json, sys
if sys.argv[1] == "hide":
  sys.modules["huggingface_hub"] = None
from fidelity_jax import cli
for name, *arguments in json.loads(sys.argv[2]):
  out, error = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
    status = cli.main([name, *arguments])
  told = [l for l in error.getvalue().splitlines() if l.startswith("fidelity_jax: ")]
  print(json.dumps([status, out.getvalue(), "\\n".join(told)]))
"""


@pytest.fixture
def server():
  with hub_server.serving() as running:
    yield running


@pytest.fixture
def run(server, tmp_path):
  """Runs commands in one process; returns (status, output, error) of each."""

  def commands(*several, token=hub_server.TOKEN, url=None, hide="show", **more):
    several = [[str(part) for part in one] for one in several]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {
      "HF_ENDPOINT": url or server.url,
      "HF_HOME": str(tmp_path / "hf"),
      "HF_HUB_DISABLE_XET": "1",
      "PYTHONPATH": str(ROOT),
      **({"HF_TOKEN": token} if token else {}),
      **more,
    }
    result = subprocess.run(
      [sys.executable, "-c", COMMANDS, hide, json.dumps(several)],
      env=environment,
      capture_output=True,
      text=True,
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]

  return commands


@pytest.fixture(scope="module")
def files(toy_run, tmp_path_factory):
  """A directory with an exported file, and one with weights."""
  root = tmp_path_factory.mktemp("exports")
  export.export(experiment(toy_run), root / "toy.jax")
  export.export(experiment(toy_run), root / "weights")
  return root


@pytest.mark.slow
def test_what_is_pushed_comes_back(server, run, files, toy_run, tmp_path):
  results = run(
    ("push", files / "toy.jax", "hf:me/toy", "--private"),
    ("push", files / "weights", "hf:me/toy@weights"),
    ("push", experiment(toy_run), "hf:me/run"),
    ("pull", "hf:me/toy", f"--to={tmp_path}/a"),
    ("pull", "hf:me/toy@weights", f"--to={tmp_path}/b"),
    ("pull", "hf:me/run", f"--to={tmp_path}/c"),
    # Without being pulled.
    ("export", "hf:me/run", f"--to={tmp_path}/d"),
  )
  assert [status for status, *_ in results] == [0] * 7, results
  assert "/me/toy/commit/" in results[0][1]
  assert server.repos["me/toy"]["private"]
  # Large files by LFS, and each push is one commit.
  assert sum("PUT /lfs/" in line for line in server.requests) >= 3
  assert sum("/commit/" in line for line in server.requests) == 3
  assert sorted(os.listdir(tmp_path / "a")) == ["README.md", "toy.jax", "toy.jax.json"]
  for name in ("toy.jax", "toy.jax.json"):
    assert (tmp_path / "a" / name).read_bytes() == (files / name).read_bytes()
  card = (tmp_path / "a" / "README.md").read_text()
  assert card == exported.card_path(files / "toy.jax").read_text()
  mine = runs.find(experiment(toy_run))
  images = pictures(mine)
  want = expected(mine, images)["logits"]
  found = [exported.load(tmp_path / "a" / "toy.jax")(**images)["logits"]]
  found += [expected(runs.find(tmp_path / one), images)["logits"] for one in "bcd"]
  for logits in found:
    np.testing.assert_allclose(logits, want, atol=1e-5)


@pytest.mark.slow
def test_what_goes_wrong_is_one_line(server, run, files, tmp_path):
  (pushed,) = run(("push", files / "toy.jax", "hf:me/toy", "--private"))
  assert pushed[0] == 0
  held = server.repos["me/toy"]["branches"]["main"]
  server.repos["me/other"] = {"private": False, "branches": {"main": {"a": b"b"}}}
  damaged = dict(held)
  damaged["toy.jax"] = held["toy.jax"][:-1] + b"!"
  server.repos["me/bad"] = {"private": False, "branches": {"main": damaged}}
  main = {"main": {"a.pth": b"x", "b.safetensors": b"y", "c/d.pth": b"z"}}
  server.repos["me/several"] = {"private": False, "branches": main}
  gated = {"private": False, "gated": True, "branches": main}
  server.repos["me/gated"] = gated
  there = f"--to={tmp_path}/there"
  expected_lines = [
    (("port", "hf:me/none", there), "no such repository"),
    (("port", "hf:me/several@v9", there), "no such revision"),
    (("port", "hf:me/several/e.pth", there), "no such file"),
    (("port", "hf:me/gated", there), "asks for its owner's permission"),
    (("pull", "hf:me/none", there), "no such repository"),
    (("pull", "hf:me/toy@v9", there), "no such revision"),
    (("pull", "hf:me/other", there), "nothing in it that fidelity_jax exported"),
    (("pull", "hf:me/bad", there), "not what its record says"),
  ]
  results = run(*(command for command, _ in expected_lines))
  for (status, _, line), (_, words) in zip(results, expected_lines, strict=True):
    assert status == 1, line
    assert words in one_line(line)
  unusable = [
    ("hf:me/several", "several files of weights in it"),
    ("hf:me/several", "a.pth, b.safetensors, c/d.pth"),
    ("hf:me/other", "no file of weights"),
    ("hf:me/several/b.safetensors", "no readable safetensors file"),
    ("hf:me", "hf:OWNER/NAME[/FILE]"),
  ]
  results = run(*(("port", address, there) for address, _ in unusable))
  for (status, _, line), (_, words) in zip(results, unusable, strict=True):
    assert status == 2, line
    assert words in one_line(line)
  without = run(
    ("port", "hf:me/toy", there),
    ("pull", "hf:me/toy", there),
    ("push", files / "toy.jax", "hf:me/toy"),
    token=None,
  )
  for status, _, line in without:
    assert status == 1, line
    assert "HF_TOKEN" in one_line(line)
  both = [(name, "hf:me/toy", there) for name in ("pull", "port")]
  for status, _, line in run(*both, url="http://127.0.0.1:9"):
    assert status == 1
    assert "is not reached" in one_line(line)
  for status, _, line in run(*both, hide="hide"):
    assert status == 1
    assert "pip install 'fidelity_jax[hub]'" in one_line(line)
  # Nothing of all that is left behind.
  assert {path.name for path in tmp_path.iterdir()} <= {"hf"}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
  """A ResNet-18 of torchvision's in a file as timm publishes it; its directory."""
  import torch
  from safetensors.torch import save_file
  from torch_reference import torchvision

  torch.manual_seed(0)
  state = torchvision().models.resnet18(num_classes=16).state_dict()
  root = tmp_path_factory.mktemp("resnet18.tv_in1k")
  save_file(state, root / "model.safetensors", {"format": "pt"})
  (root / "config.json").write_text('{"architecture": "resnet18", "num_classes": 16}')
  (root / "pytorch_model.bin").write_bytes(b"the same")
  return root


def _variables(place):
  return traverse_util.flatten_dict(port.load(place)["classifier"].variables)


@pytest.mark.slow
def test_weights_are_taken_from_the_hub(server, run, classifier, tmp_path):
  held = {path.name: path.read_bytes() for path in classifier.iterdir()}
  server.repos["timm/r18"] = {"private": False, "branches": {"main": held}}
  two = {"a.pth": b"none", "model.safetensors": held["model.safetensors"]}
  server.repos["me/two"] = {"private": False, "branches": {"main": two}}
  part = port.Part({"params": {"x": np.zeros(1, "f4")}}, {})
  port.save({"classifier": part}, tmp_path / "half", "x")
  half = {path.name: path.read_bytes() for path in (tmp_path / "half").iterdir()}
  half["a.safetensors"] = b"none"
  server.repos["me/half"] = {"private": False, "branches": {"main": half}}
  server.repos["me/part"] = {"private": False, "branches": {"main": half}}
  plan = ["train", "--config=configs/clean.py:scratch", f"--workdir={tmp_path}/w"]
  plan += ["--dry_run", "--config.model.name=resnet18"]
  weights = "--config.model.weights="
  results = run(
    ("port", "hf:timm/r18", f"--to={tmp_path}/a"),
    ("port", "hf:timm/r18/model.safetensors@main", f"--to={tmp_path}/b"),
    (*plan, f"{weights}hf:timm/r18"),
    (*plan, f"{weights}{classifier}"),
    ("port", "hf:me/two/a.pth", f"--to={tmp_path}/e"),
    ("port", "hf:me/half/port.json", f"--to={tmp_path}/e"),
    ("port", "hf:me/part/port.json", f"--to={tmp_path}/e"),
    ("port", "hf:me/part/a.safetensors", f"--to={tmp_path}/e"),
  )
  assert [status for status, *_ in results] == [0] * 4 + [2] * 4, results
  # Once, and nothing else.
  fetched = [line for line in server.requests if line.startswith("GET /timm/r18/")]
  assert len(fetched) == 1 and fetched[0].endswith("/model.safetensors")
  # A stage does not depend on where its weights were: nor does an offline one.
  offline = run(
    (*plan, f"{weights}hf:timm/r18"),
    ("port", "hf:timm/r18", f"--to={tmp_path}/c"),
    ("port", "hf:timm/other", f"--to={tmp_path}/d"),
    ("port", "hf:me/two", f"--to={tmp_path}/e"),
    ("port", "hf:me/half", f"--to={tmp_path}/e"),
    ("port", "hf:me/part", f"--to={tmp_path}/e"),
    url="http://127.0.0.1:9",
    HF_HUB_OFFLINE="1",
  )
  assert "classifier-resnet18-clean-" in results[2][1]
  assert results[2][1] == results[3][1] == offline[0][1]
  assert offline[1][0] == 0
  assert offline[2][0] == 1 and "is not reached" in one_line(offline[2][2])
  # What is there of a repository is not all that it has.
  assert offline[3][0] == 1 and "hf:OWNER/NAME/FILE" in one_line(offline[3][2])
  for status, _, line in offline[4:]:
    assert status == 1 and "not downloaded whole" in one_line(line)
  # The numbers are the file's, and a directory of such a file is weights, too.
  want = _variables(classifier)
  for place in "abc":
    found = _variables(tmp_path / place)
    assert found.keys() == want.keys()
    for path, value in want.items():
      np.testing.assert_array_equal(found[path], value)
  kernel = want["params", "backbone", "stem", "conv", "kernel"]
  theirs = safetensors.numpy.load(held["model.safetensors"])["conv1.weight"]
  np.testing.assert_array_equal(kernel, theirs.transpose(2, 3, 1, 0))
  file = classifier / "model.safetensors"
  assert port.content_digest(classifier) == port.content_digest(file)
  assert len(runs.find(classifier).class_names) == 16


def test_commands_that_are_wrong_are_refused(files, tmp_path, refused):
  for address in ("me/toy", "hf:toy", "hf:a/b/c", "hf:me/toy@"):
    refused([address, f"--to={tmp_path}/x"], 2, "hf:OWNER/NAME", command=pull.main)
    refused([files / "toy.jax", address], 2, "hf:OWNER/NAME", command=push.main)
  refused(["hf:me/toy", f"--to={tmp_path}"], 2, "exists", command=pull.main)
  licence = "--license=mit"
  for name in ("toy.jax", "weights"):
    arguments = [files / name, "hf:me/toy", licence]
    refused(arguments, 2, "export it again with --license=mit", command=push.main)
  words = "there is no directory"
  refused(["hf:me/toy", f"--to={tmp_path}/a/b"], 2, words, command=pull.main)


def test_a_damaged_export_is_not_pushed(files, tmp_path):
  for one in ("toy.jax", "toy.jax.json"):
    (tmp_path / one).write_bytes((files / one).read_bytes())
  flip(tmp_path / "toy.jax")
  with pytest.raises(errors.RunError, match="not what its record says"):
    hub.push(tmp_path / "toy.jax", "hf:me/toy")
  weights = shutil.copytree(files / "weights", tmp_path / "weights")
  flip(weights / "restorer.safetensors")
  with pytest.raises(errors.RunError, match="not what its checksum says"):
    hub.push(weights, "hf:me/toy")


def test_a_public_repository_is_not_taken_for_a_private_one(server, run, files):
  server.repos["me/toy"] = {"private": False, "branches": {"main": {}}}
  first, second = run(
    ("push", files / "toy.jax", "hf:me/toy", "--private"),
    ("push", files / "toy.jax", "hf:me/toy"),
  )
  assert first[0] == 2
  assert "public: nothing was uploaded" in one_line(first[2])
  assert second[0] == 0
  assert sum("/commit/" in line for line in server.requests) == 1
  assert "toy.jax" in server.repos["me/toy"]["branches"]["main"]


def test_nothing_else_is_uploaded(server, run, files, tmp_path):
  weights = shutil.copytree(files / "weights", tmp_path / "weights")
  ours = {path.name for path in weights.iterdir()}
  (weights / ".env").write_text("SECRET=1")
  (weights / "old.ckpt").write_text("large")
  (weights / "notes").mkdir()
  for name in ("toy.jax", "toy.jax.json"):
    shutil.copy(files / name, tmp_path)
  (tmp_path / "README.md").write_text("# About something else")
  results = run(
    ("push", weights, "hf:me/weights"), ("push", tmp_path / "toy.jax", "hf:me/toy")
  )
  assert [status for status, *_ in results] == [0, 0], results
  uploaded = lambda name: server.repos[name]["branches"]["main"].keys()
  assert uploaded("me/weights") == ours
  assert uploaded("me/toy") == {"toy.jax", "toy.jax.json"}


def test_a_card_goes_along_when_it_is_pushed_again(server, run, files, tmp_path):
  results = run(
    ("push", files / "toy.jax", "hf:me/toy"),
    ("pull", "hf:me/toy", f"--to={tmp_path}/a"),
    ("push", tmp_path / "a" / "toy.jax", "hf:me/again"),
  )
  assert [status for status, *_ in results] == [0] * 3, results
  first, again = (
    server.repos[name]["branches"]["main"] for name in ("me/toy", "me/again")
  )
  assert again == first and "README.md" in again


def test_what_the_library_says_is_passed_on():
  """Of its errors, those of connections alone mean the network."""
  library = huggingface.library()
  from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

  for error in (OfflineModeIsEnabled("off"), HTTPError("reset"), TimeoutError()):
    with (
      pytest.raises(errors.RunError, match="not reached"),
      huggingface.speaking(library, "hf:me/toy"),
    ):
      raise error
  with (
    pytest.raises(errors.RunError, match=r"fails: ValueError: too many\.$"),
    huggingface.speaking(library, "hf:me/toy"),
  ):
    raise ValueError("too many")
