"""What trackers know of a run, and closing them where an interpreter does not come to an end. Imports no tracker."""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers import TrainerCallback


PROJECT = "trl_grpo_ext"
# What transformers says where nobody has named a project.
_NO_PROJECT = "huggingface"


class DescribeRun(TrainerCallback):
    """Trackers get a name for the run, a project, the rewards and the data set; works with any `trl.GRPOTrainer`.

    ```python
    trainer.add_callback(DescribeRun(trainer, dataset_name="gsm8k"))
    ```

    Where `args.run_name` is not set, the run is called as the last part of its output folder. Where neither
    `args.project` nor `WANDB_PROJECT` names a project, that is `trl_grpo_ext`. In W&B's configuration stand `bundle`,
    the reward functions with their weights, and `dataset`, with name and number of rows.

    Args:
        trainer (`GRPOTrainer`):
            The trainer.
        dataset_name (`str`, *optional*):
            What the data set is called.
    """

    def __init__(self, trainer: Any, dataset_name: str | None = None) -> None:
        self._trainer, self._dataset_name = trainer, dataset_name
        args = trainer.args
        if args.run_name is None:
            args.run_name = Path(args.output_dir).resolve().name
        if args.project == _NO_PROJECT:
            args.project = os.environ.get("WANDB_PROJECT", PROJECT)
        if "wandb" in args.report_to:
            os.environ.setdefault("WANDB_PROJECT", args.project)  # transformers takes it from there

    def on_train_begin(self, args, state, control, **kwargs):
        wandb = sys.modules.get("wandb")
        if wandb is None or wandb.run is None or not state.is_world_process_zero:
            return
        trainer = self._trainer
        dataset = trainer.train_dataset
        bundle = dict(zip(trainer.reward_func_names, trainer.reward_weights.tolist(), strict=True))
        about = {"name": self._dataset_name, "rows": len(dataset) if hasattr(dataset, "__len__") else None}
        wandb.config.update({"bundle": bundle, "dataset": about}, allow_val_change=True)


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
