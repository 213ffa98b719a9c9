#!/usr/bin/env bash
# Run the tests that say whether this package works with a TRL, on several releases of it; `--help` says which.
# The environment is that of test.sh, each release lies in .venv-trl beside it, and both are made once.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"
use_environment dev
exec python "$ROOT/scripts/test_matrix.py" "$@"
