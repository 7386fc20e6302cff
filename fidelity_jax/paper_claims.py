"""What the paper says of accuracies, with the rows that decide it.

See `claims` for what becomes of it; methods are called as `titles` calls them.
"""

import dataclasses

from fidelity_jax.models.calibration import MODULES


@dataclasses.dataclass(frozen=True)
class Part:
  """A method that is claimed to be ahead of another.

  Attributes:
    first: title of the one that is claimed to be ahead.
    second: title of the other.
    at: where: "clean", "degraded" (the mean over all uniform levels above clean),
      "mildest", "harshest" or "severe" (the mean over the two harshest of at least
      three, else the harshest). "each": that the first has more at each level than the
      second at the next one.
    less: the claim is that the difference is larger than it is there, None for 0.
    margin: how far behind it may be, percentage points.
    optional: whether the claim can be decided without it.
  """

  first: str
  second: str
  at: str
  less: str | None = None
  margin: float = 0.0
  optional: bool = False


@dataclasses.dataclass(frozen=True)
class Claim:
  """Something that the paper says of accuracies.

  Attributes:
    words: what.
    where: the paper's section or table.
    variants: the parts that it has, all of which must be so; if there are several
      tuples of them, the first that is measured counts.
    about: titles of methods one of which must be there for it to be worth telling that
      it is not measured.
  """

  words: str
  where: str
  variants: tuple[tuple[Part, ...], ...]
  about: tuple[str, ...]


def _classifier(trained_on: str, restored: bool) -> str:
  return f"trained on {trained_on}, {'with' if restored else 'without'} restoration"


def _proposed(source: str, ensemble: bool) -> str:
  return f"proposed, {source}, {'with' if ensemble else 'without'} ensemble"


_CLEAN, _CLEAN_RESTORED = (_classifier("clean", r) for r in (False, True))
_DEGRADED, _DEGRADED_RESTORED = (_classifier("degraded", r) for r in (False, True))
_RESTORED_NOT, _RESTORED = (_classifier("restored", r) for r in (False, True))
_ORACLE, _PRETRAINED = "oracle map", "pretrained estimator"
_END_TO_END = "end-to-end estimator"
_SOURCES = (_END_TO_END, _PRETRAINED, _ORACLE)
_METHOD = _proposed(_END_TO_END, True)
_MARGIN = 1.0


def _titles(*sources: str) -> tuple[str, ...]:
  return tuple(_proposed(s, ensemble) for s in sources for ensemble in (True, False))


def _setups() -> list[Claim]:
  """Returns the claims about classifiers alone."""
  setup1 = (_CLEAN, _CLEAN_RESTORED)
  setup2, setup3 = (_DEGRADED, _DEGRADED_RESTORED), (_RESTORED, _RESTORED_NOT)
  return [
    Claim(
      "The harsher the degradation, the lower the accuracy of every classifier.",
      "3.3, Figure 3.3",
      (tuple(Part(t, t, "each", optional=True) for t in (*setup1, *setup2, *setup3)),),
      (),
    ),
    Claim(
      "Restoration helps a classifier trained on clean images.",
      "3.3, Figure 3.3a",
      ((Part(_CLEAN_RESTORED, _CLEAN, "degraded"),),),
      (_CLEAN_RESTORED,),
    ),
    Claim(
      "Training on degraded images helps on degraded images.",
      "3.3, Figure 3.3b",
      ((Part(_DEGRADED, _CLEAN, "degraded"),),),
      setup2,
    ),
    Claim(
      "Restoration hurts a classifier trained on degraded images.",
      "3.3, Figure 3.3b",
      ((Part(_DEGRADED, _DEGRADED_RESTORED, "degraded"),),),
      setup2,
    ),
    Claim(
      "Restoration helps a classifier trained on restored images.",
      "3.3, Figure 3.3c",
      ((Part(_RESTORED, _RESTORED_NOT, "degraded"),),),
      setup3,
    ),
    Claim(
      "Restored images are better classified by a classifier trained on such.",
      "3.3, Figure 3.3c",
      ((Part(_RESTORED, _CLEAN_RESTORED, "degraded"),),),
      setup3,
    ),
  ]


def _ahead(first: str, second: str, margin: float = 0.0) -> tuple:
  """One source ahead of another, with ensembles if these are there, else without."""
  return tuple(
    (Part(_proposed(first, e), _proposed(second, e), "degraded", margin=margin),)
    for e in (True, False)
  )


def _method() -> list[Claim]:
  """Returns the claims about the method and the classifiers it competes with."""
  where = "5.2, Table 5.1"
  estimated = _titles(_END_TO_END, _PRETRAINED)
  # Besides the two without which it cannot be told who is best.
  rivals = (_CLEAN, _CLEAN_RESTORED, _DEGRADED_RESTORED, _RESTORED_NOT, *estimated)
  keeping = (*estimated, _CLEAN_RESTORED, _CLEAN)
  found = [
    Claim(
      f"The proposed method ({source}) is ahead of restoration alone on degraded "
      "images.",
      where,
      tuple((Part(t, _CLEAN_RESTORED, "degraded"),) for t in _titles(source)),
      _titles(source),
    )
    for source in _SOURCES
  ]
  found += [
    Claim(
      "The proposed method gains more over restoration alone at the harshest level "
      "than at the mildest.",
      where,
      tuple(
        (Part(t, _CLEAN_RESTORED, "harshest", less="mildest"),)
        for t in _titles(*_SOURCES)
      ),
      _titles(*_SOURCES),
    ),
    Claim(
      "With the oracle map the proposed method is the best of all on degraded images.",
      where,
      tuple(
        (
          Part(t, _DEGRADED, "degraded"),
          Part(t, _RESTORED, "degraded"),
          *(Part(t, rival, "degraded", optional=True) for rival in rivals),
        )
        for t in _titles(_ORACLE)
      ),
      _titles(_ORACLE),
    ),
    Claim(
      "The oracle map is ahead of the pretrained estimator.",
      where,
      _ahead(_ORACLE, _PRETRAINED),
      _titles(_PRETRAINED),
    ),
    Claim(
      "The oracle map is ahead of the end-to-end estimator.",
      where,
      _ahead(_ORACLE, _END_TO_END),
      _titles(_END_TO_END),
    ),
    Claim(
      "The end-to-end estimator is at least as good as the pretrained one (to within "
      f"{_MARGIN:g} point).",
      where,
      _ahead(_END_TO_END, _PRETRAINED, _MARGIN),
      _titles(_END_TO_END),
    ),
    Claim(
      "On slightly degraded images the proposed method is ahead of classifiers trained "
      "on degraded or restored images.",
      where,
      tuple(
        (Part(t, _DEGRADED, "mildest"), Part(t, _RESTORED, "mildest", optional=True))
        for t in estimated
      ),
      _titles(_END_TO_END),
    ),
    Claim(
      "At the harshest level training on degraded images is ahead of all that keeps "
      "the classifier trained on clean ones and needs no clean image.",
      where,
      tuple(
        (
          Part(_DEGRADED, t, "harshest"),
          *(Part(_DEGRADED, o, "harshest", optional=True) for o in keeping if o != t),
        )
        for t in _titles(_END_TO_END)
      ),
      _titles(_END_TO_END),
    ),
    Claim(
      "On clean images a classifier trained on degraded images is behind.",
      where,
      (
        (
          Part(_CLEAN, _DEGRADED, "clean"),
          Part(_METHOD, _DEGRADED, "clean", optional=True),
        ),
      ),
      (_DEGRADED,),
    ),
  ]
  for source in _SOURCES:
    with_it, without = _titles(source)
    found += [
      Claim(
        f"The ensemble ({source}) helps on clean and on slightly degraded images.",
        where,
        ((Part(with_it, without, "clean"), Part(with_it, without, "mildest")),),
        (with_it,),
      ),
      Claim(
        f"The ensemble ({source}) costs accuracy at the harshest level.",
        where,
        ((Part(without, with_it, "harshest"),),),
        (with_it,),
      ),
    ]
  return found


def _ablations() -> list[Claim]:
  """Returns the claims about the method's parts.

  The paper's are with the oracle map and without ensemble; with anything else they are
  decided if that is what was run.
  """
  bases = tuple(reversed(_titles(*_SOURCES)))
  without = lambda base, name: f"{base}, without {name.replace('_', ' ')}"
  every = lambda *endings: tuple(f"{b}, {e}" for b in bases for e in endings)
  maps = every("l2 map", "cosine map")
  resizes = every("bicubic resizing", "nearest resizing")
  modules = (*MODULES, "residual")
  ablated = tuple(without(base, name) for base in bases for name in modules)
  ahead = lambda at, *endings: tuple(
    tuple(Part(b, f"{b}, {ending}", at) for ending in endings) for b in bases
  )
  found = [
    Claim(
      "The l1 map is better than the l2 and the cosine map.",
      "6.1.1, Table 6.1",
      ahead("degraded", "l2 map", "cosine map"),
      maps,
    ),
    Claim(
      "Bilinear resizing is the best under severe degradation.",
      "6.1.2, Table 6.1",
      ahead("severe", "bicubic resizing", "nearest resizing"),
      resizes,
    ),
    Claim(
      "Nearest resizing is better than bilinear on clean images, bicubic on slightly "
      "degraded ones.",
      "6.1.2, Table 6.1",
      tuple(
        (
          Part(f"{b}, nearest resizing", b, "clean"),
          Part(f"{b}, bicubic resizing", b, "mildest"),
        )
        for b in bases
      ),
      resizes,
    ),
  ]
  for name in modules:
    words = "residual mechanism" if name == "residual" else name.replace("_", " ")
    parts = tuple((Part(b, without(b, name), "degraded"),) for b in bases)
    claim = f"The {words} contributes."
    found.append(Claim(claim, "6.2, Table 6.1", parts, ablated))
  return found


CLAIMS: tuple[Claim, ...] = (*_setups(), *_method(), *_ablations())
