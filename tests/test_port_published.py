"""Published weights by name."""

import hashlib

import numpy as np
import pytest
import safetensors.numpy
from file_server import serving

from fidelity_jax import errors, port
from fidelity_jax.port import published


def test_a_name_becomes_a_network(tmp_path, monkeypatch):
  rng = np.random.default_rng(0)
  state = {"model.0.weight": rng.normal(size=(4, 1, 3, 3)).astype(np.float32)}
  state["model.2.weight"] = rng.normal(size=(1, 4, 3, 3)).astype(np.float32)
  content = safetensors.numpy.save(state)
  name = f"net-{hashlib.sha256(content).hexdigest()[:8]}.safetensors"
  monkeypatch.setenv("FIDELITY_JAX_CACHE", str(tmp_path / "cache"))
  with serving(content) as server:
    monkeypatch.setitem(published.FILES, "torchvision/resnet50", server.url + name)
    digest = port.content_digest("torchvision/resnet50")
  part = port.load_part("torchvision/resnet50", "restorer")
  assert digest == hashlib.sha256(content).hexdigest()
  assert part.config["depth"] == 2
  assert (tmp_path / "cache" / name).read_bytes() == content


def test_without_a_network_tells_what_to_put_where(tmp_path, monkeypatch):
  with serving(b"") as server:
    url = server.url  # The port is closed afterwards.
  url += "resnet50-0676ba61.pth"
  monkeypatch.setitem(published.FILES, "torchvision/resnet50", url)
  monkeypatch.setenv("FIDELITY_JAX_CACHE", str(tmp_path))
  for function in (port.load, port.content_digest):
    with pytest.raises(errors.Missing) as caught:
      function("torchvision/resnet50")
    message = str(caught.value)
    for part in (url, "starts 0676ba61", str(tmp_path)):
      assert part in message
    assert "\n" not in message


@pytest.mark.parametrize(
  "name", [name for name, place in published.FILES.items() if "https" in place]
)
def test_a_file_of_another_content(name, tmp_path, monkeypatch):
  """It is refused by the digits in its name."""
  monkeypatch.setenv("FIDELITY_JAX_CACHE", str(tmp_path))
  file = published.FILES[name].rpartition("/")[2]
  (tmp_path / file).write_bytes(b"something else")
  digits = file.removesuffix(".pth")[-8:]
  with pytest.raises(
    errors.RunError, match=f"SHA-256 starts [0-9a-f]{{8}}, not {digits}"
  ):
    port.load(name)


def test_an_unknown_name():
  with pytest.raises(errors.UsageError, match=r"mean 'torchvision/resnet50'"):
    port.load("torchvision/resnet5O")
