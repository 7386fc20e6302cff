"""Threads work ahead, in order, a few items at a time."""

import threading

import pytest

from fidelity_jax import overlap


def test_in_order_and_a_few_at_a_time():
  taken, most = [0], [0]

  def items():
    for i in range(500):
      taken[0] += 1
      yield i

  given = 0
  # A chain, as files are read, computed on and written.
  first = overlap.mapped(lambda i: i + 1, items())
  second = overlap.mapped(lambda i: 2 * i, (i - 1 for i in first))
  for result in second:
    assert result == 2 * given
    most[0] = max(most[0], taken[0] - given)
    given += 1
  assert given == 500
  assert 2 < most[0] <= 6


def test_it_computes_in_parallel():
  both = threading.Barrier(2, timeout=30)
  assert len(list(overlap.mapped(lambda _: both.wait(), range(4)))) == 4


def test_an_error_comes_in_its_place_and_ends_it():
  def invert(i):
    return 1 / i

  results = overlap.mapped(invert, [2, 1, 0, 4])
  assert [next(results), next(results)] == [0.5, 1]
  with pytest.raises(ZeroDivisionError):
    next(results)
  assert list(results) == []


def test_closing_finishes_what_is_under_way():
  started, done = [], []

  def work(i):
    started.append(i)
    threading.Event().wait(0.05)
    done.append(i)
    return i

  results = overlap.mapped(work, range(100))
  assert next(results) == 0
  results.close()
  assert sorted(done) == sorted(started) and len(done) <= 4
