"""Log-probabilities of a group's completions from one packed row: the prompt once, and no padding."""

from .mixin import SharedPrefixMixin


__all__ = ["SharedPrefixMixin"]
