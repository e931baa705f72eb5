#!/usr/bin/env bash
# Starts the ranks of one node under torchrun; run it on every node of a job.
set -euo pipefail

usage() {
  cat <<'EOF'
Usage: launch/torchrun.sh [KEY=VALUE ...]

Trains with the given configuration, for example:
  launch/torchrun.sh experiment=demo
  NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 launch/torchrun.sh experiment=demo parallel.tensor_model_parallel_size=8

Environment:
  NPROC_PER_NODE  ranks on this node       (default: its GPUs, or 2 without any)
  NNODES          nodes of the job         (default: 1)
  NODE_RANK       this node, from 0        (default: 0)
  MASTER_ADDR     host of node 0           (required with more than one node)
  MASTER_PORT     free port on that host   (default: 29500)
  MODULE          what to run              (default: megatron_mm.train)

SIGUSR1 is passed on to the ranks, which save a checkpoint and stop.
EOF
}

if [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then
  usage
  exit 0
fi

nodes="${NNODES:-1}"
ranks="${NPROC_PER_NODE:-$(python -c 'import torch; print(torch.cuda.device_count() or 2)')}"
if ((nodes > 1)) && [[ -z "${MASTER_ADDR:-}" ]]; then
  echo "error: NNODES=$nodes needs MASTER_ADDR, the host name of node 0, on every node." >&2
  exit 2
fi
if ((nodes > 1)); then
  rendezvous=(--nnodes "$nodes" --node-rank "${NODE_RANK:-0}"
    --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
else
  rendezvous=(--standalone)
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# The ranks are torchrun's children. It does not forward SIGUSR1 (and would die of it), so this shell does.
forward_usr1() {
  local pids
  read -ra pids <"/proc/$agent/task/$agent/children" || true # the file has no closing newline
  kill -USR1 "${pids[@]}"
}

trap '' USR1
torchrun "${rendezvous[@]}" --nproc-per-node "$ranks" -m "${MODULE:-megatron_mm.train}" "$@" &
agent=$!
trap forward_usr1 USR1
trap 'kill -TERM "$agent"' TERM INT

# wait returns early at every trapped signal; at last it returns torchrun's own exit code.
while kill -0 "$agent" 2>/dev/null; do wait "$agent" || true; done
wait "$agent"
