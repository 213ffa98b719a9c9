#!/usr/bin/env bash
# Install into .venv, check style and types, and run every test; arguments are passed on to pytest. Without arguments
# scripts/test_matrix.sh --short and scripts/test_vllm.sh are the last parts.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"
use_environment dev
cd "$ROOT"
ruff check .
ruff format --check .
mypy
case " $* " in *" -m "*) exec python -m pytest "$@" ;; esac
# Everything, also the slow tests, which plain `pytest` leaves out. Those that start processes of their own come last,
# one at a time. The worst part decides, and all are named at the end, because a failure may be pages above it.
status=5 summary=""
part() {
  local name="$1" result=0
  shift
  "$@" || result=$?
  [ "$result" != 5 ] || return 0 # none of the tests that were asked for is of this part
  if [ "$result" = 0 ]; then summary+="$name: passed"$'\n'; else summary+="$name: FAILED, see above"$'\n'; fi
  if [ "$status" = 5 ] || [ "$result" -gt "$status" ]; then status="$result"; fi
}
part "tests" python -m pytest -m "not distributed" "$@"
part "distributed tests" python -m pytest -n 0 -m distributed "$@"
# Other releases of TRL, and vLLM, have folders of their own, and no option for these tests is meant for them.
[ $# -gt 0 ] || part "tests with older releases of TRL" bash scripts/test_matrix.sh --short
[ $# -gt 0 ] || part "tests with vLLM, unless skipped above" bash scripts/test_vllm.sh
printf '\n%s' "$summary"
exit "$status"
