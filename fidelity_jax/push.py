"""`fidelity_jax push`: see `hub.push`."""

import argparse

from fidelity_jax import boundary


def main(arguments: list[str] | None = None) -> int:
  """Runs the command line; returns the exit status."""
  parser = boundary.Parser(
    prog="fidelity_jax push",
    description="Upload a run or an export to Hugging Face's hub.",
  )
  parser.add_argument(
    "run", metavar="RUN", help="an exported file or directory, or a run"
  )
  parser.add_argument("address", metavar="hf:OWNER/NAME[@BRANCH]")
  parser.add_argument("--private", action="store_true", help="to a private one alone")
  parser.add_argument(
    "--license", default="unknown", help="of a run's weights (default: unknown)"
  )
  return boundary.run(lambda: _push(parser.parse_args(arguments)))


def _push(args: argparse.Namespace) -> None:
  # JAX takes seconds to import.
  from fidelity_jax import hub, platform, signals

  signals.interrupt("while it spoke to the hub", "no directory is half written")
  platform.set_up()
  print(hub.push(args.run, args.address, args.private, args.license))


if __name__ == "__main__":
  boundary.start()
  boundary.leave(main())
