"""A report as one HTML file, which needs nothing but itself."""

import dataclasses
import importlib.resources
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import markupsafe

from fidelity_jax.report import histories, pictures, tables, text
from fidelity_jax.report.content import Content, StageRecord
from fidelity_jax.report.layout import Section


@dataclasses.dataclass(frozen=True)
class _Stage:
  """What a page shows of a stage besides its record."""

  record: StageRecord
  state: str
  time: str
  last: str
  config: markupsafe.Markup
  curves: pictures.Drawn | None


def write(
  content: Content,
  sections: Sequence[Section],
  figures: Mapping[str, pictures.Drawn],
) -> str:
  """Returns report.html's text.

  Args:
    content: what there is to show.
    sections: the same in order, see `layout.sections`.
    figures: by name.
  """
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader("fidelity_jax", "report"),
    autoescape=True,
    finalize=_finalized,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
  )
  return environment.get_template("page.html.jinja").render(
    anchors=_anchors(content.stages),
    content=content,
    css=_resource("page.css"),
    evaluation_time=text.duration(content.seconds),
    figures={name: _marked(figure) for name, figure in figures.items()},
    js=_resource("page.js"),
    sections=sections,
    stage_table=tables.of_stages(content.stages),
    stages=[_stage(i, stage) for i, stage in enumerate(content.stages)],
  )


def _finalized(value: Any) -> Any:
  """Returns what is printed: names without what no page may have in it."""
  if isinstance(value, str) and not isinstance(value, markupsafe.Markup):
    return text.printable(value)
  return value


def _resource(name: str) -> markupsafe.Markup:
  path = importlib.resources.files("fidelity_jax") / "report" / name
  return markupsafe.Markup(path.read_text().strip())


def _marked(figure: pictures.Drawn) -> pictures.Drawn:
  return dataclasses.replace(figure, inline=markupsafe.Markup(figure.inline))


def _anchors(stages: Sequence[StageRecord]) -> dict[str, str]:
  """Returns names of anchors, by stage's name."""
  found = {}
  for number, stage in enumerate(stages):
    anchor = "stage-" + re.sub(r"[^A-Za-z0-9._-]+", "-", stage.name)
    taken = anchor in found.values()
    found[stage.name] = f"{anchor}-{number}" if taken else anchor
  return found


def _stage(number: int, stage: StageRecord) -> _Stage:
  curves = None
  if histories.shown([stage]):
    title = f"{stage.name}: loss and score against epoch"
    figure = pictures.drawn(
      lambda: histories.draw([stage]), f"history-{number}", title, png=False
    )
    curves = _marked(figure)
  state = "finished" if stage.finished else "not finished"
  if stage.score is not None:
    state += f", {stage.metric} {tables.score_of(stage)[0]}"
  config = json.dumps(stage.config, indent=2, default=str)
  return _Stage(
    record=stage,
    state=state,
    time=text.duration(stage.seconds),
    last=json.dumps(stage.records[-1], default=str) if stage.records else "",
    # It has lines, which are to stay; other characters are ASCII's.
    config=markupsafe.escape(config),
    curves=curves,
  )
