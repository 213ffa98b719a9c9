"""Closing what a process reports to, where its interpreter does not come to an end by itself. Imports no tracker."""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


def finish_trackers(status: int, seconds: float) -> None:
    """Let the trackers of this process that are open send what they have, as they do when an interpreter ends.

    A process that ends with `os._exit` leaves their hooks for its end out, and with them the last figures. In this
    thread, because some know their run only in the one that began it; so it is the process that is ended, with its
    status, where a tracker takes longer than that. What one of them raises ends nothing but its own farewell.

    Args:
        status (`int`):
            What the process ends with: 0 marks runs as finished, another one as failed.
        seconds (`float`):
            Longest time.
    """
    with _at_most(seconds, status):
        for name, finish in _FINISH.items():
            module = sys.modules.get(name)
            if module is not None:
                try:
                    finish(module, status)
                except Exception as error:
                    _say(f"{name} could not be finished ({type(error).__name__}: {error})")


@contextmanager
def _at_most(seconds: float, status: int) -> Iterator[None]:
    def give_up() -> None:
        _say(f"a tracker was not done within {seconds:g} s, and is left: its last figures may be missing")
        os._exit(status)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _say(what: str) -> None:
    print(f"note: {' '.join(what.split())}", file=sys.stderr, flush=True)


def _finish_wandb(wandb: Any, status: int) -> None:
    if wandb.run is not None:
        wandb.finish(exit_code=status)
    wandb.teardown(exit_code=status)  # the service that writes for its runs


def _finish_mlflow(mlflow: Any, status: int) -> None:
    if mlflow.active_run() is not None:
        mlflow.end_run("FAILED" if status else "FINISHED")


def _finish_comet(comet_ml: Any, status: int) -> None:
    experiment = comet_ml.get_running_experiment()
    if experiment is not None:
        experiment.end()


def _finish_trackio(trackio: Any, status: int) -> None:
    if trackio.context_vars.current_run.get() is not None:
        trackio.finish()


def _finish_swanlab(swanlab: Any, status: int) -> None:
    if swanlab.has_run():
        swanlab.finish(**({"state": "crashed", "error": f"exit status {status}"} if status else {}))


_FINISH: dict[str, Callable[[ModuleType, int], None]] = {
    "wandb": _finish_wandb,
    "mlflow": _finish_mlflow,
    "comet_ml": _finish_comet,
    "trackio": _finish_trackio,
    "swanlab": _finish_swanlab,
}
