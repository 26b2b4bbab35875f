# shellcheck shell=bash
# Settings that must be the same for all processes of a cluster. Sourced by node.sh, submit.sh and slurm.sh; variables
# that are already set are kept.
for name in "${!RAY_@}" "${!RLSYS_@}" TMPDIR; do # empty counts as unset: Ray would use the working directory
  [ -n "${!name:-}" ] || unset "$name"
done
deploy=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
# The environment created by `make`, for CPUs or for CUDA. RLSYS_VENV selects another folder, or one of the two.
for each in ${RLSYS_VENV:+"$RLSYS_VENV"} "$deploy/../.venv" "$deploy/../.venv-cuda"; do
  [ -x "$each/bin/ray" ] || continue
  PATH="$(readlink -f "$each/bin"):$PATH"
  break
done

# Ray reads the token from RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token, and does not start without one.
export RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}"

# Mutual TLS between all processes: 0 or 1.
export RAY_USE_TLS="${RAY_USE_TLS:-0}"
if [ "$RAY_USE_TLS" = 1 ]; then
  tls="${RLSYS_TLS_DIR:-$HOME/.ray/tls}"
  export RAY_TLS_CA_CERT="${RAY_TLS_CA_CERT:-$tls/ca.crt}"
  export RAY_TLS_SERVER_CERT="${RAY_TLS_SERVER_CERT:-$tls/$(hostname).crt}"
  export RAY_TLS_SERVER_KEY="${RAY_TLS_SERVER_KEY:-$tls/$(hostname).key}"
  export RLSYS_TLS_CA_KEY="${RLSYS_TLS_CA_KEY:-$tls/ca.key}"
fi

export RAY_USAGE_STATS_ENABLED="${RAY_USAGE_STATS_ENABLED:-0}"
export RAY_HEAD_IP="${RAY_HEAD_IP:-${FQ_RAY_IP:-}}" # Ray's launcher sets the first, KubeRay the second
export RLSYS_PORT="${RLSYS_PORT:-6379}"
export RLSYS_DASHBOARD_HOST="${RLSYS_DASHBOARD_HOST:-127.0.0.1}"
export RLSYS_DASHBOARD_PORT="${RLSYS_DASHBOARD_PORT:-8265}"
