"""What a process of a distributed run owes the others: that it ends when it must, and says why."""

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch import distributed
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from transformers import TrainerCallback


SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_FOR_THE_FIRST = 2.0


def run_as_rank(main: Callable[..., Any], *arguments: Any) -> None:
    """Call the main function of a script that a launcher starts once for each rank; a lone process just calls it.

    Among several processes

    - an exception ends the process at once, with a line that names rank, host and cause, which the launcher repeats at
      the end of its report; so the launcher can end the others, which may be waiting in a collective call. A process
      that has only lost the connection to another one leaves it the time to be seen first;
    - a process whose launcher is gone ends within a second, instead of training on without its job;
    - a finished process ends without deallocating its process group: that waits for gloo's threads, while they may be
      waiting for Python's lock, which the deallocating thread holds. Now and then such a process never ended.

    Args:
        main (`Callable`):
            Returns when all is done and written, after the last collective call.
        *arguments:
            What it is called with.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        main(*arguments)
        return
    threading.Thread(target=_end_with_launcher, args=(os.getppid(),), daemon=True).start()
    error_handler = get_error_handler()
    error_handler.initialize()
    status = 0
    try:
        main(*arguments)
    except SystemExit as stopped:
        if isinstance(stopped.code, str):
            print(stopped.code, file=sys.stderr)
        status = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    except BaseException as error:
        if is_lost_connection(error):
            _report(f"it has lost another rank, whose message says why ({error})")
            time.sleep(SECONDS_FOR_THE_FIRST)
        else:
            traceback.print_exc()
            _report(f"{type(error).__name__}: {error}")
        error_handler.record_exception(error)  # where the launcher looks for it
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class BoundCollectiveCalls(TrainerCallback):
    """Lets every collective call give up after `ddp_timeout` seconds.

    When a node is cut off, nothing tells the others: they wait for it. `ddp_timeout` bounds that for the group of
    processes that accelerate makes; DeepSpeed calls through groups of its own, which wait for 10 minutes on GPUs and
    30 on CPUs, whatever was set.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        if distributed.is_initialized():
            for group in list(distributed.distributed_c10d._world.pg_map):
                distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=args.ddp_timeout), group)


def is_lost_connection(error: BaseException) -> bool:
    """Whether a collective call failed because another process is gone; gloo raises a plain `RuntimeError`."""
    return isinstance(error, distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _end_with_launcher(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(SECONDS_BETWEEN_LOOKS)
    _report(f"its launcher, process {launcher}, is gone")
    os._exit(1)


def _report(cause: str) -> None:
    rank = os.environ.get("RANK", "?")
    print(f"error: rank {rank} on {socket.gethostname()} ends: {cause}", file=sys.stderr, flush=True)
