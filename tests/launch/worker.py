"""A process of a job, without JAX: says what it was given, waits, or fails.

Its arguments are what each process does, by number, the last for all that follow.
"""

import os
import signal
import sys
import time

NAMES = "JAX_PROCESS_ID SLURM_PROCID".split()
rank = next(int(os.environ[name]) for name in NAMES if name in os.environ)
task = sys.argv[1:][min(rank, len(sys.argv) - 2)]


def say(text):
  """Writes a line at once: several processes may have one standard output."""
  os.write(1, f"{text}\n".encode())


def leave(number, frame):
  """Ends as a command does that has saved; "slow" takes its time."""
  if task == "slow":
    time.sleep(1.2)
  say("saved")
  os._exit(128 + number)


# Before anything is said: who reads it may send signals.
signal.signal(signal.SIGTERM, signal.SIG_IGN if task == "deaf" else leave)
names = ("JAX_", "SLURM_", "SRUN_", "XLA_", "CUDA_VISIBLE")
for name in sorted(os.environ):
  if name.startswith(names):
    say(f"{name}={os.environ[name]}")
say(f"cores={len(os.sched_getaffinity(0))} pid={os.getpid()}")
print("not a whole line", end="", file=sys.stderr, flush=True)
if task in ("wait", "slow", "deaf"):
  print("", file=sys.stderr, flush=True)
  time.sleep(60)
  sys.exit("nobody stopped it")
if task.startswith("fail="):
  time.sleep(1.0)
  sys.exit(int(task.removeprefix("fail=")))
if task == "killed":
  time.sleep(1.0)
  os.kill(os.getpid(), signal.SIGKILL)
