"""Ctrl-C and SIGTERM save a checkpoint, from which the run goes on as if it had not been interrupted."""

import os
import signal
from typing import Any

from transformers import TrainerCallback

from .ranks import is_so_anywhere
from .signals import SIGNALS, name_of


class SaveOnInterrupt(TrainerCallback):
    """On Ctrl-C or SIGTERM, saves a checkpoint behind the running optimizer step, and ends the process.

    All processes save and end together, whichever of them got the signal. `save_strategy="no"` saves too. What comes
    behind training is left out, and a line says how to go on; the exit status is 130, or 143 for SIGTERM. A second
    signal ends the process at once. Outside of training, and in the evaluations before and after it, the first one
    does: there is nothing to save.

    SIGTERM is left to transformers with `enable_jit_checkpoint`, and Ctrl-C to a notebook. Add it as the last
    callback: it ends the process in `on_train_end`.

    Args:
        trainer (`Trainer`):
            The trainer, whose processes decide together.
        command (`str`, *optional*):
            The command that goes on from the newest checkpoint in the output folder.

    Example:
    ```python
    >>> trainer.add_callback(SaveOnInterrupt(trainer))  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP
    ```
    """

    def __init__(self, trainer: Any, command: str | None = None) -> None:
        self.trainer, self.command = trainer, command
        self.has_interrupted = False
        self._checkpoint: str | None = None
        self._is_within = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.has_interrupted, self._checkpoint = False, None
        if not self._is_within:
            SIGNALS.__enter__()
            self._is_within = True

    def on_step_begin(self, args, state, control, **kwargs):
        SIGNALS.doing = f"step {state.global_step + 1}"
        SIGNALS.is_deferred = True

    def on_step_end(self, args, state, control, **kwargs):
        # a small collective call in each step: whoever got no signal must save with the others
        if is_so_anywhere(self.trainer.accelerator, SIGNALS.number is not None):
            SIGNALS.doing = f"saving step {state.global_step}"
            self.has_interrupted = True
            args.save_only_model = False  # nobody could go on from that
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
        elif control.should_training_stop and not (control.should_save or control.should_evaluate):
            self._leave_the_last_step()

    def on_save(self, args, state, control, **kwargs):
        self._checkpoint = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
        SIGNALS.goes_on = f"the last checkpoint is {self._checkpoint}; to go on: {self._way_to_go_on()}"
        if control.should_training_stop and not self.has_interrupted:
            self._leave_the_last_step()

    def on_evaluate(self, args, state, control, **kwargs):
        if control.should_training_stop and not (control.should_save or self.has_interrupted):
            self._leave_the_last_step()

    def on_train_end(self, args, state, control, **kwargs):
        self._leave()
        if self.has_interrupted:
            self.trainer.accelerator.wait_for_everyone()  # who is gone early can leave another one waiting
            number = SIGNALS.number or signal.SIGTERM
            SIGNALS.end(
                number,
                f"ended by {name_of(number)} after step {state.global_step}, saved in {self._checkpoint}; "
                f"to go on: {self._way_to_go_on()}",
            )

    def _way_to_go_on(self) -> str:
        return self.command or f"trainer.train(resume_from_checkpoint={self._checkpoint!r})"

    def _leave_the_last_step(self) -> None:
        """From here on nothing is lost that is not lost anyway: a signal ends the process at once."""
        SIGNALS.is_deferred = False
        if SIGNALS.number is not None:
            SIGNALS.end(SIGNALS.number)

    def _leave(self) -> None:
        SIGNALS.is_deferred = False
        if self._is_within:
            self._is_within = False
            SIGNALS.__exit__()


def has_interrupted(trainer: Any) -> bool:
    """Whether a trainer's training ends because of a signal, on all its processes."""
    callbacks = trainer.callback_handler.callbacks
    return any(isinstance(callback, SaveOnInterrupt) and callback.has_interrupted for callback in callbacks)
