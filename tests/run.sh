#!/usr/bin/env bash
# Makes or reuses .venv, installs the project with its test extra, and runs the tests on two processes.
#   bash tests/run.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
bash launch/install.sh test
# Files in the order of tests/conftest.py, which knows the long ones; xdist would begin with those of most tests. No new
# process for one that crashed: xdist 3.8 may then wait for ever for tests that have run.
exec "$venv/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 "$@"
