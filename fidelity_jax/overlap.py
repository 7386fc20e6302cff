"""Work on a sequence by threads, ahead of or behind the one that goes through it."""

import collections
import concurrent.futures
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def mapped(
  function: Callable[[T], R], items: Iterable[T], threads: int = 2
) -> Iterator[R]:
  """Yields `function(item)` of each item, in order, computed by threads.

  At most `threads + 1` items are taken and not yet given back, so a chain of these
  takes constant memory however long the sequence. What is under way is finished when
  the generator is closed.
  """
  waiting = collections.deque()
  pool = concurrent.futures.ThreadPoolExecutor(threads)
  try:
    for item in items:
      waiting.append(pool.submit(function, item))
      if len(waiting) > threads:
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()
  finally:
    pool.shutdown(cancel_futures=True)
