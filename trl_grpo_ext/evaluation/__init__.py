"""How often a policy answers right, in figures that can be compared.

- [`trl_grpo_ext.evaluation.grade`]: a completion against its reference, under four conventions;
- [`trl_grpo_ext.evaluation.answers`]: files of answers, one line a completion;
- [`trl_grpo_ext.evaluation.figures`]: shares, pass@k, maj@k and their intervals, of answers;
- [`trl_grpo_ext.evaluation.comparison`]: two sets of answers to the same problems;
- [`trl_grpo_ext.evaluation.statistics`]: the estimators behind them;
- [`trl_grpo_ext.evaluation.generate`]: completions, from transformers or vLLM;
- [`trl_grpo_ext.evaluation.driver`]: a policy's answers to a data set's problems;
- [`trl_grpo_ext.evaluation.policies`]: a policy from wherever it lies.
- [`trl_grpo_ext.evaluation.callback`]: all of it before, during and after training.

Grading imports no torch; names are looked up when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .grade import CONVENTIONS, Grade, grade  # at once: later, `grade` would be the module of that name


if TYPE_CHECKING:
    from .answers import Answer, append_answers, read_answers, write_answers
    from .callback import EvaluationCallback
    from .comparison import Comparison, Difference, compare_answers, comparison_table
    from .driver import Evaluation, check_problems, evaluate
    from .figures import Estimate, Figures, figures_of, table_of
    from .policies import Policy, PolicyError, load_policy


_MODULES = {
    "Answer": "answers",
    "Comparison": "comparison",
    "Difference": "comparison",
    "Estimate": "figures",
    "Evaluation": "driver",
    "EvaluationCallback": "callback",
    "Figures": "figures",
    "Policy": "policies",
    "PolicyError": "policies",
    "append_answers": "answers",
    "check_problems": "driver",
    "compare_answers": "comparison",
    "comparison_table": "comparison",
    "evaluate": "driver",
    "figures_of": "figures",
    "load_policy": "policies",
    "read_answers": "answers",
    "table_of": "figures",
    "write_answers": "answers",
}
__all__ = [
    "CONVENTIONS",
    "Answer",
    "Comparison",
    "Difference",
    "Estimate",
    "Evaluation",
    "EvaluationCallback",
    "Figures",
    "Grade",
    "Policy",
    "PolicyError",
    "append_answers",
    "check_problems",
    "compare_answers",
    "comparison_table",
    "evaluate",
    "figures_of",
    "grade",
    "load_policy",
    "read_answers",
    "table_of",
    "write_answers",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
