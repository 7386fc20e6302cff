"""Pictures of examples: what is computed, and how often."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np

from fidelity_jax import data, evaluate, examples, models, tensors
from fidelity_jax.rows import Compared, Facts
from fidelity_jax.subjects import Given, Subject

_SIZE = 16


def _subjects() -> tuple[list[Subject], data.Dataset]:
  """Returns a classifier with random weights on few images, and these."""
  config = importlib.import_module("fidelity_jax.configs.clean").get_config("demo")
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
