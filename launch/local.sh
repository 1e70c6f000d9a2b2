#!/usr/bin/env bash
# Installs into .venv and runs the quickstart: trains a small Eso-LM, evaluates it, samples from it.
#   bash launch/local.sh [--dry-run] [section.field=value ...]
# Hardware: a laptop (2 CPU cores, 4 GB) or a machine with an NVIDIA GPU, which it then uses. Time: see README.md.
# WORKDIR=DIR is where the run goes (runs/quickstart); the same command resumes it. --dry-run prints the commands.
# VENV=DIR is the environment (.venv).
set -euo pipefail
cd "$(dirname "$0")/.."
dry_run=
fail() { echo "local.sh: error: $*" >&2; exit 2; }
run() { if [ -z "$dry_run" ]; then "$@"; else printf '%q' "$1"; printf ' %q' "${@:2}"; echo; fi; }

while [[ ${1:-} == -* ]]; do
  case $1 in
    --help) sed -n '/^#!/d; /^#/!q; s/^# \{0,1\}//p' launch/local.sh; exit ;;
    --dry-run) dry_run=1 ;;
    *) fail "no option $1; see --help" ;;
  esac
  shift
done
for override in "$@"; do
  [[ $override == [!-]*=* ]] || fail "'$override': not section.field=value; options come first"
done
venv=${VENV:-.venv}
backend=cpu
if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then backend=cuda; fi

echo "Installing into $venv ($backend) ..." >&2
run bash launch/install.sh "$backend"
run exec "$venv/bin/python" experiments/quickstart.py --workdir "${WORKDIR:-runs/quickstart}" "$@"
