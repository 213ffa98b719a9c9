"""`trl-grpo-ext launch`: `accelerate launch`, without words of its own before and behind those of the script."""

import os
import signal
import subprocess
import sys
import threading
from argparse import Namespace
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
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
    launch(lambda: parse(arguments))


def parse(arguments: list[str]) -> Namespace:
    from accelerate.commands.launch import launch_command_parser

    parser = launch_command_parser()
    parser.error = lambda message: stop(2, message)
    return parser.parse_args(arguments)


def launch(make_arguments: Callable[[], Namespace]) -> None:
    """`accelerate launch`, which leaves the last word to the training processes, and ends as they do.

    Args:
        make_arguments (`Callable[[], Namespace]`):
            Makes the arguments of `accelerate launch`, and imports for seconds what it needs to do so.
    """
    others = children()  # of whoever calls this
    with signals_passed_on(others) as passed_on, set_in_environment(LAUNCHER_VARIABLE, "1"):
        arguments = make_arguments()
        from accelerate.commands.launch import launch_command
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

        hide_no_news()
        try:
            launch_command(arguments)
        except subprocess.CalledProcessError as error:
            end_as(error.returncode, passed_on)
        except SignalException as error:
            send_to_children(error.sigval, others)  # torchrun forgets those that it was just starting
            sys.exit(128 + error.sigval)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            end_as(failure.exitcode, passed_on, f"rank {rank}")
        except (OSError, ValueError, ImportError) as error:  # no such configuration, a port that is taken, ...
            stop(2 if isinstance(error, ValueError) else 1, error)


def end_as(status: int, passed_on: Collection[int] = (), process: str = "the training process") -> NoReturn:
    """End as a training process has ended, which has said why, unless it was killed by another signal than these."""
    if status < 0 and -status not in passed_on:
        name = signal.Signals(-status).name
        hint = ", perhaps because the machine has no memory left" if -status == signal.SIGKILL else ""
        print(f"error: {process} was ended by {name}{hint}", file=sys.stderr)
    sys.exit(128 - status if status < 0 else status)


@contextmanager
def signals_passed_on(others: Collection[Any]) -> Iterator[set[int]]:
    """Within it Ctrl-C and SIGTERM are the training processes' business; torchrun sees to that itself.

    One that comes before there are any ends this process, and one that is ignored stays so. Yields those that have
    been passed on.
    """
    passed_on: set[int] = set()

    def pass_on(number: int, frame: Any) -> None:
        if not send_to_children(number, others):
            sys.exit(128 + number)
        passed_on.add(number)

    if threading.current_thread() is not threading.main_thread():
        yield passed_on
        return
    heard = [number for number in HANDLED if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, pass_on) for number in heard}
    try:
        yield passed_on
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def children() -> list[Any]:
    """The processes that this one has started."""
    import psutil  # type: ignore[import-untyped]  # comes with accelerate

    found: list[Any] = psutil.Process().children()
    return found


def send_to_children(number: int, others: Collection[Any]) -> bool:
    """Send a signal to the processes that this one has started, but for others. Returns whether there are any."""
    processes = [process for process in children() if process not in others]
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)
    return bool(processes)


@contextmanager
def set_in_environment(name: str, value: str) -> Iterator[None]:
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
