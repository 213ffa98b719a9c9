"""What was probably meant by a name that there is not."""

import difflib
from collections.abc import Iterable


def suggestion(name: str, names: Iterable[str], prefix: str = "") -> str:
    """The nearest of the names, as the end of a sentence; nothing if none is near."""
    nearest = difflib.get_close_matches(name, list(names), n=1)
    return f": did you mean {prefix}{nearest[0]}?" if nearest else ""
