"""Data sets with the columns `prompt` (messages), `answer` and `solution`."""

from .arithmetic import load_arithmetic
from .gsm8k import load_gsm8k
from .prompts import SYSTEM_PROMPT, format_solution, to_prompt


__all__ = ["SYSTEM_PROMPT", "format_solution", "load_arithmetic", "load_gsm8k", "to_prompt"]
