"""Pictures of examples: what is computed, and how often."""

import importlib
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fidelity_jax import (
  data,
  errors,
  evaluate,
  examples,
  files,
  hosts,
  models,
  tensors,
)
from fidelity_jax.rows import Compared, Facts
from fidelity_jax.subjects import Given, Subject

_SIZE = 16


def _subjects() -> tuple[list[Subject], data.Dataset]:
  """Returns a classifier with random weights on few images, and these."""
  config = importlib.import_module("fidelity_jax.configs.clean").get_config("scratch")
  config.dataset.image_size = _SIZE
  config.evaluation.batch_size = 4
  config = config.copy_and_resolve_references()
  dataset = data.load(config.dataset, "test")
  dataset = dataset.select(np.arange(0, len(dataset), 16))
  model = {"name": "resnet", "stage_sizes": (1,), "width": 8}
  network = models.create(model, dataset.num_classes)
  variables = network.init(jax.random.key(0), jnp.zeros((1, _SIZE, _SIZE, 3)))
  given = Given("random", {"classifier": (network, variables)})
  facts = Facts(
    method="",
    source=None,
    trained_on="none",
    backbone="resnet",
    restorer=None,
    map=None,
    resize=None,
    without=[],
    ensemble=False,
    seed=0,
    precision="float32",
  )
  config.fidelity = {"map": None}
  compared = Compared("classifier", False)
  return [Subject(config, compared, facts.of(compared), {}, given)], dataset


def _first_says(monkeypatch, *answers):
  """Makes this the second process: the first one's next answers are these."""
  said = iter(answers)
  monkeypatch.setattr(hosts, "_index", 1)
  monkeypatch.setattr(hosts, "agree", lambda value: next(said))


@pytest.mark.slow
def test_another_host_sees_late_what_is_measured(tmp_path, monkeypatch):
  chosen, dataset = _subjects()
  there, here = tmp_path / "there", tmp_path / "here"
  first = evaluate.Evaluation(chosen, dataset, there)
  first.measure()
  told = [first._done(*one) for one in _asked(first)]
  assert set(told) == {len(dataset)}
  second = evaluate.Evaluation(chosen, dataset, here)
  late = threading.Timer(0.5, there.rename, [here])
  _first_says(monkeypatch, told, [0] * len(told))
  late.start()
  assert second._wanted() == {}
  late.join()
  for condition in chosen[0].conditions:
    ours, theirs = (e.values(chosen[0], condition) for e in (second, first))
    np.testing.assert_array_equal(ours["prediction"], theirs["prediction"])
  # And measures with the first what that one does not see.
  assert len(second._wanted()) == len(told)
  # What never comes is no endless wait.
  monkeypatch.setattr(files, "_LAG", 0.3)
  _first_says(monkeypatch, told)
  with pytest.raises(errors.RunError, match="but process 1 does not see it"):
    evaluate.Evaluation(chosen, dataset, tmp_path / "other")._wanted()


def _asked(evaluation):
  subjects = evaluation.subjects
  return [(s, place) for s in subjects for place in evaluation._places(s)]


def test_another_host_sees_late_what_is_kept(tmp_path, monkeypatch):
  there, here, of = tmp_path / "a.npz", tmp_path / "b.npz", {"of": 1}
  kept = lambda path, made: examples._kept(path, of, lambda: {"x": np.full(2, made)})
  assert kept(there, 1)["x"].tolist() == [1, 1]
  # What is seen at first may be of before.
  files.write_arrays(here, {"x": np.zeros(2)}, "before")
  late = threading.Timer(0.5, there.replace, [here])
  _first_says(monkeypatch, True, False)
  late.start()
  assert kept(here, 2)["x"].tolist() == [1, 1]
  late.join()
  # Where the first one computes, all do.
  assert kept(here, 3)["x"].tolist() == [3, 3]


def test_clean_images_are_classified_once(tmp_path, monkeypatch):
  chosen, dataset = _subjects()
  evaluation = evaluate.Evaluation(chosen, dataset, tmp_path)
  asked, values = [], tensors.Tensors.values
  made = tensors.Tensors.__init__

  def noting_made(self, networks, seed, condition, *rest):
    self.of = condition.name
    made(self, networks, seed, condition, *rest)

  def noting_values(self, subject, keep=False):
    asked.append(self.of)
    return values(self, subject, keep)

  monkeypatch.setattr(tensors.Tensors, "__init__", noting_made)
  monkeypatch.setattr(tensors.Tensors, "values", noting_values)
  shown = examples.draw(evaluation, chosen, tmp_path)
  names = [condition.name for condition in shown.conditions]
  assert len(names) == 3 and "clean" not in names
  # Six images in two batches.
  assert sorted(asked) == sorted(["clean", *names] * 2)
  clean = shown.arrays["value/clean"]
  assert clean.shape == (3, 6) and (clean == clean[0]).all()
  images = shown.arrays["clean"]
  assert images.shape == (3, 6, _SIZE, _SIZE, 3) and (images == images[0]).all()
  # The same as an evaluation says of them.
  network, variables = chosen[0].given.parts["classifier"]
  logits, _ = network.apply(variables, network.normalize(images[0]))
  np.testing.assert_array_equal(clean[0], jnp.argmax(logits, -1))
