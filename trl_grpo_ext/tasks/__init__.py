"""Data sets with the columns `prompt` (messages), `answer`, `id` and `solution` where they have them."""

from ..rewards.extractors import ANSWER_EXTRACTORS
from .arithmetic import load_arithmetic
from .problems import hold_out, load_problems, read_problems, to_problems
from .prompts import SYSTEM_PROMPT, format_solution, system_prompt_named, to_prompt
from .published import TASKS, load_asdiv, load_gsm8k, load_math, load_svamp


__all__ = [
    "ANSWER_EXTRACTORS",
    "SYSTEM_PROMPT",
    "TASKS",
    "format_solution",
    "hold_out",
    "load_arithmetic",
    "load_asdiv",
    "load_gsm8k",
    "load_math",
    "load_problems",
    "load_svamp",
    "read_problems",
    "system_prompt_named",
    "to_problems",
    "to_prompt",
]
