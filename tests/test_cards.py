"""Cards say what was measured, and Hugging Face's own tools read them."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT, experiment, results

from fidelity_jax import cards, errors, export, exported, port, runs


@pytest.fixture(scope="module")
def exports(toy_run, tmp_path_factory):
  """A directory with the same run as a .jax file and as weights."""
  root = tmp_path_factory.mktemp("exports")
  export.export(experiment(toy_run), root / "toy.jax", licence="cc-by-4.0")
  export.export(experiment(toy_run), root / "weights")
  return root


def parts(text):
  _, metadata, body = text.split("---\n", 2)
  return yaml.safe_load(metadata), body


def test_the_card_has_the_measured_accuracies(exports, toy_run):
  metadata, body = parts((exports / "toy.jax.md").read_text())
  rows = json.loads(results(toy_run).read_text())["rows"]
  own = [r for r in rows if r["method"] == "oracle" and r["ensemble"]]
  (index,) = metadata["model-index"]
  told = {
    one["dataset"]["config"]: one["metrics"][0]["value"] for one in index["results"]
  }
  assert told == {r["condition"]["name"]: r["accuracy"] / 100 for r in own}
  assert len(told) == 8
  for row in own:
    shown = f"{row['accuracy']:.2f} | {row['low']:.2f} to {row['high']:.2f}"
    assert f"| {row['condition']['name']} | {shown} |" in body


def test_the_card_says_what_it_takes_and_where_it_is_from(exports, toy_run):
  metadata, body = parts((exports / "toy.jax.md").read_text())
  run = runs.find(experiment(toy_run))
  assert metadata["license"] == "cc-by-4.0"
  assert metadata["pipeline_tag"] == "image-classification"
  for words in (
    "[N, 32, 32, 3] with values in [0, 1]",
    "(0.485, 0.456, 0.406)",
    "awgn (discrete, levels [0.0, 0.1, 0.2, 0.3, 0.4, 0.5])",
    "16, in the order of the logits: astronaut, brick",
    "Of the images that they were trained on: unknown",
    "awgn-0.5, awgn-1d, awgn-2d images of it, and on no others.",
    "6 months",
    *(stage.finished().product for stage in run.stages.values()),
  ):
    assert words in body
  # What nobody said is not made up.
  metadata, body = parts((exports / "weights" / "README.md").read_text())
  assert metadata["license"] == "unknown"
  assert "Of the weights: unknown" in body


def test_hugging_face_reads_it(exports):
  hub = pytest.importorskip("huggingface_hub")
  card = hub.ModelCard.load(exports / "toy.jax.md")
  assert card.data.library_name == "fidelity_jax"
  assert len(card.data.eval_results) == 8
  assert {one.metric_type for one in card.data.eval_results} == {"accuracy"}
  # Nothing is lost on its way through.
  again = yaml.safe_load(card.data.to_yaml())
  assert again["model-index"] == parts(card.content)[0]["model-index"]


@pytest.mark.parametrize("file", ["toy.jax.md", "weights/README.md"])
def test_its_program_runs(exports, file):
  _, body = parts((exports / file).read_text())
  (program,) = re.findall(r"```python\n(.*?)```", body, re.DOTALL)
  result = subprocess.run(
    [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{program}"],
    cwd=exports,
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stderr
  assert "'logits': (1, 16)" in result.stdout


def test_a_checkpoint_is_said_to_be_unknown(exports, tmp_path):
  part = port.load(exports / "weights")["restorer"]
  port.save({"restorer": part}, tmp_path / "restorer", "toy")
  run = runs.find(tmp_path / "restorer")
  known = cards.known_of(run)
  metadata, body = parts(cards.card(run, "x.onnx", "unknown", "0" * 64, known))
  assert metadata["pipeline_tag"] == "image-to-image"
  assert "model-index" not in metadata
  assert "Dataset and degradation: unknown" in body
  assert "Not evaluated" in body
  assert "0" * 64 in body


def test_a_card_goes_along_from_a_directory(exports, toy_run, tmp_path):
  """Licence, results, training and stages; its program names the new place."""
  run = runs.find(experiment(toy_run))
  export.export(experiment(toy_run), tmp_path / "first", licence="cc-by-4.0")
  first = (tmp_path / "first" / "README.md").read_text()
  told, body = parts(first)
  export.export(tmp_path / "first", tmp_path / "second")
  export.export(tmp_path / "second", tmp_path / "toy.jax")
  again = {
    "second": (tmp_path / "second" / "README.md").read_text(),
    "toy.jax": exported.card_path(tmp_path / "toy.jax").read_text(),
  }
  digest = port.content_digest(tmp_path / "first")
  sections = re.findall(
    r"^## (?:Classes|Trained|Results|Licence).*?(?=^## )", body, re.M | re.S
  )
  assert len(sections) == 4 and "awgn-0.5" in sections[2]
  for place, text in again.items():
    metadata, copied = parts(text)
    kinds = {"stablehlo", "safetensors"}
    assert set(metadata.pop("tags")) - kinds == set(told["tags"]) - kinds
    assert metadata == {k: v for k, v in told.items() if k != "tags"}
    assert all(section in copied for section in sections)
    assert f'("{place}"' in copied and "first" not in copied and digest in copied
    assert copied.startswith("\n# oracle\n")
    assert all(stage.finished().product in copied for stage in run.stages.values())
  # Over itself once more, nothing changes.
  export.export(tmp_path / "second", tmp_path / "second")
  assert (tmp_path / "second" / "README.md").read_text() == again["second"]
  assert exported.load(tmp_path / "toy.jax").record.licence == "cc-by-4.0"
  # Another licence is that of the new card, and nothing else changes.
  export.export(tmp_path / "second", tmp_path / "second", licence="mit")
  text = (tmp_path / "second" / "README.md").read_text()
  assert text == again["second"].replace("cc-by-4.0", "mit")


def test_what_others_add_to_a_card(exports, tmp_path):
  """Fields that no export writes go along, whatever Hugging Face allows in them."""
  place = tmp_path / "restorer"
  port.save({"restorer": port.load_part(exports / "weights", "restorer")}, place, "toy")
  card = place / "README.md"
  result = {
    "task": {"type": "image-to-image"},
    "dataset": {"name": "BSD68", "type": "bsd68", "args": {"sigma": 25}},
    "metrics": [{"type": "psnr", "value": "29.2", "args": {"max_val": 1}}],
    "source": {"name": "theirs", "url": "https://example.org"},
  }
  told = {
    "license": "other",
    "license_name": "ours",
    "language": ["en"],
    "tags": "denoising",
    "model-index": [{"name": "dncnn", "results": [result]}],
  }
  card.write_text(f"---\n{yaml.safe_dump(told)}---\n# About: {{[`it`\f\n")
  export.export(place, tmp_path / "copy")
  metadata, body = parts((tmp_path / "copy" / "README.md").read_text())
  assert "denoising" in metadata["tags"] and "safetensors" in metadata["tags"]
  del told["tags"]
  assert {name: metadata[name] for name in told} == told
  # What they measured is theirs to say.
  assert "Others' are in this card's `model-index`" in body and "29.2" not in body
  assert "Nothing was measured here." in body
  export.export(place, tmp_path / "copy", licence="mit")
  metadata, _ = parts((tmp_path / "copy" / "README.md").read_text())
  assert metadata["license"] == "mit" and "license_name" not in metadata
  # A page that is no card says nothing that is kept.
  for text in ("", "# My denoiser\n\nTrained on my photos: it works.\n", "---\n---\n"):
    card.write_text(text)
    export.export(place, tmp_path / "copy")
    metadata, _ = parts((tmp_path / "copy" / "README.md").read_text())
    assert metadata["license"] == "unknown" and "Trained on my photos" not in metadata
  for text in (
    "---\nlicense: [mit\n---\n",
    "---\nfidelity_jax: 1\n---",
    "---\n1\n---\n",
  ):
    card.write_text(text)
    with pytest.raises(errors.RunError, match="mend the YAML at its top"):
      export.export(place, tmp_path / "other")
  assert not (tmp_path / "other").exists()


def test_names_of_classes_are_no_markdown(exports):
  run = runs.find(exports / "weights")
  names = ("a|b", "*c*", "[d](e)", "line\nline", "é")
  run, known = dataclasses.replace(run, class_names=names), cards.known_of(run)
  text = cards.card(run, "x", "unknown", "0", known)
  assert r"a\|b, \*c\*, \[d\](e), line?line, é" in text


def test_damaged_results_are_said_to_be(toy_copy):
  path = results(toy_copy)
  run = runs.find(path.parent)
  for content in ("{", '{"rows": [1]}', "[]"):
    path.write_text(content)
    with pytest.raises(errors.RunError, match=r"results.json is damaged"):
      cards.results(run)
  path.unlink()
  assert cards.results(run) == []
