#!/usr/bin/env bash
# Installs this project in .venv beside it, as constraints.txt pins it.
#   launch/setup.sh cpu|cuda|tpu
# PYTHON names the interpreter; without it, one of 3.11 or later is looked for, and got
# from uv if there is none (the images of Cloud TPU come with 3.10).
set -euo pipefail
cd "$(dirname "$0")/.."

case ${1-} in
  cpu) jax=jax package='.[pretrained]' ;;
  cuda) jax='jax[cuda12]' package='.[pretrained]' ;;
  # Workdirs and data of Cloud TPU are in gs:// buckets.
  tpu) jax='jax[tpu]' package='.[gcs,pretrained]' ;;
  *)
    echo "setup.sh: name the variant: cpu, cuda or tpu" >&2
    exit 2
    ;;
esac

# Prints the first Python that is new enough and can make environments.
find_python() {
  local name
  for name in ${PYTHON:+"$PYTHON"} python3.13 python3.12 python3.11 python3; do
    if "$name" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  return 1
}

if [ ! -x .venv/bin/python ]; then
  if python=$(find_python); then
    "$python" -m venv .venv
  else
    python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --seed --python 3.12 .venv
  fi
fi
.venv/bin/python -m pip install --quiet --constraint constraints.txt "$jax" -e "$package"
.venv/bin/python -c 'import fidelity_jax.experiment; print("fidelity_jax is set up")'
