# Sourced by demo.sh, test.sh and test_vllm.sh. `use_environment EXTRAS [REQUIREMENTS]` makes .venv in the checkout (or
# $VENV), installs this package with those extras and the tested versions into it, then what a file of hashed
# requirements names, and nothing that these need; and puts it on PATH. Once that is done it needs no network.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${VENV:-$ROOT/.venv}"
PYTHON="${PYTHON:-python3}"

use_environment() {
  local extras="$1" requirements="${2:+$ROOT/$2}" wanted installed
  wanted="$(cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt" ${requirements:+"$requirements"} | cksum)"
  installed="$VENV/.installed-${extras//,/-}"
  if [ "$(cat "$installed" 2>/dev/null)" != "$wanted" ]; then
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
      echo "error: Python 3.11 or newer is needed; name one with PYTHON=/path/to/python3.11" >&2
      exit 1
    }
    [ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV" || {
      echo "error: no environment could be made in $VENV; on Debian and Ubuntu: apt-get install python3-venv" >&2
      exit 1
    }
    echo "Installing trl_grpo_ext[$extras] into $VENV (once, about 2 minutes)"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
      --constraint "$ROOT/constraints.txt" --editable "$ROOT[$extras]" || exit
    [ -z "$requirements" ] || "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
      --no-deps --require-hashes --requirement "$requirements" || exit
    echo "$wanted" >"$installed"
  fi
  export PATH="$VENV/bin:$PATH"
}
