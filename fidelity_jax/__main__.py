"""`python -m fidelity_jax COMMAND ...`, the same as `fidelity_jax COMMAND ...`."""

from fidelity_jax import cli

cli.run()
