"""Google Kubernetes Engine: a JobSet of one pod per node of a TPU slice or of GPUs."""

import argparse
import dataclasses
import json
import math
import pathlib
import re
import string

from fidelity_jax import errors
from launch import commands
from launch.commands import ROOT, Launcher, Shell

_PLACE = pathlib.Path(__file__).parent
# https://github.com/kubernetes-sigs/jobset/releases
_JOBSET = "v0.11.1"
_PORT = 8476
# Of v5e and v6e, in nodes of 4 chips.
_TOPOLOGIES = "2x2 2x4 4x4 4x8 8x8 8x16 16x16".split()


@dataclasses.dataclass(frozen=True)
class Nodes:
  """A kind of node.

  Attributes:
    machine: machine type.
    variant: of the container image.
    label: value of the node label that names the accelerator.
    chips: accelerators per node.
  """

  machine: str
  variant: str
  label: str = ""
  chips: int = 0


# https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus and
# https://cloud.google.com/compute/docs/gpus, read on 2026-11-27.
NODES = {
  "v5e": Nodes("ct5lp-hightpu-4t", "tpu", "tpu-v5-lite-podslice", 4),
  "v6e": Nodes("ct6e-standard-4t", "tpu", "tpu-v6e-slice", 4),
  "h100": Nodes("a3-highgpu-8g", "cuda", "nvidia-h100-80gb", 8),
  "h200": Nodes("a3-ultragpu-8g", "cuda", "nvidia-h200-141gb", 8),
  # To try all of it for little.
  "cpu": Nodes("e2-standard-8", "cpu"),
}


def _options(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--name", default="fidelity-jax", help="%(default)s")
  parser.add_argument("--cluster", default="fidelity-jax", help="%(default)s")
  parser.add_argument("--project", required=True, help="such as my-project")
  parser.add_argument(
    "--zone", type=commands.zone, required=True, help="such as us-east5-b"
  )
  parser.add_argument(
    "--accelerator", default="v5e", help=f"{' '.join(NODES)} (%(default)s)"
  )
  parser.add_argument("--topology", default="4x4", help="TPU chips (%(default)s)")
  parser.add_argument(
    "--nodes", type=commands.positive, help="how many, if not TPU's (2)"
  )
  parser.add_argument("--image", help="container image; one in the project's registry")
  parser.add_argument("--spot", action="store_true", help="cheaper, and preempted")
  parser.add_argument(
    "--restarts",
    type=commands.natural,
    default=20,
    help="how often to start anew after a failure or a preemption (%(default)s)",
  )
  parser.add_argument(
    "--root", action="store_true", help="TPU pods run as root (docs/launch-gke.md)"
  )
  parser.add_argument(
    "--to", default="fetched", help="where fetch writes (%(default)s)"
  )


def _check(options: argparse.Namespace, arguments: list[str]) -> None:
  """Looks at the options, and sets what follows from them.

  Raises:
    UsageError: a name, kind of node or topology that cannot be.
  """
  errors.check_choice("accelerator", options.accelerator, NODES)
  for name in ("name", "cluster"):
    # Names of pods, made from these, have to be names of hosts.
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", getattr(options, name)):
      raise errors.UsageError(
        f"--{name}={getattr(options, name)}: small letters, digits and - only, at most "
        "40, a letter first."
      )
  kind = NODES[options.accelerator]
  if kind.variant == "tpu":
    if options.nodes:
      raise errors.UsageError("--nodes: a TPU slice has those of its --topology.")
    errors.check_choice("topology", options.topology, _TOPOLOGIES)
    chips = math.prod(map(int, options.topology.split("x")))
    options.nodes = chips // kind.chips
  options.nodes = options.nodes or 2
  region = options.zone.rpartition("-")[0]
  options.image = options.image or (
    f"{region}-docker.pkg.dev/{options.project}/fidelity-jax/{kind.variant}:latest"
  )
  place = commands.workdir(arguments)
  if "run" in options.steps and not place.startswith("gs://"):
    raise errors.UsageError(
      f"--workdir={place}: pods leave nothing behind; use --workdir=gs://BUCKET/DIR."
    )
  if "fetch" in options.steps:
    commands.check_fetch(arguments, bucket=True)


def manifest(options: argparse.Namespace, arguments: list[str]) -> str:
  """Returns the JobSet, as YAML.

  Args:
    options: as checked.
    arguments: of main.
  """
  kind = NODES[options.accelerator]
  select, environment, limits, security = {}, [], {}, {}
  if kind.variant == "tpu":
    # JAX finds the others by what GKE tells each pod of a slice.
    select["cloud.google.com/gke-tpu-accelerator"] = kind.label
    select["cloud.google.com/gke-tpu-topology"] = options.topology
    limits["google.com/tpu"] = kind.chips
    if options.root:
      security = {"runAsUser": 0, "runAsNonRoot": False}
  else:
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    address = f"{options.name}-workers-0-0.{options.name}:{_PORT}"
    environment = [
      {"name": "JAX_COORDINATOR_ADDRESS", "value": address},
      {"name": "JAX_NUM_PROCESSES", "value": str(options.nodes)},
      {"name": "JAX_PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": index}}},
    ]
    select["cloud.google.com/gke-nodepool"] = options.name
    if kind.label:
      select["cloud.google.com/gke-accelerator"] = kind.label
      limits["nvidia.com/gpu"] = kind.chips
  if options.spot:
    select["cloud.google.com/gke-spot"] = "true"
  template = string.Template((_PLACE / "gke" / "jobset.yaml").read_text())
  # JSON is YAML, whatever is in the words.
  return template.substitute(
    name=options.name,
    nodes=options.nodes,
    restarts=options.restarts,
    port=_PORT,
    select=json.dumps(select),
    image=json.dumps(options.image),
    command=json.dumps(["python", "-m", options.module]),
    arguments=json.dumps(arguments),
    environment=json.dumps(environment),
    limits=json.dumps(limits),
    security=json.dumps({"runAsNonRoot": True, "runAsUser": 10001} | security),
  )


def _gcloud(options: argparse.Namespace, *words: str) -> list[str]:
  return ["gcloud", *words, f"--project={options.project}", "--quiet"]


def _kubectl(options: argparse.Namespace, *words: str) -> list[str]:
  """Returns a command on this cluster, whichever was used last."""
  context = f"gke_{options.project}_{options.zone}_{options.cluster}"
  return ["kubectl", f"--context={context}", *words]


def _on_jobs(options: argparse.Namespace, *words: str) -> list[str]:
  return _kubectl(options, "--namespace=default", *words)


def _make(
  options: argparse.Namespace, shell: Shell, *group: str, name: str, flags: list[str]
) -> None:
  """Makes a part of a cluster, unless it is there: `create` can be repeated."""
  where = [name, f"--location={options.zone}"]
  if group[-1] == "node-pools":
    where.append(f"--cluster={options.cluster}")
  look = _gcloud(options, *group, "describe", *where, "--format=value(name)")
  if shell.read(*look, dry=None) is None:
    shell.run(*_gcloud(options, *group, "create", *where, *flags))


def _create(options: argparse.Namespace, arguments: list[str], shell: Shell) -> None:
  """Makes a cluster with a small node for JobSet, and the nodes of the job."""
  kind = NODES[options.accelerator]
  pool = f"{options.project}.svc.id.goog"
  flags = ["--num-nodes=1", "--machine-type=e2-standard-4", f"--workload-pool={pool}"]
  flags.append("--release-channel=regular")
  _make(options, shell, "container", "clusters", name=options.cluster, flags=flags)
  flags = [f"--machine-type={kind.machine}", f"--num-nodes={options.nodes}"]
  flags.append("--workload-metadata=GKE_METADATA")
  if kind.variant == "tpu" and options.nodes > 1:
    flags.append(f"--tpu-topology={options.topology}")
  if kind.variant == "cuda":
    accelerator = f"type={kind.label},count={kind.chips},gpu-driver-version=latest"
    flags.append(f"--accelerator={accelerator}")
  flags += ["--spot"] * options.spot
  _make(options, shell, "container", "node-pools", name=options.name, flags=flags)
  words = ["container", "clusters", "get-credentials", options.cluster]
  shell.run(*_gcloud(options, *words, f"--location={options.zone}"))
  releases = "https://github.com/kubernetes-sigs/jobset/releases/download"
  source = f"--filename={releases}/{_JOBSET}/manifests.yaml"
  shell.run(*_kubectl(options, "apply", "--server-side", source))
  # JobSets are refused until what checks them is there.
  manager = "deployment/jobset-controller-manager"
  words = ["--namespace=jobset-system", "--for=condition=Available", manager]
  shell.run(*_kubectl(options, "wait", *words, "--timeout=300s"))


def _image(options: argparse.Namespace, arguments: list[str], shell: Shell) -> None:
  """Builds the container image in the cloud; needs no Docker here."""
  kind, region = NODES[options.accelerator], options.zone.rpartition("-")[0]
  words = ["artifacts", "repositories", "describe", "fidelity-jax"]
  if shell.read(*_gcloud(options, *words, f"--location={region}"), dry=None) is None:
    words[2] = "create"
    words += ["--repository-format=docker", f"--location={region}"]
    shell.run(*_gcloud(options, *words))
  values = f"--substitutions=_IMAGE={options.image},_VARIANT={kind.variant}"
  config = f"--config={_PLACE / 'container' / 'cloudbuild.yaml'}"
  # Only what the image is made of leaves this machine.
  ignored = f"--ignore-file={_PLACE / 'container' / 'gcloudignore'}"
  words = ["builds", "submit", str(ROOT), config, ignored, values]
  shell.run(*_gcloud(options, *words))


def _run(options: argparse.Namespace, arguments: list[str], shell: Shell) -> None:
  words = _on_jobs(options, "create", "--filename=-")
  if shell.status(*words, text=manifest(options, arguments)):
    raise errors.RunError(
      f"the job {options.name} was not made: what kubectl printed above says why. If "
      "there is one already, even one that ended, the step stop comes first."
    )
  print("it runs without this terminal; follow it with the step logs.", flush=True)


def _logs(options: argparse.Namespace, arguments: list[str], shell: Shell) -> None:
  pods = f"jobset.sigs.k8s.io/jobset-name={options.name}"
  first = "batch.kubernetes.io/job-completion-index=0"
  words = ["logs", "--follow", "--tail=-1", f"--selector={pods},{first}"]
  shell.run(*_on_jobs(options, *words))


def _show(options: argparse.Namespace, arguments: list[str], shell: Shell) -> None:
  shell.run(*_on_jobs(options, "get", f"jobset/{options.name}"))
  pods = f"--selector=jobset.sigs.k8s.io/jobset-name={options.name}"
  shell.run(*_on_jobs(options, "get", "pods", pods, "--output=wide"))


def _stop(options: argparse.Namespace, arguments: list[str], shell: Shell) -> None:
  # Pods get SIGTERM, and time to save, which is waited for.
  words = ["delete", f"jobset/{options.name}", "--ignore-not-found"]
  shell.run(*_on_jobs(options, *words, "--cascade=foreground"))


def _delete(options: argparse.Namespace, arguments: list[str], shell: Shell) -> None:
  words = ["container", "clusters", "delete", options.cluster]
  shell.run(*_gcloud(options, *words, f"--location={options.zone}"))


LAUNCHER = Launcher(
  about="A JobSet on Google Kubernetes Engine.",
  options=_options,
  steps={
    "create": _create,
    "image": _image,
    "run": _run,
    "logs": _logs,
    "status": _show,
    "fetch": commands.fetch,
    "stop": _stop,
    "delete": _delete,
  },
  default=("run",),
  check=_check,
  place=("cluster", "zone", "project"),
)
