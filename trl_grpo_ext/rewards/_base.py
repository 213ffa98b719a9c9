"""What the reward functions have in common: picklable callables with a stable name."""

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

from .text import completion_to_text


def check_score(reward: str, option: str, value: float) -> None:
    """Raise `ValueError` unless `value` is a finite number."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{reward}: {option} must be a finite number, got {value!r}")


def check_tag(reward: str, option: str, value: str) -> None:
    """Raise `ValueError` unless `value` can be the name of a tag."""
    if not isinstance(value, str) or not value or set(value) & set("<>/ \n\t"):
        raise ValueError(f"{reward}: {option} must be a tag name without brackets, like 'answer', got {value!r}")


@dataclass(frozen=True, kw_only=True)
class Reward:
    """Base of the reward functions.

    Instances and not closures, because TRL pickles reward functions for its asynchronous workers; frozen, because one
    instance is shared by every bundle that holds it. `__name__` is what TRL logs the reward under.

    Args:
        name (`str`):
            What the reward is called in logs and bundles.
    """

    name: str

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"{type(self).__name__}: name must be a non-empty string, got {self.name!r}")

    @property
    def __name__(self) -> str:
        return self.name

    @property
    def full_marks(self) -> float:
        """The score of a perfect completion."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class TextReward(Reward):
    """A reward that looks at the completion's text alone."""

    def score(self, text: str) -> float:
        """Score one completion's text."""
        raise NotImplementedError

    def __call__(self, completions: list[Any], **kwargs: Any) -> list[float]:
        return [self.score(completion_to_text(completion)) for completion in completions]
