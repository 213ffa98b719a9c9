#!/usr/bin/env bash
# Install into .venv, check style and types, and run every test; arguments are passed on to pytest. Without arguments
# scripts/test_vllm.sh is the last part.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"
use_environment dev
cd "$ROOT"
ruff check .
ruff format --check .
mypy
case " $* " in *" -m "*) exec python -m pytest "$@" ;; esac
# Everything, also the slow tests, which plain `pytest` leaves out. Those that start processes of their own come last,
# one at a time.
single=0 distributed=0 vllm=0
python -m pytest -m "not distributed" "$@" || single=$?
python -m pytest -n 0 -m distributed "$@" || distributed=$?
# vLLM has an environment of its own, and tests that no option for these is meant for.
[ $# -gt 0 ] || bash scripts/test_vllm.sh || vllm=$?
[ "$vllm" = 0 ] || exit "$vllm"
# 5: none of the tests that were asked for is of this part
[ "$single" = 5 ] && exit "$distributed"
[ "$distributed" = 5 ] && exit "$single"
exit $((single > distributed ? single : distributed))
