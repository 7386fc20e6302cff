"""Contents of reports, made up but plausible, for the tests of the report."""

import itertools

import numpy as np

from fidelity_jax import claims, degradations, statistics, titles
from fidelity_jax.report.content import Activations, Content, Examples, StageRecord
from fidelity_jax.rows import Compared, Condition, Row

CLASSES = ("cat", "dog", "<script>alert(1)</script>", "a|b *c*", "$x_{$", "q\"uo'te")
SETUPS = ("clean", "degraded", "restored")
SOURCES = ("oracle", "pretrained", "end_to_end")
# (accuracy of clean images, what a harsh level costs) by what a line is.
_QUALITY = {
  "clean": (83, 75),
  "degraded": (79, 13),
  "restored": (81, 70),
  "oracle": (82, 10),
  "pretrained": (82.5, 24),
  "end_to_end": (83, 23),
}


def conditions(spec="awgn"):
  """Returns the conditions of a kind of degradation."""
  return [Condition.of(condition) for condition in degradations.conditions(spec)]


def row(condition, **changes):
  """Returns a row."""
  fields = {
    "experiment": "oracle",
    "method": "classifier",
    "source": None,
    "trained_on": "clean",
    "backbone": "resnet50",
    "restorer": None,
    "map": None,
    "resize": None,
    "without": [],
    "ensemble": None,
    "dataset": "caltech256",
    "image_size": 224,
    "degradation": "awgn",
    "condition": condition,
    "seed": 0,
    "precision": "float32",
    "std": 0.0,
    "rounds": 1,
    "images": 500,
    "fingerprint": "0123456789abcdef",
    "stages": {"classifier": "classifier-resnet50-clean-00000000"},
    "products": {"classifier": "fedcba9876543210"},
  }
  return Row(**(fields | changes))


def _measured(random, what, severity, seed, restored):
  """Returns the numbers of a classified row."""
  clean, cost = _QUALITY[what]
  if restored and what in SETUPS:
    cost *= 0.6
  accuracy = float(np.clip(clean - cost * severity + random.normal(0, 0.8), 1, 99))
  half = 1.96 * float(np.sqrt(accuracy * (100 - accuracy) / 500))
  per_class = np.clip(accuracy + random.normal(0, 9, len(CLASSES)), 0, 100)
  return {
    "seed": seed,
    "accuracy": accuracy,
    "top5": min(accuracy + 8, 100.0),
    "ece": 3 + 9 * severity,
    "per_class": [*map(float, per_class[:-1]), None],
    "std": float(abs(random.normal(0.4, 0.1))) if severity else 0.0,
    "low": accuracy - half,
    "high": accuracy + half,
    "rounds": 10 if severity else 1,
  }


def _severity(condition, found):
  """Returns how harsh a condition is, 0 to 1."""
  if condition.kind == "clean":
    return 0.0
  if condition.vary in ("1d", "2d"):
    return 0.45
  levels = [c.level for c in found if isinstance(c.level, float | int)]
  if condition.level is None or not max(levels):
    return 0.8
  return condition.level / max(levels)


def _names(parts, seed):
  return {role: f"{role}-{name}-{seed:08x}" for role, name in parts.items()}


def methods(setups=SETUPS, sources=SOURCES):
  """Yields (what it is, fields) of the lines of a table."""
  for trained_on, restorer in itertools.product(setups, (None, "dncnn")):
    yield trained_on, {"trained_on": trained_on, "restorer": restorer}
  for source, ensemble in itertools.product(sources, (False, True)):
    fields = {"method": source, "ensemble": ensemble, "restorer": "dncnn"}
    yield source, fields | {"map": "l1", "resize": "bilinear"}


def classified(
  backbones=("resnet50",), kinds=("awgn",), seeds=(0,), lines=None, **changes
):
  """Returns rows of every line, condition, kind, network and seed."""
  random = np.random.default_rng(0)
  rows = []
  for kind, backbone, seed in itertools.product(kinds, backbones, seeds):
    found = conditions(kind)
    for (what, fields), condition in itertools.product(lines or methods(), found):
      severity = _severity(condition, found)
      restored = fields["restorer"] is not None
      parts = {"classifier": f"{backbone}-{fields.get('trained_on', 'clean')}"}
      if restored:
        parts["restorer"] = f"dncnn-{kind}"
      if what in SOURCES:
        parts["calibration"] = f"{backbone}-{what}"
      facts = {"backbone": backbone, "degradation": kind, "stages": _names(parts, seed)}
      facts |= fields | _measured(random, what, severity, seed, restored)
      rows.append(row(condition, **(facts | changes)))
  return rows


def restored(**changes):
  """Returns rows of restoration and of estimated maps."""
  rows = []
  found = conditions()
  for condition, restorer in itertools.product(found, (None, "dncnn")):
    psnr = 100.0 if condition.kind == "clean" and not restorer else 28.0
    psnr = psnr - 12 * _severity(condition, found) * (1 if restorer is None else 0.4)
    facts = {"method": "restoration", "trained_on": None, "backbone": None}
    facts |= {"restorer": restorer, "psnr": psnr, "ssim": 0.7, "rounds": 2}
    facts |= {"low": psnr - 0.3, "high": psnr + 0.3, "std": 0.02}
    rows.append(row(condition, **(facts | changes)))
  for condition, source in itertools.product(found, SOURCES[1:]):
    error = 0.01 + 0.05 * _severity(condition, found) + 0.003 * (source == "pretrained")
    facts = {"method": "estimation", "source": source, "trained_on": None}
    facts |= {"backbone": None, "map": "l1", "map_error": error, "ause": error / 3}
    facts |= {"restorer": "dncnn", "low": error - 1e-3, "high": error + 1e-3}
    rows.append(row(condition, **(facts | changes)))
  return rows


def comparison(rows, first, second, difference=3.4, **changes):
  """Returns a comparison of two titles of rows."""
  fields = {
    "first": first,
    "second": second,
    "group": titles.group(rows[0]),
    "condition": "awgn-0.3",
    "difference": difference,
    "low": difference - 1.1,
    "high": difference + 1.2,
    "p": float(np.exp(-abs(difference) * 2)),
    "test": "bootstrap",
    "images": 500,
    "rounds": 10,
  }
  return statistics.Comparison(**(fields | changes))


def stages(rows, epochs=12):
  """Returns a record for each stage behind rows."""
  random = np.random.default_rng(1)
  found = {name: role for row in rows for role, name in row.stages.items()}
  made = []
  for name, role in sorted(found.items(), key=lambda item: item[1]):
    metric = "psnr_gain" if role == "restorer" else "accuracy"
    records = []
    for epoch in range(epochs + 1):
      rise = 1 - np.exp(-epoch / 4)
      record = {"step": 55 * epoch, "epoch": epoch, "learning_rate": 0.01}
      for part, gap in (("train", 0.05), ("validation", 0.0)):
        if epoch or part == "validation":
          record[f"{part}/{metric}"] = float(
            (8 if role == "restorer" else 0.8) * (rise + gap * rise)
            + random.normal(0, 0.01)
          )
          record[f"{part}/loss"] = float(3 * np.exp(-epoch / 5) - gap + 0.4)
      records.append(record)
    parents = {} if role != "calibration" else {"restorer": next(iter(found))}
    made.append(
      StageRecord(
        name=name,
        kind=role,
        finished=True,
        metric=metric,
        score=max(record[f"validation/{metric}"] for record in records),
        seconds=3725.0,
        hardware="2 cores",
        config={"kind": role, "seed": 0, "model": {"name": "resnet50", "width": 64}},
        records=records,
        parents=parents,
        experiments=["oracle", "setup <1>"],
      )
    )
  return made


def examples(found=None, images=2, size=48, **changes):
  """Returns examples of a classifier with and without the method."""
  random = np.random.default_rng(2)
  found = found or [conditions()[i] for i in (1, 3, 5, 7)]
  shape = (len(found), images, size, size, 3)
  ramp = np.linspace(0, 1, size)[:, None] * np.ones((size, 3))[None]
  clean = np.broadcast_to(ramp, shape)
  noise = random.normal(0, 0.25, shape)
  compared = (
    *(Compared("classifier", False), Compared("classifier", True)),
    *(Compared("oracle", True, False), Compared("oracle", True, True)),
  )
  label = np.arange(len(found) * images).reshape(len(found), images) % len(CLASSES)
  arrays = {
    "clean": clean,
    "degraded": clean + noise,
    "restored": clean + noise / 5,
    "map": np.abs(noise) / 5,
    "label": label,
  }
  for number, one in enumerate(compared):
    arrays[f"value/{one.key}"] = ((label + (number < 1)) % len(CLASSES)).astype(int)
  arrays["value/clean"] = label.copy()
  fields = {"experiment": "oracle_$", "compared": compared, "map_name": "l1"}
  fields |= {"trained_on": "clean", "conditions": tuple(found), "arrays": arrays}
  return Examples(**(fields | changes))


def activations(neurons=512, **changes):
  """Returns mean inputs of the head."""
  random = np.random.default_rng(3)
  found = tuple(c for c in conditions() if c.vary is None)
  clean = random.gamma(1.2, 0.35, neurons)
  other = random.gamma(1.2, 0.35, neurons)
  severity = np.linspace(0, 1, len(found))[:, None]
  values = (1 - 0.8 * severity) * clean + 0.5 * severity * other
  less = (1 - 0.3 * severity) * clean + 0.2 * severity * other
  fields = {"class_name": "a|b *c*", "images": 30, "conditions": found}
  fields |= {"degraded": values, "restored": less, "backbone": "resnet50"}
  return Activations(**(fields | changes))


def verdicts(rows):
  """Returns a verdict of each kind."""
  pair = ("trained on clean, with restoration", "trained on clean, without restoration")
  made = []
  for verdict, difference in (
    ("holds", 9.2),
    ("does not hold", -4.1),
    ("cannot be told", 0.2),
  ):
    based = [
      comparison(rows, *pair, difference=difference, condition=condition)
      for condition in ("awgn-0.3", "awgn-0.5")
    ]
    made.append(
      claims.Verdict(
        claim=f"Restoration helps a clean-trained classifier, {verdict}",
        where="Section 3.2, Table 5.1",
        verdict=verdict,
        why=f"{difference:+.1f} points at sigma 0.3",
        paper=45.61,
        comparisons=based,
      )
    )
  made.append(
    claims.Verdict(
      claim="l1 is the best map",
      where="Table 6.1",
      verdict="not measured",
      why="no rows of the l2 map",
      paper=None,
      comparisons=[],
    )
  )
  return made


def content(rows, **changes):
  """Returns a content with everything in it that rows have."""
  found = list(dict.fromkeys(titles.title(row) for row in rows))
  pairs = list(itertools.pairwise(found))[:9]
  fields = {
    "name": "table_5_1",
    "shows": "The paper's Table 5.1: twelve methods under eight conditions.",
    "sections": ("tables", "claims"),
    "command": "python -m fidelity_jax.main --config=configs/table_5_1.py:scratch "
    "--workdir=runs/demo",
    "rows": rows,
    "comparisons": [
      comparison(rows, a, b, difference=3.4 - 1.3 * i) for i, (a, b) in enumerate(pairs)
    ],
    "verdicts": verdicts(rows) if rows else [],
    "stages": stages(rows),
    "missing": [],
    "class_names": list(CLASSES),
    "examples": [examples()],
    "activations": [],
    "environment": {
      "fidelity_jax": "0.1.0",
      "hardware": "2 cores",
      "date": "2026-11-24",
    },
    "seconds": 754.0,
  }
  return Content(**(fields | changes))
