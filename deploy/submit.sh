#!/usr/bin/env bash
# Runs a job from this checkout on a running Ray cluster:
#   deploy/submit.sh http://head:8265 configs/quickstart.yaml run.dir=/data/runs [key=value ...]
# Every node needs the packages of requirements/; the code of this checkout is uploaded with the job. Set run.dir to an
# absolute path on the head node: the job's working directory is deleted after the job.
set -euo pipefail
# shellcheck source=deploy/env.sh
source "$(dirname "$(readlink -f "$0")")/env.sh"
address=${1:?usage: deploy/submit.sh ADDRESS CONFIG [key=value ...]}
shift
exec ray job submit --address "$address" --working-dir "$(readlink -f "$deploy/..")" -- python -m rlsys train "$@"
