"""Networks as pure Linen modules: backbones with taps, heads, DnCNN, calibration."""

from fidelity_jax.models.classifier import Classifier
from fidelity_jax.models.dncnn import DnCNN
from fidelity_jax.models.folding import fold
from fidelity_jax.models.registry import create

__all__ = ["Classifier", "DnCNN", "create", "fold"]
