#!/usr/bin/env bash
# All GPUs of this machine:  experiments/launch/torchrun_one_node.sh label --config experiments/llava15_7b.yaml
# PROCESSES=2 experiments/launch/torchrun_one_node.sh ...  starts two processes, also on CPUs.
set -euo pipefail
processes="${PROCESSES:-gpu}"
verb="$1"
shift
strategy=()
if [[ "$verb" == train ]]; then strategy=(--trainer.strategy="${STRATEGY:-ddp}"); fi
exec torchrun --standalone --nproc-per-node "$processes" --max-restarts 3 \
    -m evocomp "$verb" "$@" "${strategy[@]}"
