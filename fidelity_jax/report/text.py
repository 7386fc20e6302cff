"""Names and numbers as a reader sees them."""

import re
from collections.abc import Mapping

MINUS = "−"
NONE = "–"

# What would be markup in Markdown; "&" is replaced before them.
_MARKUP = re.compile(r"([\\`*_\[\]<>|~$])")


def printable(name: str) -> str:
  """Returns a name with what cannot be shown, or not be encoded, as an escape.

  Control characters, lone surrogates (of file names that are not UTF-8) and line ends
  become escapes such as Python has, so that the result fits any page, picture or table.
  """
  return "".join(
    c if c.isprintable() else c.encode("unicode_escape").decode() for c in name
  )


def markdown(name: str) -> str:
  """Returns a name that Markdown, also in a table's cell, shows as it is."""
  return _MARKUP.sub(r"\\\1", printable(name).replace("&", "&amp;"))


def fenced(text: str, language: str = "") -> str:
  """Returns a block of code in Markdown, whatever its content."""
  runs = re.findall(r"`+", text)
  fence = "`" * max(3, 1 + max(map(len, runs), default=0))
  return f"{fence}{language}\n{text}\n{fence}"


def number(value: float | None, digits: int = 2) -> str:
  """Returns e.g. "78.06" or "−0.50"; a dash for None."""
  if value is None:
    return NONE
  return f"{value:.{digits}f}".replace("-", MINUS)


def difference(value: float | None, digits: int = 2) -> str:
  """Returns e.g. "+1.82"; a dash for None."""
  if value is None:
    return NONE
  # No "-0.00".
  value = round(value, digits) + 0.0
  return f"{value:+.{digits}f}".replace("-", MINUS)


def interval(low: float, high: float, digits: int = 2) -> str:
  """Returns e.g. "[77.10, 78.90]"."""
  return f"[{number(low, digits)}, {number(high, digits)}]"


def p_value(p: float, drawn: bool = False) -> str:
  """Returns e.g. "0.012", "1.3e−08", or "≤ 0.001".

  Args:
    p: the p-value.
    drawn: whether it is of a bootstrap, which has a least one, about 0.001.
  """
  if drawn and p <= 0.001:
    return "≤ 0.001"
  return f"{p:.3f}" if p >= 0.001 else f"{p:.1e}".replace("-", MINUS)


def duration(seconds: float | None) -> str:
  """Returns e.g. "2 h 05 min", "3 min 20 s", "12 s"; a dash for None."""
  if seconds is None:
    return NONE
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours} h {minutes:02} min"
  return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def pairs(items: Mapping[str, str]) -> str:
  """Returns e.g. "classifier=NAME;restorer=NAME"."""
  return ";".join(f"{role}={name}" for role, name in items.items())
