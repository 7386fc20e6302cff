"""Networks as pure Linen modules: backbones with taps, heads, DnCNN, calibration."""

from fidelity_jax.models import dncnn, layers, registry, restorers
from fidelity_jax.models.backbone import Backbone, Family, Layout
from fidelity_jax.models.calibration import Calibration, Ensemble
from fidelity_jax.models.classifier import Classifier
from fidelity_jax.models.dncnn import DnCNN
from fidelity_jax.models.folding import fold
from fidelity_jax.models.registry import create
from fidelity_jax.models.restorer import Restorer
from fidelity_jax.models.transfer import transfer

__all__ = [
  "Backbone",
  "Calibration",
  "Classifier",
  "DnCNN",
  "Ensemble",
  "Family",
  "Layout",
  "Restorer",
  "create",
  "dncnn",
  "fold",
  "layers",
  "registry",
  "restorers",
  "transfer",
]
