"""Processes of our own, which run a function that may hang, crash or eat memory, with a deadline for each item.

Why not `multiprocessing` or `concurrent.futures`: a pool of theirs is lost with one worker that dies, has no deadline
for an item, imports the user's script anew, and leaves workers behind that are stuck in C code when its process is
killed.
"""

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .worker_process import HEADER, to_frame


MAX_WORKERS = 16
START_TIMEOUT_S = 120.0
FAILED_STARTS = 3  # so many in a row, without one that succeeds, and it is not by chance
ANSWER_LIMIT = 2**26  # bytes; an answer that claims more is none
PROGRAM = str(Path(__file__).with_name("worker_process.py"))
# What a launcher tells the processes of a training, of which a worker is none: names, or their beginnings.
OF_A_TRAINING = (
    *("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_NAME", "ROLE_RANK"),
    *("ROLE_WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"),
)
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "MKL_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",  # all workers are alike
}


class WorkerError(RuntimeError):
    """Workers cannot be started, or were closed while somebody waited for them."""


@dataclass(frozen=True)
class Outcome:
    """What became of an item.

    Args:
        value (`Any`):
            What the task returned.
        failure (`str`, *optional*):
            Why there is no value: `"deadline"`, `"died"` (the worker ended: a crash, an exit), `"memory"`, or
            `"error: ..."` with the exception that the task raised.
    """

    value: Any = None
    failure: str | None = None


def usable_cores() -> int:
    """Cores that this process may use, shared out over the processes of its node."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    except ValueError:
        processes = 1
    return max(1, cores // max(1, processes))


@dataclass
class _Batch:
    """What one call of `map` waits for."""

    outcomes: list[Outcome | None]
    todo: "deque[_Job]"
    remaining: int
    done: threading.Event = field(default_factory=threading.Event)
    error: str | None = None
    is_cancelled: bool = False

    def set(self, index: int, outcome: Outcome) -> None:
        if self.outcomes[index] is None:
            self.outcomes[index] = outcome
            self.remaining -= 1
            if self.remaining == 0:
                self.done.set()


@dataclass(eq=False)
class _Job:
    batch: _Batch
    index: int
    frame: bytes
    timeout_s: float
    used_s: float = 0.0  # by a worker that died of what may have been left behind by the item before
    is_retry: bool = False


@dataclass(eq=False)
class _Worker:
    process: subprocess.Popen[bytes]
    connection: socket.socket
    started: float
    outgoing: bytearray
    incoming: bytearray = field(default_factory=bytearray)
    jobs: deque[_Job] = field(default_factory=deque)  # the first one is running, a second one has been sent ahead
    began: float = 0.0
    num_done: int = 0
    is_ready: bool = False
    is_leaving: bool = False

    def has_room(self, depth: int) -> bool:
        return self.is_ready and not self.is_leaving and len(self.jobs) < depth

    def deadline(self, start_timeout_s: float) -> float:
        if not self.is_ready:
            return self.started + start_timeout_s
        return self.began + self.jobs[0].timeout_s - self.jobs[0].used_s if self.jobs else float("inf")


@dataclass(frozen=True)
class _Settings:
    task: str
    options: dict[str, Any] | None
    workers: int
    memory_limit_mb: int | None
    start_timeout_s: float
    name: str


class _Dispatcher:
    """The thread that starts workers, gives them items and ends them; all of them belong to it alone.

    The kernel ends a worker with the thread that has started it, so that is one which lives as long as they do.
    """

    def __init__(self, settings: _Settings) -> None:
        self.pid = os.getpid()
        self.settings = settings
        self.lock = threading.Lock()
        self.is_over = False
        self.is_closing = False
        self.incoming: deque[_Batch] = deque()
        self.batches: deque[_Batch] = deque()
        self.workers: list[_Worker] = []
        self.num_wanted = 0
        self.failed_starts = 0
        self.last_failure = ""
        self.woken, self.waker = socket.socketpair()
        self.woken.setblocking(False)
        self.waker.setblocking(False)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.woken, selectors.EVENT_READ)
        self.thread = threading.Thread(target=self.run, name=f"workers of {settings.name}", daemon=True)
        self.thread.start()

    # from other threads

    def submit(self, batch: _Batch) -> bool:
        with self.lock:
            if self.is_over or self.is_closing:
                return False
            self.incoming.append(batch)
        self.wake()
        return True

    def wake(self) -> None:
        with contextlib.suppress(OSError):  # full: it will wake anyway; closed: it is over
            self.waker.send(b"\0")

    def close(self) -> None:
        if os.getpid() != self.pid:  # a copy, in a forked process
            return
        with self.lock:
            self.is_closing = True
        self.wake()
        if threading.current_thread() is not self.thread:
            self.thread.join()

    def forget(self) -> None:
        """In a forked process: let go of what is the parent's, so that its workers see when it ends."""
        for worker in self.workers:
            worker.connection.close()
            worker.process.returncode = 0  # it is no child of this process, which need not look for it
        self.woken.close()
        self.waker.close()
        with contextlib.suppress(OSError, ValueError):
            self.selector.close()

    # from here on in the thread

    def run(self) -> None:
        reason = "they were closed"
        try:
            while not self.is_closing:
                self.accept()
                self.start_workers()
                self.hand_out()
                for key, events in self.selector.select(self.seconds_to_wait()):
                    if key.data is None:
                        with contextlib.suppress(BlockingIOError):
                            self.woken.recv(4096)
                    else:
                        self.serve(key.data, events)
                self.end_what_overran()
        except BaseException as error:  # whoever waits is told
            reason = str(error) if isinstance(error, WorkerError) else f"{type(error).__name__}: {error}"
        finally:
            self.end(reason)

    def end(self, reason: str) -> None:
        with self.lock:
            self.is_over = True
            batches = [*self.incoming, *self.batches, *(job.batch for worker in self.workers for job in worker.jobs)]
        for worker in [*self.workers]:
            self.remove(worker)
        self.selector.close()
        self.woken.close()
        self.waker.close()
        for batch in batches:
            if batch.remaining:
                batch.error = reason
                batch.done.set()

    def accept(self) -> None:
        with self.lock:
            while self.incoming:
                self.batches.append(self.incoming.popleft())

    def num_waiting(self) -> int:
        return sum(len(batch.todo) for batch in self.batches if not batch.is_cancelled)

    def next_job(self) -> _Job | None:
        """Of each batch in turn."""
        while self.batches:
            batch = self.batches[0]
            if batch.todo and not batch.is_cancelled:
                self.batches.rotate(-1)
                return batch.todo.popleft()
            self.batches.popleft()
        return None

    def put_back(self, job: _Job) -> None:
        job.batch.todo.appendleft(job)
        if job.batch not in self.batches:
            self.batches.appendleft(job.batch)

    def start_workers(self) -> None:
        outstanding = self.num_waiting() + sum(len(worker.jobs) for worker in self.workers)
        self.num_wanted = max(self.num_wanted, min(self.settings.workers, outstanding))
        while len(self.workers) < self.num_wanted:
            self.start_worker()

    def start_worker(self, first: _Job | None = None) -> None:
        ours, theirs = socket.socketpair()
        settings = {
            "task": self.settings.task,
            "options": self.settings.options,
            "memory_limit_mb": self.settings.memory_limit_mb,
            "path": [path or os.getcwd() for path in sys.path],
        }
        environment = {key: value for key, value in os.environ.items() if not key.startswith(OF_A_TRAINING)}
        try:
            process = subprocess.Popen(  # noqa: S603  # this interpreter, with a program of this package
                [sys.executable, "-P", PROGRAM, str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**environment, **ENVIRONMENT},
                start_new_session=True,  # a group of its own to end; and Ctrl-C is the trainer's
            )
        except OSError as error:
            ours.close()
            raise WorkerError(f"the workers of {self.settings.name} cannot be started: {error}") from error
        finally:
            theirs.close()
        ours.setblocking(False)
        worker = _Worker(process, ours, time.monotonic(), bytearray(to_frame(settings)))
        self.workers.append(worker)
        self.selector.register(ours, selectors.EVENT_READ | selectors.EVENT_WRITE, worker)
        if first is not None:
            self.give(worker, first)

    def hand_out(self) -> None:
        # One item is sent ahead, so that a worker need not wait for this process; where all are sure to have one.
        for depth in (1, 2):
            for worker in self.workers:
                if worker.has_room(depth) and (depth == 1 or self.num_waiting() > len(self.workers)):
                    job = self.next_job()
                    if job is None:
                        return
                    self.give(worker, job)

    def give(self, worker: _Worker, job: _Job) -> None:
        worker.jobs.append(job)
        if len(worker.jobs) == 1:
            worker.began = time.monotonic()
        worker.outgoing += job.frame
        self.write(worker)

    def write(self, worker: _Worker) -> None:
        try:
            while worker.outgoing:
                with memoryview(worker.outgoing) as view, view[: 2**18] as part:
                    sent = worker.connection.send(part)
                del worker.outgoing[:sent]
        except BlockingIOError:
            pass
        except OSError:
            worker.outgoing.clear()  # it has ended, which the other direction tells
        self.selector.modify(
            worker.connection,
            selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.outgoing else 0),
            worker,
        )

    def serve(self, worker: _Worker, events: int) -> None:
        if worker not in self.workers:
            return
        if events & selectors.EVENT_WRITE:
            self.write(worker)
        if not events & selectors.EVENT_READ:
            return
        try:
            received = worker.connection.recv(2**20)
        except BlockingIOError:
            return
        except OSError:
            received = b""
        worker.incoming += received
        try:
            while (message := self.next_message(worker)) is not None:
                self.take(worker, message)
        except (ValueError, KeyError, TypeError, IndexError):  # what it sends is no answer
            received = b""
        if not received and worker in self.workers:
            self.replace(worker, "died")

    def next_message(self, worker: _Worker) -> dict[str, Any] | None:
        if len(worker.incoming) < HEADER.size:
            return None
        (size,) = HEADER.unpack_from(worker.incoming)
        if size > ANSWER_LIMIT:
            raise ValueError("an answer that is too long")
        if len(worker.incoming) < HEADER.size + size:
            return None
        message: dict[str, Any] = json.loads(worker.incoming[HEADER.size : HEADER.size + size])
        del worker.incoming[: HEADER.size + size]
        return message

    def take(self, worker: _Worker, message: dict[str, Any]) -> None:
        now = time.monotonic()
        if "cannot_start" in message:
            raise WorkerError(f"the workers of {self.settings.name} cannot be started: {message['cannot_start']}")
        if "ready" in message:
            worker.is_ready, worker.began, self.failed_starts = True, now, 0
            return
        if "last" in message:
            worker.is_leaving = True
            return
        failure = message.get("failure")
        outcome = Outcome(message["value"]) if failure is None else Outcome(None, str(failure))
        job = worker.jobs.popleft()
        if failure == "memory" and worker.num_done and not job.is_retry:
            job.is_retry, job.used_s = True, job.used_s + now - worker.began
            self.remove(worker)
            self.start_worker(job)
            return
        job.batch.set(job.index, outcome)
        worker.num_done += 1
        worker.began = now
        if worker.is_leaving:
            self.remove(worker)

    def seconds_to_wait(self) -> float | None:
        deadlines = [worker.deadline(self.settings.start_timeout_s) for worker in self.workers]
        nearest = min(deadlines, default=float("inf"))
        return None if nearest == float("inf") else max(0.0, nearest - time.monotonic())

    def end_what_overran(self) -> None:
        for worker in [*self.workers]:
            if time.monotonic() >= worker.deadline(self.settings.start_timeout_s):
                # this process may have been late itself: what has been answered meanwhile counts
                self.serve(worker, selectors.EVENT_READ)
                if worker in self.workers and time.monotonic() >= worker.deadline(self.settings.start_timeout_s):
                    self.replace(worker, "deadline")

    def replace(self, worker: _Worker, failure: Literal["deadline", "died"]) -> None:
        """End a worker; its item fails, or if that may have been another's fault, has the rest of its time anew."""
        job = worker.jobs.popleft() if worker.is_ready and worker.jobs else None
        self.remove(worker)
        if job is not None:
            job.used_s += time.monotonic() - worker.began
            if failure == "died" and worker.num_done and not job.is_retry and job.used_s < job.timeout_s:
                job.is_retry = True
                self.start_worker(job)
            else:
                job.batch.set(job.index, Outcome(None, failure))
        elif not worker.is_ready:
            self.failed_starts += 1
            if self.failed_starts >= FAILED_STARTS:
                how = (
                    f"was not ready in {self.settings.start_timeout_s:g} s"
                    if failure == "deadline"
                    else (f"ended with status {worker.process.returncode} before it was ready")
                )
                raise WorkerError(f"the workers of {self.settings.name} cannot be started: each {how}")

    def remove(self, worker: _Worker) -> None:
        """End a worker's process, and put its items back."""
        self.workers.remove(worker)
        self.selector.unregister(worker.connection)
        worker.connection.close()
        # Its group, with what a task may have started; and before it is waited for, after which its number is free.
        with contextlib.suppress(OSError):
            os.killpg(worker.process.pid, signal.SIGKILL)
        worker.process.wait()
        while worker.jobs:
            self.put_back(worker.jobs.pop())


class WorkerPool:
    """Worker processes that run one function on items, and are replaced when they hang, die or run out of memory.

    Workers are new Python interpreters, without the caller's script, GPUs, modules and distributed environment. They
    are started when items come, kept for the next ones, and end with the pool, with the process (however that ends)
    and with `close`. A pool can be used from any thread and by several at once, which get their turns; a forked
    process that uses one gets workers of its own.

    Args:
        task (`str` or `Callable`):
            The function: `"package.module:function"`, or a function that can be imported by its name. A worker imports
            the module. An item is what JSON has, and so is what the function returns.
        options (`Mapping`, *optional*):
            Arguments, as JSON has them, with which the function is called once in each worker; what it returns is then
            called with each item.
        timeout_s (`float`, *optional*, defaults to `5.0`):
            Seconds that an item may take, from when a worker has begun with it. A worker's start does not count.
        workers (`int`, *optional*):
            How many there are at most; where left out, this process's share of the cores ([`usable_cores`]), at most
            `MAX_WORKERS`.
        memory_limit_mb (`int`, *optional*, defaults to `2048`):
            MiB that a worker may take beyond what its imports have; `None` for no limit.
        start_timeout_s (`float`, *optional*):
            Seconds that a worker may take to start.
        name (`str`, *optional*, defaults to `"worker pool"`):
            What messages call it.

    Raises:
        ValueError: If an option has a value that cannot be used.

    Example:
    ```python
    >>> with WorkerPool("math:factorial", timeout_s=1.0, workers=1) as pool:
    ...     pool.map([4, "four"])[0]
    Outcome(value=24, failure=None)
    ```
    """

    def __init__(
        self,
        task: str | Callable[..., Any],
        *,
        options: Mapping[str, Any] | None = None,
        timeout_s: float = 5.0,
        workers: int | None = None,
        memory_limit_mb: int | None = 2048,
        start_timeout_s: float = START_TIMEOUT_S,
        name: str = "worker pool",
    ) -> None:
        check_pool_options(name, timeout_s, workers, memory_limit_mb)
        self.timeout_s = timeout_s
        self._settings = _Settings(
            _name_of(name, task),
            None if options is None else dict(options),
            min(MAX_WORKERS, usable_cores()) if workers is None else workers,
            memory_limit_mb,
            start_timeout_s,
            name,
        )
        self._lock = threading.Lock()
        self._dispatcher: _Dispatcher | None = None
        _POOLS.add(self)

    def map(self, items: Iterable[Any], timeout_s: float | None = None) -> list[Outcome]:
        """Run the task on each item.

        Args:
            items (`Iterable`):
                What JSON has.
            timeout_s (`float`, *optional*):
                Another deadline than the pool's.

        Returns:
            `list[Outcome]`:
                One for each item, in their order; which worker had an item makes no difference.

        Raises:
            WorkerError: If no worker can be started, or the pool is closed by another thread meanwhile.
            TypeError: If an item is nothing that JSON has.
        """
        frames = [to_frame({"item": item}) for item in items]
        if not frames:
            return []
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        batch = _Batch([None] * len(frames), deque(), len(frames))
        batch.todo.extend(_Job(batch, index, frame, timeout_s) for index, frame in enumerate(frames))
        while not self._get_dispatcher().submit(batch):
            pass  # it has ended just now
        try:
            batch.done.wait()
        except BaseException:  # Ctrl-C
            batch.is_cancelled = True
            raise
        if batch.error is not None:
            raise WorkerError(batch.error)
        return [outcome for outcome in batch.outcomes if outcome is not None]

    def close(self) -> None:
        """End the workers, at once. The pool can be used again, and then starts others."""
        with self._lock:
            dispatcher, self._dispatcher = self._dispatcher, None
        if dispatcher is not None:
            self._end()

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _get_dispatcher(self) -> _Dispatcher:
        with self._lock:
            dispatcher = self._dispatcher
            if dispatcher is None or dispatcher.is_over or dispatcher.is_closing:
                dispatcher = self._dispatcher = _Dispatcher(self._settings)
                self._end = weakref.finalize(self, dispatcher.close)  # which is also called when Python ends
            return dispatcher

    def _forget_parent(self) -> None:
        self._lock = threading.Lock()  # another thread may have held it, which there is no more
        dispatcher, self._dispatcher = self._dispatcher, None
        if dispatcher is not None:
            dispatcher.forget()


_POOLS: "weakref.WeakSet[WorkerPool]" = weakref.WeakSet()
_SHARED: dict[tuple[Any, ...], WorkerPool] = {}
_SHARED_LOCK = threading.Lock()


def shared_pool(maker: str, *, workers: int | None, memory_limit_mb: int | None, name: str) -> WorkerPool:
    """The one pool of this process with these settings, for rewards, which are pickled and cannot hold one.

    Args:
        maker (`str`):
            `"package.module:function"`, a function without arguments that makes the task.
        workers, memory_limit_mb, name:
            As for [`WorkerPool`].
    """
    key = (maker, workers, memory_limit_mb)
    with _SHARED_LOCK:
        if key not in _SHARED:
            _SHARED[key] = WorkerPool(maker, options={}, workers=workers, memory_limit_mb=memory_limit_mb, name=name)
        return _SHARED[key]


def close_workers() -> None:
    """End all workers of this process. What needs some afterwards starts others."""
    for pool in [*_POOLS]:
        pool.close()


def check_pool_options(name: str, timeout_s: float, workers: int | None, memory_limit_mb: int | None) -> None:
    """Raise `ValueError` unless a pool can be made with these; the message begins with the name."""
    for option, value in (("timeout_s", timeout_s), ("workers", workers), ("memory_limit_mb", memory_limit_mb)):
        is_whole = option != "timeout_s"
        if value is None and is_whole:
            continue
        kinds = int if is_whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < float("inf"):
            wanted = "a whole number above 0, or None" if is_whole else "a number of seconds above 0"
            raise ValueError(f"{name}: {option} must be {wanted}, got {value!r}")


def _name_of(pool: str, task: str | Callable[..., Any]) -> str:
    if isinstance(task, str):
        if not all(task.partition(":")):
            raise ValueError(f"{pool}: task must be like 'package.module:function', got {task!r}")
        return task
    module, name = getattr(task, "__module__", None), getattr(task, "__qualname__", None)
    if module in (None, "__main__") or name is None or getattr(sys.modules.get(module), name, None) is not task:
        raise ValueError(f"{pool}: task must be a function at the top of a module that can be imported, got {task!r}")
    return f"{module}:{name}"


def _forget_parent() -> None:
    global _SHARED_LOCK
    _SHARED_LOCK = threading.Lock()
    for pool in [*_POOLS]:
        pool._forget_parent()


os.register_at_fork(after_in_child=_forget_parent)
