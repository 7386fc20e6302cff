"""The container image's recipe, which is read but not built, and all shell scripts."""

import importlib.metadata
import json
import re
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT
from launching import tool

FOLDER = ROOT / "launch" / "container"
SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / "launch" / "slurm.sbatch"]


def _instructions():
  """Returns the instructions of the Dockerfile, with their words."""
  text = (FOLDER / "Dockerfile").read_text()
  lines = [line for line in text.splitlines() if not line.startswith("#")]
  joined = "\n".join(lines).replace("\\\n", " ")
  return [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]


def test_it_runs_as_an_ordinary_user():
  names = [name for name, _ in _instructions()]
  users = [value for name, value in _instructions() if name == "USER"]
  # By number, so that Kubernetes can tell.
  assert users == ["10001:10001"]
  last = len(names) - 1 - names[::-1].index("RUN")
  assert names.index("USER") > last


def test_all_that_is_installed_is_pinned():
  commands = "; ".join(value for name, value in _instructions() if name == "RUN")
  installs = re.findall(r"pip install [^&;]+", commands)
  assert len(installs) == 2
  assert all("--constraint=constraints.txt" in command for command in installs)
  pinned = {
    re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower()
    for line in (ROOT / "constraints.txt").read_text().splitlines()
  }
  needed = {"jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda12-pjrt", "gcsfs"}
  assert needed <= pinned


def test_variants_are_extras_of_jax():
  (script,) = [value for name, value in _instructions() if "case" in value]
  extras = re.findall(r"jax\[(\w+)\]", script)
  assert sorted(extras) == ["cuda12", "tpu"]
  assert set(extras) <= set(
    importlib.metadata.metadata("jax").get_all("Provides-Extra")
  )


def test_what_is_copied_is_there_and_not_ignored():
  kept = {
    line[1:]
    for line in (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    if line.startswith("!")
  }
  copied = set()
  for name, value in _instructions():
    if name == "COPY":
      *sources, _ = value.split()
      copied |= set(sources)
  assert copied == kept
  assert all((ROOT / name).exists() for name in copied)


def test_the_cloud_is_sent_what_it_needs():
  lines = (FOLDER / "gcloudignore").read_text().splitlines()
  assert "/*" in lines
  sent = {line[2:] for line in lines if line.startswith("!/")}
  copied = {
    source
    for name, value in _instructions()
    if name == "COPY"
    for source in value.split()[:-1]
  }
  assert sent == copied | {"launch"}


def test_the_cloud_builds_the_same():
  build = yaml.safe_load((FOLDER / "cloudbuild.yaml").read_text())
  (step,) = build["steps"]
  (file,) = [arg for arg in step["args"] if arg.startswith("--file=")]
  assert (ROOT / file.partition("=")[2]).samefile(FOLDER / "Dockerfile")
  assert build["images"] == ["${_IMAGE}"]


def test_hadolint_finds_nothing():
  words = [tool("hadolint"), str(FOLDER / "Dockerfile")]
  done = subprocess.run(words, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
  words = [tool("shellcheck"), str(script)]
  done = subprocess.run(words, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout
  assert script.stat().st_mode & 0o111 or script.suffix == ".sbatch"


@pytest.mark.slow
@pytest.mark.parametrize("extra", ["cpu", "cuda12", "tpu"])
def test_every_variant_can_be_installed(extra, tmp_path):
  """All packages of a variant exist, in the versions that are pinned."""
  words = "-m pip install --dry-run --ignore-installed --quiet --report".split()
  report = tmp_path / "report.json"
  constraint = f"--constraint={ROOT / 'constraints.txt'}"
  done = subprocess.run(
    [sys.executable, *words, str(report), constraint, f"jax[{extra}]", "gcsfs"],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  pinned = (ROOT / "constraints.txt").read_text().lower().splitlines()
  names = {re.sub(r"[-_.]+", "-", line.partition("==")[0]) for line in pinned}
  for item in json.loads(report.read_text())["install"]:
    name = re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower()
    assert name in names, f"{name} is not pinned"
