"""Rows with values per image, made up, for tests of what is made of them."""

import msgspec
import numpy as np

from fidelity_jax import degradations
from fidelity_jax.rows import Condition, Row, Scored


def conditions(spec: object = "awgn") -> list[Condition]:
  """Returns the conditions of a kind of degradation."""
  return [Condition.of(c) for c in degradations.conditions(spec)]


def row(condition: Condition, **changes: object) -> Row:
  """Returns a row of a classifier trained on clean images that sees restored ones.

  A row of the method has the l1 map, bilinear resizing and all modules.
  """
  steered = changes.get("method", "classifier") != "classifier"
  plain = Row(
    experiment="oracle",
    method="classifier",
    source=None,
    trained_on="clean",
    backbone="resnet50",
    restorer="dncnn",
    map="l1" if steered else None,
    resize="bilinear" if steered else None,
    without=[],
    ensemble=False if steered else None,
    dataset="caltech256",
    image_size=224,
    degradation="awgn",
    condition=condition,
    seed=0,
    precision="float32",
    accuracy=80.0,
    std=0.5,
    low=79.0,
    high=81.0,
    rounds=10,
    images=100,
    fingerprint="0123456789abcdef",
    stages={},
    products={},
  )
  return msgspec.structs.replace(plain, **changes)


def scored(row: Row, right: np.ndarray) -> Scored:
  """Returns a row with values that are right or wrong as given, bool [R, N]."""
  right = np.atleast_2d(right)
  values = {
    "prediction": np.where(right, 0, 1).astype(np.int32),
    "rank": np.where(right, 0, 3).astype(np.int32),
    "confidence": np.full(right.shape, 0.5, np.float32),
  }
  return Scored(row, values)
