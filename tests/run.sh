#!/usr/bin/env bash
# Makes or reuses .venv, installs the project with its test extra, and runs the tests on two processes.
#   bash tests/run.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
bash launch/install.sh test
# No new process for one that crashed: xdist 3.8 may then wait for ever for tests that have run.
exec "$venv/bin/python" -m pytest -n 2 --dist loadfile --max-worker-restart 0 "$@"
