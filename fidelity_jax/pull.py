"""`fidelity_jax pull`: see `hub.pull`."""

import argparse

from fidelity_jax import boundary


def main(arguments: list[str] | None = None) -> int:
  """Runs the command line; returns the exit status."""
  parser = boundary.Parser(
    prog="fidelity_jax pull", description="Download what was pushed, and check it."
  )
  parser.add_argument("address", metavar="hf:OWNER/NAME[@REVISION]")
  parser.add_argument("--to", required=True, metavar="DIR", help="a new directory")
  return boundary.run(lambda: _pull(parser.parse_args(arguments)))


def _pull(args: argparse.Namespace) -> None:
  # JAX takes seconds to import.
  from fidelity_jax import hub, platform, signals

  signals.interrupt("while it spoke to the hub", "no directory is half written")
  platform.set_up()
  for path in hub.pull(args.address, args.to):
    print(path)


if __name__ == "__main__":
  boundary.start()
  boundary.leave(main())
