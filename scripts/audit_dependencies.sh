#!/usr/bin/env bash
# Which packages of the tested set have known vulnerabilities: the versions of constraints.txt with all that they bring
# with them, against osv.dev (or a mirror of it, $OSV_URL), by pip-audit; arguments are passed on to it (`--desc`,
# `--ignore-vuln ID`). Exit status: 0 none has, or osv.dev cannot be reached from here, which is said; 1 some have.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"
use_environment dev

SERVICE="${OSV_URL:-https://api.osv.dev}"
python - "$SERVICE" <<'PROBE' || { echo "skipped: $SERVICE cannot be reached from here: run it where there is a network"; exit 0; }
import sys, urllib.error, urllib.request
try:
    urllib.request.urlopen(sys.argv[1], timeout=20)
except urllib.error.HTTPError:
    pass  # it has answered
except OSError:
    sys.exit(1)
PROBE

# An environment of its own, because pip-audit brings packages with it that are not of the set.
VENV_AUDIT="${VENV_AUDIT:-$ROOT/.venv-audit}"
[ -x "$VENV_AUDIT/bin/pip-audit" ] || {
  python -m venv "$VENV_AUDIT"
  "$VENV_AUDIT/bin/python" -m pip install --quiet --disable-pip-version-check "pip-audit>=2.9,<3"
}
frozen="$(mktemp)"
trap 'rm -f "$frozen"' EXIT
# a build of torch for CPUs, 2.13.0+cpu, is 2.13.0 in every list of vulnerabilities
python -m pip list --format=freeze --exclude-editable --disable-pip-version-check | sed 's/+.*//' >"$frozen"
echo "$(wc -l <"$frozen") packages against $SERVICE"
"$VENV_AUDIT/bin/pip-audit" --vulnerability-service osv --osv-url "$SERVICE/v1/query" --disable-pip --no-deps --requirement "$frozen" "$@"
