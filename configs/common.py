"""The values that the experiments share: the paper's, and those of their demo size.

An experiment is the config of its last stage; its parents' configs are nested in it.
What an experiment's stages have in common (seed, dataset, image size, degradation) is
set at the top and inherited: a parent follows it until it is overridden itself.

Every function that fills in a stage takes a size (`SIZES`): "" for the paper's own
experiment (Caltech-256, 224 px; docs/method.md, section 6); "lite" for the same on
Caltech-101 with EfficientNet-Lite0, which is pretrained, too, and small; "demo" for
that network on the embedded photographs; "scratch" for these and a classifier from
random weights. Everything but size stays as it is: the same networks, of which
denoisers have fewer and narrower layers, the same training with fewer epochs and, to
make up for them, higher rates.

`precision="auto"` is bfloat16 on accelerators and float32 on CPUs.
"""

from collections.abc import Iterable

from ml_collections import ConfigDict, config_dict

from fidelity_jax import data, errors, models, sharding

# And what they are on.
SIZES = {"": "caltech256", "lite": "folder", "demo": "demo", "scratch": "demo"}
# What smaller sizes multiply these by where the estimator is trained along, which makes
# larger steps diverge.
_ALONG = {"learning_rate": 0.8, "warmup_epochs": 2}


def experiment(name: str, kind: str, size: str) -> ConfigDict:
  """Returns what every experiment's top level has.

  Args:
    name: the experiment's, which begins its directory's name.
    kind: of its last stage: "calibration", "classifier", ...
    size: one of `SIZES`.

  Raises:
    UsageError: there is no such size.
  """
  if size not in SIZES:
    raise errors.UsageError(
      f"a config has no variant {size!r}: write ':demo' after its path for the "
      "embedded photographs, ':scratch' for these without pretrained weights, ':lite' "
      "for a small pretrained network on Caltech-101, or nothing for the paper's own "
      "experiment."
    )
  config = ConfigDict()
  config.kind = kind
  config.experiment = name
  config.seed = 0
  config.dataset = data.default_config(SIZES[size])
  if size:
    config.dataset.cache = "ram"
  if size == "lite":
    config.dataset.image_size = 128
    config.dataset.split_file = "caltech101"
  # "self": without labels, calibration learns what the frozen classifier says of the
  # clean images (docs/classifiers.md).
  config.labels = "given"
  config.dataset.labels = config.get_oneway_ref("labels")
  config.precision = "auto"
  # Longest time between two checkpoints.
  config.checkpoint_seconds = 60.0
  # How devices share arrays; docs/scaling.md.
  config.mesh = sharding.default_config()
  # First and last step of every stage to trace for XProf; docs/observing.md.
  config.profile = ConfigDict({"steps": config_dict.placeholder(tuple)})
  config.degradation = ConfigDict(
    {
      "kind": "awgn",
      # None: the kind's own levels; docs/degradations.md has them and the other fields.
      "level": config_dict.placeholder(object),
      "mixture": "discrete",
      "vary": config_dict.placeholder(str),
      "orientation": config_dict.placeholder(float),
      "kernel_size": config_dict.placeholder(int),
    }
  )
  config.parents = ConfigDict()
  return config


def evaluation(config: ConfigDict, size: str) -> None:
  """Adds how an experiment is evaluated."""
  config.evaluation = ConfigDict(
    {
      # Draws of noise per test image.
      "rounds": {"": 10, "demo": 2}.get(size, 3),
      # Of the noise: the same for all seeds of training, so that these stand apart.
      "seed": 0,
      "batch_size": 64,
      # Images drawn per condition in the picture of examples.
      "examples": 2,
      # "predictions": keep logits per image, and write them to a file of their own.
      "keep": config_dict.placeholder(str),
    }
  )


def inherit(config: ConfigDict, names: Iterable[str] | None = None) -> ConfigDict:
  """Returns a config whose fields follow those of `config` until overridden.

  Args:
    config: the config to follow.
    names: the fields to follow; None: all.
  """
  return ConfigDict(
    {
      name: inherit(config[name])
      if isinstance(config[name], ConfigDict)
      else config.get_oneway_ref(name)
      for name in names or config
    }
  )


def parent(root: ConfigDict, kind: str) -> ConfigDict:
  """Returns the beginnings of a parent stage of the experiment `root`."""
  config = ConfigDict()
  config.kind = kind
  for name in ("seed", "precision", "checkpoint_seconds"):
    config[name] = root.get_oneway_ref(name)
  config.dataset = inherit(root.dataset)
  config.profile = inherit(root.profile)
  config.mesh = inherit(root.mesh)
  config.degradation = inherit(root.degradation)
  config.parents = ConfigDict()
  return config


def _training(config: ConfigDict, **values) -> None:
  """Adds the fields of the training loop; `batch_size` may count patches."""
  # How often each validation image is degraded, differently, for the metric that
  # selects the checkpoint; the same way in every epoch.
  config.update({"warmup_epochs": 5, "validation_rounds": 1} | values)


def classifier(config: ConfigDict, size: str, source: str = "clean") -> ConfigDict:
  """Fills in a classifier stage: ResNet-50, fine-tuned from torchvision's weights.

  Args:
    config: from `experiment` or `parent`.
    size: one of `SIZES`.
    source: what it is trained on: "clean", "degraded" or "restored" (the paper's setups
      1 to 3). "restored" needs the parent "restorer".
  """
  config.source = source
  config.model = ConfigDict(
    {
      # A network of docs/backbones.md; "resnet" is small.
      "name": {"": "resnet50", "scratch": "resnet"}.get(size, "efficientnet_lite0"),
      # Fields of these networks; None: the network's own value.
      **{
        name: config_dict.placeholder(field.type)
        for name, field in models.registry.FIELDS.items()
      },
      # A path, a name such as "torchvision/resnet50", "torchvision" for the network's
      # own ImageNet weights, or None for random ones.
      "weights": config_dict.placeholder(str),
      # Replace the last layers of given weights; False keeps a classifier's own.
      "new_head": True,
    }
  )
  config.label_smoothing = 0.1
  # Epochs, of all, in which the head trains alone.
  config.head_epochs = 0
  config.optimizer = "sgd"
  if size == "scratch":
    _training(config, learning_rate=0.05, batch_size=32, epochs=12, warmup_epochs=3)
  elif size:
    config.model.weights = config.model.name
    config.head_epochs = 1
    epochs = 5 if size == "lite" else 6
    _training(config, learning_rate=0.02, batch_size=32, epochs=epochs, warmup_epochs=1)
  else:
    config.model.weights = "torchvision"
    _training(config, learning_rate=1e-3, batch_size=64, epochs=120)
  return config


def _stack(config: ConfigDict, size: str) -> None:
  """Fills in what restorer and estimator share; `batch_size` counts patches."""
  # Each patch has a level of its own.
  config.degradation.level = None
  config.degradation.mixture = "continuous"
  sides = {"": (50, 25), "lite": (64, 64)}
  config.patch_size, config.patch_stride = sides.get(size, (32, 32))
  config.model = ConfigDict(
    {
      "depth": 5 if size else 20,
      "width": 32 if size else 64,
      "batch_norm": False,
      "weights": config_dict.placeholder(str),
    }
  )
  config.optimizer = "adam"
  if not size:
    _training(config, learning_rate=1e-4, batch_size=128, epochs=120)
  elif size == "lite":
    _training(config, learning_rate=2e-3, batch_size=32, epochs=4, warmup_epochs=1)
  else:
    _training(config, learning_rate=4e-3, batch_size=32, warmup_epochs=1)


def restorer(config: ConfigDict, size: str) -> ConfigDict:
  """Fills in a restorer stage: DnCNN-20 from scratch, on patches."""
  _stack(config, size)
  config.model.name = "dncnn"
  if size == "demo":
    config.epochs = 8
  elif size == "scratch":
    # After fewer, some seeds gain little by restoration; after many more, restored
    # tiles leave the map little to tell about them (docs/notebook.md).
    config.epochs = 12
  return config


def estimator(config: ConfigDict, size: str) -> ConfigDict:
  """Fills in a fidelity map estimator stage: as the restorer, which is its parent."""
  _stack(config, size)
  config.fidelity = ConfigDict({"map": "l1", "estimator_input": "degraded"})
  if SIZES[size] == "demo":
    config.epochs = 9
  return config


def calibration(config: ConfigDict, size: str, source: str) -> ConfigDict:
  """Fills in a calibration stage and its ensemble phase.

  Args:
    config: from `experiment`.
    size: one of `SIZES`.
    source: where the fidelity map comes from: "oracle", "pretrained" or "end_to_end".
  """
  config.fidelity = ConfigDict(
    {"source": source, "map": "l1", "estimator_input": "degraded"}
  )
  config.model = ConfigDict(
    {
      # Hidden units per feature; many where features are few.
      "ratio": 4.0 if size == "scratch" else 0.5,
      # Two convolutions are what the released code has.
      "num_convs": 2 if SIZES[size] == "demo" else 3,
      "channels": 4 if SIZES[size] == "demo" else 16,
      "resize": "bilinear",
      "spatial_multiplication": True,
      "spatial_addition": True,
      "residual": True,
      "channel_multiplication": True,
      "channel_concatenation": True,
      "weights": config_dict.placeholder(str),
    }
  )
  # Recompute the estimator's activations in end-to-end training, to save memory.
  config.rematerialize = False
  config.label_smoothing = 0.1
  config.optimizer = "sgd"
  config.ensemble = ConfigDict(
    {
      "enabled": True,
      "learning_rate": 0.02 if size == "scratch" else 1e-3,
      "epochs": {"": 25, "lite": 2, "demo": 3, "scratch": 6}[size],
      "warmup_epochs": 1 if size else 5,
      "weights": config_dict.placeholder(str),
    }
  )
  if size == "scratch":
    # One draw for each of 139 validation tiles is too noisy to tell epochs apart.
    _training(
      config,
      learning_rate=5e-3,
      batch_size=8,
      epochs=80,
      warmup_epochs=4,
      validation_rounds=3,
    )
  elif size:
    # In so few steps SGD does not find its way: with 0.01 it takes two epochs to leave
    # chance, with 0.05 it diverges (docs/notebook.md).
    config.optimizer = "adam"
    epochs = 6 if size == "lite" else 10
    _training(config, learning_rate=1e-3, batch_size=16, epochs=epochs, warmup_epochs=1)
  else:
    _training(config, learning_rate=1e-3, batch_size=64, epochs=50)
  if size and source == "end_to_end":
    for field, factor in _ALONG.items():
      config[field] *= factor
  return config


def one_classifier(source: str, size: str) -> ConfigDict:
  """Returns the experiment on a classifier alone, with and without restoration.

  Args:
    source: what the classifier is trained on, which names the experiment.
    size: one of `SIZES`.

  Raises:
    UsageError: there is no such size.
  """
  config = classifier(experiment(source, "classifier", size), size, source)
  config.parents.restorer = restorer(parent(config, "restorer"), size)
  evaluation(config, size)
  return config


def method(source: str, size: str) -> ConfigDict:
  """Returns the experiment on the proposed method.

  Args:
    source: where the fidelity map comes from, which names the experiment.
    size: one of `SIZES`.

  Raises:
    UsageError: there is no such size.
  """
  config = calibration(experiment(source, "calibration", size), size, source)
  parents = config.parents
  parents.classifier = classifier(parent(config, "classifier"), size)
  parents.restorer = restorer(parent(config, "restorer"), size)
  # For `parents.classifier.source=restored`.
  parents.classifier.parents.restorer = inherit(parents.restorer)
  if source != "oracle":
    parents.estimator = estimator(parent(config, "estimator"), size)
    for name in ("map", "estimator_input"):
      parents.estimator.fidelity[name] = config.fidelity.get_oneway_ref(name)
    # The same config, hence the same stage, as the method's own restorer.
    parents.estimator.parents.restorer = inherit(parents.restorer)
  evaluation(config, size)
  return config


def study(name: str, shows: str, size: str) -> ConfigDict:
  """Returns a study without experiments: what holds for all that will be added.

  Args:
    name: the study's, which begins its directory's name.
    shows: what it is, in a line.
    size: one of `SIZES`.

  Raises:
    UsageError: there is no such size.
  """
  config = method("pretrained", size)
  config.study, config.shows = name, shows
  config.experiments = ConfigDict()
  # Their names, in the order of the report.
  config.order = ()
  # Axes: every experiment is run with each of their values; None: with the config's.
  for axis in ("seeds", "backbones", "degradations"):
    config[axis] = config_dict.placeholder(tuple)
  # Experiments that run on the config's own backbone alone.
  config.one_backbone = ()
  # What the report begins with.
  config.sections = ("tables", "claims", "curves")
  # The class whose activations are shown; None: the first.
  config.class_name = config_dict.placeholder(str)
  # Names or patterns of the experiments to run, joined by commas; None: all.
  config.only = config_dict.placeholder(str)
  # "i/n" for the i-th of n processes that work on the study together.
  config.shard = config_dict.placeholder(str)
  return config


def narrow(config: ConfigDict) -> None:
  """Sets fields of a small study, so that every network trains in a minute or two.

  From random weights ("scratch"): a quarter of the width, Adam for those without batch
  norm (docs/notebook.md), and few epochs of calibration.
  """
  classifier = config.parents.classifier
  classifier.model.width = 16
  classifier.optimizer, classifier.learning_rate = "adam", 1e-3
  classifier.epochs = 24
  # Their features differ in number, by a factor of 25.
  config.model.ratio = 0.2
  config.epochs = 15
  config.ensemble.epochs = 3


def add_setup(config: ConfigDict, source: str) -> ConfigDict:
  """Adds the experiment on a classifier alone to a study; see `one_classifier`."""
  added = inherit(config.parents.classifier)
  added.experiment, added.source = source, source
  added.labels = config.get_oneway_ref("labels")
  added.evaluation = inherit(config.evaluation)
  added.parents.restorer = inherit(config.parents.restorer)
  config.experiments[source] = added
  config.order += (source,)
  return added


def add_method(
  config: ConfigDict, source: str, size: str, name: str = ""
) -> ConfigDict:
  """Adds the experiment on the proposed method to a study; see `method`.

  Args:
    config: the study.
    source: where the fidelity map comes from.
    size: one of `SIZES`.
    name: the experiment's, if not that.

  Returns:
    The experiment's config, whose fields follow the study's until they are set.
  """
  # Only a study has the other fields.
  added = inherit(config, [*method(source, size)])
  name = name or source
  added.experiment, added.fidelity.source = name, source
  if source == "oracle":
    del added.parents.estimator
  for field in ("map", "estimator_input") if source != "oracle" else ():
    added.parents.estimator.fidelity[field] = added.fidelity.get_oneway_ref(field)
  for field, factor in _ALONG.items() if size and source == "end_to_end" else ():
    added[field] = config.get_oneway_ref(field) * factor
  config.experiments[name] = added
  config.order += (name,)
  return added
