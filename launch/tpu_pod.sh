#!/usr/bin/env bash
# Runs the same command on every worker of a Cloud TPU pod slice; jax detects the other hosts automatically.
#   launch/tpu_pod.sh my-pod us-central2-b train configs/llama3_8b.py --mesh.fsdp 64
# The repository must be in the same folder on every worker; `runs` and `data` should be shared storage.
set -euo pipefail
name=$1 zone=$2
shift 2
printf -v words '%q ' "$@"
gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all \
  --command "cd jaxgpt && uv run --extra tpu jaxgpt $words"
