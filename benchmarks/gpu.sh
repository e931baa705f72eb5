#!/usr/bin/env bash
# Everything that is due on a GPU, in slices of less than ten minutes, the most valuable first:
#   benchmarks/gpu.sh OUT                  all slices that are not done; one that is cut at its limit goes on next time
#   benchmarks/gpu.sh OUT --slice NAME     one of them
#   benchmarks/gpu.sh --list               their names, and what each is for
# Options: --limit SECONDS of a slice (default 570), --dry: tiny sizes on a CPU, to try the command itself.
# PYTHON=... names the interpreter, MM_COMMIT=... the commit where git does not know it. A slice that finished leaves
# OUT/NAME.done, which holds for that commit. Exit code 3: a slice was cut, call again; 1: something failed.
set -uo pipefail
usage() { sed -n 's/^#   //p; s/^# Opt/Opt/p' "$0" >&2; exit 2; }
names=(tests kernels step vocab_loss tiles all_kernels sanitizer)
about() {
  case $1 in
    tests) echo "is it right: pytest -m gpu, kernels and runs of every family" ;;
    kernels) echo "span attention beside its peers, where it counts: 8k and 32k positions, heads of 128" ;;
    step) echo "whole training steps of Transfusion 1.4B and eight layers of Chameleon 7B, beside other ways" ;;
    vocab_loss) echo "the head with its loss: time, and peak memory" ;;
    tiles) echo "every tile size that the kernels may be tuned to" ;;
    all_kernels) echo "the whole kernel table: 1k to 128k positions, heads of 64 and 128" ;;
    sanitizer) echo "the kernels under compute-sanitizer's memory checker, where it is installed" ;;
  esac
}
out='' limit=570 dry='' chosen=("${names[@]}")
while (($#)); do
  case $1 in
    --list) for name in "${names[@]}"; do printf '%-12s %s\n' "$name" "$(about "$name")"; done; exit ;;
    --slice) chosen=("${2:?}"); [[ -n $(about "$2") ]] || { echo "error: no slice $2: ${names[*]}" >&2; exit 2; }; shift ;;
    --limit) limit=${2:?}; shift ;;
    --dry) dry=1 ;;
    -*) usage ;;
    *) [[ -z $out ]] && out=$1 || usage ;;
  esac
  shift
done
[[ -n $out ]] || usage
mkdir -p "$out" && out=$(realpath "$out") || exit 2
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
root=$PWD
python=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
# The package need not be installed: its configurations are one under another name.
mkdir -p "$out/site" && ln -sfn "$root/configs" "$out/site/megatron_mm_configs"
export PYTHONPATH="$root:$root/kernels:$root/tests:$out/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export MM_KERNELS_CACHE=$out/tuned MM_COMMIT=${MM_COMMIT:-$(git describe --always --dirty --exclude='*' 2>/dev/null)}
[[ $dry ]] || "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null ||
  { echo "error: $python has no torch, or it sees no GPU." >&2; exit 2; }

command_of() { # the slice's command, in the array `command`
  local kernels=("$python" -m mm_kernels.span_attention.benchmark --out "$out/attention" --budget $((limit - 30)))
  local tiles=("$python" -m mm_kernels.span_attention.benchmark.tiles --out "$out/tiles")
  local small=(--device cpu --lengths 64 --head-dims 16 --heads 2:1 --tokens 64 --milliseconds 1)
  case $1 in
    tests)
      command=("$python" -m pytest -q -p no:cacheprovider --passed "$out/tests.passed" --durations 20)
      if [[ $dry ]]; then command+=(tests/test_mask.py); else
        # Other files may need packages that are not there.
        mapfile -t files < <(grep -rlE 'mark\.gpu|ON_KERNEL_DEVICE|def test_.*\bdevice[,)]' tests --include='test_*.py')
        command+=(-m "gpu and not exhaustive" "${files[@]}")
        "$python" -c 'import xdist' 2>/dev/null && command+=(-n 4)
      fi ;;
    kernels)
      if [[ $dry ]]; then command=("${kernels[@]}" "${small[@]}" --distributions docs); else
        command=("${kernels[@]}" --lengths 8192 32768 --head-dims 128); fi ;;
    all_kernels)
      if [[ $dry ]]; then command=("${kernels[@]}" "${small[@]}" --distributions docs t2i); else command=("${kernels[@]}"); fi ;;
    step)
      command=("$python" -m megatron_mm.benchmark out="$out/step")
      [[ $dry ]] && command+=(experiment=benchmark_transfusion variants=ours,dense warmup=1 steps=1 text_vocab_size=100
        train.precision=fp32 data.seq_length=128 model.trunk.num_layers=1 model.trunk.hidden_size=32
        model.trunk.num_attention_heads=2 model.trunk.ffn_hidden_size=64 model.image.height=8 model.image.width=8) ;;
    vocab_loss)
      command=("$python" -m mm_kernels.vocab_loss.benchmark --out "$out/vocab_loss")
      [[ $dry ]] && command+=(--device cpu --tokens 16 --vocab 64 --hidden 8 --repeats 1) ;;
    tiles)
      if [[ $dry ]]; then command=(env TRITON_INTERPRET=1 "${tiles[@]}" "${small[@]}" --distributions docs); else
        command=("${tiles[@]}"); fi ;;
    sanitizer)
      command=(true)
      [[ ! $dry ]] && type -P compute-sanitizer >/dev/null && command=(compute-sanitizer --target-processes all
        --error-exitcode 1 "$python" -m pytest -q -x tests/kernels/test_span_attention.py -k "named_masks and bfloat16") ;;
  esac
}

failed=() cut=()
for name in "${chosen[@]}"; do
  if [[ -f $out/$name.done && $(<"$out/$name.done") == "$MM_COMMIT" ]]; then echo "== $name: done"; continue; fi
  command_of "$name"
  echo "== $name: ${command[*]}"
  began=$SECONDS
  timeout --kill-after=20 "$limit" "${command[@]}" 2>&1 | tee -a "$out/$name.log"
  status=${PIPESTATUS[0]}
  [[ $name == tests && $status == 5 ]] && status=0 # nothing is left to run
  echo "== $name: $((SECONDS - began)) s, exit code $status"
  case $status in
    0) grep -qs "The time is up" <(tail -n 3 "$out/$name.log") && cut+=("$name") || echo "$MM_COMMIT" >"$out/$name.done" ;;
    124 | 137) cut+=("$name") ;;
    *) failed+=("$name") ;;
  esac
done
((${#failed[@]} == 0)) || { echo "failed: ${failed[*]} (see OUT/NAME.log)" >&2; exit 1; }
((${#cut[@]} == 0)) || { echo "not finished, call again to go on: ${cut[*]}" >&2; exit 3; }
