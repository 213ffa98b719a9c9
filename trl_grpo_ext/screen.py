"""What stands on the screen: a script's first line, tables, and not what is no news. Importing it imports no torch."""

import logging
import sys
from collections.abc import Callable
from typing import Any


# By logger, how messages begin that say nothing to whoever reads them.
_NO_NEWS = {
    "DeepSpeed": ("Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it.",),
    "accelerate.commands.launch": ("The following values were not passed to `accelerate launch`",),
    "torch.distributed.elastic.agent.server.api": ("Received ",),  # a signal, and passes it on
    # which process has failed: it has said why itself, or the launcher names it
    "torch.distributed.elastic.multiprocessing.api": ("Sending process", "failed (exitcode: "),
}


def begin_script() -> None:
    """Say at once which program this is, before the imports that take seconds; for a script's top.

    From here on Ctrl-C ends it with one line, see [`~trl_grpo_ext.signals.Signals`].
    """
    from . import __version__
    from .exits import is_first_rank
    from .extras import require_or_stop
    from .signals import SIGNALS

    require_or_stop()
    SIGNALS.__enter__()  # until the process ends
    hide_no_news()
    if is_first_rank() and not {"-h", "--help", "--help_all"} & set(sys.argv):
        print(f"trl_grpo_ext {__version__}: loading PyTorch and TRL", flush=True)


def hide_no_news() -> None:
    """Leave out what libraries say in every run, and what nobody could act on; all else is said."""
    for name in _NO_NEWS:
        logger = logging.getLogger(name)
        if _is_news not in logger.filters:
            logger.addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_NO_NEWS[record.name])


def show(make_table: Callable[[], Any]) -> None:
    """Print a table.

    Args:
        make_table (`Callable[[], Table]`):
            Makes the table, and imports what it needs of rich.
    """
    from rich.console import Console

    Console(markup=False).print(make_table())  # names and paths are no markup
