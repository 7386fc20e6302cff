"""What all figures share: colours, names, files that depend on the content alone."""

import collections
import contextlib
import dataclasses
import functools
import io
import warnings
from collections.abc import Callable, Iterator
from xml.etree import ElementTree

import matplotlib

matplotlib.use("Agg")
import matplotlib.figure

from fidelity_jax.report import text

# Told apart with any colour vision and on white as on black; after Okabe and Ito.
COLOURS = (
  *("#1478bd", "#d55e00", "#009e73", "#c0609a", "#d18f00", "#56b4e9"),
  *("#8a8a2b", "#9c6b4e", "#7f7f7f"),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "<", ">", "h")
# Stands for the colour of text, which in a page depends on the reader's settings.
INK = "#010203"
# Likewise, of what is behind it.
PAPER = "#fdfefd"
_STYLE = {
  "axes.edgecolor": INK,
  "axes.formatter.use_mathtext": False,
  "axes.labelcolor": INK,
  "axes.spines.right": False,
  "axes.spines.top": False,
  "axes.titlecolor": INK,
  "axes.titlesize": 10,
  "figure.facecolor": "none",
  "axes.facecolor": "none",
  "font.family": "DejaVu Sans",
  "font.size": 9,
  "grid.alpha": 0.2,
  "grid.color": INK,
  "legend.frameon": False,
  "legend.labelcolor": INK,
  "svg.fonttype": "none",
  "svg.hashsalt": "fidelity_jax",
  "text.color": INK,
  # Names are names: "$" begins no formula.
  "text.parse_math": False,
  "xtick.color": INK,
  "ytick.color": INK,
}
_SVG = "{http://www.w3.org/2000/svg}"
_XLINK = "{http://www.w3.org/1999/xlink}"
ElementTree.register_namespace("", _SVG[1:-1])
ElementTree.register_namespace("xlink", _XLINK[1:-1])
_FONTS = "system-ui, 'DejaVu Sans', Verdana, sans-serif"


@dataclasses.dataclass(frozen=True)
class Drawn:
  """A figure.

  Attributes:
    png: on white.
    svg: a file of its own, on white or black as the reader likes.
    inline: the same for a page: in the colour of the text around, with ids that no
      other figure has.
    caption: what it shows.
  """

  png: bytes
  svg: bytes
  inline: str
  caption: str


def drawn(
  draw: Callable[[], tuple[matplotlib.figure.Figure, str]],
  name: str,
  title: str,
  png: bool = True,
) -> Drawn:
  """Draws a figure.

  Args:
    draw: returns the figure and its caption; called in the style of the report.
    name: a word that no other figure of the page is called.
    title: for those who cannot see it.
    png: whether it is needed as PNG, else that is empty.
  """
  with _style():
    figure, caption = draw()
    pixels = _saved(figure, "png", dpi=110, facecolor="white") if png else b""
    if png:
      # Laid out once is enough.
      figure.set_layout_engine("none")
    vector = _saved(figure, "svg", dpi=80).decode()
  caption = text.printable(caption)
  inline = _inline(vector, name, title)
  return Drawn(pixels, _standalone(inline).encode(), inline, caption)


def png(draw: Callable[[], matplotlib.figure.Figure]) -> bytes:
  """Returns a figure on white.

  Args:
    draw: returns it; called in the style of the report.
  """
  with _style():
    return _saved(draw(), "png", dpi=110, facecolor="white")


@contextlib.contextmanager
def _style() -> Iterator[None]:
  with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
    # Names in scripts that the font lacks; a browser shows them.
    warnings.filterwarnings("ignore", message="Glyph .* missing from")
    yield


def _saved(figure: matplotlib.figure.Figure, kind: str, **kwargs) -> bytes:
  buffer = io.BytesIO()
  metadata = {"Date": None} if kind == "svg" else {}
  figure.savefig(buffer, format=kind, metadata=metadata, **kwargs)
  return buffer.getvalue()


def _inline(vector: str, name: str, title: str) -> str:
  """Returns a figure's SVG element for a page."""
  root = ElementTree.fromstring(vector)
  for parent in root.iter():
    for child in list(parent):
      # A style would hold for the whole page; metadata is of no use there.
      if child.tag in (f"{_SVG}metadata", f"{_SVG}style"):
        parent.remove(child)
  for element in root.iter():
    for key, value in element.items():
      if key == "id":
        value = f"{name}-{value}"
      elif key == f"{_XLINK}href" and value.startswith("#"):
        value = f"#{name}-{value[1:]}"
      value = value.replace("url(#", f"url(#{name}-").replace(INK, "currentColor")
      value = value.replace(PAPER, "var(--paper, #fff)")
      element.set(key, value.replace("'DejaVu Sans'", _FONTS))
  # Two pictures that are the same have one id.
  often = collections.Counter()
  for element in root.iter():
    if (known := element.get("id")) is not None:
      often[known] += 1
      if often[known] > 1:
        element.set("id", f"{known}-again-{often[known]}")
  width = float(root.get("viewBox").split()[2]) * 96 / 72
  for key in ("width", "height", "version"):
    root.attrib.pop(key, None)
  root.set("role", "img")
  root.set("aria-labelledby", f"{name}-title")
  style = "stroke-linejoin:round;stroke-linecap:butt"
  root.set("style", f"--width:{width:.0f}px;{style}")
  element = ElementTree.Element(f"{_SVG}title", {"id": f"{name}-title"})
  element.text = text.printable(title)
  root.insert(0, element)
  return ElementTree.tostring(root, encoding="unicode")


def _standalone(inline: str) -> str:
  """Returns an SVG file."""
  style = (
    "<style>svg{--paper:#fff;color:#1b1f24;background:var(--paper)}"
    "@media(prefers-color-scheme:dark){svg{--paper:#14171b;color:#e6e8eb}}</style>"
  )
  start, rest = inline.split(">", 1)
  return f'<?xml version="1.0" encoding="utf-8"?>\n{start}>{style}{rest}\n'


@functools.cache
def look(number: int) -> dict[str, str]:
  """Returns colour and marker of the line of a number, no two of the first 99 alike."""
  return {
    "color": COLOURS[number % len(COLOURS)],
    "marker": MARKERS[number % len(MARKERS)],
  }


def name(shown: str) -> str:
  """Returns a name for a picture."""
  return text.printable(shown).replace("_", " ")


def heading(kind: str) -> str:
  """Returns what a kind of degradation is called, e.g. "gaussian blur + noise"."""
  return name(kind).replace("awgn", "noise").replace("+", " + ")
