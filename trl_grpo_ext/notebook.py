"""Training in a notebook; importing this needs IPython."""

from typing import ClassVar

from transformers.utils.notebook import NotebookProgressCallback


class NotebookProgress(NotebookProgressCallback):
    """A notebook's table with reward and accuracy in it: the loss of GRPO says little, and often is 0.

    With `eval_strategy` the table has a line for each evaluation, in which those of the evaluation stand.
    """

    columns: ClassVar[dict[str, str]] = {"reward": "Reward", "accuracy": "Accuracy"}

    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs=logs, **kwargs)
        if args.eval_strategy == "no" and self.training_tracker is not None and logs and "loss" in logs:
            values = {title: logs[name] for name, title in self.columns.items() if logs.get(name) is not None}
            self.training_tracker.write_line({"Step": state.global_step, **values})
