"""Where a run's time goes: every moment is charged once."""

import shlex
import time

import jax
import jax.numpy as jnp
import pytest

from fidelity_jax import files, timing


def test_every_moment_is_charged_once():
  inner = jax.jit(lambda x: jnp.sin(x) @ x)
  with timing.run() as clock:
    start = time.perf_counter()
    with timing.part("a"):
      with timing.kind("steps"):
        time.sleep(0.05)
        # Its trace lies within that of the outer one, and is not counted twice.
        jax.jit(lambda x: inner(x) + inner(2 * x))(jnp.ones((64, 64)))
        with timing.kind("validation"):
          time.sleep(0.02)
      time.sleep(0.03)
    clock.settle()
    took = time.perf_counter() - start
  assert list(clock.parts) == ["start-up", "a"]
  spent = clock.parts["a"]
  assert set(spent) == {"compilation", "steps", "validation", "other"}
  assert sum(spent.values()) == pytest.approx(took, abs=0.01)
  assert spent["compilation"] > 0.005
  assert 0.05 <= spent["steps"] <= took - 0.05 - spent["compilation"] + 0.01
  assert 0.02 <= spent["validation"] < spent["steps"]
  # Nothing is timed outside of a run.
  with timing.part("b"), timing.kind("steps"):
    jax.jit(lambda x: x + 1)(1.0)
  assert "b" not in clock.parts


def _record(workdir, number):
  (path,) = workdir.glob("oracle-*/times.jsonl")
  return files.read_json_lines(path)[number]


def test_a_run_remembers_where_its_time_went(toy_run):
  record = _record(toy_run, 0)
  names = [s.parent.name for s in toy_run.glob("*/finished.json")]
  assert set(record["seconds"]) == {
    *("start-up", "between stages", "evaluation", "report"),
    *names,
  }
  for name in names:
    assert record["seconds"][name].keys() >= {"compilation", "steps", "checkpoints"}
    assert record["seconds"][name]["compilation"] > 0.1
  assert "configs/oracle.py" in record["command"] and record["hardware"]


@pytest.mark.slow
def test_a_run_tells_where_its_time_went(command, toy_copy):
  """The command again, which trains nothing: it has a record of its own."""
  words = shlex.split(_record(toy_copy, 0)["command"])[3:]
  words = [w for w in words if not w.startswith("--workdir")]
  start = time.monotonic()
  result = command(*words, f"--workdir={toy_copy}", check=0)
  took = time.monotonic() - start
  seconds = _record(toy_copy, 1)["seconds"]
  told = sum(sum(part.values()) for part in seconds.values())
  assert 0.5 * took < told < took
  head, *rows = result.stderr[result.stderr.index("where the time went") :].splitlines()
  kinds = ("compilation", "steps", "validation", "checkpoints", "other")
  assert head.split()[4:] == ["seconds", *kinds]
  total = next(row for row in rows if row.startswith("in all"))
  assert float(total.split()[2]) == pytest.approx(told, abs=0.3)
  assert not any("validation" in part for part in seconds.values())
