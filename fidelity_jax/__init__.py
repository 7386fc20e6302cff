"""Classify degraded images by steering frozen CNNs with a fidelity map.

model = fidelity_jax.load("runs/demo/pretrained")
result = model("photo.jpg")
print(result.top(3))
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from fidelity_jax.inference import Model, Result, load

__all__ = ["Model", "Result", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
  # JAX takes seconds to import, which commands that only print should not wait for.
  if name not in __all__:
    raise AttributeError(f"module 'fidelity_jax' has no attribute {name!r}")
  from fidelity_jax import inference

  return getattr(inference, name)
