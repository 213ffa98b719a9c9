#!/usr/bin/env bash
# Install into .venv and train the embedded policy on the CPU; arguments are passed on to the recipe.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"
use_environment report
cd "$ROOT"
exec accelerate launch recipes/gsm8k.py "$@"
