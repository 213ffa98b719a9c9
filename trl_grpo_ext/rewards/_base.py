"""What the reward functions have in common: picklable callables with a stable name."""

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeAlias

from .text import completion_to_text


def check_score(reward: str, option: str, value: float) -> None:
    """Raise `ValueError` unless `value` is a finite number."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{reward}: {option} must be a finite number, got {value!r}")


# A tag's name, `"answer"` for `<answer>...</answer>`, or the texts that open and close it.
Tag: TypeAlias = str | tuple[str, str]


def to_tag_pair(reward: str, option: str, value: Tag, *, open_ended: bool = False) -> tuple[str, str]:
    """The opening and the closing text of a tag.

    Args:
        reward (`str`):
            What the message calls the one who asks.
        option (`str`):
            The option that `value` is of.
        value (`str` or `tuple[str, str]`):
            A tag's name, or its two texts.
        open_ended (`bool`, *optional*, defaults to `False`):
            Whether one of the texts may be empty: without an opening text, what is tagged begins with the completion;
            without a closing one, it ends with it.

    Raises:
        ValueError: If `value` is neither a tag's name nor two different texts.
    """
    if isinstance(value, str) and value and not set(value) & set("<>/ \n\t"):
        return f"<{value}>", f"</{value}>"
    if isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(part, str) for part in value):
        opening, closing = value
        texts = [part for part in value if part or not open_ended]
        if texts and all(part.strip() for part in texts) and opening != closing:
            return opening, closing
    raise ValueError(
        f"{reward}: {option} must be a tag's name without brackets, like 'answer', or the texts that open and close "
        f"it, like ('<SOLUTION>', '</SOLUTION>'), got {value!r}"
    )


def to_tuple(value: Any) -> Any:
    """A list, as files of settings have them, and the lists in it as tuples, which do not change."""
    return tuple(map(to_tuple, value)) if isinstance(value, list | tuple) else value


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
