"""The benchmarks run, at sizes that say nothing about speed."""

import importlib.util
import json
from unittest import mock

import jax
import pytest
from conftest import ROOT

from fidelity_jax import cpu

SMALL = ["--batch=1", "--size=64", "--repeats=1"]


def _run(command, tmp_path, name, *arguments):
  path = tmp_path / "results.json"
  program = (f"benchmarks/{name}.py",)
  command(*arguments, f"--json={path}", program=program, check=0)
  return json.loads(path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["oracle", "pretrained", "end_to_end"])
def test_train_step(command, tmp_path, mode):
  results = _run(command, tmp_path, "train_step", f"--modes={mode}", *SMALL)
  step = results["steps"][mode]
  assert step["ratio"] > 0
  assert step["flops"] > 1e9
  assert all(step[side]["peak_bytes"] > 2**20 for side in ("jax", "torch"))


@pytest.mark.slow
def test_backbones(command, tmp_path):
  results = _run(command, tmp_path, "backbones", "--nets=alexnet", *SMALL)
  assert "alexnet" in json.dumps(results)


@pytest.mark.slow
def test_convolutions(command, tmp_path):
  shapes = ("--shapes=calibration", "--repeats=1")
  assert _run(command, tmp_path, "convolutions", *shapes)


def test_cpu_has_every_case(monkeypatch):
  monkeypatch.syspath_prepend(ROOT / "benchmarks")
  spec = importlib.util.spec_from_file_location("cpu", ROOT / "benchmarks" / "cpu.py")
  benchmark = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(benchmark)

  def chooses(case):
    function, arrays = benchmark.make(case, 1, 32)
    return "platform_index" in str(jax.make_jaxpr(function)(*arrays))

  # What was chosen on one side must not be found again on the other.
  for _ in range(2):
    with mock.patch.object(cpu, "choose", benchmark.plain):
      assert not chooses("remat")
    assert chooses("remat")
  assert all(chooses(case) for case in benchmark.CASES)


@pytest.mark.slow
def test_cpu(command, tmp_path):
  cases = _run(command, tmp_path, "cpu", *SMALL)["cases"]
  assert cases["remat"]["cpu"]["temp_bytes"] < cases["remat"]["plain"]["temp_bytes"]
