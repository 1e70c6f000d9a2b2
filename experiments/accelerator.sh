#!/usr/bin/env bash
# What to run first on a machine with a GPU: is all of it right there, and how fast? In eight minutes at most.
#   bash experiments/accelerator.sh OUT [--small] [STEP...]
# OUT is a folder for logs, numbers and pictures; OUT.tar.gz has all of them after each step, so also if one is killed.
# All steps, or those named, begin at once, in processes of their own. While a model trains for four minutes, tests run
# and what is timed later is compiled. Then each has the machine for itself, the most wanted first:
#   goldens      every number of the authors' code (needs the extra test)
#   kernels      attention, products of few rows, the draw, softmax and norms: this platform's kernels against the plain
#                computation (needs the extra test)
#   check-cache  cached logits against uncached ones of a small model, in float32 and bfloat16
#   curves       an Eso-LM of over 20 M parameters, trained for four minutes; then quality against passes and seconds
#   training     the step of the paper's size, L = 1024, batch 64: speed, memory, operations, family beside family
#   ratio        Table 11's Eso-LM, BD3-LM (16) and MDLM at L = 8192, batches 1 and 16, scaled from some passes
#   passes       a pass of AR and Eso-LM with kernels and without, L = 1024 and 8192, batches 1 and 16
#   shares       of attention, head and optimizer in a training step, by a profile
#   torch        a compiled PyTorch step of the same sizes, where there is torch
#   batches      the training step of AR at batches 32 and 128
#   table13      six rows of Table 13 at batch 512, a generation of each
#   sampling     Table 11 by whole generations, one of each
#   quickstart   the small model at full size: trained, bounds, samples (only if it is named)
# Compilers try out products and attention while others are at work on the card, so a figure may be a little worse than
# that of the same command by itself. A step that fails or finds no time left does not keep the others from running.
# --small: the same steps at sizes for any machine, within an hour. PYTHON=COMMAND is the interpreter (.venv/bin/python).
set -uo pipefail
steps=(goldens kernels check-cache curves training ratio passes shares torch batches table13 sampling)
total=475 out=${1:-}
tests=(env XLA_FLAGS= JAX_DISABLE_MOST_OPTIMIZATIONS=0) fast=()
tiny=() step=(--length 1024) batch=64 others=(32 128) pace=10
long=(--lengths 8192 --batches 1 16) both=(--lengths 1024 8192 --batches 1 16) wide=(--lengths 1024 --batches 512)
model=(--size 20m) learn=240 curves=38 samples=64 torch=(--batch 64)
brief=(train.steps=100 train.warmup=1 train.learning_rate=0.01 train.eval_windows=64) quickstart=()
case $out in
  --help) sed -n '/^#!/d; /^#/!q; s/^# \{0,1\}//p' "$0"; exit ;;
  "" | -*) echo "accelerator.sh: error: give a folder for the results; see --help" >&2; exit 2 ;;
esac
shift
if [ "${1:-}" = --small ]; then
  shift
  total=3600
  tests=(env) fast=(-m "not slow")
  tiny=(model.width=32 model.heads=2 model.layers=1 model.vocab_size=500) step=(--length 64) batch=4 others=(2) pace=2
  long=(--lengths 64 --batches 2) both=(--lengths 32 --batches 1) wide=(--lengths 32 --batches 2)
  brief=(model.width=32 model.length=32 "${brief[@]}") quickstart=("${brief[@]}")
  model=(--size smoke "${brief[@]}") learn=60 curves=60 samples=16
  torch=(--batch 2 --layers 1 --width 32 --heads 2 --length 32 --vocab 500)
fi
for name in "$@"; do
  [[ " ${steps[*]} quickstart " == *" $name "* ]] ||
    { echo "accelerator.sh: error: $name: no such step; see --help" >&2; exit 2; }
done
[ $# -eq 0 ] || steps=("$@")
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-.venv/bin/python} scratch=$(mktemp -d) failed=0 SECONDS=0
declare -A pids
export XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_PYTHON_CLIENT_MEM_FRACTION=0.9  # all of them share the card's memory

pack() {
  tar -czf "$scratch/all" --exclude=checkpoints -C "${out%/*}/" "${out##*/}"
  mv "$scratch/all" "$out.tar.gz"
}

# shellcheck disable=SC2329  # by the trap
leave() {
  jobs -rp | xargs -r kill
  wait
  pack
  rm -rf "$scratch"
}
trap leave EXIT
trap 'exit 143' TERM INT

start() {  # STEP NAME COMMAND...: in the background, if the step is asked for
  [[ " ${steps[*]} " == *" $1 "* ]] || return 0
  timeout -k 5 "$total" "${@:3}" >"$out/$2.log" 2>&1 &
  pids[$2]=$!
}

finish() {  # NAME SECONDS: its turn, until so many seconds have passed since the start
  local name=$1 pid=${pids[$1]:-}
  [ -n "$pid" ] || return 0
  touch "$scratch/$name"
  while kill -0 "$pid" 2>/dev/null && [ "$SECONDS" -lt "$2" ]; do sleep 0.1; done
  kill "$pid" 2>/dev/null  # what is over stays over
  if wait "$pid"; then
    echo "$name: done, at $SECONDS s"
  else
    echo "$name: FAILED or out of time, at $SECONDS s; the end of $out/$name.log:"
    tail -n 5 "$out/$name.log"
    failed=1
  fi
  pack
}

turn() { finish "$1" $((SECONDS + $2 * total / 475)); }  # NAME SECONDS: so many more
check() { start "$1" "$1" "${tests[@]}" "$python" -m pytest -n 0 "${fast[@]}" "${@:2}"; }
bench() {  # STEP NAME sampling|training OPTION...
  start "$1" "$2" "$python" -m eso_jax bench "${@:3}" --out "$out/$2.json" --wait-for "$scratch/$2" "${tiny[@]}"
}
table() { bench "$1" "$1" sampling --preset "${@:2}"; }
training() { bench "$1" "$2" training --families "$3" --alpha-0 0.5 --batch "$4" --steps "$pace" "${step[@]}"; }

kind=$("$python" -c 'import jax; print(jax.default_backend().replace("gpu", "cuda"), jax.devices()[0].device_kind)')
echo "accelerator.sh: $kind"
case $kind in tpu*) echo "accelerator.sh: error: all steps begin at once, and a TPU serves one process" >&2; exit 2 ;; esac
tests+=(JAX_PLATFORMS="${kind%% *}")
decoders=("$python" experiments/fewer_passes.py "${model[@]}")
start curves curves "${decoders[@]}" --workdir "$out/model" --train-seconds "$learn" --seconds "$curves" \
  --samples "$samples" --out "$out/curves.json"
# Its programs, compiled into JAX's cache meanwhile, with a model that has hardly trained.
start curves before-curves timeout "$learn" "${decoders[@]}" --workdir "$scratch/model" --seconds "$learn" \
  --samples 16 --out "$scratch/curves.json" train.steps=2 train.warmup=1
check goldens tests/test_goldens.py
check kernels tests/test_{kernels,softmax,norm}.py tests/test_attention.py::test_kernels_are_plain_attention
# shellcheck disable=SC2016  # $0 is the interpreter, $1 the model
start check-cache check-cache bash -c '"$0" -m eso_jax train quickstart --workdir "$@" || exit
  for type in float32 bfloat16; do "$0" -m eso_jax check-cache --workdir "$1" --dtype $type || exit; done
  ' "$python" "$out/cached" "${brief[@]}"
for family in ar mdlm esolm; do training training "training-$family" "$family" "$batch"; done
table ratio table11 --samplers Eso-LM "BD3-LM (16)" MDLM "${long[@]}" --passes 16 --repeats 1
table passes table11 --samplers Eso-LM AR "${both[@]}" --passes 64 --attention auto plain
start shares shares "$python" experiments/step_shares.py --families ar,esolm --batch "$batch" "${step[@]}" \
  --wait-for "$scratch/shares" --out "$out/shares.json" "${tiny[@]}"
if "$python" -c 'import importlib.util as i; raise SystemExit(i.find_spec("torch") is None)'; then
  start torch torch "$python" experiments/torch_step.py "${torch[@]}" --steps "$pace" --wait-for "$scratch/torch" \
    --out "$out/torch.json"
elif [[ " ${steps[*]} " == *" torch "* ]]; then
  echo "torch: left out, $python has none"
fi
for size in "${others[@]}"; do training batches "batch-$size" ar "$size"; done
table table13 table13 "${wide[@]}" --repeats 1 --samplers "Eso-LM a0=1 T=128" "MDLM a0=1 T=64" "Eso-LM a0=1 T=1024" \
  AR "BD3-LM (16) a0=1 T=256" "Eso-LM a0=0.25 T=128"
table sampling table11 --samplers Eso-LM AR "BD3-LM (16)" "${long[@]}" --repeats 1
start quickstart quickstart "$python" experiments/quickstart.py --workdir "$out/quickstart" "${quickstart[@]}"

for name in goldens kernels check-cache; do finish "$name" $((total * 250 / 475)); done
finish curves $((total * 325 / 475))
for name in training-{ar,mdlm,esolm}; do turn "$name" 15; done
for name in ratio passes shares; do turn "$name" 25; done
# The steps above have 445 s. Those below have what is left of them.
for name in torch "${others[@]/#/batch-}" table13 sampling quickstart; do finish "$name" "$total"; done
exit $failed
