"""The benchmarks run, at sizes that say nothing about speed."""

import argparse
import importlib.util
import json
import re
import sys

import jax
import numpy as np
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
  # Compiling the rest with PyTorch would take minutes.
  options = () if mode == "oracle" else ("--no_compiled",)
  results = _run(command, tmp_path, "train_step", f"--modes={mode}", *options, *SMALL)
  step = results["steps"][mode]
  others = ("eager",) if options else ("eager", "compiled")
  assert tuple(step["ratio"]) == others
  assert min(step["ratio"].values()) > 0
  assert step["flops"] > 1e9
  assert all(step[side]["peak_bytes"] > 2**20 for side in ("jax", *others))


@pytest.mark.slow
def test_backbones(command, tmp_path):
  results = _run(command, tmp_path, "backbones", "--nets=alexnet", *SMALL)
  for row in results["times"]["alexnet"].values():
    assert row["ratio"].keys() == {"eager", "compiled"}
    # It is there, and not what eager does.
    assert row["compiled"]["first_seconds"] > 1 + row["compiled"]["seconds"]


def test_what_cannot_be_compiled_is_left_out(monkeypatch, capsys):
  shared = _imported(monkeypatch, "side_by_side")

  def fails():
    text = (
      "backend='inductor' raised:\nCppCompileError\n\nf.cpp:1: fatal error: Python.h"
    )
    raise RuntimeError(text)

  times = shared.interleave({"jax": int, "eager": int, "compiled": fails}, 1)
  assert times.keys() == {"jax", "eager"}
  said = capsys.readouterr().out
  assert said.startswith("torch.compile is left out: ")
  assert said.endswith("fatal error: Python.h\n")
  assert shared.with_ratios(times)["ratio"].keys() == {"eager"}
  with pytest.raises(RuntimeError, match="inductor"):
    shared.interleave({"jax": fails, "eager": int}, 1)


@pytest.mark.slow
def test_convolutions(command, tmp_path):
  shapes = ("--shapes=calibration", "--repeats=1")
  assert _run(command, tmp_path, "convolutions", *shapes)


def _imported(monkeypatch, name):
  monkeypatch.syspath_prepend(ROOT / "benchmarks")
  path = ROOT / "benchmarks" / f"{name}.py"
  spec = importlib.util.spec_from_file_location(name, path)
  benchmark = importlib.util.module_from_spec(spec)
  # Where dataclasses look for it.
  monkeypatch.setitem(sys.modules, name, benchmark)
  spec.loader.exec_module(benchmark)
  return benchmark


def test_cpu_has_every_case(monkeypatch):
  benchmark = _imported(monkeypatch, "cpu")

  def chooses(case):
    function, arrays = benchmark.make(case, 1, 32)
    return "platform_index" in str(jax.make_jaxpr(function)(*arrays))

  # What was chosen on one side must not be found again on the other.
  for _ in range(2):
    with cpu.left_out():
      assert not chooses("remat")
    assert chooses("remat")
  assert all(chooses(case) for case in benchmark.CASES)


@pytest.mark.slow
def test_cpu(command, tmp_path):
  cases = _run(command, tmp_path, "cpu", *SMALL)["cases"]
  assert cases["remat"]["cpu"]["temp_bytes"] < cases["remat"]["plain"]["temp_bytes"]


@pytest.mark.slow
def test_evaluation(command, tmp_path):
  rows = ["clean", "clean-restoration", "pretrained-ensemble"]
  small = ("--backbone=resnet18", "--depth=3", "--images=2", f"--rows={','.join(rows)}")
  results = _run(command, tmp_path, "evaluation", *small, *SMALL)
  assert all(value > 0 for value in results["ratio"].values())
  assert [*results["details"]["alone"][0]] == rows
  calls = results["profile"]["calls"]
  # Two batches under eight conditions; two rows share the restored images' features.
  once = ("degrading", "restoring", "estimating maps", "calibrated features")
  assert {calls[part] for part in once} == {16}
  assert calls["plain features"] == 32
  assert calls["ensembles and heads"] == 48
  assert 0 < results["networks"]["rate"]


def test_evaluation_has_the_rows_of_the_table(monkeypatch, tmp_path, cache_folder):
  benchmark = _imported(monkeypatch, "evaluation")
  args = argparse.Namespace(
    rows=list(benchmark.ROWS),
    **{"size": 64, "backbone": "resnet18", "depth": 3},
    **{"rounds": 1, "batch": 1, "images": 2},
  )
  ours = benchmark.Ours(tmp_path, args)
  assert set(ours.rows) == set(benchmark.ROWS)
  trained = {(s.compared.key, s.facts.trained_on) for s in ours.rows.values()}
  assert len(trained) == 12
  (conditions,) = {s.conditions for s in ours.rows.values()}
  assert len(conditions) == 8
  assert len(ours.dataset) == 2


def test_evaluation_refuses_to_compare_different_work(monkeypatch):
  benchmark = _imported(monkeypatch, "evaluation")
  logits = np.arange(1.0, 5.0, dtype=np.float32)[None]
  assert benchmark.check_agreement("clean", 1.0001 * logits, logits) < 2e-4
  for other in (1.01 * logits, np.full_like(logits, np.nan)):
    with pytest.raises(SystemExit, match="compute different things"):
      benchmark.check_agreement("clean", other, logits)


@pytest.mark.slow
def test_end_to_end(command, tmp_path):
  small = ("--backbone=resnet18", "--depth=3", "--images=2", "--tested=2", "--photos=")
  results = _run(command, tmp_path, "end_to_end", *small, *SMALL)
  assert results["classes"] == 2
  assert all(value > 0 for value in results["ratio"]["jax"].values())
  assert set(results["relative_error"]) == {"torch", "torch, trained"}
  for seconds in results["sides"].values():
    for phase in ("start-up", "networks taken over", "training", "evaluation"):
      assert 0 < seconds[phase] < seconds["in all"], phase
  assert results["sides"]["jax"]["compilation"] > 1


def test_end_to_end_charges_every_second_once(monkeypatch):
  benchmark = _imported(monkeypatch, "end_to_end")
  parts = {
    "start-up": {"other": 2.0},
    "between stages": {"other": 0.5},
    "classifier-clean-12345678": {"compilation": 8.0, "validation": 1.0},
    "calibration-oracle-12345678": {
      **{"compilation": 16.0, "steps": 4.0, "validation": 0.25},
      **{"checkpoints": 0.125, "other": 0.375},
    },
    "evaluation": {"compilation": 32.0, "other": 10.0},
    "report": {"other": 3.0},
  }
  phases = benchmark.phases_of(parts, drawn=2.0, total=80.0)
  assert list(phases) == list(benchmark.PHASES)
  # The process takes longer than its run, and what no phase names is start-up.
  rest = {"start-up": 80 - 56 - 4 - 0.25 - 0.125 - 1 - 8 - 5, "networks taken over": 1}
  assert phases == {
    **rest,
    **{"compilation": 56, "training": 4, "validation": 0.25, "checkpoints": 0.125},
    **{"evaluation": 8, "report": 5},
  }


def test_end_to_end_refuses_to_compare_different_work(monkeypatch):
  benchmark = _imported(monkeypatch, "end_to_end")
  logits = 100 + np.arange(6, dtype=np.float32).reshape(2, 3) % 4
  find = lambda labels, name, logits: benchmark.Found(
    {}, np.array(labels), {"classifier": {name}}, {"classifier": logits}, 0.0
  )
  found = find([0, 1], "clean", logits)
  assert benchmark.check_same_work("torch", found, found) == 0
  for other in (
    find([0, 2], "clean", logits),
    find([0, 1], "awgn-0.1", logits),
    # Nearly the same, but of other images.
    find([0, 1], "clean", logits[::-1]),
  ):
    with pytest.raises(SystemExit, match="different"):
      benchmark.check_same_work("torch", found, other)


@pytest.mark.slow
def test_scaling(command, tmp_path):
  small = ("--dry", "--steps=classifier", "--devices=1,2", "--batch=2", "--repeats=1")
  one, two = _run(command, tmp_path, "scaling", *small)["rows"]["classifier"]
  assert not one["collectives"] and one["sent_bytes"] == 0
  assert two["reduced_bytes"] > two["trained_bytes"] == one["trained_bytes"]
  # Half of the batch is on each.
  assert two["memory"]["batch"] * 2 == one["memory"]["batch"]
  assert two["flops"] == pytest.approx(one["flops"], rel=0.01)
  assert one["seconds"] > 0 and two["seconds"] > 0


def test_scaling_reports_a_row_that_takes_too_long(monkeypatch):
  benchmark = _imported(monkeypatch, "scaling")
  args = ["scaling", "--dry", "--limit=0.1"]
  monkeypatch.setattr("sys.argv", args)
  found = benchmark.in_a_process(benchmark.parse(), "oracle", 2)
  assert found == "not done after 0.1 s"


def test_scaling_reports_a_row_that_fails(monkeypatch):
  benchmark = _imported(monkeypatch, "scaling")
  monkeypatch.setattr("sys.argv", ["scaling", "--dry", "--batch=3"])
  with pytest.raises(SystemExit):
    benchmark.parse()
  monkeypatch.setattr("sys.argv", ["scaling", "--topology=v5e:3x1000"])
  found = benchmark.in_a_process(benchmark.parse(), "oracle", 1)
  assert found.startswith("exit status 1: ")


def test_scaling_model(monkeypatch):
  """Worked out by hand: 256 chips in rings of 16, and eight in lines."""
  model = _imported(monkeypatch, "scaling_model")
  step = model.Step("some", flops=78.8e9, reduced=180_000_000, operations=10)
  # 78.8 GFLOP at 40 % of 197 TFLOP/s are a millisecond.
  t = model.time(step, model.V5E, images=1, share=0.4)
  assert t.computing == pytest.approx(1e-3)
  # Four links of 45 GB/s; 16 hops to scatter, 16 to gather.
  assert t.sending == pytest.approx(2 * 255 / 256 * 1e-3)
  assert t.waiting == pytest.approx(10 * 32e-6)
  assert t.efficiency == pytest.approx(1 / (1 + 2 * 255 / 256 + 0.32))
  few = model.enough(step, model.V5E, 0.9, share=0.4)
  assert model.time(step, model.V5E, few, 0.4).efficiency == pytest.approx(0.9)
  small = model.slice_of_v5e(2, 4)
  assert (small.devices, small.bandwidth) == (8, 90e9)
  assert small.wait == pytest.approx(8e-6)


def test_the_page_on_scaling_has_what_the_model_gives(monkeypatch):
  model = _imported(monkeypatch, "scaling_model")
  text = (ROOT / "docs" / "scaling.md").read_text()
  row = r"^\| (\w+) \| [\d,]+ \| ([\d,]+) \| ([\d,]+) \| ([\d.]+) \|$"
  steps = [
    model.Step(name, 1e9 * float(flops), *(int(n.replace(",", "")) for n in numbers))
    for name, *numbers, flops in re.findall(row, text, re.MULTILINE)
  ]
  assert [step.name for step in steps] == ["classifier", "oracle", "end_to_end"]
  lines = text.splitlines()
  for line in model.tables(steps, share=0.4):
    assert line in lines, line


@pytest.mark.slow
def test_inference(command, tmp_path):
  small = ("--backbone=resnet18", "--depth=3", "--batches=1,2", *SMALL[1:])
  batches = _run(command, tmp_path, "inference", *small)["batches"]
  assert batches.keys() == {"1", "2"}
  for row in batches.values():
    assert {"jit", "jax_file", "torch", "torch_nhwc", "compiled"} <= row.keys()
    assert all(side["difference"] < 1e-3 for side in row.values())
    assert max(row[k]["ratio"] for k in ("torch", "torch_nhwc")) == 1


def test_inference_refuses_to_compare_different_work(monkeypatch):
  benchmark = _imported(monkeypatch, "inference")
  logits = np.arange(1.0, 5.0, dtype=np.float32)[None]
  sides = {"torch": lambda images: (logits, logits)}
  for factor in (1.01, np.nan):
    sides["jit"] = lambda images, factor=factor: (logits, factor * logits)
    with pytest.raises(SystemExit, match="compute different things"):
      benchmark.check_agreement(sides, None)


@pytest.mark.slow
def test_growth(command, tmp_path):
  small = ("--backbone=resnet18", "--depth=3", "--images=1", f"--figures={tmp_path}")
  points = ("--batches=1,2", "--sizes=64", "--conditions=1,2")
  results = _run(command, tmp_path, "growth", *points, *small, *SMALL)
  growth = results["growth"]
  assert {name: len(found) for name, found in growth.items()} == dict(
    batches=2, sizes=1, conditions=2
  )
  one, two = growth["batches"]
  for side in ("jax", "eager"):
    assert two[side]["flops"] == 2 * one[side]["flops"]
    assert all(point[side]["peak_bytes"] > 2**20 for point in (one, two))
  # Of two rows, one's work is part of the other's.
  alone = growth["conditions"][0]
  assert alone["jax"]["flops"] < alone["eager"]["flops"]
  drawn = [tmp_path / f"growth-{name}.png" for name in growth]
  assert all(path.stat().st_size > 1000 for path in drawn)


def test_growth_tells_what_bounds(monkeypatch):
  """Ten seconds, and two for an image, of which arithmetic is one."""
  benchmark = _imported(monkeypatch, "growth")
  points = [
    {"batch": n}
    | {side: {"seconds": 10 + 2 * n, "flops": n} for side in benchmark.SIDES}
    for n in (1, 2, 45)
  ]
  lines = list(benchmark.bounds(points, benchmark.PARTS["batches"], peak=1))
  assert lines[0] == "jax: 10.000 s +2.0000 s per image"
  shares = "arithmetic 8%, fixed 83%, rest 8%; largest: fixed"
  assert lines[1] == f"  batch 1: {shares}"
  assert lines[3].endswith("arithmetic 45%, fixed 10%, rest 45%; largest: arithmetic")
