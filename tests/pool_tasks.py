"""What workers of a pool are made to do in tests: to fail in every way there is. Workers import it, so it is quick."""

import ctypes
import os
import sys
import time
from pathlib import Path
from typing import Any


EATEN = []


def do(what: Any) -> Any:
    """Return what is sent; or do what it is called."""
    if isinstance(what, list) and what[0] == "hang":  # and leave a file when it has begun
        Path(what[1]).write_text(str(os.getpid()))
        what = "hang"
    if isinstance(what, list) and what[0] == "sleep":
        time.sleep(what[1])
    if isinstance(what, list) and what[0] == "keep":
        EATEN.append(b"x" * what[1])
    if what == "hang":  # in C code, which holds the lock that all threads need
        return 9**9**9
    if what == "sleep":
        time.sleep(3600)
    if what == "exit":
        os._exit(3)
    if what == "crash":
        ctypes.string_at(0)
    if what == "memory":
        while True:
            EATEN.append(bytearray(2**24))
    if what == "stack":
        return do_forever(what)
    if what == "leave":
        sys.exit(3)
    if what == "no JSON":
        return object()
    if what == "print":
        print("printed by a task")
    if what == "about":
        return {"pid": os.getpid(), "modules": sorted(sys.modules), "environment": dict(os.environ)}
    return what


def do_forever(what: Any) -> Any:
    return do_forever(what)


def make(greeting: str) -> Any:
    """A task that is made in the worker."""
    return lambda item: f"{greeting} {item}"


def die_at_start(**options: Any) -> Any:
    os._exit(5)


def sleep_at_start(**options: Any) -> Any:
    time.sleep(3600)


def make_verifier_or_worse() -> Any:
    """As math-verify, but for answers for which it has no input: one eats memory, two end their worker."""
    from trl_grpo_ext.rewards.symbolic import make_verifier

    verify = make_verifier()
    return lambda pair: do(pair[0]) if pair[0] in ("memory", "crash", "exit") else verify(pair)
