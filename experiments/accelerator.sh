#!/usr/bin/env bash
# What to run first on a machine with a GPU or a TPU: is all of it right there, and how fast? What matters comes first;
# each step has a limit. On an H200 goldens took 70 s, quickstart 166 s, a check of the cache one to two minutes, and
# sampling, mostly compiling, the most.
#   bash experiments/accelerator.sh OUT [--small] [STEP...]     OUT: a folder for logs, numbers and pictures
# goldens      every number of the authors' code (needs the extra test)
# attention    the kernels of this platform against the plain computation (needs the extra test)
# training     the training step of the paper's size at L = 1024: speed, memory, operations, family beside family
# sampling     the paper's Table 11 at L = 8192, batches 1 and 16, one generation each
# quickstart   trains the small model at full size, bounds, samples, the cached sampler against MDLM's
# check-cache  cached logits against uncached ones on that model, in float32 and bfloat16
# All of them, or only those named, in this order.
# A step that fails does not keep the others from running. --small tries the same steps at sizes for any machine.
# PYTHON=COMMAND is the interpreter (.venv/bin/python).
set -uo pipefail
out=${1:-} overrides=() sizes=(--lengths 8192 --batches 1 16) train=(--length 1024 --batch 32)
shift
if [ "${1:-}" = --small ]; then
  shift
  tiny=(model.width=32 model.heads=2 model.layers=1 model.vocab_size=500)
  overrides=(model.width=32 model.length=32 train.steps=20 train.eval_windows=64)
  sizes=("${tiny[@]}" --lengths 64 --batches 2) train=("${tiny[@]}" --length 64 --batch 4 --steps 2)
fi
case $out in
  --help) sed -n '/^#!/d; /^#/!q; s/^# \{0,1\}//p' "$0"; exit ;;
  "" | -*) echo "accelerator.sh: error: give a folder for the results; see --help" >&2; exit 2 ;;
esac
all=" goldens attention training sampling quickstart check-cache " steps=" $* "
for name in "$@"; do
  [[ $all == *" $name "* ]] || { echo "accelerator.sh: error: $name: no such step; see --help" >&2; exit 2; }
done
[ $# -gt 0 ] || steps=$all
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-.venv/bin/python}
kind=$("$python" -c 'import jax; print(jax.default_backend().replace("gpu", "cuda"), jax.devices()[0].device_kind)')
echo "accelerator.sh: $kind"
failed=0

run() {  # STEP NAME SECONDS COMMAND...: if the step is asked for, at most so many seconds
  local name=$2 limit=$3 begun=$SECONDS
  [[ $steps == *" $1 "* ]] || return 0
  shift 3
  if timeout "$limit" "$@" >"$out/$name.log" 2>&1; then
    echo "$name: done in $((SECONDS - begun)) s"
  else
    echo "$name: FAILED after $((SECONDS - begun)) s; the end of $out/$name.log:"
    tail -n 5 "$out/$name.log"
    failed=1
  fi
}

tests() { run "$1" "$1" 300 env JAX_PLATFORMS="${kind%% *}" "$python" -m pytest -n 0 "${@:2}"; }
bench() { run "$1" "$1" "$2" "$python" -m eso_jax bench "$1" "${@:3}" --out "$out/$1.json"; }

tests goldens tests/test_goldens.py
tests attention tests/test_attention*.py
bench training 600 "${train[@]}" --families ar,mdlm,esolm --alpha-0 1 0.5
bench sampling 1800 "${sizes[@]}" --preset table11 --repeats 1
run quickstart quickstart 600 "$python" experiments/quickstart.py --workdir "$out/quickstart" "${overrides[@]}"
cp "$out"/quickstart/{results.json,loss.png} "$out" 2>/dev/null
for type in float32 bfloat16; do
  run check-cache "check-cache-$type" 300 "$python" -m eso_jax check-cache --workdir "$out/quickstart" --dtype "$type"
done
exit $failed
