"""A reward function of your own, kept from ending or stopping a run: what it cannot score is not scored."""

import asyncio
import contextvars
import inspect
import logging
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from numbers import Real
from typing import Any

from ._base import Reward
from .symbolic import UNSCORED
from .text import conversation_to_text
from .worker_pool import WorkerPool
from .worker_process import describe


logger = logging.getLogger(__name__)

# Arguments of a reward that do not come one for each completion.
SINGLE_ARGUMENTS = ("trainer_state", "log_extra", "log_metric", "environments")
# So many of the last items tell whether a function still works; fewer say nothing.
RATE_WINDOW, RATE_MINIMUM = 128, 32
# A batch that fails is divided to find out which items it is; for no longer than so many times its time.
SEARCH_TIMES = 4
# Calls that ran over and were given up, but which Python cannot end: with so many of them the function is not called.
MAX_ABANDONED = 4
NO_DEADLINE_S = 86_400.0 * 7


class RewardFailure(RuntimeError):
    """A reward function fails, and the run is to end; the message is one line."""


@dataclass(frozen=True)
class _Failure:
    """Why items have no score."""

    reason: str


class GuardedReward:
    """See [`guard`]. `reward_func` is the function that is guarded."""

    def __init__(
        self,
        reward_func: Callable[..., Any],
        timeout_s: float | None,
        on_error: str,
        isolate: bool,
        memory_limit_mb: int | None,
        max_failure_rate: float | None,
        name: str,
    ) -> None:
        self.reward_func = reward_func
        self.timeout_s, self.on_error, self.isolate = timeout_s, on_error, isolate
        self.memory_limit_mb, self.max_failure_rate = memory_limit_mb, max_failure_rate
        self.__name__ = name
        self._recent: deque[bool] = deque(maxlen=RATE_WINDOW)
        self._told: set[str] = set()
        self._abandoned: list[threading.Thread] = []
        self._pool: WorkerPool | None = None

    def __getattr__(self, name: str) -> Any:
        """What else the function has, as `full_marks`."""
        if name.startswith("__") or name == "reward_func":
            raise AttributeError(name)
        return getattr(self.reward_func, name)

    def options(self) -> dict[str, Any]:
        """The options that it was made with."""
        names = ("timeout_s", "on_error", "isolate", "memory_limit_mb", "max_failure_rate")
        return {name: getattr(self, name) for name in names}

    def __reduce__(self) -> tuple[Any, ...]:
        return _guard_again, (self.reward_func, self.__name__, self.options())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GuardedReward) and self.__reduce__() == other.__reduce__()

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"guard({self.__name__})"

    def __call__(self, prompts: Any = None, completions: Any = None, **columns: Any) -> list[float | None]:
        batch = _Batch(self, prompts, completions, columns)
        while rows := batch.next_rows():
            batch.take(rows, self._call(batch, rows))
        return self._finish(batch)

    def _call(self, batch: "_Batch", rows: Sequence[int]) -> Any:
        """What the function returns for these rows, or the failure."""
        if self.isolate:
            return self._call_in_worker(batch, rows)
        arguments = batch.arguments(rows)
        if self.timeout_s is None:
            return _caught(self.reward_func, arguments)
        self._abandoned = [thread for thread in self._abandoned if thread.is_alive()]
        if len(self._abandoned) >= MAX_ABANDONED:
            return _Failure(f"not called, {MAX_ABANDONED} calls that ran over still go on")
        found: list[Any] = []
        context = contextvars.copy_context()
        thread = threading.Thread(
            target=lambda: found.append(context.run(_caught, self.reward_func, arguments)),
            name=f"reward {self.__name__}",
            daemon=True,
        )
        thread.start()
        thread.join(self.timeout_s)
        if not found:
            self._abandoned.append(thread)
            return _Failure(f"took longer than {self.timeout_s:g} s")
        return found[0]

    def _call_in_worker(self, batch: "_Batch", rows: Sequence[int]) -> Any:
        if self._pool is None:
            self._pool = WorkerPool(
                _call_isolated, workers=1, memory_limit_mb=self.memory_limit_mb, name=f"reward {self.__name__}"
            )
        item = {"function": _dotted(self.reward_func), "arguments": batch.arguments(rows, only_columns=True)}
        try:
            (outcome,) = self._pool.map([item], self.timeout_s or NO_DEADLINE_S)
        except TypeError as error:  # a column of what JSON has not
            return _Failure(f"isolate needs columns of texts, numbers, lists and dicts ({error})")
        if outcome.failure is not None:
            reasons = {"deadline": f"took longer than {self.timeout_s or 0:g} s", "memory": "ran out of memory"}
            return _Failure(reasons.get(outcome.failure, outcome.failure.removeprefix("error: ")))
        batch.log_as_worker(rows, outcome.value["logged"])
        return outcome.value["scores"]

    def _finish(self, batch: "_Batch") -> list[float | None]:
        """Raise or tell what has failed, and log for the batch as a whole."""
        failures = {row: found for row, found in enumerate(batch.found) if isinstance(found, _Failure)}
        if failures and self.on_error == "raise":
            row, failure = next(iter(failures.items()))
            raise RewardFailure(f"{self.__name__} fails on {batch.describe(row)}: {failure.reason}")
        for row, failure in failures.items():
            if failure.reason not in self._told and len(self._told) < RATE_WINDOW:
                self._told.add(failure.reason)
                logger.warning(
                    "%s has not scored %s: %s. Such items are None; this is said once.",
                    self.__name__,
                    batch.describe(row),
                    failure.reason,
                )
        self._recent.extend(row in failures for row in range(len(batch.found)))
        if self.max_failure_rate is not None and len(self._recent) >= RATE_MINIMUM:
            rate = sum(self._recent) / len(self._recent)
            if failures and rate > self.max_failure_rate:
                last = list(failures.values())[-1].reason
                raise RewardFailure(
                    f"{self.__name__} has failed on {rate:.0%} of the last {len(self._recent)} completions, above "
                    f"max_failure_rate={self.max_failure_rate:g}; the last time: {last}"
                )
        scores = [None if isinstance(found, _Failure) else found for found in batch.found]
        batch.log(scores)
        return scores


class GuardedAsyncReward(GuardedReward):
    """See [`guard`]: of an asynchronous function, and asynchronous itself."""

    async def __call__(  # type: ignore[override]
        self, prompts: Any = None, completions: Any = None, **columns: Any
    ) -> list[float | None]:
        batch = _Batch(self, prompts, completions, columns)
        while rows := batch.next_rows():
            batch.take(rows, await self._call_async(batch, rows))
        return self._finish(batch)

    async def _call_async(self, batch: "_Batch", rows: Sequence[int]) -> Any:
        task = asyncio.ensure_future(_awaited(self.reward_func, batch.arguments(rows)))
        # and not `wait_for`, which waits for as long as a function takes that overhears being cancelled
        done, _ = await asyncio.wait([task], timeout=self.timeout_s)
        if not done:
            task.cancel()
            return _Failure(f"took longer than {self.timeout_s:g} s")
        return task.result()

    # TRL before 1.14 awaits what `inspect.iscoroutinefunction` says must be; that takes an object for a function if it
    # has what functions have.
    __code__ = __call__.__code__
    __defaults__ = __call__.__defaults__
    __kwdefaults__: Any = None


def guard(
    reward_func: Callable[..., Any],
    *,
    timeout_s: float | None = None,
    on_error: str = "none",
    isolate: bool = False,
    memory_limit_mb: int | None = 2048,
    max_failure_rate: float | None = 0.5,
    name: str | None = None,
) -> Callable[..., Any]:
    """Let a reward function of yours fail, hang or return nonsense without ending or stopping the run.

    What it does not score is `None`, which TRL leaves out, and never 0.0, which would say "wrong". That is: items for
    which it raises, takes longer than `timeout_s`, or returns NaN, an infinity or no number; and where it returns
    another number of scores than there are completions. Of a batch that fails as a whole, halves are scored by
    themselves, until the items are found that it fails on; where all of several halves fail, or that takes longer than
    four times `timeout_s`, the rest of the batch is `None`. A function whose scores depend on the batch around an item
    sees smaller batches then.

    The share of completions without a score is logged as `rewards/unscored`, and each reason is told once. A reward of
    this package does all that by itself, and is returned as it is.

    Args:
        reward_func (`Callable`):
            A reward function as TRL takes it, also an asynchronous one (what is made of it is asynchronous too).
        timeout_s (`float`, *optional*):
            Seconds that a call may take; where left out as long as it likes. A call that runs over goes on in a thread
            of its own, whose result nobody waits for, unless it is asynchronous (it is cancelled) or `isolate` is set
            (its process is killed): without `isolate` it is for functions that wait, for a server or a file.
        on_error (`str`, *optional*, defaults to `"none"`):
            `"none"`, or `"raise"`: end the run with an error that names function, row and prompt.
        isolate (`bool`, *optional*, defaults to `False`):
            Call the function in a process of its own, which is killed where it runs over, and replaced. The function
            must be one that can be imported by its name, from a module without the script's `__main__`; it is given
            prompts, completions and columns as JSON has them, and no `trainer_state`.
        memory_limit_mb (`int`, *optional*, defaults to `2048`):
            With `isolate`: MiB that the process may take; `None` for no limit.
        max_failure_rate (`float`, *optional*, defaults to `0.5`):
            The run ends where the function has failed on a larger share of the last 128 completions (of at least 32):
            training on what is left would be training on nothing. `None` for never.
        name (`str`, *optional*):
            What the reward is called in logs; by default as the function is.

    Returns:
        `Callable`:
            A reward function, picklable if `reward_func` is.

    Raises:
        TypeError: If `reward_func` is no function.
        ValueError: If an option has a value that cannot be used, or a function that is to be isolated cannot be
            imported by its name.
        RewardFailure: When it is called, see `on_error` and `max_failure_rate`.

    Example:
    ```python
    >>> def length(completions, **kwargs):
    ...     return [1.0 / len(text) for text in completions]
    >>> guard(length)(prompts=["a", "b"], completions=["four", ""])
    [0.25, None]
    ```
    """
    from .bundle import reward_name  # which imports this module

    if not callable(reward_func) or isinstance(reward_func, type):
        raise TypeError(f"guard: reward_func must be a reward function, got {reward_func!r}")
    if isinstance(reward_func, Reward | GuardedReward):
        return reward_func
    name = name or reward_name(reward_func)
    what = f"guard({name})"
    if timeout_s is not None and not (_is_number(timeout_s) and timeout_s > 0):
        raise ValueError(f"{what}: timeout_s must be a number of seconds above 0, or None, got {timeout_s!r}")
    if on_error not in ("none", "raise"):
        raise ValueError(f"{what}: on_error must be 'none' or 'raise', got {on_error!r}")
    if max_failure_rate is not None and not (_is_number(max_failure_rate) and 0 <= max_failure_rate <= 1):
        raise ValueError(f"{what}: max_failure_rate must be from 0 to 1, or None, got {max_failure_rate!r}")
    is_async = inspect.iscoroutinefunction(reward_func) or inspect.iscoroutinefunction(type(reward_func).__call__)
    if isolate:
        if is_async:
            raise ValueError(f"{what}: an asynchronous function is not isolated; timeout_s alone cancels it")
        _dotted(reward_func, what)
    kind = GuardedAsyncReward if is_async else GuardedReward
    return kind(reward_func, timeout_s, on_error, isolate, memory_limit_mb, max_failure_rate, name)


def _guard_again(reward_func: Callable[..., Any], name: str, options: dict[str, Any]) -> Callable[..., Any]:
    return guard(reward_func, name=name, **options)


class _Batch:
    """One call of a guarded reward: what came of its rows, and what the function has logged about them."""

    def __init__(self, reward: GuardedReward, prompts: Any, completions: Any, columns: dict[str, Any]) -> None:
        if completions is None:
            raise ValueError(f"{reward.__name__}: completions is missing")
        self.single = {name: columns[name] for name in SINGLE_ARGUMENTS if name in columns}
        rows = {"prompts": prompts, "completions": completions, **columns}
        self.columns = {
            name: values for name, values in rows.items() if name not in self.single and values is not None
        }
        self.found: list[Any] = [_Failure("the search for what fails took too long")] * len(completions)
        self.waiting = deque([list(range(len(completions)))] if len(completions) else [])
        self.failed_calls = 0
        self.logged: dict[str, list[Any]] = {}
        self.metrics: dict[str, list[tuple[int, float]]] = {}
        self.ends = None if reward.timeout_s is None else time.monotonic() + SEARCH_TIMES * reward.timeout_s

    def next_rows(self) -> list[int]:
        """The rows to call the function with next; none where all have been, or there is no time for more."""
        has_time = self.ends is None or time.monotonic() < self.ends
        return self.waiting.popleft() if self.waiting and has_time else []

    def take(self, rows: Sequence[int], returned: Any) -> None:
        """What came of a call with these rows: scores, or two halves that are to be tried by themselves."""
        scores = self._checked(rows, returned)
        if not isinstance(scores, _Failure):
            self.failed_calls = 0
            for row, score in zip(rows, scores, strict=True):
                self.found[row] = score
            return
        self.failed_calls += 1
        for row in rows:
            self.found[row] = scores
        if len(rows) > 1:
            middle = len(rows) // 2
            self.waiting.extend([list(rows[:middle]), list(rows[middle:])])
        # All fails, as a whole, in each half, quarter and eighth: a server that is down, say.
        if self.failed_calls > 14 and all(isinstance(found, _Failure) for found in self.found):
            self.waiting.clear()

    def _checked(self, rows: Sequence[int], returned: Any) -> Any:
        """A score, `None` or a failure for each row; one failure where the call as a whole is none."""
        if isinstance(returned, _Failure):
            return returned
        try:
            values = list(returned)
        except TypeError:
            return _Failure(f"returned a {type(returned).__name__}, which is no list")
        except Exception as error:
            return _Failure(describe(error))
        if len(values) != len(rows):
            return _Failure(f"returned {len(values)} scores for {len(rows)} completions")
        return [_to_score(value) for value in values]

    def arguments(self, rows: Sequence[int], only_columns: bool = False) -> dict[str, Any]:
        """What the function is called with for these rows."""
        is_whole = len(rows) == len(self.found)
        columns = {
            name: values if is_whole or not _is_column(values, self.found) else [values[row] for row in rows]
            for name, values in self.columns.items()
        }
        if only_columns:
            return columns
        single = dict(self.single)
        if "environments" in single and not is_whole and _is_column(single["environments"], self.found):
            single["environments"] = [single["environments"][row] for row in rows]
        if "log_extra" in single:
            single["log_extra"] = lambda column, values: self.note_extra(rows, column, values)
        if "log_metric" in single:
            single["log_metric"] = lambda name, value: self.note_metric(rows, name, value)
        return {**columns, **single}

    def note_extra(self, rows: Sequence[int], column: str, values: Any) -> None:
        """Keep what a call has logged about its rows."""
        values = list(values)
        if len(values) == len(rows):
            kept = self.logged.setdefault(column, [None] * len(self.found))
            for row, value in zip(rows, values, strict=True):
                kept[row] = value

    def note_metric(self, rows: Sequence[int], name: str, value: float) -> None:
        """The same for a metric of its rows as a whole."""
        self.metrics.setdefault(name, []).append((len(rows), value))

    def log_as_worker(self, rows: Sequence[int], logged: Mapping[str, Any]) -> None:
        """The same for what a call in another process has logged."""
        for column, values in logged["extra"]:
            self.note_extra(rows, column, values)
        for name, value in logged["metrics"]:
            self.note_metric(rows, name, value)

    def log(self, scores: Sequence[float | None]) -> None:
        """Log once for all rows what the calls have logged for theirs, and the share without a score."""
        if self.single.get("log_extra") is not None:
            for column, values in self.logged.items():
                self.single["log_extra"](column, values)
        if self.single.get("log_metric") is not None:
            for name, parts in self.metrics.items():
                total = sum(size for size, _ in parts)
                self.single["log_metric"](name, sum(size * value for size, value in parts) / total)
            if scores:
                self.single["log_metric"](UNSCORED, sum(score is None for score in scores) / len(scores))

    def describe(self, row: int) -> str:
        """A row for a message."""
        prompts = self.columns.get("prompts")
        prompt = conversation_to_text(prompts[row]) if prompts is not None and len(prompts) > row else ""
        prompt = " ".join(prompt.split())
        return f"row {row}, prompt {prompt[:60] + '...' if len(prompt) > 60 else prompt!r}"


def _caught(reward_func: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    try:
        returned = reward_func(**arguments)
        return asyncio.run(wait_for(returned)) if inspect.isawaitable(returned) else returned
    except Exception as error:
        return _Failure(describe(error))


async def wait_for(awaitable: Any) -> Any:
    """What a coroutine, or anything else that can be awaited, comes to; `asyncio.run` takes coroutines alone."""
    return await awaitable


async def _awaited(reward_func: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    try:
        return await reward_func(**arguments)
    except Exception as error:
        return _Failure(describe(error))


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_column(values: Any, rows: Sequence[Any]) -> bool:
    return hasattr(values, "__getitem__") and hasattr(values, "__len__") and len(values) == len(rows)


def _to_score(value: Any) -> Any:
    """A finite number, `None`, or the failure that it is anything else."""
    if value is None:
        return None
    try:
        # numbers of numpy and torch too, and their arrays without dimensions
        number = None if isinstance(value, str | bytes) else float(value)
    except Exception:
        number = None
    if number is None:
        return _Failure(f"returned a {type(value).__name__} for a score, which is no number")
    return number if math.isfinite(number) else _Failure(f"returned {number} for a score")


def _dotted(reward_func: Any, what: str = "guard") -> str:
    """The name by which a worker imports a function."""
    module, name = getattr(reward_func, "__module__", None), getattr(reward_func, "__qualname__", None)
    found = None
    if module in sys.modules and isinstance(name, str):
        found = getattr(sys.modules[str(module)], name, None)
    if found is not reward_func or module == "__main__":
        raise ValueError(
            f"{what}: isolate needs a function that another process can import, not one of the script itself, a "
            "lambda or one that is made in a function: move it to a module of its own"
        )
    return f"{module}:{name}"


def _call_isolated(item: Mapping[str, Any]) -> dict[str, Any]:
    """In the worker: call the function, and bring back what it has logged."""
    module, _, name = item["function"].partition(":")
    reward_func = getattr(import_module(module), name)
    extra: list[Any] = []
    metrics: list[Any] = []
    returned = reward_func(
        **item["arguments"],
        trainer_state=None,
        log_extra=lambda column, values: extra.append((column, list(values))),
        log_metric=lambda metric, value: metrics.append((metric, float(value))),
    )
    if inspect.isawaitable(returned):
        returned = asyncio.run(wait_for(returned))
    scores = [score if score is None or isinstance(score, str) else float(score) for score in returned]
    return {"scores": scores, "logged": {"extra": extra, "metrics": metrics}}
