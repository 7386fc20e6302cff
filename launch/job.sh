#!/usr/bin/env bash
# Runs a module on this host of a slice; process-id file and signals are for `stop`.
#   launch/job.sh MODULE ARGUMENTS
# A job that is here already, left by a connection that broke, is stopped first: it saves,
# and this one goes on from there.
set -euo pipefail
cd "$(dirname "$0")/.."

# Whether the process of a number is one of ours that still runs.
runs() {
  grep -qs fidelity_jax "/proc/$1/cmdline"
}

if [ -f job.pid ] && old=$(cat job.pid) && runs "$old"; then
  echo "job.sh: stopping the job that runs here already" >&2
  kill -TERM "$old" || true
  for _ in $(seq 300); do
    runs "$old" || break
    sleep 1
  done
  if runs "$old"; then
    kill -KILL "$old"
  fi
fi
echo $$ >job.pid
exec .venv/bin/python -m "$@"
