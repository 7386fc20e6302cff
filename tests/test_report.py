"""The report: tables, figures and files, of contents that are made up."""

import csv
import dataclasses
import html.parser
import io
import itertools
import json
import re
from xml.etree import ElementTree

import matplotlib.image
import msgspec
import numpy as np
import pytest
import report_content as made
from markdown_it import MarkdownIt

from fidelity_jax import errors, paper, report
from fidelity_jax.report import (
  activations,
  curves,
  examples,
  groups,
  histories,
  layout,
  markdown,
  pictures,
  tables,
  text,
)
from fidelity_jax.rows import Compared, Condition

# Names that would be markup, formulas, other cells, or no text at all.
NAMES = (
  *("<script>alert(1)</script>", "a|b", "*bold* _x_ `code`", "$x_{$", "a$b$\\frac{"),
  *("[link](http://x.y)", "q\"uo'te & &amp;", "line\nend", "\x1b[0m", "\udce9", "猫"),
)


@pytest.fixture(scope="module")
def full():
  """A content with everything in it."""
  rows = made.classified() + made.restored()
  return made.content(
    *(rows,),
    activations=[made.activations()],
    examples=[made.examples(size=16)],
    missing=["estimator <x>: failed: no room"],
  )


@pytest.fixture(scope="module")
def written(full, tmp_path_factory):
  """The directory of its report."""
  place = tmp_path_factory.mktemp("report")
  report.write(place, full)
  return place


def _table(rows, field="accuracy", class_names=made.CLASSES):
  (group,) = (group for group in groups.make(rows) if group.field == field)
  return tables.of_group(group, class_names)


def test_it_writes_everything(written):
  report.check(written)
  assert {path.name for path in written.iterdir()} == set(report.NAMES)
  for path in written.glob("*.png"):
    assert matplotlib.image.imread(path).std() > 0.01
  for path in written.glob("*.svg"):
    assert ElementTree.parse(path).getroot().tag.endswith("svg")


def test_it_writes_the_same_again_and_figures_of_another_report_go(tmp_path):
  rows = made.classified(lines=list(made.methods(("clean",), ())))
  content = made.content(rows, examples=[made.examples(size=8)])
  found = []
  for _ in range(2):
    report.write(tmp_path, content)
    found.append({path.name: path.read_bytes() for path in tmp_path.iterdir()})
  assert found[0] == found[1]
  assert {"examples.svg", "histories.png"} <= set(found[0])
  report.write(tmp_path, made.content(rows, examples=[], stages=[]))
  left = {path.name for path in tmp_path.iterdir()}
  figures = {"accuracy.png", "accuracy.svg"}
  assert left == {*report.NAMES[:4], *figures}


def test_nothing_at_all_is_a_report_too(tmp_path):
  content = made.content(
    [], examples=[], comparisons=[], missing=["everything: failed"], class_names=[]
  )
  report.write(tmp_path, content)
  assert "everything: failed" in (tmp_path / "report.html").read_text()
  assert json.loads((tmp_path / "results.json").read_text())["rows"] == []


def test_what_cannot_be_written_is_said_before(tmp_path):
  (tmp_path / "report.html").mkdir()
  with pytest.raises(errors.RunError, match=r"report\.html is no regular file"):
    report.check(tmp_path)


def test_results_for_programs(full, written):
  results = json.loads((written / "results.json").read_text())
  assert list(results) == [
    *("command", "environment", "seconds"),
    *("rows", "comparisons", "verdicts", "missing", "class_names"),
  ]
  for kind in ("command", "environment", "seconds", "comparisons", "verdicts"):
    assert results[kind] == msgspec.to_builtins(getattr(full, kind))
  for fields, row in zip(results["rows"], full.rows, strict=True):
    known = None if row.accuracy is None else paper.accuracy(row)
    assert fields == msgspec.to_builtins(row) | {"paper": known}
  assert results["rows"][0]["paper"] == 83.2
  with open(written / "results.csv", newline="") as file:
    lines = list(csv.DictReader(file))
  assert len(lines) == len(full.rows)
  for line, row in zip(lines, full.rows, strict=True):
    assert float(line["value"]) == row.value
    assert line["condition"] == row.condition.name
    assert line["accuracy"] == ("" if row.accuracy is None else repr(row.accuracy))
    names = dict(part.split("=") for part in line["stages"].split(";"))
    assert names == row.stages
  varying = [line for line in lines if line["condition_vary"] == "1d"]
  assert {line["condition_level"] for line in varying} == {"0.5;0.0"}


def test_the_best_of_a_column_is_bold_and_the_papers_number_beside():
  rows = made.classified()
  main, top5, ece, per_class = _table(rows)
  column = main.columns.index("0.3")
  cells = [line[column] for line in main.lines]
  values = [cell.sort for cell in cells]
  assert [cell.best for cell in cells] == [v == max(values) for v in values]
  row = next(row for row in rows if row.condition.name == "awgn-0.3")
  assert cells[0].text == f"{row.accuracy:.2f}"
  expected = f"paper 10.44 ({row.accuracy - 10.44:+.2f})"
  assert expected in cells[0].notes
  assert any(f"± {row.std:.2f}" in note for note in cells[0].notes)
  assert any(f"[{row.low:.2f}, {row.high:.2f}]" in note for note in cells[0].notes)
  # A calibration error is the better the smaller it is.
  assert ece.lines[0][1].sort == 3.0 and ece.lines[0][1].best
  assert top5.lines[0][column].sort == pytest.approx(row.top5)
  assert [line[0].text for line in per_class.lines] == list(made.CLASSES)
  hardest = next(row for row in rows if row.condition.name == "awgn-0.5")
  assert per_class.lines[0][1].sort == hardest.per_class[0]
  assert per_class.lines[-1][1].text == text.NONE


def test_it_says_when_the_experiment_is_not_the_papers():
  said = "no reproduction"
  lines = list(made.methods(("clean",), ()))
  own = made.classified(lines=lines)
  other = made.classified(lines=lines, dataset="demo", image_size=64)
  assert said not in " ".join(_table(own)[0].notes)
  (main, *_) = _table(other)
  assert said in " ".join(main.notes)
  assert any("paper 83.20" in note for note in main.lines[0][1].notes)
  unknown = made.classified(kinds=("motion_blur",), lines=lines)
  notes = " ".join(_table(unknown)[0].notes)
  assert paper.tables()["source"] not in notes


def test_seeds_are_put_together_and_their_spread_kept_apart():
  lines = list(made.methods(("clean",), ()))
  rows = made.classified(seeds=(0, 1, 2), lines=lines)
  main = _table(rows)[0]
  assert len(main.lines) == 2
  column = main.columns.index("0.3")
  same = [
    row for row in rows if row.condition.name == "awgn-0.3" and row.restorer is None
  ]
  values = [row.accuracy for row in same]
  cell = main.lines[0][column]
  assert cell.sort == pytest.approx(np.mean(values))
  noise = f"± {np.mean([row.std for row in same]):.2f} noise"
  training = f"± {np.std(values, ddof=1):.2f} training"
  assert noise in cell.notes and training in cell.notes
  ((role, links),) = main.lines[0][0].stages
  assert role == "classifier"
  assert [shown for _, shown in links] == ["0", "1", "2"]
  notes = " ".join(main.notes)
  assert "noise" in notes and "training" in notes


def test_other_measures():
  psnr, ssim = _table(made.restored(), "psnr")
  # Of clean images that are not restored nothing can be measured.
  same = psnr.lines[0][1]
  assert (same.text, same.best, same.notes) == ("identical", False, ())
  assert psnr.lines[1][1].text != "identical" and "100 dB" in psnr.notes[-1]
  assert psnr.lines[1][-1].best and not psnr.lines[0][-1].best
  assert ssim.folded
  error, ause = _table(made.restored(), "map_error")
  worse, better = (line[1] for line in error.lines)
  assert better.best and not worse.best and better.sort < worse.sort
  assert ause.lines[0][1].text == f"{worse.sort / 3:.4f}"


def test_one_title_of_two_experiments_is_two_lines():
  condition = made.conditions()[0]
  fields = {"accuracy": 50.0, "low": 40.0, "high": 60.0}
  rows = [
    made.row(condition, experiment=name, stages={"classifier": name}, **fields)
    for name in ("short", "longer")
  ]
  (group,) = groups.make(rows)
  title = "trained on clean, without restoration"
  assert group.titles == [f"{title} (short)", f"{title} (longer)"]
  # Of the same stages they are the same.
  same = [msgspec.structs.replace(row, stages={"classifier": "a"}) for row in rows]
  (group,) = groups.make(same)
  assert group.titles == [title]
  assert group.get(title, condition).rows == (same[0],)


def test_rows_that_are_missing_leave_a_gap(tmp_path):
  rows = made.classified(lines=list(made.methods(("clean",), ())))
  rows.pop(3)
  main = _table(rows)[0]
  assert main.lines[0][4].text == text.NONE
  report.write(tmp_path, made.content(rows, examples=[], stages=[]))


@pytest.mark.parametrize(
  ("backbones", "kinds", "shape"),
  [(1, 1, (1, 1)), (3, 1, (1, 3)), (5, 4, (4, 5)), (2, 2, (2, 2)), (1, 5, (2, 3))],
)
def test_panels_stand_in_a_grid(backbones, kinds, shape):
  backbones = ("alexnet", "vgg16", "googlenet", "resnet50", "resnet18")[:backbones]
  names = ("awgn", "salt_and_pepper", "gaussian_blur", "motion_blur")
  kinds = (*names, "rectangular_crop")[:kinds]
  rows = made.classified(backbones, kinds, lines=list(made.methods(("clean",), ())))
  found = groups.make(rows)
  assert len(found) == len(backbones) * len(kinds)
  figure, _ = curves.draw(found, made.CLASSES)
  axes = [one for one in figure.axes if one.axison]
  # Each panel has levels, and at its side what varies.
  assert len(axes) == 2 * len(found)
  gridspec = figure.axes[0].get_gridspec()
  assert (gridspec.nrows, gridspec.ncols // 2) == shape
  levels = len(found[0].uniform)
  drawn = [line for line in axes[0].lines if len(line.get_xdata()) == levels]
  assert len([line for line in drawn if line.get_linestyle() != "None"]) == 2


def test_lines_can_be_told_apart():
  found = groups.make(made.classified())
  looks = curves._looks(found)
  assert len(looks) == 12
  seen = [(v["color"], v["marker"], str(v["ls"]), v["mfc"]) for v in looks.values()]
  assert len(set(seen)) == 12
  for title, look in looks.items():
    dashed = look["ls"] != "-"
    assert dashed == (title.startswith("trained") and "with restoration" in title)
    assert (look["lw"] > 1.5) == title.startswith("proposed")
  assert len({tuple(pictures.look(n).items()) for n in range(99)}) == 99


def test_the_order_of_neurons_is_that_of_the_degraded_panel():
  one = made.activations(50)
  order = activations.ordered(one.degraded)
  change = one.degraded[-1] - one.degraded[0]
  assert np.all(np.diff(change[order]) >= 0)
  figure, caption = activations.draw([one])
  assert "order" in caption and len(figure.axes) == 2
  for axes, values in zip(figure.axes, (one.degraded, one.restored), strict=True):
    raw = [line.get_ydata() for line in axes.lines if len(line.get_ydata()) == 50]
    assert any(np.array_equal(line, values[0][order]) for line in raw)
  alone = dataclasses.replace(one, restored=None)
  assert len(activations.draw([alone])[0].axes) == 1


@pytest.mark.parametrize("size", [1, 9216])
def test_heads_of_any_size(size):
  figure = pictures.drawn(
    lambda: activations.draw([made.activations(size)]), "activations", "title"
  )
  assert len(figure.svg) < 1_000_000


def test_histories_mark_the_checkpoint_that_is_kept():
  stage = made.stages(made.classified())[0]
  kept = histories.best(stage)
  assert kept["validation/accuracy"] == stage.score
  records = [dict(r, **{"validation/loss": abs(r["epoch"] - 3)}) for r in stage.records]
  estimator = dataclasses.replace(stage, metric="loss", records=records)
  assert histories.best(estimator)["epoch"] == 3
  assert histories.measures(estimator) == ["loss"]
  figure, _ = histories.draw([stage])
  loss, accuracy = (axes for axes in figure.axes if axes.axison)
  assert accuracy.lines[2].get_xdata() == [kept["epoch"]]
  assert loss.lines[2].get_xdata() == [kept["epoch"]]
  # In training there is no epoch 0.
  assert loss.lines[0].get_xdata()[0] == 1 and loss.lines[1].get_xdata()[0] == 0
  nothing = dataclasses.replace(stage, records=[], score=None, finished=False)
  assert histories.shown([nothing, stage]) == [stage]


def test_sections_lead_as_they_are_told(full):
  captions = dict.fromkeys(("accuracy", "examples", "activations", "histories"), "x")
  for leading in itertools.permutations(("curves", "claims", "histories"), 2):
    content = dataclasses.replace(full, sections=leading)
    names = [section.name for section in layout.sections(content, captions)]
    assert tuple(names[:2]) == leading
    everything = {*layout.ORDER, "accuracy", "restored", "maps"} - {"tables"}
    assert set(names) == everything and len(names) == len(everything)


def test_examples_of_two_experiments_with_maps():
  plain = made.examples(map_name=None)
  plain.arrays.pop("map")
  first, second, third = (made.examples(experiment=name) for name in "abc")
  assert examples.chosen([plain, first, second, third]) == [first, second]
  assert examples.chosen([plain]) == [plain]
  assert examples.chosen([]) == []
  many = made.examples(made.conditions() * 2, images=20, size=8)
  figure, _ = examples.draw([many, plain], made.CLASSES)
  assert figure.get_figwidth() < 15
  titles = [axes.get_title() for axes in figure.axes]
  assert "noise 2D (0.5 to 0)\ndog" in titles


def test_a_map_below_zero_is_drawn():
  """As networks that were not trained for long estimate it."""
  one = made.examples()
  figure, _ = examples.draw(
    [dataclasses.replace(one, arrays=one.arrays | {"map": one.arrays["map"] - 5})],
    made.CLASSES,
  )
  figure.canvas.draw()
  assert all(i.get_clim()[0] < i.get_clim()[1] for a in figure.axes for i in a.images)


def test_what_is_said_of_clean_images_is_below_them():
  one = made.examples()
  wrong = (one.arrays["label"] + 1) % len(made.CLASSES)
  figure, caption = examples.draw(
    [dataclasses.replace(one, arrays=one.arrays | {"value/clean": wrong})], made.CLASSES
  )
  below = [axes.get_xlabel() for axes in figure.axes if axes.get_title()]
  assert below and all(text.startswith("✗") for text in below)
  assert "sees the clean" in caption


def test_examples_of_a_restorer_have_its_psnr():
  compared = (Compared("restoration", False), Compared("restoration", True))
  one = made.examples(compared=compared, map_name=None, trained_on=None)
  values = {f"value/{c.key}": np.full((4, 2), 21.5, np.float32) for c in compared}
  images = {k: v for k, v in one.arrays.items() if not k.startswith(("value", "map"))}
  figure, caption = examples.draw(
    [dataclasses.replace(one, arrays=images | values)], made.CLASSES
  )
  assert "21.5 dB" in {axes.get_xlabel() for axes in figure.axes}
  assert "PSNR" in caption


@pytest.mark.parametrize(
  "spec",
  [
    "clean",
    "motion_blur",
    "gaussian_blur+awgn",
    [{"kind": "awgn", "level": 0.1}, {"kind": "motion_blur", "level": 5}],
    {"kind": "salt_and_pepper", "level": 0.2},
  ],
  ids=str,
)
def test_any_degradation_has_its_pictures(spec):
  _check_pictures(spec, "accuracy")


@pytest.mark.parametrize("measured", ["psnr", "map_error"])
@pytest.mark.parametrize("spec", ["clean", "gaussian_blur+awgn"])
def test_any_measure_has_its_pictures(spec, measured):
  _check_pictures(spec, measured)


def _check_pictures(spec, measured):
  method = {"accuracy": "classifier", "psnr": "restoration", "map_error": "estimation"}
  rows = [
    made.row(
      *(condition,),
      method=method[measured],
      source="pretrained",
      degradation=condition.kind,
      low=29.0,
      high=31.0,
      **{measured: 30.0},
    )
    for condition in made.conditions(spec)
  ]
  rows = [msgspec.structs.replace(r, degradation=rows[-1].degradation) for r in rows]
  content = made.content(
    rows, stages=[], examples=[made.examples([rows[-1].condition], size=8)]
  )
  figures = report.draw(content)
  assert set(figures) == {"accuracy", "examples"}
  sections = layout.sections(content, {name: "" for name in figures})
  shown = markdown.write(content, sections)
  heading = groups.heading(rows[-1].condition, rows[-1].degradation)
  assert f"| {text.markdown(heading)} |" in shown


class _Page(html.parser.HTMLParser):
  """Collects a page's tags, texts, ids and what it refers to."""

  def __init__(self, page):
    super().__init__()
    self.tags, self.texts, self.ids, self.references = [], [], [], []
    self.relations = []
    self.feed(page)

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    for name, value in attrs:
      if name == "rel":
        self.relations += value.split()
      if name == "id":
        self.ids.append(value)
      if name in ("href", "src", "xlink:href"):
        self.references.append(value)

  def handle_data(self, data):
    self.texts.append(data)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
  """The directory of a report whose names are all hostile."""
  rows = made.classified(lines=list(made.methods(("clean",), ("oracle",))))
  fields = {"dataset": NAMES[0], "experiment": NAMES[1]}
  rows = [msgspec.structs.replace(row, **fields) for row in rows]
  stages = [
    dataclasses.replace(
      *(stage,), name=f"{stage.kind}-{name}", experiments=[name], config={"path": name}
    )
    for stage, name in zip(itertools.cycle(made.stages(rows)), NAMES)
  ]
  # Curves take their time, and all are drawn alike.
  stages[2:] = [dataclasses.replace(stage, records=[]) for stage in stages[2:]]
  content = made.content(
    rows,
    name=NAMES[3],
    shows=NAMES[6],
    command=f"run --name={NAMES[2]}",
    missing=list(NAMES),
    class_names=list(NAMES),
    stages=stages,
    examples=[made.examples(size=8, experiment=NAMES[3])],
    activations=[made.activations(class_name=NAMES[9], backbone=NAMES[8])],
    environment={name: name for name in NAMES},
  )
  place = tmp_path_factory.mktemp("hostile")
  report.write(place, content)
  return place


def test_names_are_names_in_html(hostile):
  page = (hostile / "report.html").read_text()
  parsed = _Page(page)
  assert parsed.tags.count("script") == 1
  shown = "".join(parsed.texts)
  for name in NAMES:
    assert text.printable(name) in shown, name
  assert "alert(1)</script>" not in page


def test_and_in_markdown(hostile):
  page = (hostile / "report.md").read_text()
  # Texts of cells as a renderer shows them.
  tokens = MarkdownIt("commonmark").enable("table").parse(page)
  inline = [token for token in tokens if token.type == "inline"]
  shown = ["".join(child.content for child in token.children) for token in inline]
  for name in NAMES:
    assert text.printable(name) in shown, name
  kinds = {child.type for token in inline for child in token.children}
  assert not kinds & {"em_open", "code_inline"}
  links = [c for t in inline for c in t.children if c.type == "link_open"]
  assert {link.attrs["href"] for link in links} == {"report.html"}
  images = [c.attrs["src"] for t in inline for c in t.children if c.type == "image"]
  assert set(images) == {p.name for p in hostile.glob("*.png")}
  widths = [0]
  for token in tokens:
    if token.type == "tr_open":
      widths.append(0)
    widths[-1] += token.type in ("th_open", "td_open")
  assert len({width for width in widths if width}) <= 5


def test_and_in_pictures(hostile):
  for path in hostile.glob("*.svg"):
    root = ElementTree.parse(path).getroot()
    assert not root.findall(".//{http://www.w3.org/2000/svg}script")
  shown = "".join(ElementTree.parse(hostile / "activations.svg").getroot().itertext())
  assert "\\x1b[0m" in shown and "\\udce9" in shown


def test_a_page_needs_nothing_but_itself(written):
  page = _Page((written / "report.html").read_text())
  assert len(page.ids) == len(set(page.ids))
  assert not {"iframe", "img"} & set(page.tags)
  assert page.relations == ["icon"]
  for reference in page.references:
    assert reference.startswith(("#", "data:")), reference
    if reference.startswith("#"):
      assert reference[1:] in page.ids
  source = (written / "report.html").read_text()
  for address in re.findall(r"url\(([^)]*)\)", source):
    assert address.startswith("#"), address
  for address in set(re.findall(r"https?://[^\"'\s<)]+", source)):
    assert address.startswith("http://www.w3.org/"), address


def test_every_number_is_on_the_page(full, written):
  shown = "".join(_Page((written / "report.html").read_text()).texts)
  for row in full.rows:
    digits = 4 if row.map_error is not None else 2
    assert (f"{row.value:.{digits}f}" if row.psnr != 100 else "identical") in shown
  for stage in full.stages:
    assert stage.name in shown and json.dumps(stage.records[-1]) in shown
  for verdict in full.verdicts:
    assert verdict.claim in shown and verdict.why in shown and verdict.verdict in shown
  for fact in full.environment.values():
    assert fact in shown
  assert full.missing[0] in shown and "12 min 34 s" in shown


@pytest.mark.parametrize(
  ("value", "expected"),
  [(1.8249, "+1.82"), (-0.5, "−0.50"), (-0.001, "+0.00"), (None, "–")],
)
def test_differences(value, expected):
  assert text.difference(value) == expected


@pytest.mark.parametrize(
  ("p", "drawn", "expected"),
  [
    (0.0123, True, "0.012"),
    (2 / 2001, True, "≤ 0.001"),
    (2 / 2001, False, "1.0e−03"),
    (1.3e-8, False, "1.3e−08"),
  ],
)
def test_p_values(p, drawn, expected):
  assert text.p_value(p, drawn) == expected


def test_two_examples_of_the_same_pictures_have_ids_of_their_own():
  shown = [made.examples(size=8), made.examples(size=8, experiment="other")]
  figure = pictures.drawn(lambda: examples.draw(shown, made.CLASSES), "examples", "x")
  ids = _Page(figure.inline).ids
  assert len(ids) == len(set(ids)) and any("-again-" in name for name in ids)


def test_a_stages_command_trains_no_more_than_it_needs():
  rows = made.classified(lines=list(made.methods(("clean",), ())))
  content = made.content(rows)
  stage = content.stages[0]
  assert content.command_of(stage) == f"{content.command} --config.only=oracle"
  odd = dataclasses.replace(stage, experiments=["setup <1>"])
  assert content.command_of(odd) == f"{content.command} '--config.only=setup <1>'"
  alone = dataclasses.replace(
    content, stages=[dataclasses.replace(stage, experiments=["oracle"])]
  )
  assert alone.command_of(stage) == content.command
  assert made.content(rows, command="").command_of(stage) == ""


def test_accuracy_of_stages_is_in_percent():
  stage = dataclasses.replace(made.stages(made.classified())[0], score=0.8125)
  assert tables.score_of(stage) == ("81.25 %", 81.25)
  restorer = dataclasses.replace(stage, metric="psnr_gain", score=-0.5)
  assert tables.score_of(restorer) == ("−0.5", -0.5)


def test_claims_are_the_papers_where_they_are_of_its_experiment():
  rows = made.classified(lines=list(made.methods(("clean",), ())))
  own, other = "caltech256, 224 px, resnet50, awgn", "demo, 64 px, resnet18, awgn"
  of = lambda *names: tables.of_verdicts(
    [msgspec.structs.replace(v, group=n) for v in made.verdicts(rows) for n in names]
  )
  assert of(own).lead == ""
  lead = of(other).lead
  assert lead.startswith("Made by the paper for Caltech-256 under AWGN")
  assert lead.endswith(f"here asked of {other}.")
  assert lead in markdown.write(
    made.content(rows), [layout.Section("x", "x", [layout.Part("", [of(other)])])]
  )
  assert own in of(own, other).lead


def test_the_worst_part_of_a_claim_is_shown():
  rows = made.classified(lines=list(made.methods(("clean",), ())))
  first = "trained on clean, without restoration"
  parts = [
    made.comparison(rows, first, first, d, condition="clean against awgn-0.1")
    for d in (3.0, -2.0, 1.0)
  ]
  verdict = msgspec.structs.replace(made.verdicts(rows)[0], comparisons=parts)
  table = tables.of_verdicts([verdict])
  _, _, why, here, _ = table.lines[0]
  assert (here.text, here.notes[-1]) == ("−2.00", "the worst of 3")
  assert why.notes[0].startswith(f"{first}, clean against awgn-0.1: +3.00 [")
  assert "another seed of training may decide otherwise" in table.notes[0]
  parts = [msgspec.structs.replace(c, seeds=3, over_seeds=1.0) for c in parts]
  verdict = msgspec.structs.replace(verdict, comparisons=parts)
  assert "another seed" not in tables.of_verdicts([verdict]).notes[0]


def test_single_rounds_are_not_counted_and_all_precisions_told():
  rows = made.classified(lines=list(made.methods(("clean",), ())))
  one = made.comparison(rows, "a", "b", rounds=1, test="mcnemar")
  assert tables.of_comparisons([one]).lines[0][-1].notes == ("500 images",)
  rows[3] = msgspec.structs.replace(rows[3], precision="bfloat16")
  assert "computed in float32 and bfloat16." in _table(rows)[0].notes[0]


@pytest.mark.parametrize(
  ("seconds", "expected"),
  [(None, "–"), (12.4, "12 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")],
)
def test_durations(seconds, expected):
  assert text.duration(seconds) == expected


def test_headings_name_what_differs():
  level = Condition("awgn-0.3", "awgn", 0.3, None, [])
  assert groups.heading(level, "awgn") == "0.3"
  assert groups.heading(level, "motion_blur") == "awgn 0.3"
  sequence = Condition("a+b", "gaussian_blur+awgn", None, "mixture", [])
  assert groups.heading(sequence, "awgn") == "gaussian blur + awgn"
  assert groups.heading(sequence, "gaussian_blur+awgn") == "a+b"
  assert io.StringIO(text.fenced("a ``` b")).readline() == "````\n"
