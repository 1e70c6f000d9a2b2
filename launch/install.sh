#!/usr/bin/env bash
# Makes or reuses a virtual environment and installs the project in it, editable. Used by the other scripts.
#   bash launch/install.sh [EXTRAS]     EXTRAS: cpu (default), cuda, tpu, test, ...; commas between several
# VENV=DIR is the environment (.venv), PYTHON=COMMAND the interpreter it is made with: the newest of those that are tested
# (3.13, 3.12, 3.11), else python3 if that is 3.11 or above.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
extras=${1:-cpu}
case $extras in
  --help) sed -n '/^#!/d; /^#/!q; s/^# \{0,1\}//p' launch/install.sh; exit ;;
  -*) echo "install.sh: error: no option $extras; see --help" >&2; exit 2 ;;
esac

if [ ! -x "$venv/bin/python" ]; then
  for python in ${PYTHON:-python3.13 python3.12 python3.11 python3 none}; do
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
  done
  if [ "$python" = none ]; then
    echo "install.sh: error: no Python >= 3.11 on PATH; install one, or set PYTHON=COMMAND" >&2
    exit 2
  fi
  if ! "$python" -m venv "$venv" >&2; then
    rm -rf "$venv"
    echo "install.sh: error: '$python -m venv' failed; on Debian and Ubuntu install python3-venv" >&2
    exit 2
  fi
fi
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".[$extras]"
