#!/usr/bin/env bash
# Runs a module on this host of a slice; process-id file and signals are for `stop`.
#   launch/job.sh MODULE ARGUMENTS
# A job that is here already, left by a connection that broke, is stopped first: it saves,
# and this one goes on from there.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -f job.pid ] && old=$(cat job.pid) && grep -qs "fidelity_jax" "/proc/$old/cmdline"; then
  echo "job.sh: stopping the job that runs here already" >&2
  kill -TERM "$old" || true
  for _ in $(seq 300); do
    [ -d "/proc/$old" ] || break
    sleep 1
  done
  kill -KILL "$old" 2>/dev/null || true
fi
echo $$ >job.pid
exec .venv/bin/python -m "$@"
