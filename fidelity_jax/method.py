"""From degraded image to logits (docs/method.md, section 1)."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from fidelity_jax import fidelity, models

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Method:
  """The proposed method's networks and how they are wired.

  Variables are passed to every call as a dictionary: "restorer", "classifier",
  "calibration", and where used "estimator" and "ensemble", each as its module's `init`
  returns it.

  Attributes:
    classifier: the frozen classifier, batch norm folded; None for restoration alone.
    restorer: the frozen restorer, batch norm folded; None for images as they are.
    calibration: the trainable modules, or None for the classifier as it is.
    ensemble: the ensemble module, or None for the calibrated feature alone.
    estimator: the fidelity map estimator, or None for the oracle map.
    map_name: "l1", "l2" or "cosine".
    estimator_input: "degraded" or "restored".
    rematerialize: recompute the estimator's activations in the backward pass instead
      of keeping them; saves memory in end-to-end training.
  """

  classifier: models.Classifier | None
  restorer: models.Restorer | None
  calibration: models.Calibration | None = None
  ensemble: models.Ensemble | None = None
  estimator: models.DnCNN | None = None
  map_name: str = "l1"
  estimator_input: str = "degraded"
  rematerialize: bool = False

  def restore(self, variables: PyTree, degraded: jax.Array) -> jax.Array:
    """Returns the restored image, float32 [N, H, W, 3] in [0, 1].

    No gradient flows into it.

    Args:
      variables: see the class.
      degraded: float32 [N, H, W, 3] in [0, 1].
    """
    restored = self.restorer.apply(variables["restorer"], degraded, method="restore")
    return jax.lax.stop_gradient(restored)

  def fidelity_map(
    self,
    variables: PyTree,
    degraded: jax.Array,
    restored: jax.Array,
    clean: jax.Array | None,
  ) -> jax.Array:
    """Returns the map m, float32 [N, H, W, 3] (cosine: 1 channel).

    Args:
      variables: see the class.
      degraded: float32 [N, H, W, 3] in [0, 1].
      restored: likewise.
      clean: likewise; used by the oracle map only.

    Raises:
      ValueError: no clean images for the oracle map.
    """
    if self.estimator is None:
      if clean is None:
        raise ValueError("the oracle map needs the clean images")
      return fidelity.oracle_map(restored, clean, self.map_name)
    seen = degraded if self.estimator_input == "degraded" else restored
    if self.rematerialize:
      params = variables["estimator"]["params"]
      return models.dncnn.apply_rematerialized(self.estimator, params, seen)
    return self.estimator.apply(variables["estimator"], seen)

  def calibrated(
    self, variables: PyTree, restored: jax.Array, confidence: jax.Array
  ) -> jax.Array:
    """Returns the calibrated feature h, [N, F].

    Args:
      variables: see the class.
      restored: float32 [N, H, W, 3] in [0, 1].
      confidence: f, float32 [N, H, W, 1].
    """
    calibrate = functools.partial(self.calibration.apply, variables["calibration"])
    sizes = self.classifier.tap_sizes(restored.shape[1:3])
    maps = calibrate(confidence, sizes, method="spatial_maps")
    features = self.classifier.apply(
      variables["classifier"],
      self.classifier.normalize(restored),
      tap=self.calibration.steer(maps),
      method="features",
    )
    return calibrate(features, confidence, method="channel")

  def plain(self, variables: PyTree, images: jax.Array) -> jax.Array:
    """Returns the frozen backbone's own feature of `images`, [N, F]."""
    images = self.classifier.normalize(images)
    return self.classifier.apply(variables["classifier"], images, method="features")

  def classify(self, variables: PyTree, features: jax.Array) -> jax.Array:
    """Returns the frozen head's logits, float32 [N, K]."""
    return self.classifier.apply(variables["classifier"], features, method="classify")

  def logits(
    self, variables: PyTree, degraded: jax.Array, clean: jax.Array | None = None
  ) -> jax.Array:
    """Returns the logits of the whole method, float32 [N, K].

    Args:
      variables: see the class.
      degraded: float32 [N, H, W, 3] in [0, 1].
      clean: likewise; used by the oracle map only.
    """
    restored = self.restore(variables, degraded)
    confidence = fidelity.confidence(
      self.fidelity_map(variables, degraded, restored, clean), self.map_name
    )
    plain = self.plain(variables, restored) if self.ensemble is not None else None
    features = self._steered(variables, restored, confidence, plain)
    return self.classify(variables, features)

  def _steered(
    self,
    variables: PyTree,
    restored: jax.Array,
    confidence: jax.Array,
    plain: jax.Array | None,
  ) -> jax.Array:
    """Returns the feature [N, F] that the whole method gives the head."""
    features = self.calibrated(variables, restored, confidence)
    if self.ensemble is None:
      return features
    return self.ensemble.apply(variables["ensemble"], features, plain, confidence)

  def outputs(
    self, variables: PyTree, degraded: jax.Array, clean: jax.Array | None = None
  ) -> dict[str, jax.Array]:
    """Returns all that the networks say of images, each thing computed once.

    Args:
      variables: see the class.
      degraded: float32 [N, H, W, 3] in [0, 1].
      clean: likewise; used by the oracle map only.

    Returns:
      What these networks have of: "restored", float32 [N, H, W, 3] in [0, 1];
      "fidelity_map", float32 [N, H, W, C]; "confidence", float32 [N, H, W, 1]; and
      float32 [N, K] "logits" of the whole method, "restored_logits" and
      "degraded_logits" of the frozen classifier on these images. Without calibration
      the logits are the classifier's, on what it is to see.
    """
    found, plain = {}, None
    if self.restorer is not None:
      found["restored"] = self.restore(variables, degraded)
    if self.calibration is not None or self.estimator is not None:
      shown = found["restored"]
      found["fidelity_map"] = self.fidelity_map(variables, degraded, shown, clean)
      found["confidence"] = fidelity.confidence(found["fidelity_map"], self.map_name)
    if self.classifier is None:
      return found
    for seen, images in (("degraded", degraded), ("restored", found.get("restored"))):
      if images is not None:
        plain = self.plain(variables, images)
        found["logits"] = self.classify(variables, plain)
        found[f"{seen}_logits"] = found["logits"]
    if self.calibration is not None:
      steered = self._steered(variables, found["restored"], found["confidence"], plain)
      found["logits"] = self.classify(variables, steered)
    return found

  @property
  def radius(self) -> dict[str, int]:
    """How many pixels away an image can be that an output pixel depends on.

    Of those `outputs` that have the images' size, by name; see `Restorer.radius`.
    """
    if self.restorer is None:
      return {}
    found = {"restored": self.restorer.radius}
    if self.calibration is not None or self.estimator is not None:
      of_map = 0 if self.estimator is None else self.estimator.radius
      if self.estimator is None or self.estimator_input == "restored":
        of_map += self.restorer.radius
      found |= {"fidelity_map": of_map, "confidence": of_map}
    return found

  def init_calibration(self, key: jax.Array, size: tuple[int, int]) -> PyTree:
    """Returns fresh calibration variables for images of `size` (H, W)."""
    confidence = jnp.zeros((1, *size, 1))
    features = jnp.zeros((1, self.classifier.feature_size))
    sizes = self.classifier.tap_sizes(size)
    return self.calibration.init(key, features, confidence, sizes)

  def init_ensemble(self, key: jax.Array) -> PyTree:
    """Returns fresh ensemble variables."""
    features = jnp.zeros((1, self.classifier.feature_size))
    return self.ensemble.init(key, features, features, jnp.zeros((1, 8, 8, 1)))
