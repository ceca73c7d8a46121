#!/usr/bin/env bash
# Run the same command on every machine. HEAD: name or address of the first machine; NODES: number of machines.
#   HEAD=node0 NODES=4 experiments/launch/torchrun_many_nodes.sh train --config experiments/llava15_7b.yaml
# On the first machine add IS_HEAD=1 if its name does not resolve to itself (containers, network namespaces).
set -euo pipefail
: "${HEAD:?set HEAD to the name or address of the first machine}" "${NODES:?set NODES to the number of machines}"
verb="$1"
shift
strategy=()
if [[ "$verb" == train ]]; then strategy=(--trainer.strategy="${STRATEGY:-ddp}"); fi
conf="join_timeout=900,last_call_timeout=10"
if [[ -n "${IS_HEAD:-}" ]]; then conf="$conf,is_host=$IS_HEAD"; fi
local_addr=()
if [[ -n "${LOCAL_ADDR:-}" ]]; then local_addr=(--local-addr "$LOCAL_ADDR"); fi
exec torchrun --nnodes "$NODES" --nproc-per-node "${PROCESSES:-gpu}" --max-restarts "${MAX_RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD:${PORT:-29512}" --rdzv-id "${JOB_ID:-evocomp}" --rdzv-conf "$conf" \
    "${local_addr[@]}" -m evocomp "$verb" "$@" "${strategy[@]}"
