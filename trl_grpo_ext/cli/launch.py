"""`trl-grpo-ext launch`: `accelerate launch`, without words of its own before and behind those of the script."""

import os
import signal
import subprocess
import sys
import threading
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from ..exits import stop
from ..screen import hide_no_news
from ..signals import HANDLED, LAUNCHER_VARIABLE


HELP = """usage: trl-grpo-ext launch [options of accelerate launch] SCRIPT [options of the script]

Start a training script as `accelerate launch` does, with the same options (`accelerate launch --help` lists them). It
warns of no default values, prints no traceback behind the script's own last line, passes Ctrl-C and SIGTERM on, and
ends with the script's exit status.

  trl-grpo-ext launch recipes/gsm8k.py
  trl-grpo-ext launch --config_file recipes/accelerate/zero2.yaml --num_processes 8 recipes/gsm8k.py --config ...
"""


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return
    from accelerate.commands.launch import launch_command_parser

    parser = launch_command_parser()
    parser.error = lambda message: stop(2, message)
    launch(parser.parse_args(arguments))


def launch(arguments: Namespace) -> None:
    """`accelerate launch`, which leaves the last word to the training processes, and ends as they do."""
    from accelerate.commands.launch import launch_command
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    hide_no_news()
    with signals_passed_on(), set_in_environment(LAUNCHER_VARIABLE, "1"):
        try:
            launch_command(arguments)
        except subprocess.CalledProcessError as error:
            end_as(error.returncode)
        except SignalException as error:
            sys.exit(128 + error.sigval)
        except ChildFailedError as error:
            end_as(error.get_first_failure()[1].exitcode)


def end_as(status: int) -> NoReturn:
    """End as a training process has ended, which has said why, unless it was killed."""
    if status < 0:
        name = signal.Signals(-status).name
        hint = ", perhaps because the machine has no memory left" if -status == signal.SIGKILL else ""
        print(f"error: a training process was ended by {name}{hint}", file=sys.stderr)
    sys.exit(128 - status if status < 0 else status)


@contextmanager
def signals_passed_on() -> Iterator[None]:
    """Within it Ctrl-C and SIGTERM are the training processes' business; torchrun sees to that itself."""

    def pass_on(number: int, frame: Any) -> None:
        for process in psutil.Process().children():
            process.send_signal(number)

    import psutil  # type: ignore[import-untyped]  # comes with accelerate

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, pass_on) for number in HANDLED}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def set_in_environment(name: str, value: str) -> Iterator[None]:
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
