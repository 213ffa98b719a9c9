"""The other end of a [`~trl_grpo_ext.rewards.worker_pool.WorkerPool`]: it runs one function on what it is sent.

It is started as a script of its own, `python worker_process.py DESCRIPTOR PARENT`, and so imports nothing of this
package before it is told where to look for modules. Frames are a length and JSON; the first one says what to do.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import socket
import struct
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any


HEADER = struct.Struct("!I")
PR_SET_PDEATHSIG = 1
MAX_DESCRIBED = 500


def to_frame(message: Any) -> bytes:
    """A message as it is sent: its length, and JSON.

    Raises:
        TypeError: If the message is nothing that JSON has.
    """
    content = json.dumps(message).encode()  # in ASCII, so that a lone surrogate in a text is no error
    return HEADER.pack(len(content)) + content


def find_task(name: str, options: dict[str, Any] | None) -> Callable[[Any], Any]:
    """The function that is called `package.module:function`, or where there are options, what it makes of them."""
    module, _, attribute = name.partition(":")
    function: Callable[..., Any] = getattr(import_module(module), attribute)
    return function if options is None else function(**options)


def describe(error: BaseException) -> str:
    """An exception on one short line. The texts of some are as long as the numbers that they are about."""
    try:
        text = str(error)[:MAX_DESCRIBED].split("\n")[0]
    except Exception:
        text = ""
    return f"{type(error).__name__}: {text}".removesuffix(": ")


def _die_with_parent(parent: int) -> None:
    """Let the kernel end this process with the thread that started it: that reaches C code which holds the GIL too."""
    with contextlib.suppress(OSError, AttributeError):  # not Linux: a worker then ends after its item
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        os._exit(1)


def _pages() -> tuple[int, int]:
    """This process's memory: what it has asked for, and what it has got. (0, 0) where that cannot be known."""
    with contextlib.suppress(OSError), open("/proc/self/statm") as file:
        size, resident = map(int, file.read().split()[:2])
        return size, resident
    return 0, 0


def _limit_memory(limit_mb: int | None) -> float:
    """Limit what items may take beyond what imports have; returns with how many pages a worker is not used again."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # if the machine's memory runs out, a worker is ended and not the training
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    if limit_mb is None:
        return float("inf")
    size, resident = _pages()
    limit = size * resource.getpagesize() + limit_mb * 2**20
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return resident + limit_mb * 2**20 / resource.getpagesize() / 2


def _receive(connection: socket.socket, size: int) -> bytes | None:
    parts = []
    while size:
        part = connection.recv(min(size, 2**20))
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _receive_frame(connection: socket.socket) -> Any:
    header = _receive(connection, HEADER.size)
    content = None if header is None else _receive(connection, *HEADER.unpack(header))
    return None if content is None else json.loads(content)


def _run(task: Callable[[Any], Any], item: Any) -> tuple[bytes, bool]:
    """The answer to an item, and whether it is this worker's last: after running out of memory, little is certain."""
    try:
        return to_frame({"value": task(item)}), False
    except MemoryError:
        failure, is_last = "memory", True
    except BaseException as error:  # SystemExit too: it is the task's, and a worker's end is for the parent to say
        failure, is_last = f"error: {describe(error)}", False
    return to_frame({"failure": failure}), is_last


def main(descriptor: int, parent: int) -> None:
    """Run the task on each item until the parent closes the connection."""
    _die_with_parent(parent)
    connection = socket.socket(fileno=descriptor)
    os.dup2(2, 1)  # what a task prints is for people
    settings = _receive_frame(connection)
    if settings is None:
        return
    sys.path[:] = settings["path"]
    try:
        task = find_task(settings["task"], settings["options"])
        retire_at = _limit_memory(settings["memory_limit_mb"])
    except BaseException as error:
        connection.sendall(to_frame({"cannot_start": describe(error)}))
        return
    connection.sendall(to_frame({"ready": True}))
    while (message := _receive_frame(connection)) is not None:
        answer, is_last = _run(task, message["item"])
        # What an item has left behind must not decide how the next one ends.
        if is_last or _pages()[1] > retire_at:
            connection.sendall(to_frame({"last": True}) + answer)
            break
        connection.sendall(answer)
    connection.close()
    os._exit(0)  # without clearing up after a task that may have left threads


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
