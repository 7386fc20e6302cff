"""What a report shows, in order: the same for Markdown and HTML."""

import dataclasses
from collections.abc import Sequence

from fidelity_jax.report import groups, tables
from fidelity_jax.report.content import Content
from fidelity_jax.report.groups import Group
from fidelity_jax.report.tables import Table

_ORDER = ("tables", "curves", "claims", "comparisons", "examples", "activations")
ORDER = (*_ORDER, "histories")


@dataclasses.dataclass(frozen=True)
class Part:
  """Tables under a heading.

  Attributes:
    heading: the heading, "" for none.
    tables: the tables.
  """

  heading: str
  tables: list[Table]


@dataclasses.dataclass(frozen=True)
class Section:
  """A section.

  Attributes:
    name: see `ORDER`; also the name of its anchor.
    heading: its heading.
    parts: its tables.
    figure: name of its figure's files without the suffix, None for none.
    caption: of the figure.
  """

  name: str
  heading: str
  parts: list[Part] = dataclasses.field(default_factory=list)
  figure: str | None = None
  caption: str = ""


_TABLES = {
  "accuracy": ("accuracy", "Accuracy"),
  "psnr": ("restored", "Restored images"),
  "map_error": ("maps", "Estimated maps"),
}
_FIGURES = {
  "examples": ("examples", "Examples"),
  "activations": ("activations", "Inputs of the head"),
  "histories": ("histories", "Training"),
}


def sections(content: Content, captions: dict[str, str]) -> list[Section]:
  """Returns a report's sections but the last ones, of stages and of the environment.

  Args:
    content: what there is to show.
    captions: of the figures that there are, by name.
  """
  found = groups.make(content.rows)
  order = [name for name in content.sections if name in ORDER]
  order += [name for name in ORDER if name not in order]
  made = []
  for name in order:
    if name == "tables":
      made += _tables(found, content.class_names)
    elif name == "curves":
      if caption := captions.get("accuracy"):
        heading = "Against the level"
        made.append(Section("curves", heading, figure="accuracy", caption=caption))
    elif name == "claims":
      if content.verdicts:
        parts = [Part("", [tables.of_verdicts(content.verdicts)])]
        made.append(Section("claims", "The paper's claims", parts))
    elif name == "comparisons":
      if content.comparisons:
        parts = [Part("", [tables.of_comparisons(content.comparisons)])]
        made.append(Section("comparisons", "Comparisons", parts))
    elif caption := captions.get(name):
      figure, heading = _FIGURES[name]
      made.append(Section(name, heading, figure=figure, caption=caption))
  return made


def _tables(found: Sequence[Group], class_names: Sequence[str]) -> list[Section]:
  made = []
  for field, (name, heading) in _TABLES.items():
    parts = [
      Part(group.name, tables.of_group(group, class_names))
      for group in found
      if group.field == field
    ]
    if parts:
      made.append(Section(name, heading, parts))
  return made
