#!/usr/bin/env bash
# Runs a module on this host of a slice, or stops it; job.pid is its process.
#   launch/job.sh run MODULE ARGUMENTS
#   launch/job.sh stop
# To stop is to have it save and end, and to wait for that. `run` does it first with a
# job that is here already, left by a connection that broke, and goes on from there.
set -euo pipefail
cd "$(dirname "$0")/.."

# Whether the process of a number is a job that still runs.
runs() {
  [ -r "/proc/$1/cmdline" ] &&
    tr '\0' ' ' 2>/dev/null <"/proc/$1/cmdline" | grep -q '^\.venv/bin/python -m '
}

# Asks the process of a number to end; fails if it still runs after five minutes.
stop() {
  kill -TERM "$1" || true
  for _ in $(seq 1500); do
    runs "$1" || return 0
    sleep 0.2
  done
  return 1
}

old=
[ ! -f job.pid ] || old=$(cat job.pid)
case ${1-} in
  run)
    shift
    if [ -n "$old" ] && runs "$old"; then
      echo "job.sh: stopping the job that runs here already" >&2
      stop "$old" || kill -KILL "$old"
    fi
    echo $$ >job.pid
    exec .venv/bin/python -m "$@"
    ;;
  stop)
    if [ -z "$old" ]; then
      echo "job.sh: no job was started here" >&2
      exit 1
    elif ! runs "$old"; then
      # Another host of the slice may have been asked a moment earlier.
      echo "job.sh: the job here has ended already"
    elif ! stop "$old"; then
      echo "job.sh: the job still runs after five minutes" >&2
      exit 1
    fi
    ;;
  *)
    echo "job.sh: run MODULE ARGUMENTS, or stop" >&2
    exit 2
    ;;
esac
