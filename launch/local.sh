#!/usr/bin/env bash
# Runs several processes on one machine, as a cluster would: to try a multi-host run locally.
#   launch/local.sh 2 train configs/shakespeare_char.py --mesh.data 2
set -euo pipefail
count=$1
shift
export JAX_COORDINATOR_ADDRESS=127.0.0.1:${PORT:-12355} JAX_NUM_PROCESSES=$count
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
for ((i = 1; i < count; i++)); do
  JAX_PROCESS_ID=$i jaxgpt "$@" >/dev/null 2>"${TMPDIR:-/tmp}/jaxgpt-process-$i.log" &
done
JAX_PROCESS_ID=0 jaxgpt "$@"
wait
