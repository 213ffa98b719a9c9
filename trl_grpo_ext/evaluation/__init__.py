"""How often a policy answers right, in figures that can be compared.

Grading imports no torch; names are looked up when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .callback import EvaluationCallback
    from .driver import Evaluation, check_problems, evaluate


_MODULES = {
    "EvaluationCallback": "callback",
    "Evaluation": "driver",
    "check_problems": "driver",
    "evaluate": "driver",
}
__all__ = ["Evaluation", "EvaluationCallback", "check_problems", "evaluate"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
