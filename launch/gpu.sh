#!/usr/bin/env bash
# Trains on one machine with NVIDIA GPUs, any number of them, in one process; installs into .venv first.
#   bash launch/gpu.sh [--dry-run] EXPERIMENT WORKDIR [section.field=value ...]
#   bash launch/gpu.sh experiments/paper.py:owt/esolm_1 runs/esolm_1 train.batch_size=256
# EXPERIMENT: FILE.py, FILE.py:RUN, a config.json, or quickstart, as `eso-jax train` takes it.
# Hardware: GPUs whose memory the model and its batch fit. Time: the experiment's; the same command resumes.
# Preempted or crashed, it is started again: launch/restart.sh (PAUSE, CRASHES). SIGTERM: it saves and ends.
# --dry-run prints the commands and runs none. VENV=DIR is the environment (.venv). Paths: relative to the repository.
set -euo pipefail
cd "$(dirname "$0")/.."
script=gpu.sh
# shellcheck source=launch/options.sh
source launch/options.sh
[ $# -ge 2 ] || fail "$# arguments; give EXPERIMENT and WORKDIR, or --help"
check_overrides EXPERIMENT "${@:3}"
experiment_file "$1" >/dev/null

run nvidia-smi --list-gpus || fail "nvidia-smi finds no GPU; mend the driver, or train on the CPU with eso-jax train"
run bash launch/install.sh cuda
run exec bash launch/restart.sh "${VENV:-.venv}/bin/eso-jax" train "$1" --workdir "$2" "${@:3}"
