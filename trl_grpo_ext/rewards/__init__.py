"""Reward functions for GRPO, tested, named and weighted. Importing this package imports no torch.

Every reward follows TRL's calling convention: keyword arguments in (`prompts`, `completions`, the data set's columns,
`log_extra`, `log_metric`, `trainer_state`), one float a completion out, or `None` where it could not be scored. A
completion may be a string, a list of messages or `None`. No text makes a reward raise, hang or go quadratic.
"""

from .audit import AuditReport, AuditRow, audit, check_references
from .bundle import RewardBundle, gsm8k_bundle, math_bundle, tag_bundle
from .correctness import (
    correctness_reward_func,
    exact_correctness_reward_func,
    get_correctness_reward,
    get_exact_correctness_reward,
)
from .extract import (
    extract_answer_after_thinking,
    extract_boxed_answer,
    extract_hash_answer,
    extract_last_number,
    extract_tagged_answer,
    extract_xml_answer,
)
from .extractors import ANSWER_EXTRACTORS, get_answer_extractor
from .format import (
    format_reward_func,
    get_format_reward,
    get_int_reward,
    get_soft_format_reward,
    get_strict_format_reward,
    get_xmlcount_reward,
    int_reward_func,
    soft_format_reward_func,
    strict_format_reward_func,
    xmlcount_reward_func,
)
from .guard import RewardFailure, guard
from .hardened import get_hardened_extractor, get_hardened_format_reward
from .numbers import (
    is_reference_number,
    numerically_equal,
    parse_answer_number,
    parse_number,
    parse_plain_number,
)
from .references import reference_to_text
from .symbolic import get_math_correctness_reward
from .text import completion_to_text
from .worker_pool import close_workers


__all__ = [
    "ANSWER_EXTRACTORS",
    "AuditReport",
    "AuditRow",
    "RewardBundle",
    "RewardFailure",
    "audit",
    "check_references",
    "close_workers",
    "completion_to_text",
    "correctness_reward_func",
    "exact_correctness_reward_func",
    "extract_answer_after_thinking",
    "extract_boxed_answer",
    "extract_hash_answer",
    "extract_last_number",
    "extract_tagged_answer",
    "extract_xml_answer",
    "format_reward_func",
    "get_answer_extractor",
    "get_correctness_reward",
    "get_exact_correctness_reward",
    "get_format_reward",
    "get_hardened_extractor",
    "get_hardened_format_reward",
    "get_int_reward",
    "get_math_correctness_reward",
    "get_soft_format_reward",
    "get_strict_format_reward",
    "get_xmlcount_reward",
    "gsm8k_bundle",
    "guard",
    "int_reward_func",
    "is_reference_number",
    "math_bundle",
    "numerically_equal",
    "parse_answer_number",
    "parse_number",
    "parse_plain_number",
    "reference_to_text",
    "soft_format_reward_func",
    "strict_format_reward_func",
    "tag_bundle",
    "xmlcount_reward_func",
]
