"""Published weights by name."""

import hashlib

import numpy as np
import pytest
import safetensors.numpy
from file_server import serving

from fidelity_jax import downloading, errors, port
from fidelity_jax.port import published


def test_a_name_becomes_a_network(tmp_path, monkeypatch):
  rng = np.random.default_rng(0)
  state = {"model.0.weight": rng.normal(size=(4, 1, 3, 3)).astype(np.float32)}
  state["model.2.weight"] = rng.normal(size=(1, 4, 3, 3)).astype(np.float32)
  content = safetensors.numpy.save(state)
  name = f"net-{hashlib.sha256(content).hexdigest()[:8]}.safetensors"
  monkeypatch.setenv("FIDELITY_JAX_CACHE", str(tmp_path / "cache"))
  monkeypatch.setitem(published.FILES, "torchvision/resnet50", name)
  with serving(content) as server:
    monkeypatch.setattr(published, "BASE_URL", server.url)
    part = port.load_part("torchvision/resnet50", "restorer")
  assert part.config["depth"] == 2
  assert (tmp_path / "cache" / name).read_bytes() == content


def test_without_a_network_tells_what_to_put_where(tmp_path, monkeypatch):
  with serving(b"") as server:
    url = server.url  # Nobody listens there any more afterwards.
  monkeypatch.setattr(published, "BASE_URL", url)
  monkeypatch.setenv("FIDELITY_JAX_CACHE", str(tmp_path))
  with pytest.raises(errors.RunError) as caught:
    port.load("torchvision/resnet50")
  message = str(caught.value)
  for part in (f"{url}resnet50-0676ba61.pth", "starts 0676ba61", str(tmp_path)):
    assert part in message
  assert "\n" not in message


def test_names(monkeypatch):
  with pytest.raises(errors.UsageError, match=r"mean 'torchvision/resnet50'"):
    port.load("torchvision/resnet5O")
  checksums = []
  monkeypatch.setattr(
    downloading, "fetch", lambda url, folder, checksum: checksums.append(checksum)
  )
  for name, file in published.FILES.items():
    published.find(name)
    assert checksums[-1] == f"sha256:{file.rpartition('-')[2].partition('.')[0]}"
    assert len(checksums[-1]) == len("sha256:") + 8
