"""What the paper claims, and what becomes of it here."""

import msgspec

from fidelity_jax import statistics


class Verdict(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
  """What becomes of one of the paper's claims.

  Attributes:
    claim: in words.
    where: the paper's section or table.
    verdict: "holds", "does not hold", "cannot be told" or "not measured".
    why: in a line, the numbers behind it, or what is not measured.
    paper: the paper's own difference, percentage points, None where it gives none.
    comparisons: what it is based on; the first decides.
  """

  claim: str
  where: str
  verdict: str
  why: str
  paper: float | None
  comparisons: list[statistics.Comparison]
