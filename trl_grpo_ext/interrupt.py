"""Ctrl-C and SIGTERM save a checkpoint, from which the run goes on as if it had not been interrupted."""

import os
import signal
from typing import Any

from transformers import TrainerCallback

from .private import hide_home
from .ranks import is_so_anywhere
from .signals import SIGNALS, name_of


class SaveOnInterrupt(TrainerCallback):
    """On Ctrl-C or SIGTERM, saves a checkpoint behind the running optimizer step or evaluation, and ends the process.

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
        self._is_within, self._save_only_model = False, False

    def on_train_begin(self, args, state, control, **kwargs):
        self.has_interrupted, self._checkpoint = False, None
        self._save_only_model = args.save_only_model
        if not self._is_within:
            SIGNALS.__enter__()
            self._is_within = True

    def on_step_begin(self, args, state, control, **kwargs):
        SIGNALS.doing = f"step {state.global_step + 1}"
        SIGNALS.is_deferred = True

    def on_step_end(self, args, state, control, **kwargs):
        if self._is_interrupted():
            self._save_and_stop(args, state, control)
        elif control.should_evaluate:
            SIGNALS.doing = f"the evaluation behind step {state.global_step}"
        elif control.should_training_stop and not control.should_save:
            self._leave_the_last_step()

    def on_evaluate(self, args, state, control, **kwargs):
        if not SIGNALS.is_deferred or self.has_interrupted or args.save_strategy == "best":
            return  # it is not training that asks for it; it is the second set of problems; what is saved is not known
        if self._is_interrupted():
            self._save_and_stop(args, state, control)
        elif control.should_training_stop and not control.should_save:
            self._leave_the_last_step()

    def on_save(self, args, state, control, **kwargs):
        self._checkpoint = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
        SIGNALS.goes_on = f"the last checkpoint is {hide_home(self._checkpoint)}; to go on: {self._way_to_go_on()}"
        if self.has_interrupted or not SIGNALS.is_deferred:
            return
        if control.should_training_stop:
            self._leave_the_last_step()
        elif not args.save_only_model and self._is_interrupted():  # while it was saved: that will do
            self.has_interrupted = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        args.save_only_model = self._save_only_model
        try:
            if SIGNALS.is_deferred and not self.has_interrupted:
                self._leave_the_last_step()
            if self.has_interrupted:
                self.trainer.accelerator.wait_for_everyone()  # who is gone early can leave another one waiting
                number = SIGNALS.number or signal.SIGTERM
                SIGNALS.end(
                    number,
                    f"ended by {name_of(number)} after step {state.global_step}, saved in "
                    f"{hide_home(self._checkpoint)}; to go on: {self._way_to_go_on()}",
                )
        finally:
            self._is_within = False
            SIGNALS.__exit__()

    def _is_interrupted(self) -> bool:
        """Whether a signal has come to any process: whoever got none must save with the others. All call it."""
        return is_so_anywhere(self.trainer.accelerator, SIGNALS.number is not None)

    def _save_and_stop(self, args: Any, state: Any, control: Any) -> None:
        SIGNALS.doing = f"saving step {state.global_step}"
        self.has_interrupted = control.should_save = control.should_training_stop = True
        control.should_evaluate = False
        args.save_only_model = False  # nobody could go on from that

    def _way_to_go_on(self) -> str:
        return self.command or f"trainer.train(resume_from_checkpoint={self._checkpoint!r})"

    def _leave_the_last_step(self) -> None:
        """From here on nothing is lost that is not lost anyway: a signal ends the process at once."""
        SIGNALS.is_deferred = False
        if self._is_interrupted():
            SIGNALS.end(SIGNALS.number or signal.SIGTERM)


def has_interrupted(trainer: Any) -> bool:
    """Whether a trainer's training ends because of a signal, on all its processes."""
    callbacks = trainer.callback_handler.callbacks
    return any(isinstance(callback, SaveOnInterrupt) and callback.has_interrupted for callback in callbacks)
