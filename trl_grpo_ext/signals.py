"""Ctrl-C and SIGTERM: one line in place of a traceback, at once or when what must not be lost is saved. No torch here.

Python calls a signal's handler in the main thread, between two of its own instructions: not while a collective call
hangs, and late in a long forward. So a thread of its own counts signals as they come, says that one has come, and ends
the process at the second one.
"""

import os
import select
import shlex
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import Any

from .exits import Stop, is_first_rank
from .private import command_without_secrets


HANDLED = (signal.SIGINT, signal.SIGTERM)
SECONDS_UNTIL_SAID = 30.0
# torchrun gives its processes 30 s from the signal that it got itself, so what is said then is not read any more.
SECONDS_UNTIL_SAID_UNDER_TORCHRUN = 25.0
# Within them a signal is the same one again: `timeout` sends it to its command and to the group of that, torchrun and
# Slurm pass on what the terminal has sent to all.
SECONDS_OF_ECHO, SECONDS_OF_ECHO_WHERE_PASSED_ON = 0.3, 3.0
# For a process to end that has nothing to save.
SECONDS_TO_END = 60.0
# What is typed before a script's options, where that is neither the script nor a launcher: `bash scripts/demo.sh`.
COMMAND_VARIABLE = "TRL_GRPO_EXT_COMMAND"
# Set by a launcher of ours, which passes signals on, and says nothing of its own behind its processes' last words.
LAUNCHER_VARIABLE = "TRL_GRPO_EXT_LAUNCHER"
LAUNCHERS = ("accelerate", "torchrun", "deepspeed", "trl-grpo-ext", "trl")
LAUNCHER_MODULES = ("accelerate", "torch.distributed", "deepspeed", "trl_grpo_ext", "trl")


class Interrupted(Stop):
    """What ends a process after a signal, with the status 128 and the signal's number; most often its line is said."""

    def __init__(self, number: int, line: str, is_said: bool = True) -> None:
        super().__init__(128 + number, line)
        self.is_said = is_said


class Signals:
    """Waits for Ctrl-C and SIGTERM within `with`, in the main thread; elsewhere, or in a notebook, for none.

    Handlers that others have set, and signals that are ignored (`nohup`), are left as they are.

    Attributes:
        number (`int`, *optional*):
            The signal that has come.
        is_deferred (`bool`):
            Whether it is left to somebody who asks for `number` in time. Else the process ends at once.
        goes_on (`str`):
            What to do afterwards, as the end of a line that says that the process ends at once.
        doing (`str`):
            What is waited for: "step 7".
        is_said_later (`bool`):
            Whether whoever catches [`Interrupted`] says its line.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.is_deferred = False
        self.goes_on = "there is no checkpoint to go on from"
        self.doing = "this step"
        self.is_said_later = False
        self._previous: dict[int, Any] = {}
        self._depth = 0
        self._is_ending = False
        self._is_woken = True

    @property
    def is_on(self) -> bool:
        return bool(self._previous)

    def __enter__(self) -> "Signals":
        self._depth += 1
        if self._depth == 1 and threading.current_thread() is threading.main_thread():
            self._begin()
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        self.is_deferred = False  # whoever has left it so by an exception asks no more
        if self._depth == 0 and self.is_on:
            self._end()

    def _begin(self) -> None:
        self.__dict__.update({**Signals().__dict__, "_depth": 1, "is_said_later": self.is_said_later})
        free = [
            number for number in HANDLED if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
        ]
        if _is_interactive():
            free = [number for number in free if number != signal.SIGINT]
        self._previous = {number: signal.signal(number, self._handle) for number in free}
        if not self.is_on:
            return
        self._reading, self._writing = socket.socketpair()
        self._writing.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._writing.fileno(), warn_on_full_buffer=False)
        self._is_woken = self._wakeup == -1
        if not self._is_woken:  # an event loop waits for signals here
            signal.set_wakeup_fd(self._wakeup)
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()

    def _end(self) -> None:
        self._restore()
        self._writing.send(bytes(1))
        self._thread.join()
        self._reading.close()
        self._writing.close()

    def forget_in_child(self) -> None:
        """In a process that was forked, signals are as they were: the socket is the parent's."""
        if self.is_on:
            self._restore()
            self._depth = 0

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, handler)
        self._previous = {}
        if self._is_woken:
            signal.set_wakeup_fd(-1)

    def request(self, number: int) -> None:
        """As if a signal had come."""
        with suppress(OSError):
            self._writing.send(bytes([number]))

    # In the main thread

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._is_woken:
            self.request(number)
        self.number = self.number or number  # whoever asks next must not be quicker than the thread
        if not self.is_deferred and not self._is_ending:
            self.end(number)

    def end(self, number: int, line: str | None = None) -> None:
        """End the process because of a signal: say a line on the first rank, and raise [`Interrupted`]."""
        self._is_ending = True
        line = f"ended by {name_of(number)}: {self.goes_on}" if line is None else line
        if is_first_rank() and not self.is_said_later:
            say(line)
        raise Interrupted(number, line, not self.is_said_later)

    # In a thread of its own

    def _watch(self) -> None:
        came_at: float | None = None
        has_said = False
        of_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        is_passed_on = of_torchrun or "SLURM_JOB_ID" in os.environ or LAUNCHER_VARIABLE in os.environ
        echo_s = SECONDS_OF_ECHO_WHERE_PASSED_ON if is_passed_on else SECONDS_OF_ECHO
        until_said_s = SECONDS_UNTIL_SAID_UNDER_TORCHRUN if of_torchrun else SECONDS_UNTIL_SAID
        while True:
            wait_s = None
            if came_at is not None and not has_said:
                limit_s = until_said_s if self.is_deferred else SECONDS_TO_END
                wait_s = max(0.0, came_at + limit_s - monotonic())
            if not select.select([self._reading], [], [], wait_s)[0]:
                assert self.number is not None
                assert came_at is not None
                if not self.is_deferred:
                    if not self._is_ending and is_first_rank():  # the main thread has not come to it
                        say(f"\nended by {name_of(self.number)}: {self.goes_on}")
                    os._exit(128 + self.number)
                has_said = True
                self._say_that_it_takes_long(monotonic() - came_at, of_torchrun)
                continue
            number = self._reading.recv(1)[0]
            if number == 0:
                return
            if number not in self._previous or signal.getsignal(number) != self._handle:
                continue  # another signal, or one that somebody else handles by now
            if came_at is None:
                came_at, self.number = monotonic(), self.number or number
                if self.is_deferred and is_first_rank():
                    say(f"\n{name_of(number)}: ends when {self.doing} is done and saved. {_at_once()}")
            elif monotonic() - came_at >= echo_s:
                if is_first_rank():
                    say(f"\nended by a second {name_of(number)}, without saving: {self.goes_on}")
                os._exit(128 + number)

    def _say_that_it_takes_long(self, seconds: float, of_torchrun: bool) -> None:
        if not is_first_rank():
            return
        limit = "; torchrun ends its processes after 30 s if it got the signal too" if of_torchrun else ""
        say(f"\nstill at {self.doing}, {seconds:.0f} s after {name_of(self.number or 0)}{limit}. {_at_once()}")


SIGNALS = Signals()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=SIGNALS.forget_in_child)


def name_of(number: int) -> str:
    """What a signal is called by whoever sends it."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def say(line: str) -> None:
    """Write a line to the error stream, also where the main thread is writing to it."""
    with suppress(OSError):
        os.write(2, f"{line}\n".encode())


def _at_once() -> str:
    """How to end it without saving: a terminal does not reach it any more when its launcher has ended."""
    return f"Ctrl-C again, or kill {os.getpid()}, ends it at once without saving."


def _is_interactive() -> bool:
    """Whether Ctrl-C is to interrupt a cell or a statement, not the process."""
    ipython = sys.modules.get("IPython")
    return hasattr(sys, "ps1") or (ipython is not None and ipython.get_ipython() is not None)


# The command that goes on


def command_line() -> list[str]:
    """What a user has typed to start this process, with the launcher's part where there is one."""
    if COMMAND_VARIABLE in os.environ:
        return [*shlex.split(os.environ[COMMAND_VARIABLE]), *sys.argv[1:]]
    launcher = _words_of(f"/proc/{os.getppid()}/cmdline")
    return _as_typed(launcher if _is_launcher(launcher) else sys.orig_argv)


def command_that_goes_on(words: Sequence[str]) -> str:
    """A command line that goes on from the newest checkpoint, for a shell."""
    kept: list[str] = []
    is_value = False
    for word in words:
        if word == "--resume_from_checkpoint" or is_value:
            is_value = not is_value
        elif not word.startswith("--resume_from_checkpoint="):
            kept.append(word)
    return command_without_secrets([*kept, "--resume_from_checkpoint", "latest"])


def _words_of(file: str) -> list[str]:
    try:
        return [os.fsdecode(word) for word in Path(file).read_bytes().removesuffix(b"\0").split(b"\0")]
    except OSError:
        return []


def _is_launcher(words: Sequence[str]) -> bool:
    """Whether this is the command line of a program that starts ranks, such as `python .../accelerate launch`."""
    after_python = [word for word in words[1:] if word not in ("-u", "-I", "-E", "-s", "-S")]
    if not after_python:
        return False
    if after_python[0] == "-m" and len(after_python) > 1:
        return any(f"{after_python[1]}.".startswith(f"{module}.") for module in LAUNCHER_MODULES)
    return os.path.basename(after_python[0]) in LAUNCHERS


def _as_typed(words: Sequence[str]) -> list[str]:
    """A process's command line as a shell takes it: `accelerate` for `python .../accelerate` if that is found."""
    if len(words) > 1 and os.access(words[1], os.X_OK) and os.path.basename(words[1]) in LAUNCHERS:
        words = words[1:]
    first, found = os.path.basename(words[0]), shutil.which(os.path.basename(words[0]))
    is_found = found is not None and os.path.abspath(found) == os.path.abspath(words[0])
    return [first if is_found else words[0], *words[1:]]
