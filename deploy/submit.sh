#!/usr/bin/env bash
# Run a job on a Ray cluster that is already up, from this checkout:
#   deploy/submit.sh http://head:8265 configs/quickstart.yaml run.dir=/data/runs [key=value ...]
# Every node has the packages of requirements/; this checkout's code travels with the job. Give run.dir an absolute path on
# the head node: the job's own folder goes away with it.
set -euo pipefail
# shellcheck source=deploy/env.sh
source "$(dirname "$(readlink -f "$0")")/env.sh"
address=${1:?usage: deploy/submit.sh ADDRESS CONFIG [key=value ...]}
shift
exec ray job submit --address "$address" --working-dir "$(readlink -f "$deploy/..")" -- python -m rlsys train "$@"
