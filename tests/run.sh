#!/usr/bin/env bash
# Makes or reuses .venv, installs the project with its test extra, and runs the tests on two processes.
#   bash tests/run.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
bash launch/install.sh test
exec "$venv/bin/python" -m pytest -n 2 --dist loadfile "$@"
