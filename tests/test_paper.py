"""The paper's own numbers, beside ours."""

import pytest
import scored_rows

from fidelity_jax import paper
from fidelity_jax.rows import Condition, Row

_CONDITIONS = {c.name.removeprefix("awgn-"): c for c in scored_rows.conditions()}
_SETUPS = {"setup1": "clean", "setup2": "degraded", "setup3": "restored"}
_VARIANTS = {
  "oracle, l1, bilinear, all modules": {},
  "fidelity map: l2": {"map": "l2"},
  "fidelity map: cosine": {"map": "cosine"},
  "downsampling: bicubic": {"resize": "bicubic"},
  "downsampling: nearest": {"resize": "nearest"},
  "without spatial multiplication": {"without": ["spatial_multiplication"]},
  "without residual mechanism": {"without": ["residual"]},
  "without spatial addition": {"without": ["spatial_addition"]},
  "without channel multiplication": {"without": ["channel_multiplication"]},
  "without channel concatenation": {"without": ["channel_concatenation"]},
}


def _row(column: str = "0.3", **changes: object) -> Row:
  return scored_rows.row(_CONDITIONS[column], **changes)


def _oracle(column: str = "0.3", **changes: object) -> Row:
  return _row(column, **{"method": "oracle"} | changes)


def test_every_number_of_table_5_1():
  table, seen = paper.tables()["table_5_1"], 0
  for line in table["rows"]:
    method = line["classifier_or_method"]
    facts = {"method": method, "ensemble": line["ensemble"]}
    if method in _SETUPS:
      facts = {"trained_on": _SETUPS[method]}
    if line["restoration_at_test"] == "none":
      facts["restorer"] = None
    for column, expected in zip(table["columns"], line["accuracy"], strict=True):
      row = _row(column, **facts)
      assert paper.accuracy(row) == expected
      assert paper.same_experiment(row)
      seen += 1
  assert seen == 12 * 8


def test_every_number_of_table_6_1():
  table, seen = paper.tables()["table_6_1"], 0
  for line in table["rows"]:
    for column, expected in zip(table["columns"], line["accuracy"], strict=True):
      row = _row(column)
      if line["row"] != "setup 1 with restoration":
        row = _oracle(column, **_VARIANTS[line["row"]])
      assert paper.accuracy(row) == expected
      assert paper.same_experiment(row)
      seen += 1
  assert seen == 11 * 7


@pytest.mark.parametrize(
  "changes",
  [
    {"dataset": "demo"},
    {"image_size": 64},
    {"backbone": "resnet18"},
    {"restorer": "another"},
  ],
  ids=str,
)
def test_other_data_and_networks_have_the_number_of_the_same_method(changes):
  for row, expected in ((_row(**changes), 56.05), (_oracle(**changes), 76.24)):
    assert paper.accuracy(row) == expected
    assert not paper.same_experiment(row)


@pytest.mark.parametrize(
  "row",
  [
    _row(trained_on="given"),
    _row(trained_on="none"),
    _row(backbone="vgg16"),
    _row(degradation="motion_blur"),
    _row("clean", degradation="motion_blur"),
    scored_rows.row(Condition("awgn-0.35", "awgn", 0.35, None, [])),
    scored_rows.row(Condition("awgn-1d", "awgn", [0.3, 0.0], "1d", [])),
    scored_rows.row(Condition("motion_blur-5", "motion_blur", 5.0, None, [])),
    _oracle(trained_on="degraded"),
    _oracle(trained_on="given"),
    _oracle(map="l2", ensemble=True),
    _oracle(map="l2", resize="nearest"),
    _oracle(without=["spatial_addition", "residual"]),
    _oracle("2d", map="l2"),  # Not legible.
    _row(method="pretrained", without=["residual"]),
    _row(method="end_to_end", map="cosine"),
    _row(method="restoration", trained_on=None, backbone=None, map=None),
    _row(method="estimation", trained_on=None, backbone=None, source="pretrained"),
  ],
  ids=range(18),
)
def test_there_is_no_such_number(row):
  assert paper.accuracy(row) is None
  assert not paper.same_experiment(row)
