"""Commands, fields and links in the documents exist."""

import ast
import functools
import importlib.util
import pathlib
import re

import pytest
from conftest import ROOT

CONFIGS = sorted({*(ROOT / "configs").glob("*.py")} - {ROOT / "configs" / "common.py"})
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


@functools.cache
def _config(path, size=""):
  spec = importlib.util.spec_from_file_location("config", ROOT / path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(size)


def _has(config, field):
  *path, last = field.split(".")
  for name in path:
    config = config[name]
  return last in config


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_fields_on_command_lines_exist(document):
  text = document.read_text().replace("\\\n", " ")
  for line in text.splitlines():
    named = re.search(r"--config=(configs/\w+\.py)(?::(\w+))?", line)
    # A field without a command is one of the method's, or of a study's.
    path, size = named.groups() if named else ("configs/table_5_1.py", None)
    config = _config(path, size or "")
    for field in re.findall(r"--config\.([a-z_.0-9]+)=", line):
      assert _has(config, field), f"{path}: {field}"


def test_the_table_of_fields_is_true():
  text = (ROOT / "docs" / "method.md").read_text()
  fields = re.findall(r"^\| `([a-z_.]+)` \|.*\|.*\|$", text, re.MULTILINE)
  configs = [_config(f"configs/{name}.py") for name in ("oracle", "end_to_end")]
  assert len(fields) > 15
  for config in configs:
    assert all(_has(config, field) for field in fields)
    assert {f"model.{name}" for name in config.model} <= set(fields)
    assert {f"ensemble.{n}" for n in config.ensemble} - set(fields) == {
      "ensemble.warmup_epochs"
    }


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
  for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
    if not target.startswith("http"):
      assert (document.parent / pathlib.Path(target)).exists(), target


def test_every_file_and_test_that_is_named_exists():
  tests = "\n".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
  # Tables and sentences name a module from within the package, or by its name alone.
  places = [ROOT / part for part in ("", "fidelity_jax", "configs", "tests")]
  for document in DOCUMENTS:
    text = document.read_text()
    named = re.findall(r"\b(?:\w+/)+\w+\.py\b|(?<=`)\w+\.py(?=`)", text)
    for path in named:
      exists = any((place / path).exists() for place in places)
      # Or the page itself has it.
      exists = exists or f"```python\n# {path}\n" in text
      assert exists, f"{document.name}: {path}"
    for name in re.findall(r"`(test_\w+)`", text):
      assert f"def {name}(" in tests, f"{document.name}: {name}"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_say_how_to_run_them_and_how_long_it_takes(path):
  said = " ".join(ast.get_docstring(ast.parse(path.read_text())).split())
  assert f"python -m fidelity_jax.main --config=configs/{path.name}" in said
  assert re.search("minutes|not run", said, re.IGNORECASE)
  assert "TIME_" not in said
