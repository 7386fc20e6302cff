"""What a reader gets of an experiment or a study: a page, tables, figures, numbers."""

import pathlib

from fidelity_jax import errors, files
from fidelity_jax.report import (
  activations,
  curves,
  examples,
  groups,
  histories,
  layout,
  markdown,
  page,
  pictures,
  records,
)
from fidelity_jax.report.content import Content

_FIGURES = ("accuracy", "examples", "activations", "histories")
# What `write` writes; figures only where there is anything to draw.
NAMES = (
  *("results.json", "results.csv", "report.md", "report.html"),
  *(f"{name}.{suffix}" for name in _FIGURES for suffix in ("png", "svg")),
)


def check(directory: pathlib.Path) -> None:
  """Raises RunError if what `write` writes could not be written there."""
  files.check_directory(directory, write=True)
  for name in NAMES:
    files.check_file(directory / name)


def write(directory: pathlib.Path, content: Content) -> None:
  """Writes everything a reader needs.

  The files depend on `content` alone: written twice, they are the same. Figures of an
  earlier report that this one has not are removed.

  Args:
    directory: where; it exists.
    content: what there is to show.

  Raises:
    RunError: a file cannot be written.
  """
  figures = draw(content)
  for name in _FIGURES:
    if name in figures:
      files.write_bytes(directory / f"{name}.png", figures[name].png)
      files.write_bytes(directory / f"{name}.svg", figures[name].svg)
      continue
    with errors.while_doing(f"removing figures from {directory}"):
      for suffix in ("png", "svg"):
        (directory / f"{name}.{suffix}").unlink(missing_ok=True)
  captions = {name: figure.caption for name, figure in figures.items()}
  sections = layout.sections(content, captions)
  texts = {
    "report.md": markdown.write(content, sections),
    "report.html": page.write(content, sections, figures),
    "results.csv": records.as_csv(content.rows),
  }
  for name, text in texts.items():
    files.write_bytes(directory / name, text.encode())
  # Last: where it is, all else is.
  files.write_json(directory / "results.json", records.as_json(content))


def draw(content: Content) -> dict[str, pictures.Drawn]:
  """Returns the figures that there is anything to draw for, by name."""
  name = content.name
  drawn = {}
  if content.rows:
    found = groups.make(content.rows)
    drawn["accuracy"] = pictures.drawn(
      lambda: curves.draw(found, content.class_names),
      "accuracy",
      f"{name}: results against the level of degradation",
    )
  if shown := examples.chosen(content.examples):
    drawn["examples"] = pictures.drawn(
      lambda: examples.draw(shown, content.class_names),
      "examples",
      f"{name}: images, degraded and restored, and what is predicted from them",
    )
  if content.activations:
    drawn["activations"] = pictures.drawn(
      lambda: activations.draw(content.activations),
      "activations",
      f"{name}: mean inputs of the head, by neuron, at each level of degradation",
    )
  if histories.shown(content.stages):
    drawn["histories"] = pictures.drawn(
      lambda: histories.draw(content.stages),
      "histories",
      f"{name}: loss and score against epoch, of every stage",
    )
  return drawn
