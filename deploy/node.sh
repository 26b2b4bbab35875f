#!/usr/bin/env bash
# Starts and stops one node of a Ray cluster; used by images, Ray's launcher, KubeRay, Slurm, and by hand.
#   node.sh head   [--block] [ray start options]   start the first node: GCS, dashboard on 127.0.0.1, raylet
#   node.sh worker [--block] [ray start options]   start another node; RAY_HEAD_IP: address of the head
#   node.sh await N                                wait until N nodes are up
#   node.sh stop                                   stop this node, but no other Ray on the machine
#   node.sh certificate [NAME ...]                 create this node's TLS certificate if RAY_USE_TLS is 1
# RLSYS_RAY_OPTIONS: more options of `ray start`, such as --resources={"learner_node":1}. RLSYS_WAIT_S: limit of waits.
set -euo pipefail
# shellcheck source=deploy/env.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"

folder="${RAY_TMPDIR:-/tmp}"
session_file="$folder/rlsys-node-$(id -u).session"
wait_s="${RLSYS_WAIT_S:-300}"

die() {
  echo "node.sh: $*" >&2
  exit 1
}

runs() { # whether Ray's processes are in this node's session; the session id alone may have been reused
  [ -s "$session_file" ] && pgrep --session "$(<"$session_file")" --full 'gcs_server|raylet' >/dev/null
}

start() {
  local more
  read -ra more <<<"${RLSYS_RAY_OPTIONS:-}"
  # Otherwise a worker would use the head's folder, and two nodes on one machine would delete each other's files.
  [ -z "${RAY_TMPDIR:-}" ] || more+=(--temp-dir="$RAY_TMPDIR/ray")
  set -- --disable-usage-stats "$@" "${more[@]}"
  "$deploy/certificate.sh"
  case " $* " in
  *" --block "*) exec ray start "$@" ;; # the node ends with this process
  esac
  ! runs || die "a node of $(id -un) is already running; stop it first: node.sh stop"
  mkdir -p "$folder"
  # stop ends the processes of this new session. `ray stop` would end every Ray of this user on the machine.
  # shellcheck disable=SC2016  # expanded by the inner shell
  setsid --wait bash -c 'echo $$ >"$0" && exec ray start "$@"' "$session_file" "$@" </dev/null
}

start_head() {
  start --head --port="$RLSYS_PORT" --include-dashboard=true \
    --dashboard-host="$RLSYS_DASHBOARD_HOST" --dashboard-port="$RLSYS_DASHBOARD_PORT" \
    --dashboard-agent-listen-port="${RLSYS_AGENT_PORT:-52365}" --ray-client-server-port="${RLSYS_CLIENT_PORT:-10001}" "$@"
}

knock() { # wait until the head listens: nodes of a job start in any order, and Ray itself gives up too early or never
  local end=$((SECONDS + wait_s))
  until (: >"/dev/tcp/$1/$RLSYS_PORT") 2>/dev/null; do
    ((SECONDS < end)) || die "nothing listens at $1:$RLSYS_PORT after $wait_s s"
    sleep 0.5
  done
}

start_worker() {
  [ -n "$RAY_HEAD_IP" ] || die "worker: RAY_HEAD_IP is not set; set it to the head's address"
  knock "$RAY_HEAD_IP"
  start --address="$RAY_HEAD_IP:$RLSYS_PORT" "$@"
}

await() {
  local nodes=${1:?usage: node.sh await N} head=${RAY_HEAD_IP:-127.0.0.1}
  knock "$head"
  local end=$((SECONDS + wait_s))
  # A connection attempted too early was seen to hang, so each attempt has a time limit.
  until timeout 60 python3 -c "$count" "$nodes" "$head:$RLSYS_PORT"; do
    ((SECONDS < end)) || die "fewer than $nodes nodes are up after $wait_s s"
  done
}
count='
import sys, time, ray
ray.init(address=sys.argv[2], logging_level="error", log_to_driver=False)
while (up := sum(node["Alive"] for node in ray.nodes())) < int(sys.argv[1]):
    time.sleep(0.2)
print(f"{up} nodes are up")
'

stop() {
  if ! runs; then
    rm -f "$session_file"
    echo "no node of $(id -un) to stop here"
    return
  fi
  local session
  session=$(<"$session_file")
  pkill -TERM --session "$session" || true
  for _ in {1..50}; do
    pgrep --session "$session" >/dev/null || break
    sleep 0.1
  done
  pkill -KILL --session "$session" || true # the GCS was seen to outlive a TERM
  rm -f "$session_file"
  echo "stopped"
}

command=${1:-}
[ $# -eq 0 ] || shift
case "$command" in
head) start_head "$@" ;;
worker) start_worker "$@" ;;
await) await "$@" ;;
stop) stop ;;
certificate) exec "$deploy/certificate.sh" "$@" ;;
*) die "usage: node.sh head|worker [--block] [ray start options] | await N | stop | certificate [NAME ...]" ;;
esac
