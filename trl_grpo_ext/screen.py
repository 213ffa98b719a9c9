"""Tables on the screen, where rich is there to show them: it comes with the extra `report`."""

import sys
from collections.abc import Callable
from typing import Any


def show(make_table: Callable[[], Any]) -> None:
    """Print a table; where rich is missing, one line that says how to have it.

    Args:
        make_table (`Callable[[], Table]`):
            Makes the table, and imports what it needs of rich.
    """
    try:
        from rich.console import Console

        Console(markup=False).print(make_table())  # names and paths are no markup
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "rich":
            raise
        print("note: tables need rich: pip install 'trl_grpo_ext[report]'", file=sys.stderr)
