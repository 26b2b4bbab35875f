#!/usr/bin/env bash
#SBATCH --job-name=rlsys
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@120
# Starts a Ray cluster on the nodes of a Slurm job, runs one training job on it, and stops the cluster. Submit from the
# checkout, which must be on a file system shared by all nodes:
#   sbatch deploy/slurm.sh configs/quickstart.yaml [key=value ...]
# The packages for CUDA sample only on GPUs, so request one:
#   sbatch --gpus-per-node=1 deploy/slurm.sh configs/quickstart.yaml model.dtype=bfloat16 \
#     learner.num_gpus=0.5 sampler.num_gpus=0.5 sampler.colocate=true
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?slurm.sh runs under sbatch}" # sbatch runs a copy of this file from elsewhere
# Nodes can be shared by several jobs, so ports and Ray's folder depend on the job id.
export RLSYS_PORT="${RLSYS_PORT:-$((20000 + SLURM_JOB_ID % 10000))}"
export RLSYS_DASHBOARD_PORT="${RLSYS_DASHBOARD_PORT:-$((RLSYS_PORT + 10000))}"
export RLSYS_AGENT_PORT="${RLSYS_AGENT_PORT:-$((RLSYS_PORT + 20000))}"
export RLSYS_CLIENT_PORT="${RLSYS_CLIENT_PORT:-$((RLSYS_PORT + 30000))}"
export RAY_TMPDIR="${RAY_TMPDIR:-/tmp/rlsys-$SLURM_JOB_ID}"
# shellcheck source=deploy/env.sh
source deploy/env.sh

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
on() { # on NODES COMMAND...: with all resources of the job there. Replaces the subshell, so that signals reach srun
  local where=$1
  shift
  exec srun --overlap --nodelist="$where" --nodes="$(tr , '\n' <<<"$where" | wc -l)" --ntasks-per-node=1 \
    --cpus-per-task="$SLURM_CPUS_ON_NODE" --cpu-bind=none "$@"
}
read -r RAY_HEAD_IP _ < <(on "${nodes[0]}" hostname -I)
export RAY_HEAD_IP

steps=()
finish() {
  trap '' TERM INT
  [ ${#steps[@]} -eq 0 ] || kill -TERM "${steps[@]}" 2>/dev/null || true
  wait
}
trap finish EXIT
trap 'exit 143' TERM INT

on "${nodes[0]}" deploy/node.sh head --block --num-cpus="$SLURM_CPUS_ON_NODE" &
steps+=($!)
if [ ${#nodes[@]} -gt 1 ]; then
  on "$(IFS=, && echo "${nodes[*]:1}")" deploy/node.sh worker --block --num-cpus="$SLURM_CPUS_ON_NODE" &
  steps+=($!)
fi
(on "${nodes[0]}" deploy/node.sh await "${#nodes[@]}")

RAY_ADDRESS="$RAY_HEAD_IP:$RLSYS_PORT" on "${nodes[0]}" rlsys train "$@" &
steps+=($!)
wait $! # a signal ends this wait; finish sends it to the run, which then saves its state
