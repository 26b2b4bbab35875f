#!/usr/bin/env bash
# Checks on a rented GPU, one call for each of the two commands; docs/gpu.md says what their lines mean.
#
#   benchmarks/gpu_session.sh check OUT             torch, transformers and peft; 6 minutes
#   benchmarks/gpu_session.sh loop OUT [ARCHIVE]    6 minutes; ARCHIVE.tar.xz holds vLLM, Ray and the rest
#
# MINUTES=4 shortens the run, PYTHON names the interpreter, SITE the folder into which ARCHIVE is unpacked; ARGS are
# further arguments of the command. Facts are in OUT/facts.jsonl as soon as they are known.
set -uo pipefail

usage() {
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    echo "error: $1" >&2
    exit 2
}

what=${1:-} out=${2:-} archive=${3:-}
case $what in check | loop) ;; *) usage "found '${what}'; wanted check or loop" ;; esac
[ -n "$out" ] || usage "found no folder for the results"
mkdir -p "$out" || usage "$out cannot be made"
out=$(cd "$out" && pwd)
[ -z "$archive" ] || [ -r "$archive" ] || usage "$archive cannot be read"
[ -z "$archive" ] || archive=$(readlink -f "$archive")

cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3} minutes=${MINUTES:-6}
read -r -a more <<<"${ARGS:-}"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
{
    nvidia-smi || echo "nvidia-smi: not there"
    df -h /dev/shm /tmp
    nproc
    free -g
} >"$out/machine.txt" 2>&1

if [ "$what" = check ]; then
    exec "$python" -m benchmarks.gpu_check --out "$out" --minutes "$minutes" "${more[@]}"
fi
if [ -n "$archive" ]; then
    site=${SITE:-/tmp/rlsys-site}
    if [ ! -d "$site/vllm" ]; then
        { mkdir -p "$site" && tar -xJf "$archive" -C "$site"; } || usage "$archive cannot be unpacked into $site"
    fi
    export PYTHONPATH=$site:$PWD${PYTHONPATH:+:$PYTHONPATH}
fi
exec "$python" -m benchmarks.gpu_loop "$out" --minutes "$minutes" "${more[@]}"
