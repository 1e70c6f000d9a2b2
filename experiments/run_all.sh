#!/usr/bin/env bash
# Every table and figure of the paper: trains what is missing, measures, and writes reports with the paper's numbers
# beside ours. Interrupted, the same command goes on where it was.
#   bash experiments/run_all.sh --scale smoke     a laptop: two CPU cores, about an hour; into experiments/results/smoke
#   bash experiments/run_all.sh --scale paper     the paper's own setting: months of a GPU host, or a pod
# VENV=DIR is the environment (.venv; made if it is not there), with the extra eval.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
if [ "$#" -ne 2 ] || [ "$1" != --scale ]; then
  echo "run_all.sh: error: give --scale smoke or --scale paper" >&2
  exit 2
fi
"$venv/bin/python" -c 'import mauve' 2>/dev/null || bash launch/install.sh eval
begin=$(date +%s)
"$venv/bin/python" experiments/tables/train_all.py "$@"
for script in experiments/tables/{table,figure}*.py; do
  "$venv/bin/python" "$script" "$@"
done
"$venv/bin/python" experiments/tables/index.py "$@"
echo "run_all.sh: all done in $((($(date +%s) - begin) / 60)) minutes" >&2
