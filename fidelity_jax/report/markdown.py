"""A report as Markdown, for GitHub and for reading as it is."""

import json
from collections.abc import Sequence

from fidelity_jax.report import tables, text
from fidelity_jax.report.content import Content, StageRecord
from fidelity_jax.report.layout import Section
from fidelity_jax.report.tables import Cell, Table


def write(content: Content, sections: Sequence[Section]) -> str:
  """Returns report.md's text.

  Args:
    content: what there is to show.
    sections: the same in order, see `layout.sections`.
  """
  lines = [f"# {text.markdown(content.name)}", ""]
  if content.shows:
    lines += [text.markdown(content.shows), ""]
  if content.missing:
    lines += ["**Missing:**", ""]
    lines += [f"- {text.markdown(line)}" for line in content.missing] + [""]
  if content.command:
    lines += [text.fenced(text.printable(content.command), "sh"), ""]
  lines += ["The same with sortable tables: [report.html](report.html).", ""]
  for section in sections:
    lines += _section(section)
  if content.stages:
    lines += ["## Stages", "", *_table(tables.of_stages(content.stages), caption=False)]
    for stage in content.stages:
      lines += _stage(stage, content.command_of(stage))
  lines += ["## Made with", ""]
  facts = dict(content.environment)
  facts["time of the evaluation"] = text.duration(content.seconds)
  lines += ["| | |", "|---|---|"]
  lines += [f"| {text.markdown(k)} | {text.markdown(v)} |" for k, v in facts.items()]
  return "\n".join([*lines, ""])


def _section(section: Section) -> list[str]:
  lines = [f"## {text.markdown(section.heading)}", ""]
  for part in section.parts:
    if part.heading:
      lines += [f"### {text.markdown(part.heading)}", ""]
    for table in part.tables:
      lines += _table(table, caption=table.folded)
  if section.figure:
    alt = text.markdown(section.heading)
    lines += [f"![{alt}]({section.figure}.png)", ""]
    lines += [text.markdown(section.caption), ""]
  return lines


def _table(table: Table, caption: bool) -> list[str]:
  lines = []
  if table.folded:
    # Only inside a summary; GitHub reads Markdown again after an empty line.
    lines += ["<details>", f"<summary>{_html(table.caption)}</summary>", ""]
  elif caption:
    lines += [f"**{text.markdown(table.caption)}**", ""]
  if table.lead:
    lines += [text.markdown(table.lead), ""]
  lines.append("| " + " | ".join(map(text.markdown, table.columns)) + " |")
  lines.append("|" + "---|" * len(table.columns))
  lines += ["| " + " | ".join(map(_cell, cells)) + " |" for cells in table.lines]
  lines.append("")
  for note in table.notes:
    lines += [text.markdown(note), ""] if note else []
  if table.folded:
    lines += ["</details>", ""]
  return lines


def _cell(cell: Cell) -> str:
  shown = text.markdown(cell.text)
  if cell.best:
    shown = f"**{shown}**"
  if not cell.text and cell.stages:
    shown = "<br>".join(
      f"{text.markdown(role)}: {text.markdown(name)}"
      for role, links in cell.stages
      for name, _ in links
    )
  return "<br>".join([shown, *map(text.markdown, cell.notes)])


def _html(shown: str) -> str:
  shown = text.printable(shown)
  for plain, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
    shown = shown.replace(plain, entity)
  return shown


def _stage(stage: StageRecord, command: str) -> list[str]:
  config = json.dumps(stage.config, indent=2, default=str)
  summary = f"<summary>{_html(stage.name)}: config</summary>"
  lines = ["<details>", summary, "", text.fenced(config, "json"), ""]
  if command:
    lines += [text.fenced(text.printable(command), "sh"), ""]
  if stage.records:
    last = json.dumps(stage.records[-1], default=str)
    lines += ["Last record:", "", text.fenced(last, "json"), ""]
  return [*lines, "</details>", ""]
