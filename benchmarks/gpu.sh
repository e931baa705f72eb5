#!/usr/bin/env bash
# Everything that is due on a GPU, in one command: tests, memory checker, benchmarks.
#   benchmarks/gpu.sh OUT [SECONDS]     results go to OUT; the attention benchmark stops after SECONDS (default 900)
# What is measured already is not measured again: start it once more to go on. PYTHON=... names the interpreter.
set -uo pipefail
[[ $# -ge 1 ]] || { sed -n 's/^#   //p' "$0" >&2; exit 2; }
mkdir -p "$1" && out=$(realpath "$1") || exit 2
seconds=${2:-900}
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
export PYTHONPATH="$PWD:$PWD/kernels:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null || { echo "error: $python has no torch, or it sees no GPU." >&2; exit 2; }

failed=()
stage() { # name, command...: its output goes to the terminal and to OUT/name.log
  local name=$1; shift
  echo "== $name: $*"
  "$@" 2>&1 | tee "$out/$name.log" || failed+=("$name")
}
stage tests "$python" -m pytest -q -m "not slow" tests/kernels tests/nn
command -v compute-sanitizer >/dev/null && stage sanitizer compute-sanitizer --error-exitcode 1 \
  "$python" -m pytest -q -x tests/kernels/test_span_attention.py -k "named_masks and bfloat16"
stage attention "$python" -m mm_kernels.span_attention.benchmark --out "$out/attention" --budget "$seconds"
stage vocab_loss "$python" -m mm_kernels.vocab_loss.benchmark --out "$out/vocab_loss"
stage step "$python" -m megatron_mm.benchmark out="$out/step"
((${#failed[@]} == 0)) || { echo "failed: ${failed[*]}" >&2; exit 1; }
