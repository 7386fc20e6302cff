"""Runs the main command and ends it, by a real signal, at a chosen moment.

  python tests/killer.py SIGNAL MOMENT COUNT FLAG...

Moments, the COUNT-th of which is fatal: "step" (after a training step), "write" (inside
a checkpoint write, seen by its temporary directory), "validate" (in a validation),
"finish" (a stage is trained and not yet marked), "evaluate" (before a batch
is degraded).
"""

import os
import pathlib
import runpy
import signal
import sys
import threading

sys.path.insert(0, os.getcwd())

from fidelity_jax import evaluate, signals, stages, train


def main() -> None:
  """Runs the command, to be ended at the chosen moment."""
  number, moment, count = getattr(signal, sys.argv[1]), sys.argv[2], int(sys.argv[3])
  sys.argv = ["fidelity_jax.main", *sys.argv[4:]]
  left = [count]

  def reached() -> None:
    left[0] -= 1
    if left[0] == 0:
      os.kill(os.getpid(), number)

  def before(function):
    def wrapped(*args, **kwargs):
      reached()
      return function(*args, **kwargs)

    return wrapped

  if moment == "step":
    signals.received = before(signals.received)
  elif moment == "finish":
    stages.Stage.finish = before(stages.Stage.finish)
  elif moment == "validate":
    train.Trainer.validate = before(train.Trainer.validate)
  elif moment == "evaluate":
    evaluate.Tensors = before(evaluate.Tensors)
  elif moment == "write":
    (workdir,) = [a.split("=", 1)[1] for a in sys.argv if a.startswith("--workdir=")]
    threading.Thread(target=_watch, args=(workdir, reached), daemon=True).start()
  runpy.run_module("fidelity_jax.main", run_name="__main__", alter_sys=True)


def _watch(workdir: str, reached) -> None:
  seen = set()
  while True:
    for path in pathlib.Path(workdir).glob("*/checkpoints/*tmp*"):
      if path not in seen:
        seen.add(path)
        reached()


if __name__ == "__main__":
  main()
