"""Configs of stages and experiments with the report's values (METHOD section 6).

An experiment is the config of its last stage; its parents' configs are nested in it.
What an experiment's stages have in common (seed, dataset, image size, degradation) is
set at the top and inherited: a parent follows it until it is overridden itself.
"""

from ml_collections import ConfigDict, config_dict

from fidelity_jax import data, errors


def inherit(config: ConfigDict) -> ConfigDict:
  """Returns a config whose fields follow those of `config` until overridden."""
  return ConfigDict(
    {
      name: inherit(config[name])
      if isinstance(config[name], ConfigDict)
      else config.get_oneway_ref(name)
      for name in config
    }
  )


def degradation(kind: str, mixture: str | None) -> ConfigDict:
  """Returns the config of one degradation; see `fidelity_jax.degradations`.

  Args:
    kind: "awgn", "salt_and_pepper", ...
    mixture: "discrete" or "continuous" over `level`, by default the kind's own.
  """
  return ConfigDict(
    {
      "kind": kind,
      "level": config_dict.placeholder(object),
      "mixture": mixture if mixture else config_dict.placeholder(str),
      "vary": config_dict.placeholder(str),
      "orientation": config_dict.placeholder(float),
      "kernel_size": config_dict.placeholder(int),
    }
  )


def base(kind: str, size: str) -> ConfigDict:
  """Returns what every experiment's top level has, for a last stage of this kind.

  Args:
    kind: "calibration", "estimator", ...
    size: "" for Caltech-256, "demo" for the embedded photographs.

  Raises:
    UsageError: if there is no such size.
  """
  if size not in ("", "demo"):
    raise errors.UsageError(
      f"a config has no variant {size!r}: write ':demo' after its path for the "
      "embedded photographs, or nothing for the report's own experiment."
    )
  dataset = "demo" if size == "demo" else "caltech256"
  config = ConfigDict()
  config.kind = kind
  config.seed = 0
  config.dataset = data.default_config(dataset)
  # "auto" computes in bfloat16 on accelerators and in float32 on CPU.
  config.precision = "auto"
  config.checkpoint_seconds = 60.0
  config.degradation = degradation("awgn", "discrete")
  return config


def stage(root: ConfigDict, kind: str) -> ConfigDict:
  """Returns the beginnings of a parent stage of the experiment `root`."""
  config = ConfigDict()
  config.kind = kind
  config.seed = root.get_oneway_ref("seed")
  config.dataset = inherit(root.dataset)
  config.precision = root.get_oneway_ref("precision")
  config.checkpoint_seconds = root.get_oneway_ref("checkpoint_seconds")
  config.degradation = inherit(root.degradation)
  return config


def training(
  config: ConfigDict,
  optimizer: str,
  learning_rate: float,
  batch_size: int,
  epochs: int,
) -> None:
  """Adds the fields of the training loop to a stage's config."""
  config.optimizer = optimizer
  config.learning_rate = learning_rate
  config.batch_size = batch_size
  config.epochs = epochs
  config.warmup_epochs = 5
  # How often each validation image is degraded, differently, for the metric that
  # selects the checkpoint; the same way in every epoch.
  config.validation_rounds = 1


def classifier(config: ConfigDict, source: str = "clean") -> ConfigDict:
  """Fills in a classifier stage: ResNet-50, fine-tuned from torchvision's weights.

  Args:
    config: from `base` or `stage`.
    source: what it is trained on: "clean", "degraded" or "restored" (setups 1 to 3).
  """
  config.source = source
  config.model = ConfigDict(
    {
      "name": "resnet50",
      "stage_sizes": config_dict.placeholder(tuple),
      "width": config_dict.placeholder(int),
      "block": config_dict.placeholder(str),
      "transform_input": config_dict.placeholder(bool),
      "transform_steered": config_dict.placeholder(bool),
      # A path, a name such as "torchvision/resnet50", "torchvision" for the network's
      # own ImageNet weights, or None for random ones.
      "weights": config_dict.placeholder(str),
      # Replace the last layers of given weights; False keeps a classifier's own.
      "new_head": True,
    }
  )
  config.model.weights = "torchvision"
  config.label_smoothing = 0.1
  training(config, "sgd", 1e-3, 64, 120)
  return config


def restorer(config: ConfigDict) -> ConfigDict:
  """Fills in a restorer stage: DnCNN-20 from scratch, batch_size in patches."""
  config.model = ConfigDict(
    {
      "depth": 20,
      "width": 64,
      "batch_norm": False,
      "weights": config_dict.placeholder(str),
    }
  )
  config.degradation.level = None
  config.degradation.mixture = "continuous"
  config.patch_size = 50
  config.patch_stride = 25
  training(config, "adam", 1e-4, 128, 120)
  return config


def estimator(config: ConfigDict) -> ConfigDict:
  """Fills in a fidelity map estimator stage: as the restorer."""
  restorer(config)
  config.fidelity = ConfigDict({"map": "l1", "estimator_input": "degraded"})
  return config


def calibration(config: ConfigDict, source: str) -> ConfigDict:
  """Fills in a calibration stage and its ensemble phase.

  Args:
    config: from `base`.
    source: where the fidelity map comes from: "oracle", "pretrained" or "end_to_end".
  """
  config.fidelity = ConfigDict(
    {"source": source, "map": "l1", "estimator_input": "degraded"}
  )
  config.model = ConfigDict(
    {
      "ratio": 0.5,
      "num_convs": 3,
      "channels": 16,
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
  training(config, "sgd", 1e-3, 64, 50)
  config.ensemble = ConfigDict(
    {
      "enabled": True,
      "learning_rate": 1e-3,
      "epochs": 25,
      "warmup_epochs": 5,
      "weights": config_dict.placeholder(str),
    }
  )
  return config


def method(source: str, size: str = "") -> ConfigDict:
  """Returns the experiment that trains and evaluates the proposed method.

  Args:
    source: where the fidelity map comes from: "oracle", "pretrained" or "end_to_end".
    size: "" for the report's experiment, "demo" for the embedded one.

  Raises:
    UsageError: if there is no such size.
  """
  config = base("calibration", size)
  config.experiment = source
  calibration(config, source)
  # `examples`: images drawn per condition in the picture of examples.
  config.evaluation = ConfigDict({"rounds": 10, "batch_size": 64, "examples": 2})
  config.parents = ConfigDict()
  config.parents.classifier = classifier(stage(config, "classifier"))
  config.parents.restorer = restorer(stage(config, "restorer"))
  if source != "oracle":
    parent = estimator(stage(config, "estimator"))
    parent.fidelity.map = config.fidelity.get_oneway_ref("map")
    parent.fidelity.estimator_input = config.fidelity.get_oneway_ref("estimator_input")
    config.parents.estimator = parent
  if size == "demo":
    _shrink(config)
  if source != "oracle":
    # The same config, hence the same stage, as the method's own restorer.
    parent.parents = ConfigDict({"restorer": inherit(config.parents.restorer)})
  return config


def estimator_alone(size: str = "") -> ConfigDict:
  """Returns the experiment that trains the fidelity map estimator and no more."""
  config = base("estimator", size)
  config.experiment = "estimator"
  estimator(config)
  config.parents = ConfigDict({"restorer": restorer(stage(config, "restorer"))})
  if size == "demo":
    _shrink_stack(config)
    _shrink_stack(config.parents.restorer)
  return config


def _shrink(config: ConfigDict) -> None:
  """Makes an experiment small enough for minutes on two CPU cores.

  Everything but size stays as it is: the same networks with fewer and narrower layers,
  the same training with fewer epochs and, to make up for them, higher rates.
  """
  config.dataset.cache = "ram"
  # Two convolutions as the released code has; wide layers, as there are few features.
  config.model.num_convs, config.model.channels, config.model.ratio = 2, 4, 4.0
  config.learning_rate, config.batch_size = 5e-3, 8
  config.epochs, config.warmup_epochs = 80, 4
  # One draw for each of 139 tiles is too noisy to tell epochs apart.
  config.validation_rounds = 3
  if config.fidelity.source == "end_to_end":
    # The estimator that moves along makes larger steps diverge.
    config.learning_rate, config.warmup_epochs = 4e-3, 8
  config.ensemble.update({"learning_rate": 0.02, "epochs": 6, "warmup_epochs": 1})
  config.evaluation.rounds = 3
  parent = config.parents.classifier
  # Small by default (models/registry.py): `stage_sizes`, `width`, `block` override.
  parent.model.name, parent.model.weights = "resnet", None
  parent.learning_rate, parent.batch_size = 0.05, 32
  parent.epochs, parent.warmup_epochs = 12, 3
  _shrink_stack(config.parents.restorer)
  if "estimator" in config.parents:
    _shrink_stack(config.parents.estimator)


def _shrink_stack(config: ConfigDict) -> None:
  config.model.depth, config.model.width = 5, 32
  config.patch_size, config.patch_stride = 32, 32
  config.learning_rate, config.batch_size = 4e-3, 32
  # After more, restored tiles leave the map little to tell about them.
  config.epochs = 7 if config.kind == "restorer" else 9
  config.warmup_epochs = 1
