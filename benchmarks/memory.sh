#!/usr/bin/env bash
# Peak memory of a rank while ranks and context grow together: 1, 2, 4 and 8 ranks, every way of sending keys.
#   benchmarks/memory.sh OUT.csv [TOKENS]     tokens on each rank (default 512); one row a measurement is appended
set -euo pipefail
[[ $# -ge 1 ]] || { sed -n 's/^#   //p' "$0" >&2; exit 2; }
out=$(realpath "$1"); tokens=${2:-512}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
for comm in ring exchange ulysses; do
  for ranks in 1 2 4 8; do
    "$python" -m torch.distributed.run --nproc-per-node "$ranks" -m megatron_mm.benchmark.memory out="$out" \
      tokens="$tokens" parallel.context_parallel_comm="$comm" parallel.feed_forward_block=512
  done
done
