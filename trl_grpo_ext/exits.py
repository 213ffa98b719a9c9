"""How a command ends that cannot go on: with one line on the error stream, and an exit status. Imports no torch."""

import os
import sys
from typing import NoReturn


class Stop(SystemExit):
    """What [`stop`] ends a process with."""

    def __init__(self, status: int, line: str) -> None:
        super().__init__(status)
        self.line = line


def stop(status: int, message: object) -> NoReturn:
    """End with one line on the error stream, and an exit status other than 0.

    Args:
        status (`int`):
            2 where the arguments are wrong, 1 where what they name cannot be had.
        message (`object`):
            What is said, an exception for one; line breaks in it become spaces.
    """
    line = f"error: {one_line(message)}"
    if status != 2 or is_first_rank():  # arguments are wrong on all ranks, and one says so
        print(line, file=sys.stderr, flush=True)
    raise Stop(status, line)


def one_line(message: object) -> str:
    """A message without its line breaks."""
    return " ".join(str(message).split())


def is_first_rank() -> bool:
    """Whether this is the process that speaks for all."""
    return os.environ.get("RANK", "0") == "0"
