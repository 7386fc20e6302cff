"""A stand-in for srun: starts the processes of all nodes here, for real.

The variables are those that JAX and users read, of
https://slurm.schedmd.com/srun.html#SECTION_OUTPUT-ENVIRONMENT-VARIABLES. Every node is
called localhost; a job of several has its processes numbered as SLURM numbers them.
"""

import os
import signal
import subprocess
import sys
import time

each = int(os.environ["SLURM_NTASKS_PER_NODE"])
count = each * int(os.environ["SLURM_NODES"])
words = sys.argv[1:]
# A cluster may have set 1 for jobs that say nothing.
kill = "--kill-on-bad-exit=0" not in words
while words[0].startswith("--"):
  if words.pop(0) not in ("--kill-on-bad-exit=0", "--label"):
    sys.exit("srun: no such option")
tasks = []
for rank in range(count):
  own = {
    "SLURM_NTASKS": count,
    "SLURM_PROCID": rank,
    "SLURM_LOCALID": rank % each,
    "SLURM_NODEID": rank // each,
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_STEP_NUM_NODES": os.environ["SLURM_NODES"],
  }
  own = os.environ | {name: str(value) for name, value in own.items()}
  tasks.append(subprocess.Popen(words, env=own))


def forward(number, frame):
  """Passes a signal on."""
  for task in tasks:
    task.send_signal(number)


signal.signal(signal.SIGTERM, forward)
while any(task.poll() is None for task in tasks):
  if kill and any(task.poll() for task in tasks):
    for task in tasks:
      task.kill()
  time.sleep(0.05)
codes = [task.returncode for task in tasks]
sys.exit(max(128 - code if code < 0 else code for code in codes))
