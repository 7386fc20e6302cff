"""Classify degraded images by steering frozen CNNs with a fidelity map."""

__version__ = "0.1.0"
