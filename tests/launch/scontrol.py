"""A stand-in for scontrol, squeue and scancel: records its arguments."""

import json
import os
import pathlib
import sys

with open(pathlib.Path(os.environ["STANDIN"]) / "calls.jsonl", "a") as file:
  file.write(json.dumps({"slurm": sys.argv[1:]}) + "\n")
