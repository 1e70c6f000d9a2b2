#!/usr/bin/env bash
# Installs into .venv and runs the quickstart: trains a small Eso-LM, evaluates it, samples from it.
#   bash launch/local.sh [--dry-run] [section.field=value ...]
# Hardware: a laptop (2 CPU cores, 4 GB) or a machine with an NVIDIA GPU, which it then uses. Time: see docs/measured.md.
# WORKDIR=DIR is where the run goes (runs/quickstart); the same command resumes it. --dry-run prints the commands.
# VENV=DIR is the environment (.venv).
set -euo pipefail
cd "$(dirname "$0")/.."
script=local.sh
# shellcheck source=launch/options.sh
source launch/options.sh
check_overrides "overrides" "$@"
venv=${VENV:-.venv}
backend=cpu
if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then backend=cuda; fi

echo "Installing into $venv ($backend) ..." >&2
run bash launch/install.sh "$backend"
run exec "$venv/bin/python" experiments/quickstart.py --workdir "${WORKDIR:-runs/quickstart}" "$@"
