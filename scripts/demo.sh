#!/usr/bin/env bash
# Install into .venv and train the embedded policy on the CPU; arguments are passed on to the recipe.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"
use_environment report
cd "$ROOT"
# what goes on after Ctrl-C is this script; and a single process needs no launcher, which would have words of its own
TRL_GRPO_EXT_COMMAND="bash$(printf ' %q' "$0" "$@")" exec python recipes/gsm8k.py "$@"
