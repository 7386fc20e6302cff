"""`python -m fidelity_jax.port CHECKPOINT --to=DIR`: converts a foreign checkpoint."""

import argparse

from fidelity_jax import boundary, locations


def main(arguments: list[str] | None = None) -> int:
  """Runs the command line; returns the exit status."""
  parser = boundary.Parser(
    prog="python -m fidelity_jax.port",
    description="Convert a PyTorch checkpoint into weights that configs can name.",
  )
  parser.add_argument(
    "checkpoint",
    metavar="CHECKPOINT",
    help="a .pth or .safetensors file, a name (torchvision/resnet50, "
    "efficientnet_lite0, ...), or hf:OWNER/NAME[/FILE][@REVISION] on Hugging Face's "
    "hub",
  )
  parser.add_argument("--to", required=True, metavar="DIR", help="directory to write")
  parser.add_argument(
    "--class_names", metavar="FILE", help="text file, one class name a line"
  )
  parser.add_argument(
    "--transform_input",
    choices=("true", "false"),
    default="true",
    help="whether a GoogLeNet re-scales its input, as torchvision's weights expect",
  )
  parser.add_argument(
    "--network",
    metavar="MODULE:CLASS",
    help="a network of your own that the weights are for, see docs/own_backbone.md",
  )
  parser.add_argument(
    "--image_size",
    type=int,
    metavar="N",
    help="side of the images that it is for, pixels, where its variables depend on it",
  )
  return boundary.run(lambda: _port(parser.parse_args(arguments)))


def _port(args: argparse.Namespace) -> None:
  # JAX takes seconds to import.
  import jax

  from fidelity_jax import errors, port, signals

  if args.image_size is not None and (args.image_size < 1 or not args.network):
    raise errors.UsageError(
      "--image_size is a number of pixels, and for a network of your own: give "
      "--network=MODULE:CLASS, too."
    )
  signals.interrupt("while it ported", "what was there is as it was")
  parts = port.load(
    args.checkpoint,
    args.class_names,
    args.transform_input == "true",
    {"name": args.network} if args.network else None,
    args.image_size,
  )
  port.save(parts, locations.expand(args.to, write=True), args.checkpoint)
  for name, part in parts.items():
    count = sum(leaf.size for leaf in jax.tree.leaves(part.variables))
    facts = {k: v for k, v in part.config.items() if k != "class_names"}
    print(f"{name}: {count:,} numbers, {facts}")
  print(f"written to {args.to}")


if __name__ == "__main__":
  boundary.start()
  boundary.leave(main())
