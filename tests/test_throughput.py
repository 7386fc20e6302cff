"""What is measured of training, and traces of it, on a stage that really trains."""

import contextlib
import gzip
import json
import logging
import os
import pathlib
import shutil
import signal
import struct
import sys
import threading
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
import training
from conftest import ROOT, TOY, overrides
from tensorboardX.proto.event_pb2 import Event, SessionLog

from fidelity_jax import (
  chips,
  errors,
  metrics,
  progress,
  sharding,
  signals,
  throughput,
  tracing,
)

IMAGES, STEPS = 4, 4
SPEED = [
  "speed/step_seconds",
  "speed/input_wait_seconds",
  "speed/images_per_second",
  "speed/images_per_second_per_chip",
  "speed/flops_per_second",
]


def _trainer(directory, epochs=2, traced=None, **network):
  """A restorer on 16 images, in 4 steps per epoch of 16 patches each."""
  fields = {"epochs": epochs, "traced": traced}
  return training.restorer(directory, 16, IMAGES, network=network, **fields)


@contextlib.contextmanager
def _compiled():
  """Gives a list of what is compiled meanwhile, by name."""
  names = []

  class Handler(logging.Handler):
    def emit(self, record):
      text = record.getMessage()
      if text.startswith("Finished XLA compilation of "):
        beside = threading.current_thread() is not threading.main_thread()
        names.append(text.split()[4] + " beside" * beside)

  handler, logger = Handler(), logging.getLogger("jax")
  logger.addHandler(handler)
  # Not jax.log_compiles, which is of one thread.
  before = jax.config.jax_log_compiles
  jax.config.update("jax_log_compiles", True)
  try:
    yield names
  finally:
    jax.config.update("jax_log_compiles", before)
    logger.removeHandler(handler)


@pytest.fixture
def plugin(monkeypatch):
  """Has JAX take its CPU backend for a plugin, as those for GPUs and TPUs are."""
  name = "jax._src.xla_bridge.using_pjrt_c_api"
  monkeypatch.setattr(name, lambda backend=None: True)
  assert jax.jit(lambda x: x @ x).lower(jnp.zeros((8, 8))).cost_analysis() is None


class Trained(NamedTuple):
  directory: pathlib.Path
  records: list[dict]
  intervals: list[dict]
  seconds: float
  compiled: list[list[str]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
  """Two epochs and, in a second run, a third one; a few steps of each run traced.

  Each step has its line of progress, as on a terminal if it takes half a second.
  """
  directory = tmp_path_factory.mktemp("stage")
  compiled, begun = [], time.monotonic()
  for epochs, traced in ((2, (2, 3)), (3, (11, 20))):
    with _compiled() as names, pytest.MonkeyPatch.context() as patch:
      patch.setattr(progress.Progress, "due", lambda self: True)
      _trainer(directory, epochs, traced).run()
    compiled.append(names)
  seconds = time.monotonic() - begun
  records, intervals = (
    [json.loads(line) for line in (directory / name).read_text().splitlines()]
    for name in ("metrics.jsonl", "intervals.jsonl")
  )
  return Trained(directory, records, intervals, seconds, compiled)


def test_the_step_is_compiled_once(trained):
  """Neither for its operations to be counted, nor by a new epoch, nor by resuming.

  The validation step is compiled once, too, and beside it.
  """
  for names in trained.compiled:
    steps = [name for name in names if "step" in name]
    assert sorted(steps) == ["jit(eval_step) beside", "jit(train_step)"]


def test_every_epoch_says_how_fast_it_went(trained):
  assert len(trained.records) == 3
  for record in trained.records:
    assert set(SPEED) < set(record)
    step, wait, rate, per_chip, flops = (record[name] for name in SPEED)
    assert 0 < wait < step < record["seconds"]
    assert rate * step == pytest.approx(IMAGES)
    assert per_chip * jax.device_count() == pytest.approx(rate)
    # Validation and compilation are no part of it.
    assert step * STEPS < record["seconds"]
    # Python alone takes tens of megabytes.
    assert 3e7 < record["memory/host_bytes"] < 1e12
    assert flops > 0
    # Nothing is known of these on a CPU.
    assert "speed/share_of_peak" not in record
    assert "memory/device_bytes" not in record
  counted = [r["speed/flops_per_second"] * r["speed/step_seconds"] for r in trained[1]]
  assert counted == pytest.approx([counted[0]] * 3)


def test_an_epoch_that_was_interrupted_has_the_speed_since_then(tmp_path, monkeypatch):
  """Stopped and resumed in the middle of the second epoch of two."""
  trainer, made = _trainer(tmp_path), []
  batches, finish = trainer._batches, trainer._finish_epoch

  def slow_batches(start):
    with batches(start) as iterator:
      for number, batch in enumerate(iterator, start + 1):
        if start == 0 and number == STEPS + 3:
          monkeypatch.setattr(signals, "_received", signal.SIGTERM)
        time.sleep(0.3 if start else 0.0)
        yield batch

  def finish_and_look(step, state, done, writer, record, start):
    made.append(record["steps_per_second"] * (time.monotonic() - start))
    return finish(step, state, done, writer, record, start)

  monkeypatch.setattr(trainer, "_batches", slow_batches)
  monkeypatch.setattr(trainer, "_finish_epoch", finish_and_look)
  with pytest.raises(signals.Stopped):
    trainer.run()
  monkeypatch.setattr(signals, "_received", None)
  start = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
  assert STEPS < start < 2 * STEPS
  trainer.run()
  assert made == pytest.approx([STEPS, 2 * STEPS - start], rel=0.2)


def _events(directory):
  """Returns (tag, step) of all scalars in TensorBoard's files, in order.

  As TensorBoard has them: what a later run says it will write again is gone.
  """
  found = []
  for path in sorted(directory.glob("events.out.tfevents.*")):
    content, place = path.read_bytes(), 0
    while place < len(content):
      (length,) = struct.unpack_from("<Q", content, place)
      event = Event.FromString(content[place + 12 : place + 12 + length])
      if event.session_log.status == SessionLog.START:
        found = [(tag, step) for tag, step in found if step < event.step]
      found += [(value.tag, event.step) for value in event.summary.value]
      place += 16 + length
  return found


def test_tensorboard_has_epochs_and_intervals(trained):
  found = _events(trained.directory)
  for name in SPEED:
    assert [step for tag, step in found if tag == name] == [4, 8, 12]
    intervals = [step for tag, step in found if tag == f"interval/{name}"]
    assert intervals == [record["step"] for record in trained.intervals]
  assert ("validation/loss", 12) in found


def test_intervals_are_recorded_at_their_end_and_not_for_every_line(trained):
  steps = [record["step"] for record in trained.intervals]
  # Each run's last one always is.
  assert steps == sorted(set(steps)) and {8, 12} <= set(steps)
  assert len(steps) <= 2 + trained.seconds / 10
  for record in trained.intervals:
    assert {"epoch", *SPEED, "memory/host_bytes"} < set(record)
    assert record["epoch"] == -(-record["step"] // STEPS)
    # At its end an epoch has a record of its own.
    assert ("train/loss" in record) == (record["step"] % STEPS > 0)


def test_tensorboard_drops_what_a_resumed_run_repeats(tmp_path):
  for start in (0, 15):
    writer = metrics.MetricWriter(tmp_path, [{"step": 10}] if start else [], start)
    for step in range(start + 1, 19):
      writer.write_interval({"step": step, "speed/step_seconds": 0.1})
    writer.close()
    # The files' names have the second in them.
    time.sleep(1.1)
  steps = [step for _, step in _events(tmp_path)]
  assert steps == list(range(1, 19))


def _traced(directory):
  """Returns the numbers of the steps of each trace in a stage's directory."""
  found = []
  for path in sorted(directory.glob("plugins/profile/*/*.trace.json.gz")):
    assert list(path.parent.glob("*.xplane.pb"))
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    steps = [event for event in events if event.get("name") == "train"]
    found.append(sorted(int(event["args"]["step_num"]) for event in steps))
  return found


def test_a_trace_has_the_steps_asked_for_as_far_as_there_are_any(trained):
  assert _traced(trained.directory) == [[2, 3], [11, 12]]


def test_steps_that_a_stage_has_not_are_not_traced(tmp_path, capsys):
  pause = contextlib.nullcontext
  tracer = tracing.Tracer("restorer", tmp_path, (5, 9), 0, 4, pause)
  for number in range(1, 5):
    with tracer.step(number, ()):
      pass
    tracer.done(number, ())
  assert not list(tmp_path.iterdir())
  said = capsys.readouterr().err
  assert said == "restorer: has 4 steps: none of profile.steps=(5, 9).\n"


def test_a_trace_of_a_run_that_is_stopped_is_written(tmp_path):
  tracer = tracing.Tracer("restorer", tmp_path, (1, 9), 0, 20, contextlib.nullcontext)
  for number in (1, 2):
    with tracer.step(number, ()):
      pass
    tracer.done(number, ())
  tracer.close()
  assert _traced(tmp_path) == [[1, 2]]


def test_a_trace_that_cannot_be_written_is_an_error_of_one_line(tmp_path):
  place = tmp_path / "plugins"
  tracer = tracing.Tracer("restorer", tmp_path, (1, 1), 0, 1, contextlib.nullcontext)
  place.write_text("")
  with pytest.raises(errors.RunError, match=r"beginning a trace in .* failed"):
    with tracer.step(1, ()):
      pass
  place.unlink()
  with tracer.step(1, ()):
    pass
  shutil.rmtree(place)
  place.write_text("")
  with pytest.raises(errors.RunError, match=r"writing a trace to .* failed"):
    tracer.done(1, ())
  # The profiler holds on to what it could not write.
  place.unlink()
  jax.profiler.stop_trace()


def test_operations_of_a_convolution_step_are_those_of_its_formula():
  """Without padding, and all kernels with a gradient, the first one's input without."""
  count, side, (a, b, c) = 4, 32, (8, 16, 24)
  kernels = (jnp.zeros((3, 3, a, b)), jnp.zeros((3, 3, b, c)))

  def loss(kernels, x):
    for kernel in kernels:
      numbers = ("NHWC", "HWIO", "NHWC")
      x = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "VALID", dimension_numbers=numbers
      )
    return (x**2).mean()

  step = jax.jit(jax.grad(loss))
  found = throughput.flops(step.lower(kernels, jnp.zeros((count, side, side, a))))
  first = 2 * count * (side - 2) ** 2 * 9 * a * b
  second = 2 * count * (side - 4) ** 2 * 9 * b * c
  assert found == pytest.approx(2 * first + 3 * second, rel=0.02)


def test_operations_of_a_restorer_are_those_of_its_formula(tmp_path):
  """Through the trainer's own step, which is only lowered here."""
  width, depth = 32, 4
  trainer = _trainer(tmp_path, depth=depth, width=width)
  state = trainer.initial_state()
  with trainer._batches(0) as batches:
    batch = next(batches)
  found = throughput.flops(trainer.train_step.lower(state, (), batch))
  outer, inner = 3 * width, width * width
  products = 2 * outer + (depth - 2) * inner
  # Forward and kernels' gradients; gradients of inputs but for the image's.
  per_pixel = 2 * 9 * (2 * products + products - outer)
  pixels = 4 * IMAGES * 16 * 16
  # Of a kernel over the border of so small a patch a part is not multiplied.
  assert 0.85 < found / (pixels * per_pixel) < 1.03


def _lowered(*platforms):
  """A product of 2 x 64^3 operations and a convolution, lowered for platforms."""

  def step(x):
    numbers = ("NHWC", "HWIO", "NHWC")
    kernel = jnp.ones((3, 3, 4, 4))
    y = (x @ x).reshape(1, 32, 32, 4)
    y = jax.lax.conv_general_dilated(
      y, kernel, (1, 1), "VALID", dimension_numbers=numbers
    )
    return y.sum()

  traced = jax.jit(jax.grad(step)).trace(jnp.zeros((64, 64)))
  return traced.lower(lowering_platforms=platforms or None)


def test_operations_are_counted_for_plugins_too(request):
  expected = [throughput.flops(_lowered(*p)) for p in ([], ["cuda"], ["tpu"])]
  # A gradient of a product is two products.
  assert expected[0] > 2 * 2 * 64**3
  request.getfixturevalue("plugin")
  found = [throughput.flops(_lowered(*p)) for p in ([], ["cuda"], ["tpu"])]
  assert found == expected == [expected[0]] * 3


def test_operations_are_not_known_without_a_cpu_backend(plugin, monkeypatch):
  def devices(*args, backend=None, **kwargs):
    raise RuntimeError(f"Unknown backend {backend}")

  monkeypatch.setattr(jax, "local_devices", devices)
  assert throughput.flops(_lowered()) is None


@pytest.mark.parametrize("name", ["hlo_module_cost_analysis", None])
def test_operations_are_not_known_where_jax_has_changed(plugin, monkeypatch, name):
  if name:
    monkeypatch.delattr(f"jaxlib._jax.{name}")
  else:
    monkeypatch.delattr("jaxlib._jax")
    monkeypatch.setitem(sys.modules, "jaxlib._jax", None)
  assert throughput.flops(_lowered()) is None


def test_a_meter_leaves_pauses_out_and_keeps_spans_apart():
  meter = throughput.Meter(8, sharding.make_layout(size=1).mesh, "float32")
  batches = iter(lambda: time.sleep(0.02), 1)
  begun = time.monotonic()
  meter.next(batches)
  meter.start(jax.jit(lambda x: x @ x), jnp.zeros((64, 64)))
  for i in range(4):
    if i:
      meter.next(batches)
    time.sleep(0.01)
    if i == 1:
      early = meter.read("interval")
      with meter.paused():
        time.sleep(0.2)
  late, whole = meter.read("interval"), meter.read("epoch")
  took = time.monotonic() - begun
  assert whole["speed/step_seconds"] * 4 < took - 0.2
  # The first batch is there before the clock starts.
  assert 3 * 0.02 / 4 <= whole["speed/input_wait_seconds"]
  assert whole["speed/input_wait_seconds"] + 0.01 <= whole["speed/step_seconds"]
  total = 2 * early["speed/step_seconds"] + 2 * late["speed/step_seconds"]
  assert 4 * 0.01 + 3 * 0.02 <= total <= 4 * whole["speed/step_seconds"]
  rate = whole["speed/flops_per_second"] * whole["speed/step_seconds"]
  assert rate == pytest.approx(2 * 64**3)
  assert meter.read("interval") == {} == throughput.facts({})


def test_a_known_chip_has_a_share_of_its_peak(monkeypatch, plugin):
  monkeypatch.setitem(chips._PEAKS, "cpu", {"bfloat16": 4e9, "float32": 2e9})
  meter = throughput.Meter(8, sharding.make_layout(size=1).mesh, "float32")
  meter.next(iter([None]))
  meter.start(jax.jit(lambda x: x @ x), jnp.zeros((64, 64)))
  found = meter.read("epoch")
  rate = found["speed/flops_per_second"]
  assert found["speed/share_of_peak"] == pytest.approx(rate / 2e9)
  assert throughput.facts(found)["of peak"].endswith("%")


def test_memory_is_that_of_the_fullest_device():
  class Device:
    def __init__(self, **stats):
      self.memory_stats = lambda: stats or None

  devices = [Device(bytes_in_use=3, peak_bytes_in_use=9), Device(bytes_in_use=5)]
  found = throughput.memory([*devices, Device()])
  assert found["memory/device_bytes"] == 5
  assert found["memory/device_peak_bytes"] == 9


@pytest.mark.slow
def test_a_stage_with_a_trace_is_finished(toy_copy, command):
  (stage,) = toy_copy.glob("ensemble-*")
  shutil.rmtree(stage)
  arguments = ["--config=configs/oracle.py:scratch", f"--workdir={toy_copy}"]
  arguments += [*overrides(TOY), "--config.profile.steps=(2,3)"]
  result = command(*arguments, check=0)
  assert _traced(stage) == [[2, 3]]
  # Only what trains is traced.
  assert len(list(toy_copy.glob("*/plugins"))) == 1
  assert "images/s" in result.stderr and "input wait" in result.stderr
  content = {p: p.read_bytes() for p in stage.rglob("*") if p.is_file()}
  again = command(*arguments, check=0)
  assert f"{stage.name}: finished" in again.stderr
  assert {p: p.read_bytes() for p in stage.rglob("*") if p.is_file()} == content


_FOUR = """
import pathlib, sys, test_throughput
with test_throughput._compiled() as names:
  test_throughput._trainer(pathlib.Path(sys.argv[1]), 2).run()
print(names.count("jit(train_step)"))
"""


@pytest.mark.slow
def test_the_step_is_compiled_once_for_four_devices(command, tmp_path, trained):
  env = {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
  }
  result = command(tmp_path, program=("-c", _FOUR), env=env, check=0)
  assert result.stdout.split() == ["1"]
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  for record, alone in zip(map(json.loads, lines), trained.records[:2], strict=True):
    rate, step = record["speed/images_per_second"], record["speed/step_seconds"]
    assert record["speed/images_per_second_per_chip"] * 4 == pytest.approx(rate)
    # The whole step is counted, and not one device's part.
    whole = alone["speed/flops_per_second"] * alone["speed/step_seconds"]
    assert record["speed/flops_per_second"] * step == pytest.approx(whole, rel=0.05)
