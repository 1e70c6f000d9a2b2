#!/usr/bin/env bash
# What to run first on a machine with a GPU or a TPU: is all of it right there, and how fast? On an H200 the first two
# steps took 70 and 166 s, a check of the cache one to two minutes each, and the bench, mostly compiling, the most.
#   bash experiments/accelerator.sh OUT [--small]     OUT: a folder for logs, numbers and pictures
# 1 goldens      every number of the authors' code (needs the extra test)
# 2 quickstart   trains the small model at full size, bounds, samples, the cached sampler against MDLM's
# 3 check-cache  cached logits against uncached ones on that model, in float32 and bfloat16
# 4 bench        the paper's Table 11 at L = 8192, batches 1 and 16, one generation each
# A step that fails does not keep the others from running. --small tries the same steps at sizes for any machine.
# PYTHON=COMMAND is the interpreter (.venv/bin/python).
set -uo pipefail
out=${1:-} overrides=() sizes=(--lengths 8192 --batches 1 16)
if [ "${2:-}" = --small ]; then
  overrides=(model.width=32 model.length=32 train.steps=20 train.eval_windows=64)
  sizes=(model.width=32 model.heads=2 model.layers=1 model.vocab_size=500 --lengths 64 --batches 2)
fi
case $out in
  --help) sed -n '/^#!/d; /^#/!q; s/^# \{0,1\}//p' "$0"; exit ;;
  "" | -*) echo "accelerator.sh: error: give a folder for the results; see --help" >&2; exit 2 ;;
esac
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-.venv/bin/python}
kind=$("$python" -c 'import jax; print(jax.default_backend().replace("gpu", "cuda"), jax.devices()[0].device_kind)')
echo "accelerator.sh: $kind"
failed=0

step() {  # NAME SECONDS COMMAND...: at most so many seconds
  local name=$1 limit=$2 begun=$SECONDS
  shift 2
  if timeout "$limit" "$@" >"$out/$name.log" 2>&1; then
    echo "$name: done in $((SECONDS - begun)) s"
  else
    echo "$name: FAILED after $((SECONDS - begun)) s; the end of $out/$name.log:"
    tail -n 5 "$out/$name.log"
    failed=1
  fi
}

step goldens 300 env JAX_PLATFORMS="${kind%% *}" "$python" -m pytest -n 0 tests/test_goldens.py
step quickstart 600 "$python" experiments/quickstart.py --workdir "$out/quickstart" "${overrides[@]}"
cp "$out"/quickstart/{results.json,loss.png} "$out" 2>/dev/null
for type in float32 bfloat16; do
  step "check-cache-$type" 300 "$python" -m eso_jax check-cache --workdir "$out/quickstart" --dtype "$type"
done
step bench 1800 "$python" -m eso_jax bench sampling "${sizes[@]}" --preset table11 --repeats 1 --out "$out/bench.json"
exit $failed
