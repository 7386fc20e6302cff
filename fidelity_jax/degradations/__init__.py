"""Degradations of images on the device: pure functions of (key, image, level).

`from_config` turns data into a `Degradation` for batches; `conditions` lists what a
kind is evaluated under; `awgn` and its siblings degrade one image at a given level.
"""

from fidelity_jax.degradations.blur import gaussian_blur, motion_blur
from fidelity_jax.degradations.conditions import Condition, conditions
from fidelity_jax.degradations.crop import rectangular_crop
from fidelity_jax.degradations.degradation import Degradation
from fidelity_jax.degradations.kinds import KINDS
from fidelity_jax.degradations.noise import awgn, salt_and_pepper
from fidelity_jax.degradations.spec import Spec, from_config

__all__ = [
  "KINDS",
  "Condition",
  "Degradation",
  "Spec",
  "awgn",
  "conditions",
  "from_config",
  "gaussian_blur",
  "motion_blur",
  "rectangular_crop",
  "salt_and_pepper",
]
