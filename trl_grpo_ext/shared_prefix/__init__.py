"""Log-probabilities of a group's completions from one packed row: the prompt once, and no padding."""

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .mixin import SharedPrefixMixin


__all__ = ["SharedPrefixMixin"]


def __getattr__(name: str) -> Any:
    """The mixin when it is first used: rollouts need the layout alone, and the mixin needs rollouts."""
    if name != "SharedPrefixMixin":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .mixin import SharedPrefixMixin

    return SharedPrefixMixin
