#!/usr/bin/env bash
# Check this package on an NVIDIA GPU: tests, benchmark, demo; within 20 minutes and without a network. `--help` says more.
# Nothing is installed: the Python is $PYTHON, or that of .venv (or $VENV) if demo.sh or test.sh has made it, or python3.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${VENV:-$ROOT/.venv}"
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  [ ! -x "$VENV/bin/python" ] || PYTHON="$VENV/bin/python"
fi
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" "$ROOT/scripts/check_gpu.py" "$@"
