"""torchvision's published weights: names and files."""

import pathlib
import re

from fidelity_jax import downloading, errors, files

BASE_URL = "https://download.pytorch.org/models/"
# The hexadecimal digits in a name are the first ones of the file's SHA-256.
FILES = {
  "torchvision/alexnet": "alexnet-owt-7be5be79.pth",
  "torchvision/googlenet": "googlenet-1378be20.pth",
  "torchvision/resnet18": "resnet18-f37072fd.pth",
  "torchvision/resnet50": "resnet50-0676ba61.pth",
  "torchvision/resnet50-v2": "resnet50-11ad3fa6.pth",
  "torchvision/vgg16": "vgg16-397923af.pth",
  "torchvision/vgg16-features": "vgg16_features-amdegroot-88682ab5.pth",
}


def find(name: str) -> pathlib.Path:
  """Returns the file of a published network, downloaded once into the cache.

  Args:
    name: a key of `FILES`.

  Raises:
    errors.UsageError: no such name.
    errors.RunError: it could not be downloaded, or its checksum is wrong.
  """
  if name not in FILES:
    raise errors.UsageError(
      f"there are no published weights {name!r}; {errors.near(name, FILES)}"
    )
  file = FILES[name]
  digits = re.search(r"-([0-9a-f]{8,64})\.[a-z]+$", file).group(1)
  return downloading.fetch(BASE_URL + file, files.cache_folder(), f"sha256:{digits}")
