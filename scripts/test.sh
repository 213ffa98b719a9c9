#!/usr/bin/env bash
# Install into .venv, check style and types, and run every test; arguments are passed on to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"
use_environment dev
cd "$ROOT"
ruff check .
ruff format --check .
mypy
# `-m ""` takes the slow tests in, which plain `pytest` leaves out.
exec python -m pytest -m "" "$@"
