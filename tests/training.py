"""What tests of the training loop share: a small restorer, about to be trained."""

import pathlib

from fidelity_jax import data, degradations, models, sharding, tasks, train

# Of each image.
PATCHES = 4


def restorer(
  directory: pathlib.Path,
  count: int | None = None,
  images_per_step: int = 4,
  image_size: int = 32,
  network: dict | None = None,
  **settings,
) -> train.Trainer:
  """Returns what trains a restorer on demo images.

  Args:
    directory: the stage's.
    count: images, None for all.
    images_per_step: in a batch, of four patches each.
    image_size: side of the images, pixels; a patch's is half of it.
    network: fields of the restorer.
    settings: further fields of `train.Settings`.
  """
  some = data.load(data.default_config("demo"), "validation")
  some = some if count is None else some.select(range(count))
  layout, patch = sharding.make_layout(size=images_per_step * PATCHES), image_size // 2
  awgn = degradations.from_config("awgn")
  fields = {"epochs": 1, "validation_rounds": 1} | settings
  return train.Trainer(
    title="restorer",
    task=tasks.RestorationTask(
      restorer=models.DnCNN(**{"depth": 2, "width": 4} | (network or {})),
      inputs=tasks.Inputs(awgn, 0, "restorer", patch, patch, layout.batch),
      patches_per_image=PATCHES,
    ),
    settings=train.Settings(
      seed=0,
      purpose="restorer",
      image_size=image_size,
      images_per_step=images_per_step,
      warmup_epochs=0,
      learning_rate=1e-3,
      optimizer="adam",
      checkpoint_seconds=60.0,
      workers=0,
      crop_area=(0.5, 1.0),
      crop_aspect=(1.0, 1.0),
      reduced_decode=False,
      **fields,
    ),
    train_data=some,
    validation_data=some,
    directory=directory,
    layout=layout,
  )
