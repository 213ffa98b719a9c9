"""How often a policy answers right: see [`trl_grpo_ext.evaluation.generate`]."""

from .generate import Accuracy, check_problems, evaluate, generate_texts, is_flexibly_correct, is_strictly_correct


__all__ = ["Accuracy", "check_problems", "evaluate", "generate_texts", "is_flexibly_correct", "is_strictly_correct"]
