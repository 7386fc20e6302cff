"""The tutorial notebook: as it is committed, and executed anew."""

import ast
import re

import nbclient
import nbformat
import pytest
from conftest import ROOT

_PATH = ROOT / "docs" / "tutorial.ipynb"


@pytest.fixture
def notebook():
  return nbformat.read(_PATH, as_version=4)


def _code(notebook):
  return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _printed(notebook):
  """Returns what the cells print on standard output."""
  outputs = [output for cell in _code(notebook) for output in cell.outputs]
  return "".join(o.text for o in outputs if o.get("name") == "stdout")


def _pictures(notebook):
  """Returns how many pictures there are."""
  outputs = [output for cell in _code(notebook) for output in cell.outputs]
  return sum("image/jpeg" in output.get("data", {}) for output in outputs)


def _check(notebook):
  """Checks what the notebook says of its numbers and pictures."""
  text = _printed(notebook)

  def numbers(pattern):
    return [float(x) for x in re.search(pattern, text).groups()]

  noisy, restored = numbers(r"noisy tiles +([\d.]+) dB\n.*restored tiles +([\d.]+) dB")
  # Noise of sigma 0.4, clipped, and a denoiser that takes off most of it.
  assert 8 < noisy < 12 and restored > noisy + 6
  steep, other = numbers(r"steepest tenth of pixels ([\d.]+)\n.*other pixels +([\d.]+)")
  assert 0 < other < steep < 0.5
  clean, noisy, restored = numbers(
    r"clean +([\d.]+) %\nnoisy +([\d.]+) %\nrestored +([\d.]+) %"
  )
  assert 100 >= clean > 70 and restored > noisy + 15 and clean > restored
  lines = re.findall(r"^(on noisy|on restored|with the map) +([\d. ]+)$", text, re.M)
  curves = {name: [float(x) for x in line.split()] for name, line in lines}
  assert all(len(curve) == 5 for curve in curves.values()) and len(curves) == 3
  on_noisy, on_restored, with_map = curves.values()
  # From sigma 0.3 on, where the differences are larger than chance.
  for i in (2, 3, 4):
    assert on_noisy[i] < on_restored[i] < with_map[i] <= 100
  assert with_map[4] - on_restored[4] > 3 and on_restored[4] - on_noisy[4] > 15
  rescued, lost = numbers(r"(\d+) tiles rescued, (\d+) lost")
  assert rescued > lost > 0


def test_it_is_committed_as_it_was_executed(notebook):
  nbformat.validate(notebook)
  cells = _code(notebook)
  assert len(cells) >= 10
  for number, cell in enumerate(cells, 1):
    ast.parse(cell.source)
    assert cell.execution_count == number
    assert not cell.metadata
    # The first only imports and defines.
    assert cell.outputs or number == 1
    for output in cell.outputs:
      assert output.output_type != "error" and output.get("name") != "stderr"
  _check(notebook)
  assert _pictures(notebook) >= 8


def test_it_is_small_and_tells_nothing_of_a_machine(notebook):
  assert _PATH.stat().st_size < 1_000_000
  assert set(notebook.metadata) == {"kernelspec", "language_info"}
  text = "".join(cell.source for cell in notebook.cells) + _printed(notebook)
  assert not re.search(r"(^|[\s\"'(=])(/\w+/|~/|[A-Z]:\\)", text)
  assert not re.search(r"\d\d:\d\d:\d\d|20\d\d-\d\d", text)


@pytest.mark.slow
def test_executed_anew_it_says_the_same(notebook, tmp_path):
  """In an empty directory, training included."""
  for cell in _code(notebook):
    cell.outputs, cell.execution_count = [], None
  where = {"metadata": {"path": str(tmp_path)}}
  client = nbclient.NotebookClient(notebook, timeout=1800, resources=where)
  pictures = _pictures(nbformat.read(_PATH, as_version=4))
  client.execute()
  _check(notebook)
  assert _pictures(notebook) == pictures
  # What it trained is there.
  assert len(list((tmp_path / "runs" / "tutorial").glob("*/finished.json"))) == 3
