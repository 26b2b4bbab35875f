#!/usr/bin/env bash
# Runs `rlsys serve` on a node of a running Ray cluster, in the background.
#   serve.sh start CONFIG.yaml [key=value ...]   return once it serves, with the two lines for clients
#   serve.sh status [ADDRESS or CONFIG.yaml]     what it does, as JSON
#   serve.sh stop                                end it: running requests are completed, models are written to disk
# RLSYS_SERVE_DIR: folder of its log and process id, by default ~/.local/state/rlsys. RLSYS_WAIT_S: limit of waits.
set -euo pipefail
# shellcheck source=deploy/env.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"

folder="${RLSYS_SERVE_DIR:-$HOME/.local/state/rlsys}"
log="$folder/serve.log" pid_file="$folder/serve.pid"
wait_s="${RLSYS_WAIT_S:-600}"

die() {
  echo "serve.sh: $*" >&2
  exit 1
}

runs() { # whether the process of the file is a server: its id may have been reused
  [ -s "$pid_file" ] && ps --pid "$(<"$pid_file")" --format args= 2>/dev/null | grep --quiet 'rlsys.* serve '
}

start() {
  [ $# -gt 0 ] || die "start: found no configuration; wanted serve.sh start CONFIG.yaml [key=value ...]"
  ! runs || die "process $(<"$pid_file") serves already; stop it first: serve.sh stop"
  mkdir -p "$folder"
  RAY_ADDRESS="${RAY_ADDRESS:-auto}" PYTHONUNBUFFERED=1 setsid rlsys serve "$@" >"$log" 2>&1 </dev/null &
  echo $! >"$pid_file"
  local end=$((SECONDS + wait_s))
  until grep --quiet 'export TINKER_API_KEY' "$log"; do
    kill -0 $! 2>/dev/null || die "it ended: $(tail --lines=20 "$log")"
    ((SECONDS < end)) || die "it does not serve after $wait_s s; see $log"
    sleep 0.2
  done
  grep 'export TINKER' "$log"
}

stop() {
  if ! runs; then
    rm -f "$pid_file"
    echo "no server of $(id -un) to stop here"
    return
  fi
  local pid end=$((SECONDS + wait_s))
  pid=$(<"$pid_file")
  kill -TERM "$pid"
  while kill -0 "$pid" 2>/dev/null; do
    ((SECONDS < end)) || die "process $pid does not end within $wait_s s; see $log"
    sleep 0.2
  done
  rm -f "$pid_file"
  tail --lines=1 "$log"
}

command=${1:-}
[ $# -eq 0 ] || shift
case "$command" in
start) start "$@" ;;
status) exec rlsys serve --status "$@" ;;
stop) stop ;;
*) die "usage: serve.sh start CONFIG.yaml [key=value ...] | status | stop" ;;
esac
