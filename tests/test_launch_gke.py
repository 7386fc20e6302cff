"""launch/run gke: its JobSets against the schemas, its commands against stand-ins."""

import json
import pathlib

import jsonschema
import pytest
import yaml
from conftest import one_line
from launching import PLACE, StandIns, here, launch, nothing_installed, printed, refusal

GKE = ["gke", "--project=my-project", "--zone=us-east5-b"]
ARGUMENTS = ["--", "--config=configs/oracle.py:demo", "--workdir=gs://bucket/demo"]


@pytest.fixture
def standins(tmp_path):
  return StandIns(tmp_path)


def _manifest(*words, arguments=ARGUMENTS):
  """Returns the JobSet that a dry run prints."""
  text = here(*GKE, "--dry_run", *words, *arguments)
  text = text.split(" create --filename=-\n", 1)[1]
  return yaml.safe_load(text.rsplit("it runs without", 1)[0])


def _check(manifest):
  """Checks a JobSet against its own schema, and its jobs against Kubernetes'."""
  validate = pytest.importorskip("kubernetes_validate").validate
  schema = json.loads((PLACE / "jobset.schema.json").read_text())
  jsonschema.Draft202012Validator.check_schema(schema)
  jsonschema.validate(manifest, schema)
  for replicated in manifest["spec"]["replicatedJobs"]:
    job = {
      "apiVersion": "batch/v1",
      "kind": "Job",
      "metadata": {"name": f"{manifest['metadata']['name']}-{replicated['name']}-0"},
      "spec": replicated["template"]["spec"],
    }
    # What GKE's regular channel has, and a later version.
    for version in ("1.33", "1.36"):
      validate(job, version, strict=True)


def _pod(manifest):
  (job,) = manifest["spec"]["replicatedJobs"]
  return job["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize(
  "words", ["v5e", "v6e --spot", "h100 --spot", "h200", "cpu --spot"]
)
def test_manifests_are_valid(words):
  accelerator, *others = words.split()
  _check(_manifest(f"--accelerator={accelerator}", *others))


def test_the_schemas_refuse_what_is_wrong():
  # So that the tests above can fail.
  ValidationError = pytest.importorskip("kubernetes_validate").ValidationError
  manifest = _manifest()
  manifest["spec"]["failurePolicy"]["maxRestart"] = 3
  with pytest.raises(jsonschema.ValidationError, match="maxRestart"):
    _check(manifest)
  manifest = _manifest()
  _pod(manifest)["containers"][0]["arg"] = ["x"]
  with pytest.raises(ValidationError, match="arg"):
    _check(manifest)
  manifest = _manifest()
  _pod(manifest)["terminationGracePeriodSeconds"] = "long"
  with pytest.raises(ValidationError, match="long"):
    _check(manifest)


@pytest.mark.parametrize(
  "accelerator, label, topology, nodes",
  [
    ("v5e", "tpu-v5-lite-podslice", "2x4", 2),
    ("v5e", "tpu-v5-lite-podslice", "16x16", 64),
    ("v6e", "tpu-v6e-slice", "4x4", 4),
    ("v6e", "tpu-v6e-slice", "2x2", 1),
  ],
)
def test_a_tpu_slice_has_a_pod_per_node(accelerator, label, topology, nodes):
  manifest = _manifest(f"--accelerator={accelerator}", f"--topology={topology}")
  (job,) = manifest["spec"]["replicatedJobs"]
  assert job["template"]["spec"]["parallelism"] == nodes
  assert job["template"]["spec"]["completions"] == nodes
  assert _pod(manifest)["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": label,
    "cloud.google.com/gke-tpu-topology": topology,
  }
  (container,) = _pod(manifest)["containers"]
  assert container["resources"]["limits"] == {"google.com/tpu": 4}
  # JAX asks GKE's own variables.
  assert container["env"] == []
  assert container["image"].endswith("/my-project/fidelity-jax/tpu:latest")
  assert container["command"] == ["python", "-m", "fidelity_jax.main"]
  assert container["args"] == ARGUMENTS[1:]


def test_gpu_pods_are_told_how_to_meet():
  manifest = _manifest("--accelerator=h200", "--nodes=4", "--name=big", "--spot")
  pod = _pod(manifest)
  (container,) = pod["containers"]
  assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
  address, count, number = container["env"]
  # Pod 0 of job 0 of the workers, in the network of the JobSet's name.
  assert address["value"] == "big-workers-0-0.big:8476"
  assert {"containerPort": 8476} in container["ports"]
  assert manifest["spec"]["network"]["enableDNSHostnames"] is True
  assert (count["name"], count["value"]) == ("JAX_NUM_PROCESSES", "4")
  assert number["name"] == "JAX_PROCESS_ID"
  assert number["valueFrom"]["fieldRef"]["fieldPath"].endswith("completion-index']")
  assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"


def test_only_a_wrong_command_is_not_repeated():
  manifest = _manifest("--restarts=7")
  assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 7
  (rule,) = manifest["spec"]["failurePolicy"]["rules"]
  assert rule["action"] == "FailJobSet"
  assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
  (job,) = manifest["spec"]["replicatedJobs"]
  (rule,) = job["template"]["spec"]["podFailurePolicy"]["rules"]
  (container,) = _pod(manifest)["containers"]
  assert rule["onExitCodes"]["containerName"] == container["name"]
  assert rule["onExitCodes"]["values"] == [2]


def test_pods_are_no_root_unless_asked():
  assert _pod(_manifest())["securityContext"] == {
    "runAsNonRoot": True,
    "runAsUser": 10001,
  }
  manifest = _manifest("--root")
  _check(manifest)
  assert _pod(manifest)["securityContext"]["runAsUser"] == 0


def test_any_argument_arrives_as_it_is():
  odd = ["--workdir=gs://b/x", 'a "quoted": word', "$name", "- {x: 1}", "# no comment"]
  manifest = _manifest(arguments=["--", *odd])
  _check(manifest)
  assert _pod(manifest)["containers"][0]["args"] == odd


@pytest.mark.parametrize(
  "words, expected",
  [
    (["--accelerator=v6e"], {"tpu-topology": "4x4", "num-nodes": "4"}),
    (["--accelerator=v6e", "--topology=2x2"], {"num-nodes": "1"}),
    (
      ["--accelerator=h100", "--spot"],
      {
        "accelerator": "type=nvidia-h100-80gb,count=8,gpu-driver-version=latest",
        "num-nodes": "2",
        "spot": True,
      },
    ),
    (["--accelerator=cpu", "--nodes=3"], {"num-nodes": "3"}),
  ],
)
def test_nodes_are_those_that_are_asked_for(standins, words, expected):
  commands = printed(here(*GKE, "create", "--dry_run", *words))
  (pool,) = [line for line in commands if "node-pools create" in line]
  program = [str(standins.place / "bin" / "gcloud")]
  launch(*pool.split()[1:], program=program, env=standins.environment)
  (call,) = standins.calls()
  assert expected.items() <= call["flags"].items()
  given = {"accelerator", "spot", "tpu-topology"}
  assert given & set(call["flags"]) == given & set(expected)


def test_a_cluster_from_first_to_last(standins):
  env = standins.environment
  there = {f"container {kind} describe": [1] for kind in ("clusters", "node-pools")}
  standins.answer(there)
  done = launch(*GKE, "create", "image", "run", *ARGUMENTS, env=env)
  assert done.stdout.endswith(
    "What was made stays and costs until: launch/run gke delete "
    "--cluster=fidelity-jax --zone=us-east5-b --project=my-project\n"
  )
  last = ["logs", "status", "fetch", "stop", "delete", "--to=here"]
  done = launch(*GKE, *last, *ARGUMENTS, env=env, cwd=standins.place)
  assert "costs until" not in done.stdout
  calls = standins.calls()
  names = [call.get("command", "kubectl") for call in calls]
  assert names == [
    "container clusters describe",
    "container clusters create",
    "container node-pools describe",
    "container node-pools create",
    "container clusters get-credentials",
    "kubectl",
    "kubectl",
    "artifacts repositories describe",
    "builds submit",
    *["kubectl"] * 4,
    "storage rsync",
    "kubectl",
    "container clusters delete",
  ]
  # Whatever cluster was used last.
  context = "--context=gke_my-project_us-east5-b_fidelity-jax"
  commands = [call["kubectl"] for call in calls if "kubectl" in call]
  assert all(command[0] == context for command in commands)
  assert sum("--namespace=default" in command for command in commands) == 5
  # The pods' save is waited for.
  assert "--cascade=foreground" in commands[-1]
  applied = [call for call in calls if call.get("text")]
  assert len(applied) == 1
  _check(yaml.safe_load(applied[0]["text"]))


def test_a_registry_is_made_where_there_is_none(standins):
  standins.answer({"artifacts repositories describe": [1]})
  launch(*GKE, "image", "--accelerator=h100", env=standins.environment)
  _, create, build = standins.calls()
  assert create["command"] == "artifacts repositories create"
  assert create["flags"]["location"] == "us-east5"
  assert build["flags"]["substitutions"].endswith("/cuda:latest,_VARIANT=cuda")
  assert pathlib.Path(build["flags"]["ignore-file"]).exists()


def test_create_goes_on_where_it_ended(standins):
  pools = "container node-pools describe"
  standins.answer({pools: [1], "container node-pools create": [1]})
  done = launch(*GKE, "create", check=1, env=standins.environment)
  assert "container node-pools create" in one_line(done.stderr)
  assert "costs until: launch/run gke delete" in done.stdout
  standins.answer({pools: ["fidelity-jax"]})
  launch(*GKE, "create", env=standins.environment)
  names = [call.get("command") for call in standins.calls()]
  assert "container clusters create" not in names
  assert names[-3:] == ["container clusters get-credentials", None, None]


def test_a_job_that_is_there_already_is_no_new_one(standins):
  program = standins.place / "bin" / "kubectl"
  program.write_text("#!/bin/sh\necho AlreadyExists >&2\nexit 1\n")
  done = launch(*GKE, "run", *ARGUMENTS, check=1, env=standins.environment)
  assert "the step stop comes first" in done.stderr.splitlines()[-1]
  assert "it runs without" not in done.stdout


def test_a_dry_run_needs_neither_an_account_nor_tools():
  words = ["create", "image", "run", "logs", "status", "fetch", "stop", "delete"]
  done = launch(*GKE, *words, "--dry_run", *ARGUMENTS, env=nothing_installed())
  assert {line.split()[0] for line in printed(done)} == {"gcloud", "kubectl"}


@pytest.mark.parametrize(
  "words, said",
  [
    (["--accelerator=v7"], "unknown accelerator 'v7'"),
    (["--topology=4x4x4"], "unknown topology '4x4x4'"),
    (["--topology=3x4"], "unknown topology '3x4'"),
    (["--zone=us-east5"], "'us-east5' is no zone"),
    (["--nodes=3"], "has those of its --topology"),
    (["--name=Big_Job"], "small letters"),
    (["--", "--workdir=runs"], "pods leave nothing behind"),
    (["--", "--workdir=s3://bucket/demo"], "pods leave nothing behind"),
    (["fetch", "--", "--workdir=runs"], "fetch needs"),
  ],
)
def test_what_is_wrong_is_said_in_one_line(words, said):
  arguments = [] if "--" in words else ARGUMENTS
  step = [] if "fetch" in words else ["run"]
  assert said in refusal(*GKE, *step, *words, *arguments)
