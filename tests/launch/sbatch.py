"""A stand-in for sbatch: runs the script here and at once, with SLURM's variables."""

import os
import sys

KNOWN = (
  "--account --cpus-per-task --gpus-per-node --job-name --mem --nodes "
  "--ntasks-per-node --partition --time"
).split()
environment, words = dict(os.environ), sys.argv[1:]
while words[0].startswith("--"):
  name, _, value = words.pop(0).partition("=")
  if name not in KNOWN:
    sys.exit(f"sbatch: no such option: {name}")
  environment[f"SLURM_{name[2:].upper().replace('-', '_')}"] = value
environment["SLURM_JOB_ID"] = "4321"
os.execvpe("bash", ["bash", *words], environment)
