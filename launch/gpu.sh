#!/usr/bin/env bash
# Trains on one machine with NVIDIA GPUs, any number of them, in one process; installs into .venv first.
#   bash launch/gpu.sh [--dry-run] EXPERIMENT WORKDIR [section.field=value ...]
#   bash launch/gpu.sh experiments/owt/esolm_1.py runs/esolm_1 train.batch_size=256
# Hardware: GPUs whose memory the model and its batch fit. Time: the experiment's; the same command resumes.
# Preempted or crashed, it is started again: launch/restart.sh (PAUSE, CRASHES). SIGTERM: it saves and ends.
# --dry-run prints the commands and runs none. VENV=DIR is the environment (.venv). Paths: relative to the repository.
set -euo pipefail
cd "$(dirname "$0")/.."
dry_run=
fail() { echo "gpu.sh: error: $*" >&2; exit 2; }
run() { if [ -z "$dry_run" ]; then "$@"; else printf '%q' "$1"; printf ' %q' "${@:2}"; echo; fi; }

while [[ ${1:-} == -* ]]; do
  case $1 in
    --help) sed -n '/^#!/d; /^#/!q; s/^# \{0,1\}//p' launch/gpu.sh; exit ;;
    --dry-run) dry_run=1 ;;
    *) fail "no option $1; see --help" ;;
  esac
  shift
done
[ $# -ge 2 ] || fail "$# arguments; give EXPERIMENT and WORKDIR, or --help"
for override in "${@:3}"; do
  [[ $override == [!-]*=* ]] || fail "'$override': not section.field=value; options come before EXPERIMENT"
done
[ -f "$1" ] || fail "EXPERIMENT = '$1': no such file"

run nvidia-smi --list-gpus || fail "nvidia-smi finds no GPU; mend the driver, or train on the CPU with eso-jax train"
run bash launch/install.sh cuda
run exec bash launch/restart.sh "${VENV:-.venv}/bin/eso-jax" train "$1" --workdir "$2" "${@:3}"
