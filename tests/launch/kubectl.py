"""A stand-in for kubectl: records its arguments and standard input."""

import json
import os
import pathlib
import sys

text = sys.stdin.read() if "--filename=-" in sys.argv else ""
with open(pathlib.Path(os.environ["STANDIN"]) / "calls.jsonl", "a") as file:
  file.write(json.dumps({"kubectl": sys.argv[1:], "text": text}) + "\n")
