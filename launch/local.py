"""Several processes on this machine, joined over loopback."""

import argparse
import contextlib
import ctypes
import os
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

from fidelity_jax import errors
from launch import commands
from launch.commands import ROOT, Launcher, Shell


def _options(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "--processes", type=commands.positive, default=2, help="how many (%(default)s)"
  )
  device = parser.add_mutually_exclusive_group()
  device.add_argument(
    "--devices",
    type=commands.positive,
    help="simulated CPU devices of each process; what JAX finds, if not given",
  )
  device.add_argument("--gpus", type=commands.positive, help="GPUs of each process")
  parser.add_argument(
    "--grace",
    type=commands.positive,
    default=30,
    help="seconds that the others have to end in when one failed (%(default)s)",
  )
  own = ROOT / ".venv" / "bin" / "python"
  parser.add_argument(
    "--python", default=str(own if own.exists() else sys.executable), help="%(default)s"
  )


def _check(options: argparse.Namespace, arguments: list[str]) -> None:
  """Looks at whether there are GPUs enough, where that is known.

  Raises:
    UsageError: there are not.
  """
  given = os.environ.get("CUDA_VISIBLE_DEVICES")
  if options.gpus and given is not None:
    needed, there = options.processes * options.gpus, len(_listed(given))
    if needed > there:
      raise errors.UsageError(
        f"--processes={options.processes} --gpus={options.gpus} are {needed} GPUs, but "
        f"CUDA_VISIBLE_DEVICES={given} lists {there}."
      )


def _listed(devices: str) -> list[str]:
  return [name.strip() for name in devices.split(",") if name.strip()]


def environments(options: argparse.Namespace, port: int) -> list[dict[str, str]]:
  """Returns the environment variables that each process is given besides ours.

  Args:
    options: `processes`, `devices`, `gpus`.
    port: of the coordinator, which is process 0.
  """
  made = []
  needed = options.processes * (options.gpus or 0)
  visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(needed))))
  for index in range(options.processes):
    variables = {
      "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
      "JAX_NUM_PROCESSES": str(options.processes),
      "JAX_PROCESS_ID": str(index),
    }
    if options.devices:
      flags = os.environ.get("XLA_FLAGS", "")
      count = f"--xla_force_host_platform_device_count={options.devices}"
      variables |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{flags} {count}".strip()}
    if options.gpus:
      first = index * options.gpus
      devices = _listed(visible)[first : first + options.gpus]
      variables["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    made.append(variables)
  return made


def shares(options: argparse.Namespace, cores: list[int]) -> list[list[int] | None]:
  """Returns the cores of each process.

  A process on CPU devices gets cores of its own if there is one for each of its
  devices. Where there are fewer, pinning would only take away threads.

  Args:
    options: `processes`, `devices`.
    cores: those that there are.

  Returns:
    Per process its cores, or None for all of them.
  """
  each = len(cores) // options.processes
  if not options.devices or each < options.devices:
    return [None] * options.processes
  return [cores[i * each : (i + 1) * each] for i in range(options.processes)]


def _free_port() -> int:
  with socket.socket() as listening:
    listening.bind(("127.0.0.1", 0))
    return listening.getsockname()[1]


def _run(options: argparse.Namespace, arguments: list[str], shell: Shell) -> None:
  words = [options.python, "-m", options.module, *arguments]
  made = environments(options, _free_port())
  for variables in made:
    settings = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
    print("+", *settings, shlex.join(words), flush=True)
  if not shell.dry_run:
    cores = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []
    with _started(words, made, shares(options, cores)) as processes:
      status = _Watch(processes, options.grace).status()
    if status:
      raise SystemExit(status)


@contextlib.contextmanager
def _started(
  words: list[str], made: list[dict[str, str]], cores: list[list[int] | None]
) -> Iterator[list[subprocess.Popen]]:
  """Starts the processes; none of them outlives the context.

  Raises:
    RunError: the program cannot be started.
  """
  processes: list[subprocess.Popen] = []
  try:
    for variables, own in zip(made, cores, strict=True):

      def prepare(own=own):
        if sys.platform == "linux":
          # PR_SET_PDEATHSIG: a launcher that is killed leaves nobody behind.
          ctypes.CDLL(None).prctl(1, signal.SIGTERM)
          if own:
            os.sched_setaffinity(0, own)

      processes.append(
        subprocess.Popen(
          words,
          env=os.environ | variables,
          stdin=subprocess.DEVNULL,
          stdout=subprocess.PIPE,
          stderr=subprocess.PIPE,
          # Ctrl-C reaches the launcher alone, which passes it on.
          start_new_session=True,
          preexec_fn=prepare,
        )
      )
    yield processes
  except OSError as error:
    if processes:
      raise
    raise errors.RunError(f"{words[0]} cannot be started: {error.strerror}.") from error
  finally:
    for process in processes:
      _kill(process)


def _kill(process: subprocess.Popen) -> None:
  """Kills a process and its workers, which share its group."""
  with contextlib.suppress(ProcessLookupError):
    os.killpg(process.pid, signal.SIGKILL)
  process.wait()


def _said(status: int) -> str:
  if status < 0:
    return f"was killed by {signal.Signals(-status).name}"
  return f"ended with status {status}"


class _Watch:
  """Passes signals on, shows the output, and ends all when one process failed."""

  def __init__(self, processes: list[subprocess.Popen], grace: int):
    self.processes = processes
    self.grace = grace
    self.asked = False
    self.selector = selectors.DefaultSelector()
    for index, process in enumerate(processes):
      prefix = f"[{index}] ".encode() if len(processes) > 1 else b""
      for pipe, target in ((process.stdout, 1), (process.stderr, 2)):
        self.selector.register(
          pipe, selectors.EVENT_READ, [prefix, target, bytearray()]
        )
    for number in (signal.SIGINT, signal.SIGTERM):
      signal.signal(number, lambda number, frame: self.signal(number))

  def signal(self, number: int) -> None:
    """Sends a signal to all that run."""
    self.asked = True
    for process in self.processes:
      if process.poll() is None:
        process.send_signal(number)

  def status(self) -> int:
    """Waits for all; returns the status of the first that failed, or 0."""
    first, until, ended = 0, None, set()
    while len(ended) < len(self.processes):
      self.show(0.1)
      for index, process in enumerate(self.processes):
        if index in ended or process.poll() is None:
          continue
        ended.add(index)
        status = process.returncode
        if status and not first:
          first = 128 - status if status < 0 else status
          self.say(f"process {index} {_said(status)}.")
          # Who was asked to stop already may still save, and a second signal would end
          # it at once.
          if len(ended) < len(self.processes) and not self.asked:
            self.say(f"the others have {self.grace} s to end.")
            self.signal(signal.SIGTERM)
            until = time.monotonic() + self.grace
        elif status:
          self.say(f"process {index} {_said(status)}.")
      if until is not None and time.monotonic() > until:
        late = [i for i in range(len(self.processes)) if i not in ended]
        self.say(f"killing {', '.join(f'process {i}' for i in late)}.")
        for index in late:
          _kill(self.processes[index])
        until = None
    # Workers that are left would hold the pipes open; then what is in them still.
    for process in self.processes:
      _kill(process)
    while self.show(0.1):
      pass
    for key in list(self.selector.get_map().values()):
      self.close(key)
    return first

  def say(self, text: str) -> None:
    """Tells the user."""
    print(f"fidelity_jax: {text}", file=sys.stderr, flush=True)

  def show(self, seconds: float) -> bool:
    """Shows whole lines that came; returns whether any output did."""
    if not self.selector.get_map():
      time.sleep(seconds)
      return False
    ready = self.selector.select(seconds)
    for key, _ in ready:
      chunk = os.read(key.fd, 1 << 16)
      if not chunk:
        self.close(key)
        continue
      prefix, target, held = key.data
      held += chunk
      *lines, rest = held.split(b"\n")
      held[:] = rest
      _write(target, b"".join(prefix + line + b"\n" for line in lines))
    return bool(ready)

  def close(self, key: selectors.SelectorKey) -> None:
    """Shows what is left of a stream that has ended."""
    prefix, target, held = key.data
    if held:
      _write(target, prefix + bytes(held) + b"\n")
    self.selector.unregister(key.fileobj)


def _write(target: int, data: bytes) -> None:
  # Whoever read it may be gone: the job goes on.
  with contextlib.suppress(OSError):
    while data:
      data = data[os.write(target, data) :]


LAUNCHER = Launcher(
  about="Several processes on this machine, joined over loopback.",
  options=_options,
  steps={"run": _run},
  default=("run",),
  check=_check,
)
