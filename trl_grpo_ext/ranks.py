"""What a process of a distributed run owes the others: to decide with them, to end when it must, and to say why."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import distributed
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from transformers import TrainerCallback

from .exits import Stop, is_first_rank, one_line, stop
from .signals import LAUNCHER_VARIABLE, SIGNALS, Interrupted, say
from .trackers import finish_trackers


__all__ = ["BoundCollectiveCalls", "Stop", "is_lost_connection", "is_so_anywhere", "run_as_rank", "stop"]

SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_FOR_THE_FIRST = 2.0
# In which a launcher whose rank has failed ends: it gives the other ranks 30 s.
SECONDS_FOR_THE_LAUNCHER = 60
# For a step and its checkpoint, when a signal has ended the launcher before this process has saved.
SECONDS_FOR_A_CHECKPOINT = 600
# For trackers to send what they have: all of it, or when this rank has failed and the others wait for its end, less.
SECONDS_FOR_TRACKERS, SECONDS_FOR_TRACKERS_AFTER_A_FAILURE = 300, 15


def run_as_rank(main: Callable[..., Any], *arguments: Any) -> None:
    """Call the main function of a script that a launcher starts once for each rank; a lone process just calls it.

    A process whose launcher is gone ends within a second, instead of training on without its job; one that a shell has
    started does not end with the shell. A lone process that is training with
    [`~trl_grpo_ext.interrupt.SaveOnInterrupt`] saves first, as on a signal: `accelerate launch` passes none on to it.

    Ctrl-C and SIGTERM end a process with one line and the status 130 or 143, see [`~trl_grpo_ext.signals.Signals`].

    The line that says why a process ends is the last one on the screen: a launcher reports in a dozen lines of its own
    that a rank has failed, so the rank leaves a small process behind, which waits for the launcher's end (a minute at
    most), says the line again, and ends.

    Among several processes

    - an exception ends the process at once, with a line that names rank, host and cause, which the launcher repeats at
      the end of its report; so the launcher can end the others, which may be waiting in a collective call. A process
      that has only lost the connection to another one leaves it the time to be seen first;
    - trackers that are open (W&B, MLflow, Comet, Trackio, SwanLab) are finished, which else their hooks for an
      interpreter's end do;
    - a finished process ends without deallocating its process group: that waits for gloo's threads, while they may be
      waiting for Python's lock, which the deallocating thread holds. Now and then such a process never ended. So
      `main` does not destroy the group either, as `Trainer.end` and `Accelerator.end_training` do.

    Args:
        main (`Callable`):
            Returns when all is done and written, after the last collective call.
        *arguments:
            What it is called with.
    """
    launcher = os.getppid()
    is_done = threading.Event()
    is_one_of_several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    SIGNALS.is_said_later = True  # when no progress bar stands there any more
    if is_one_of_several or _is_launched():
        threading.Thread(target=_end_with_launcher, args=(launcher, is_done, is_one_of_several), daemon=True).start()
    if not is_one_of_several:
        try:
            with SIGNALS:
                main(*arguments)
        except SystemExit as stopped:
            if not _repeat_after(launcher, _line_of(stopped)):  # said once, behind what the launcher says
                _say_of_interruption(stopped)
            raise
        except Exception as error:
            _repeat_after(launcher, f"error: {type(error).__name__}: {one_line(error)}")
            raise
        finally:
            SIGNALS.is_said_later = False
            is_done.set()
        return
    error_handler = get_error_handler()
    error_handler.initialize()
    status, last_words = 0, None
    try:
        with SIGNALS:
            main(*arguments)
    except SystemExit as stopped:
        if isinstance(stopped.code, str):
            print(stopped.code, file=sys.stderr)
        _say_of_interruption(stopped)
        last_words = _line_of(stopped)
        status = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    except BaseException as error:
        if is_lost_connection(error):
            _report(f"it has lost another rank, whose message says why ({error})")
            time.sleep(SECONDS_FOR_THE_FIRST)
        else:
            traceback.print_exc()
            last_words = _report(f"{type(error).__name__}: {one_line(error)}")
        error_handler.record_exception(error)  # where the launcher looks for it
        status = 1
    if last_words is not None and _is_first_to_fail():
        _repeat_after(launcher, last_words)
    sys.stdout.flush()
    finish_trackers(status, SECONDS_FOR_TRACKERS_AFTER_A_FAILURE if status else SECONDS_FOR_TRACKERS)
    sys.stderr.flush()
    os._exit(status)


class BoundCollectiveCalls(TrainerCallback):
    """Lets every collective call give up after `ddp_timeout` seconds.

    When a node is cut off, nothing tells the others: they wait for it. `ddp_timeout` bounds that for the group of
    processes that accelerate makes; DeepSpeed calls through groups of its own, which wait for 10 minutes on GPUs and
    30 on CPUs, whatever was set.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        from .compat import bound_collective_calls  # here, because it imports TRL, and ranks that only end need not

        if distributed.is_initialized():
            bound_collective_calls(timedelta(seconds=args.ddp_timeout))


def is_so_anywhere(accelerator: Accelerator, condition: bool) -> bool:
    """Whether a condition holds on any process: which collective calls each of them makes must be decided together."""
    if accelerator.num_processes == 1:
        return condition
    found = torch.tensor([float(condition)], device=accelerator.device)
    return bool(accelerator.reduce(found, reduction="sum").item() > 0)


def ranks_with_the_same_rows(accelerator: Accelerator) -> str | None:
    """What makes several processes compute the same rows, by accelerate's name for it; `None` if nothing does."""
    parallelism = getattr(accelerator, "parallelism_config", None)
    sizes = ((name, getattr(parallelism, name, 1)) for name in ("tp_size", "cp_size", "sp_size", "pp_size"))
    return next((f"{name}={size}" for name, size in sizes if (size or 1) > 1), None)


def is_lost_connection(error: BaseException) -> bool:
    """Whether a collective call failed because another process is gone; gloo raises a plain `RuntimeError`."""
    return isinstance(error, distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _end_with_launcher(launcher: int, is_done: threading.Event, is_one_of_several: bool) -> None:
    while os.getppid() == launcher:
        if is_done.wait(SECONDS_BETWEEN_LOOKS):
            return
    if SIGNALS.number is None and SIGNALS.is_deferred and not is_one_of_several:
        SIGNALS.request(signal.SIGTERM)
        wait_s: float = SECONDS_FOR_A_CHECKPOINT
    else:
        wait_s = SECONDS_FOR_A_CHECKPOINT if SIGNALS.number is not None else 0.0
    if is_done.wait(wait_s):
        return
    _report(f"its launcher, process {launcher}, is gone")
    os._exit(1)


def _is_launched() -> bool:
    """Whether a launcher has started this process, as it says in the environment; a shell must not end it."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def _report(cause: str) -> str:
    rank = os.environ.get("RANK", "?")
    line = f"error: rank {rank} on {socket.gethostname()} ends: {cause}"
    print(line, file=sys.stderr, flush=True)
    return line


def _line_of(stopped: SystemExit) -> str | None:
    """What a process says that ends by itself, if it says anything."""
    if isinstance(stopped, Stop):
        return stopped.line
    return stopped.code if isinstance(stopped.code, str) else None


def _say_of_interruption(stopped: SystemExit) -> None:
    if isinstance(stopped, Interrupted) and not stopped.is_said and is_first_rank():
        traceback.clear_frames(stopped.__traceback__)  # so that bars of theirs end
        say(stopped.line)


def _is_first_to_fail() -> bool:
    """Whether no other rank of this launcher has asked so far; they share the folder of their launcher's files."""
    try:
        (Path(os.environ["TORCHELASTIC_ERROR_FILE"]).parent.parent / "failed").touch(exist_ok=False)
    except FileExistsError:
        return False
    except (KeyError, OSError):
        pass
    return True


# A process of its own, because a launcher ends the groups of its ranks; it holds the error stream open, so that
# whoever reads that to its end reads this line too.
_REPEAT = """
import select, sys
line, launcher, end = sys.stdin.buffer.read(), int(sys.argv[1]), select.poll()
end.register(launcher, select.POLLIN)
if end.poll(1000 * int(sys.argv[2])):
    sys.stderr.buffer.write(line)
"""


def _repeat_after(launcher: int, line: str | None) -> bool:
    """Say a line again when the process `launcher` has ended, if it is one; a shell, for one, is not.

    Returns:
        `bool`: Whether that will be done.
    """
    if line is None or not _is_launched() or os.getppid() != launcher or LAUNCHER_VARIABLE in os.environ:
        return False
    try:
        handle = os.pidfd_open(launcher)
        process = subprocess.Popen(  # noqa: S603  # this Python, and a program that stands above
            [sys.executable, "-I", "-S", "-c", _REPEAT, str(handle), str(SECONDS_FOR_THE_LAUNCHER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=[handle],
            start_new_session=True,
        )
    except (AttributeError, OSError):
        return False  # not on Linux, or no process can be started
    assert process.stdin is not None
    with process.stdin:
        process.stdin.write(f"{line}\n".encode())
    return True
