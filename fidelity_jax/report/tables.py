"""Groups, comparisons, verdicts and stages -> tables, for Markdown and HTML alike."""

import dataclasses
from collections.abc import Iterable, Sequence

from fidelity_jax import claims, paper, statistics
from fidelity_jax.report import content, groups, text
from fidelity_jax.report.groups import MEASURES, Entry, Group, Measure

# What the PSNR of identical images counts as, see `quality.psnr`.
_IDENTICAL = 100.0
Links = tuple[str, tuple[tuple[str, str], ...]]


@dataclasses.dataclass(frozen=True)
class Cell:
  """A cell.

  Attributes:
    text: what stands in it.
    sort: what it is sorted by, None by its text.
    notes: lines of small print below.
    best: whether it is the best of its column.
    hint: what is shown when it is pointed at.
    stages: the stages that it links to: (role, names and texts of the role's links).
    state: the verdict, "finished" or "missing-stage", for its colour.
  """

  text: str
  sort: float | None = None
  notes: tuple[str, ...] = ()
  best: bool = False
  hint: str = ""
  stages: tuple[Links, ...] = ()
  state: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
  """A table.

  Attributes:
    caption: what it shows.
    columns: headings; the first is of the column that names the lines.
    hints: what is shown when a heading is pointed at.
    lines: cells; the first names the line.
    notes: paragraphs that belong to it.
    folded: whether a page shows it only on request.
    lead: a paragraph above it, "" for none.
  """

  caption: str
  columns: tuple[str, ...]
  hints: tuple[str, ...]
  lines: list[list[Cell]]
  notes: tuple[str, ...] = ()
  folded: bool = False
  lead: str = ""

  @property
  def numeric(self) -> list[bool]:
    """Whether each column has numbers in it."""
    columns = zip(*self.lines, strict=True)
    return [any(cell.sort is not None for cell in cells) for cells in columns]


def of_group(group: Group, class_names: Sequence[str]) -> list[Table]:
  """Returns a group's tables, the one that it is about first."""
  extra = {"accuracy": ("top5", "ece"), "psnr": ("ssim",), "map_error": ("ause",)}
  tables = [measure_table(group, MEASURES[group.field])]
  for field in extra[group.field]:
    if any(e.mean(field) is not None for e in group.entries.values()):
      tables.append(measure_table(group, MEASURES[field]))
  if group.field == "accuracy" and (table := _per_class(group, class_names)):
    tables.append(table)
  return tables


def measure_table(group: Group, measure: Measure) -> Table:
  """Returns a line a method, a column a condition."""
  main = measure.field == group.field
  best = {}
  for condition in group.conditions:
    entries = [group.get(title, condition) for title in group.titles]
    values = [
      e.mean(measure.field) for e in entries if e and not _identical(e, measure)
    ]
    values = [value for value in values if value is not None]
    if len(values) > 1:
      best[condition.name] = max(values, key=lambda value: measure.sign * value)
  lines = []
  for title in group.titles:
    cells = [Cell(title, stages=_stages(group.of(title)))]
    for condition in group.conditions:
      entry = group.get(title, condition)
      value = entry.mean(measure.field) if entry else None
      if value is None:
        cells.append(Cell(text.NONE))
        continue
      if _identical(entry, measure):
        cells.append(Cell("identical", value, hint=_what(entry)))
        continue
      cells.append(
        Cell(
          text.number(value, measure.digits),
          value,
          _notes(entry, measure) if main else (),
          value == best.get(condition.name),
          f"{_what(entry)}; {value:.6g}",
        )
      )
    lines.append(cells)
  unit = f", {measure.unit}" if measure.unit else ""
  return Table(
    caption=f"{measure.name[0].upper()}{measure.name[1:]}{unit}: {group.name}",
    columns=("method", *_headings(group)),
    hints=("", *(condition.name for condition in group.conditions)),
    lines=lines,
    notes=_explained(group, measure) if main else (measure.note,),
    folded=not main,
  )


def _identical(entry: Entry, measure: Measure) -> bool:
  """Returns whether images are as the clean ones."""
  return measure.field == "psnr" and entry.mean("psnr") >= _IDENTICAL


def _headings(group: Group) -> list[str]:
  degradation = group.first.degradation
  found = [groups.heading(c, degradation) for c in group.conditions]
  if len(set(found)) < len(found):
    found = [text.printable(c.name) for c in group.conditions]
  return found


def _what(entry: Entry) -> str:
  """Returns how often something was measured."""
  row = entry.first
  seeds = ", ".join(str(row.seed) for row in entry.rows if row.seed is not None)
  rounds = f", {row.rounds} rounds" if row.rounds > 1 else ""
  return f"{row.images} images{rounds}{seeds and f', seed {seeds}'}"


def _notes(entry: Entry, measure: Measure) -> tuple[str, ...]:
  """Returns the small print: the paper's number, spreads, interval."""
  digits, lines = measure.digits, []
  if entry.paper is not None:
    apart = text.difference(entry.value - entry.paper, digits)
    lines.append(f"paper {text.number(entry.paper, digits)} ({apart})")
  ends = text.interval(entry.low, entry.high, digits)
  noise = entry.over_rounds is not None
  spread = f"± {entry.over_rounds:.{digits}f}" if noise else ""
  if entry.over_seeds is None:
    return (*lines, f"{spread} {ends}".strip())
  if noise:
    lines.append(f"{spread} noise")
  lines.append(f"± {entry.over_seeds:.{digits}f} training")
  lines.append(ends)
  return tuple(lines)


def _explained(group: Group, measure: Measure) -> tuple[str, ...]:
  """Returns how to read the main table of a group."""
  entries = list(group.entries.values())
  rounds = max(row.rounds for entry in entries for row in entry.rows)
  first = group.first
  seeds = len(group.seeds)
  what = "Mean over images"
  if rounds > 1:
    what += f" and {rounds} rounds of noise (1 where nothing is random)"
  if seeds > 1:
    what += f", then over {seeds} seeds of training"
  parts = [f"{what}. In brackets [ ] the 95 % interval"]
  if seeds > 1:
    parts[0] += ", the mean of the seeds' own"
  parts[0] += "."
  if seeds > 1:
    if rounds > 1:
      parts.append(
        "± noise: standard deviation over rounds of noise, the mean over seeds."
      )
    parts.append(
      "± training: standard deviation over seeds of training, a spread of its own."
    )
  elif rounds > 1:
    parts.append("±: standard deviation over rounds of noise.")
  parts.append(f"Best of a column in bold. {measure.note}".strip())
  trained = ""
  if seeds:
    named = ", ".join(map(str, group.seeds))
    trained = f"seed{'s' * (seeds > 1)} {named}; "
  precisions = dict.fromkeys(row.precision for entry in entries for row in entry.rows)
  parts.append(
    f"{first.images} test images; {trained}computed in {' and '.join(precisions)}. All "
    "methods see the same noise."
  )
  notes = [" ".join(parts)]
  if any(_identical(entry, measure) for entry in entries):
    notes.append(
      f"identical: as the clean images. Their PSNR has no bound, and counts as "
      f"{_IDENTICAL:g} dB where a mean is taken."
    )
  if any(entry.paper is not None for entry in entries):
    notes.append(_of_the_paper(entries))
  return tuple(notes)


def _of_the_paper(entries: list[Entry]) -> str:
  """Returns what the paper's numbers are, and whether they may be compared."""
  note = (
    "paper: its own number for the same method and condition "
    f"({paper.tables()['source']}), and in brackets ours less the paper's."
  )
  with_numbers = [entry.first for entry in entries if entry.paper is not None]
  if not all(paper.same_experiment(row) for row in with_numbers):
    note += (
      " This is not the paper's own experiment (Caltech-256, 224 px, its networks): "
      "the dataset or the network is another, so the differences compare patterns, "
      "they are no reproduction."
    )
  return note


def _stages(entries: Iterable[Entry]) -> tuple[Links, ...]:
  """Returns links to all stages behind a line; several of a role by their seeds."""
  found = {}
  for entry in entries:
    for row in entry.rows:
      for role, name in row.stages.items():
        # A stage serves several seeds if it was not trained for each of them.
        found.setdefault(role, {}).setdefault(name, str(row.seed))
  return tuple(
    (role, tuple(names.items()) if len(names) > 1 else ((next(iter(names)), role),))
    for role, names in found.items()
  )


def _per_class(group: Group, class_names: Sequence[str]) -> Table | None:
  """Returns a line a class, a column a method, at the harshest level."""
  condition = group.harshest
  found = {title: group.get(title, condition) for title in group.titles}
  found = {t: e for t, e in found.items() if e and e.first.per_class}
  if not found:
    return None
  count = max(len(entry.first.per_class) for entry in found.values())
  lines = []
  for number in range(count):
    known = number < len(class_names)
    name = class_names[number] if known else f"class {number}"
    values = [entry.of_class(number) for entry in found.values()]
    there = [value for value in values if value is not None]
    best = max(there) if len(there) > 1 else None
    lines.append(
      [Cell(name)]
      + [Cell(text.number(v, 1), v, best=v is not None and v == best) for v in values]
    )
  where = groups.heading(condition, "")
  return Table(
    caption=f"Accuracy of each class, %, at {where}: {group.name}",
    columns=("class", *found),
    hints=("",) * (1 + len(found)),
    lines=lines,
    notes=(f"Percent of a class's images classified right ({condition.name}).",),
    folded=True,
  )


def of_comparisons(comparisons: Sequence[statistics.Comparison]) -> Table:
  """Returns a line for each comparison."""
  several = len({comparison.group for comparison in comparisons}) > 1
  lines = []
  for c in comparisons:
    seeds = f", {c.seeds} seeds" if c.seeds > 1 else ""
    notes = ()
    if c.over_seeds is not None:
      notes = (f"± {c.over_seeds:.2f} training",)
    rounds = f" × {c.rounds} rounds" if c.rounds > 1 else ""
    size = f"{c.images} images{rounds}{seeds}"
    cells = [
      Cell(c.first),
      Cell(c.second),
      Cell(c.condition),
      Cell(text.difference(c.difference), c.difference, notes),
      Cell(text.interval(c.low, c.high), c.low),
      Cell(text.p_value(c.p, c.test == "bootstrap"), c.p, hint=repr(c.p)),
      Cell(c.test, notes=(size,)),
    ]
    if several:
      cells.insert(2, Cell(c.group))
    lines.append(cells)
  columns = ["first", "second", "condition", "difference", "95 % interval", "p", "test"]
  if several:
    columns.insert(2, "group")
  where = "" if several or not comparisons else f": {comparisons[0].group}"
  return Table(
    caption=f"Methods compared on the same images and noise{where}",
    columns=tuple(columns),
    hints=("",) * len(columns),
    lines=lines,
    notes=(
      "Difference: the first's accuracy less the second's, percentage points. p: that "
      "there is no difference, two-sided; by McNemar's exact test for single rounds, "
      "else by the bootstrap over images with all their rounds. p is not corrected "
      "for the number of comparisons.",
    ),
    folded=len(lines) > 40,
  )


_SIGNS = {"holds": "✓", "does not hold": "✗", "cannot be told": "?"}


def of_verdicts(verdicts: Sequence[claims.Verdict]) -> Table:
  """Returns a line for each of the paper's claims."""
  lines = []
  several = len({verdict.group for verdict in verdicts}) > 1
  for verdict in verdicts:
    basis = [_basis(c) for c in verdict.comparisons]
    count = len(verdict.comparisons)
    worst = verdict.comparisons[claims.worst(verdict.comparisons)] if count else None
    ends = (text.interval(worst.low, worst.high),) if worst else ()
    lines.append(
      [
        Cell(
          verdict.claim, notes=(verdict.where, *((verdict.group,) if several else ()))
        ),
        Cell(
          f"{_SIGNS.get(verdict.verdict, text.NONE)} {verdict.verdict}",
          state=verdict.verdict.replace(" ", "-"),
        ),
        Cell(verdict.why, notes=tuple(basis)),
        Cell(
          text.difference(worst and worst.difference),
          worst and worst.difference,
          (*ends, *((f"the worst of {count}",) if count > 1 else ())),
        ),
        Cell(text.difference(verdict.paper), verdict.paper),
      ]
    )
  seeds = [c.seeds for verdict in verdicts for c in verdict.comparisons]
  note = _DECIDED
  if 1 in seeds:
    several = max(seeds) > 1
    note += (
      f" {'Some verdicts are' if several else 'All this is'} of one seed of training: "
      "for these trained networks; another seed of training may decide otherwise."
    )
  return Table(
    caption="The paper's claims, and what becomes of them here",
    columns=("claim", "verdict", "why", "difference here", "the paper's"),
    hints=("",) * 5,
    lines=lines,
    notes=(note,),
    lead=_asked(list(dict.fromkeys(verdict.group for verdict in verdicts))),
  )


_OWN = "caltech256, 224 px, resnet50, awgn"
_DECIDED = (
  "Differences in percentage points, with the 95 % interval in brackets; of several "
  "parts of a claim the worst. A claim holds if all its intervals are on the side that "
  "is claimed, and does not if any is on the other, at 95 % for all parts together "
  "(Bonferroni); else it cannot be told. A t interval over several seeds of training "
  "must say the same, and of single rounds McNemar's p be below 0.05."
)


def _asked(names: Sequence[str]) -> str:
  """Returns of what the paper claims it, where that is not what is here."""
  others = [name for name in names if name not in (_OWN, "")]
  if not others:
    return ""
  return (
    "Made by the paper for Caltech-256 under AWGN (and ResNet-50 where it is about the "
    f"method); here asked of {'; '.join(name for name in names if name)}."
  )


def _basis(c: statistics.Comparison) -> str:
  """Returns a comparison in a line."""
  # Of one method, between two conditions; else of two.
  methods = c.first if c.first == c.second else f"{c.first} less {c.second}"
  return (
    f"{methods}, {c.condition}: {text.difference(c.difference)} "
    f"{text.interval(c.low, c.high)}, p {text.p_value(c.p, c.test == 'bootstrap')}"
  )


def of_stages(stages: Sequence[content.StageRecord]) -> Table:
  """Returns a line for each stage."""
  lines = []
  for stage in stages:
    state = "finished" if stage.finished else "missing-stage"
    score, sort = score_of(stage)
    lines.append(
      [
        Cell(stage.name, stages=(("details", ((stage.name, "details"),)),)),
        Cell(stage.kind),
        Cell("finished" if stage.finished else "not finished", state=state),
        Cell(score, sort, (stage.metric,) if stage.metric else ()),
        Cell(text.duration(stage.seconds), stage.seconds),
        Cell("" if stage.parents else text.NONE, stages=_links(stage.parents)),
        Cell(", ".join(stage.experiments)),
      ]
    )
  columns = ("stage", "kind", "state", "score", "time", "trained from", "experiments")
  return Table(
    caption="Stages: what was trained",
    columns=columns,
    hints=("", "", "", "the best validation score", "of training", "", ""),
    lines=lines,
  )


def score_of(stage: content.StageRecord) -> tuple[str, float | None]:
  """Returns a stage's score as it is shown, accuracy in percent, and as a number."""
  if stage.score is None:
    return text.NONE, None
  if stage.metric and stage.metric.split("/")[-1] == "accuracy":
    return f"{100 * stage.score:.2f} %", 100 * stage.score
  return f"{stage.score:.4g}".replace("-", text.MINUS), stage.score


def _links(parents: dict[str, str]) -> tuple[Links, ...]:
  return tuple((role, ((name, role),)) for role, name in parents.items())
