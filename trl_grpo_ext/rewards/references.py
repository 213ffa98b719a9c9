"""A cell of the answer column as the text that answers are compared with; pandas, numpy and torch are not imported."""

import math
from decimal import Decimal
from numbers import Rational, Real
from typing import Any

from .extract import HASH_MARKER, extract_hash_answer


# Beyond this many digits before the point a decimal number keeps its power of ten: written out it would fill memory.
MAX_WRITTEN_EXPONENT = 10_000


def reference_to_text(value: Any) -> str | None:
    """The text of a reference, or `None` where there is nothing to compare with.

    Args:
        value (`str`, a number or `None`):
            A cell of the data set's answer column: a text; GSM8K's own solution, of which what follows the last
            `####` counts; or a number of any kind (`int`, `float`, `Decimal`, `Fraction`, a scalar of numpy or
            torch), which is written with its own digits and without a `.0`.

    Returns:
        `str` or `None`:
            The text, stripped; `None` where the cell is missing ([`is_missing`]), an infinity, or neither text nor
            number (a list, say). Never raises.
    """
    if isinstance(value, str):
        text = extract_hash_answer(value) if HASH_MARKER in value else value.strip()
        return text or None
    if is_missing(value):
        return None
    value = _to_scalar(value)
    if isinstance(value, str):
        return reference_to_text(value)
    # bool, and numpy's, which is no number
    return str(value) if type(value).__name__ in ("bool", "bool_") else number_to_text(value)


def is_missing(value: Any) -> bool:
    """Whether a cell holds nothing: `None`, an empty text, NaN, or what pandas puts in the place of a value."""
    if value is None or isinstance(value, str):
        return not (value and value.strip())
    try:
        return bool(value != value)
    except Exception:  # pandas' NA can be compared with nothing, itself included; an array can be with everything
        return not hasattr(value, "__len__")


def number_to_text(value: Any) -> str | None:
    """A finite number in decimal digits, whole ones without a `.0`; `None` for all else."""
    try:
        if isinstance(value, Rational):
            numerator, denominator = int(value.numerator), int(value.denominator)
            # by way of Decimal, because `str` refuses integers that are longer than Python's limit
            return str(Decimal(numerator)) + (f"/{Decimal(denominator)}" if denominator != 1 else "")
        if isinstance(value, Decimal):
            if not value.is_finite():
                return None
            if value.adjusted() > MAX_WRITTEN_EXPONENT:
                return str(value)
            return format(value.to_integral_value() if value == value.to_integral_value() else value, "f")
        if isinstance(value, Real) and math.isfinite(value):
            # `str`, which for a number of single precision gives the digits that were meant
            whole = int(float(value))
            return str(Decimal(whole)) if value == whole else str(value)
    except (ArithmeticError, TypeError, ValueError):
        pass
    return None


def _to_scalar(value: Any) -> Any:
    """The number in an array or a tensor without dimensions, as data sets in numpy's or torch's format give it."""
    if isinstance(value, Real | Decimal) or not hasattr(value, "__array__"):
        return value
    try:
        return value.__array__()[()]
    except Exception:  # a tensor that is on a GPU, or has a gradient
        return value.item() if getattr(value, "ndim", None) == 0 else None
