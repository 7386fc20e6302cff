"""Commands on the launchers' pages are accepted, by launch/run and by gcloud."""

import re
import shlex

import pytest
from conftest import ROOT
from launching import StandIns, here, launch, printed

PAGES = sorted((ROOT / "docs").glob("launch*.md"))


def _commands(page):
  """Returns the words of the commands in a page's blocks."""
  blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
  lines = "".join(blocks).replace("\\\n", " ").splitlines()
  return [shlex.split(line) for line in lines if line.strip()]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_are_accepted(page, tmp_path):
  standins = StandIns(tmp_path)
  seen = 0
  for words in _commands(page):
    if words[0] == "launch/run" and words[1] != "NAME":
      assert printed(here(words[1], "--dry_run", *words[2:]))
    elif words[0] == "gcloud":
      program = [str(tmp_path / "bin" / "gcloud")]
      launch(*words[1:], program=program, env=standins.environment)
    elif words[0] == "sbatch":
      _, *flags, script, _, _ = words
      assert (ROOT / script).exists()
      assert {flag.partition("=")[0] for flag in flags} == {
        "--nodes",
        "--ntasks-per-node",
        "--gpus-per-node",
      }
    else:
      assert words[0] in ("launch/run", "launch/setup.sh", "docker")
      continue
    seen += 1
  assert seen or page.name == "launch-container.md"
