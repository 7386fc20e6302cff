"""One-time set-up for command lines."""

import warnings

from absl import logging


def set_up() -> None:
  """Quiets libraries, whose messages would drown what the user wants to read."""
  logging.set_verbosity(logging.ERROR)
  warnings.filterwarnings("ignore", module="orbax|tensorstore|flax|grain")
