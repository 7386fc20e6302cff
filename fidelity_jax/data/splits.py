"""Which example belongs to train, validation and test."""

import zlib
from collections.abc import Sequence

import numpy as np

from fidelity_jax.data.dataset import SPLITS
from fidelity_jax.errors import UsageError


def sizes(
  count: int, fractions: Sequence[float], counts: Sequence[int]
) -> tuple[int, int, int]:
  """Returns how many of a class's examples go to train, validation and test.

  Args:
    count: the number of examples of the class.
    fractions: shares of train, validation and test; their sum is at most 1.
    counts: if not empty, numbers of examples that take the place of `fractions`;
      one of them may be -1, "all that remain".
  """
  if counts:
    wanted = list(counts)
    rest = max(count - sum(n for n in wanted if n >= 0), 0)
    wanted = [rest if n < 0 else n for n in wanted]
  else:
    validation, test = round(fractions[1] * count), round(fractions[2] * count)
    whole = sum(fractions) > 1 - 1e-6
    train = count - validation - test if whole else round(fractions[0] * count)
    wanted = [train, validation, test]
  # A class that is too small fills train first, then validation.
  taken = []
  for n in wanted:
    taken.append(min(n, count - sum(taken)))
  return tuple(taken)


def draw(
  class_names: Sequence[str],
  labels: np.ndarray,
  keys: Sequence[str],
  *,
  seed: int,
  fractions: Sequence[float],
  counts: Sequence[int] = (),
) -> dict[str, list[int]]:
  """Draws the splits of every class by a seed.

  A class's draw depends on the seed, its name and its sorted keys alone, so adding a
  class leaves the splits of all others as they were.

  Args:
    class_names: names by label.
    labels: int32 [N].
    keys: stable keys, N of them.
    seed: the dataset's split seed.
    fractions: see `sizes`.
    counts: see `sizes`.

  Returns:
    {"train" | "validation" | "test": sorted example indices}.
  """
  chosen = {split: [] for split in SPLITS}
  order = sorted(range(len(keys)), key=lambda i: keys[i])
  members = {label: [] for label in range(len(class_names))}
  for i in order:
    members[int(labels[i])].append(i)
  for label, name in enumerate(class_names):
    rng = np.random.Generator(
      np.random.Philox(key=[seed % 2**64, zlib.crc32(name.encode())])
    )
    shuffled = [members[label][i] for i in rng.permutation(len(members[label]))]
    start = 0
    for split, n in zip(
      SPLITS, sizes(len(shuffled), fractions, counts), strict=True
    ):
      chosen[split] += shuffled[start : start + n]
      start += n
  return {split: sorted(indices) for split, indices in chosen.items()}


def check_shares(fractions: Sequence[float], counts: Sequence[int]) -> None:
  """Refuses shares that cannot be drawn.

  Raises:
    UsageError: not three numbers, negative ones, or more than everything.
  """
  if len(fractions) != 3 or min(fractions) < 0 or sum(fractions) > 1 + 1e-6:
    raise UsageError(
      "dataset.fractions must be three numbers >= 0 (train, validation, test) with "
      f"a sum of at most 1, not {tuple(fractions)}"
    )
  if counts and (len(counts) != 3 or min(counts) < -1 or list(counts).count(-1) > 1):
    raise UsageError(
      "dataset.counts must be empty or three numbers of examples per class (train, "
      f"validation, test), at most one of them -1 for the rest, not {tuple(counts)}"
    )
