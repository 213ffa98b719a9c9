#!/usr/bin/env bash
# Install into .venv and train the embedded policy on the CPU; arguments are passed on to the recipe.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"
use_environment report
cd "$ROOT"
# `accelerate launch recipes/gsm8k.py`, which leaves first and last words to the recipe; after Ctrl-C this script goes on
printf -v TRL_GRPO_EXT_COMMAND 'bash %q' "$0"
export TRL_GRPO_EXT_COMMAND
exec trl-grpo-ext launch recipes/gsm8k.py "$@"
