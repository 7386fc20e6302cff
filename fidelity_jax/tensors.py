"""What is made of a batch of test images, each thing once for all methods.

Networks of one structure share a compiled program, whatever their weights.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fidelity_jax import (
  assembly,
  degradations,
  fidelity,
  platform,
  quality,
  randomness,
  sharding,
  stages,
  tasks,
)
from fidelity_jax.method import Method
from fidelity_jax.subjects import Given, Subject

PyTree = Any


class _Part(NamedTuple):
  """A network of a finished stage, or of a checkpoint.

  Attributes:
    of: name of the stage that trained it, or the checkpoint's digest.
    network: the module.
    variables: its variables, on the devices.
  """

  of: str
  network: Any
  variables: PyTree


class Networks:
  """The networks of finished stages and of checkpoints, each loaded once."""

  def __init__(self, num_classes: int, layout: sharding.Layout):
    self._load = assembly.Loader(num_classes, layout)
    self._layout = layout
    self._parts: dict[tuple[str, str], _Part] = {}

  def of(self, subject: Subject) -> dict[str, _Part]:
    """Returns a subject's networks by role; end-to-end, the estimator with them."""
    found, behind = {}, subject.stages
    if subject.given is not None:
      return {role: self._given(subject.given, role) for role in subject.given.parts}
    calibration = behind.get("calibration")
    if calibration and calibration.config.fidelity.source == "end_to_end":
      # The one that was trained along, not the one that it started from.
      behind = behind | {"estimator": calibration}
    for role in ("classifier", "restorer", "estimator", "calibration", "ensemble"):
      if stage := behind.get(role):
        found[role] = self._part(stage, role)
    return found

  def _given(self, given: Given, role: str) -> _Part:
    if (given.digest, role) not in self._parts:
      network, variables = given.parts[role]
      variables = self._layout.place({role: variables})[role]
      self._parts[given.digest, role] = _Part(given.digest, network, variables)
    return self._parts[given.digest, role]

  def _part(self, stage: stages.Stage, role: str) -> _Part:
    if (stage.name, role) not in self._parts:
      network, variables = self._load(stage)
      if isinstance(network, Method):
        network, variables = getattr(network, role), variables[role]
      self._parts[stage.name, role] = _Part(stage.name, network, variables)
    return self._parts[stage.name, role]


@functools.cache
def _compiled(function: Callable, *static: Any) -> Callable:
  """Returns a function compiled with its first arguments fixed.

  Networks are compared by structure: those of one share a program.
  """
  bound = functools.partial(function, *static)
  options = platform.compiler_options()
  return platform.in_turn(jax.jit(bound, compiler_options=options))


def _restore(restorer, variables, degraded):
  return restorer.apply(variables, degraded, method="restore")


def _estimate(estimator, variables, images):
  return estimator.apply(variables, images)


def _plain(method: Method, variables, images):
  return method.plain(variables, images)


def _calibrated(method: Method, variables, restored, fidelity_map):
  confidence = fidelity.confidence(fidelity_map, method.map_name)
  return method.calibrated(variables, restored, confidence)


def _ensemble(ensemble, map_name, variables, calibrated, plain, fidelity_map):
  confidence = fidelity.confidence(fidelity_map, map_name)
  return ensemble.apply(variables, calibrated, plain, confidence)


def _classify(method: Method, variables, features):
  return method.classify(variables, features)


def _answers(keep: bool, logits, label):
  own = jnp.take_along_axis(logits, label[:, None], 1)
  # Of equal logits the first counts, as in argmax.
  before = jnp.arange(logits.shape[1]) < label[:, None]
  rank = jnp.sum((logits > own) | ((logits == own) & before), -1, dtype=jnp.int32)
  # Logits that are not finite are no answer.
  finite = jnp.all(jnp.isfinite(logits), -1)
  values = {
    "prediction": jnp.argmax(logits, -1).astype(jnp.int32),
    "rank": jnp.where(finite, rank, logits.shape[1]),
    "confidence": jnp.where(finite, jnp.max(jax.nn.softmax(logits), -1), 0.0),
  }
  return values | ({"logits": logits} if keep else {})


def _restoration(images, clean):
  return {"psnr": tasks.base.psnr(images, clean), "ssim": quality.ssim(images, clean)}


def _estimation(map_name, fidelity_map, restored, clean):
  true = fidelity.oracle_map(restored, clean, map_name)
  # A high similarity is a small error.
  expected = 1 - fidelity_map if map_name == "cosine" else fidelity_map
  return {
    "error": jnp.mean(jnp.abs(fidelity_map - true), axis=(1, 2, 3)),
    "ause": quality.ause(expected, jnp.abs(restored - clean)),
  }


@jax.jit
def _degrade(degradation, key, batch, round_):
  clean = batch["image"].astype(jnp.float32) / 255
  keys = randomness.example_keys(key, round_, batch["index"])
  return degradation(keys, clean), clean


class Tensors:
  """What is made of one degraded batch, each thing once."""

  def __init__(
    self,
    networks: Networks,
    seed: int,
    condition: degradations.Condition,
    batch: dict[str, jax.Array],
    round_: int,
  ):
    """Degrades a batch.

    Args:
      networks: gives networks.
      seed: of the noise.
      condition: what is done to the images.
      batch: "image" uint8 [N, H, W, 3], "index" and "label" int32 [N].
      round_: number of the draw.
    """
    self._networks, self._label = networks, batch["label"]
    key = randomness.purpose_key(seed, f"evaluation/{condition.name}")
    made = _degrade(condition.degradation, key, batch, jnp.int32(round_))
    self.degraded, self.clean = made
    self._made: dict[tuple, Any] = {}

  def _once(self, key: tuple, make: Callable[[], Any]) -> Any:
    if key not in self._made:
      self._made[key] = make()
    return self._made[key]

  def _outputs(self, subject: Subject) -> dict[str, np.ndarray] | None:
    """Returns what the program gives that the subject is of, None if it is of none."""
    given = subject.given
    if given is None or given.program is None:
      return None
    # It runs where it can: on one device, or outside of JAX.
    run = lambda: given.program(np.asarray(self.degraded), np.asarray(self.clean))
    return self._once(("program", given.digest), run)

  def images(self, subject: Subject) -> jax.Array:
    """Returns what the subject sees, float32 [N, H, W, 3] in [0, 1]."""
    if not subject.compared.restored:
      return self.degraded
    if (outputs := self._outputs(subject)) is not None:
      return outputs["restored"]
    restorer = self._networks.of(subject)["restorer"]
    restore = _compiled(_restore, restorer.network)
    make = lambda: restore(restorer.variables, self.degraded)
    return self._once(("restored", restorer.of), make)

  def fidelity_map(self, subject: Subject) -> jax.Array:
    """Returns the subject's map, float32 [N, H, W, C]."""
    if (outputs := self._outputs(subject)) is not None:
      return outputs["fidelity_map"]
    parts, config = self._networks.of(subject), subject.config.fidelity
    restored = self.images(subject)
    if config.source == "oracle":
      oracle = lambda: _oracle(config.map, restored, self.clean)
      return self._once(("oracle", config.map, parts["restorer"].of), oracle)
    estimator = parts["estimator"]
    seen = restored if config.estimator_input == "restored" else self.degraded
    estimate = _compiled(_estimate, estimator.network)
    key = ("map", estimator.of, config.estimator_input, parts["restorer"].of)
    return self._once(key, lambda: estimate(estimator.variables, seen))

  def features(self, subject: Subject) -> jax.Array:
    """Returns what the subject gives the classifier's head, [N, F]; not of programs."""
    compared, parts = subject.compared, self._networks.of(subject)
    images = self.images(subject)
    classifier = parts["classifier"]
    variables = {"classifier": classifier.variables}
    alone = Method(classifier.network, None)
    seen = parts["restorer"].of if compared.restored else None
    plain = lambda: self._once(
      ("plain", classifier.of, seen),
      lambda: _compiled(_plain, alone)(variables, images),
    )
    if compared.method == "classifier":
      return plain()
    fidelity_map, name = self.fidelity_map(subject), subject.config.fidelity.map
    calibration = parts["calibration"]
    steered = dataclasses.replace(alone, calibration=calibration.network, map_name=name)
    both = variables | {"calibration": calibration.variables}
    calibrated = self._once(
      ("calibrated", calibration.of),
      lambda: _compiled(_calibrated, steered)(both, images, fidelity_map),
    )
    if not compared.ensemble:
      return calibrated
    ensemble = parts["ensemble"]
    combine = _compiled(_ensemble, ensemble.network, name)
    return combine(ensemble.variables, calibrated, plain(), fidelity_map)

  def logits(self, subject: Subject) -> jax.Array:
    """Returns what a subject that classifies says, float32 [N, K]."""
    if (outputs := self._outputs(subject)) is not None:
      return outputs["logits"]
    classifier = self._networks.of(subject)["classifier"]
    classify = _compiled(_classify, Method(classifier.network, None))
    return classify({"classifier": classifier.variables}, self.features(subject))

  def values(self, subject: Subject, keep: bool = False) -> dict[str, jax.Array]:
    """Returns what is measured of the subject, arrays [N] by name.

    Args:
      subject: the subject.
      keep: of a classification, with "logits" [N, K].
    """
    if subject.compared.method == "restoration":
      return _compiled(_restoration)(self.images(subject), self.clean)
    if subject.compared.method == "estimation":
      measure = _compiled(_estimation, subject.config.fidelity.map)
      fidelity_map = self.fidelity_map(subject)
      return measure(fidelity_map, self.images(subject), self.clean)
    return _compiled(_answers, keep)(self.logits(subject), self._label)


@functools.partial(jax.jit, static_argnums=0)
def _oracle(map_name, restored, clean):
  return fidelity.oracle_map(restored, clean, map_name)
