"""What a training script needs around its trainer; what it cannot have ends it with one line.

In the order in which a script calls them: [`check_settings`], [`set_cpu_threads`], [`find_start`], [`announce`],
[`find_bundle`], [`load_tokenizer`], [`model_init_kwargs`], [`make_trainer`], [`add_evaluation`], [`train`], [`save`],
[`write_summary`], [`print_summary`], [`write_report`].
Exit status: 2 for wrong arguments, 1 for what could not be had, 130 after Ctrl-C and 143 after SIGTERM.
"""

import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import torch
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, ProgressCallback, TrainerCallback
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.utils.logging import disable_progress_bar
from trl import GRPOTrainer, ModelConfig

from .checkpoints import CheckpointError
from .config import GRPOExtConfig
from .embedded_policy import EMBEDDED_POLICY, embedded_policy_path
from .evaluation import EvaluationCallback, Figures, table_of
from .exits import one_line, stop
from .interrupt import SaveOnInterrupt
from .private import hide_home, shorten_home
from .ranks import BoundCollectiveCalls, is_so_anywhere
from .rewards.bundle import RewardBundle
from .rewards.names import find_rewards
from .runs import BeginRun, RunError, Start, choose_start
from .screen import show
from .script_arguments import RunArguments
from .signals import SIGNALS, command_line, command_that_goes_on
from .spelling import suggestion
from .trackers import DescribeRun
from .versions import installed_versions


if TYPE_CHECKING:
    from datasets import Dataset

SUMMARY_FILE = "summary.json"

# TRL, transformers and DeepSpeed still use old names between themselves; there is nothing that a user could change.
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*is deprecated", category=FutureWarning)
warnings.filterwarnings("ignore", message="`torch.distributed.all_gather_into_tensor` is", category=FutureWarning)


class CompactProgress(ProgressCallback):
    """The training bar with the reward in it, in place of a wall of metrics (they are in `trainer_state.json`)."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and logs and "reward" in logs:
            shown = {"reward": logs["reward"], "accuracy": logs.get("accuracy")}
            self.training_bar.set_postfix({name: f"{value:.2f}" for name, value in shown.items() if value is not None})


class TimeBudget(TrainerCallback):
    """Stops training in time: before a step that, if it takes as long as the longest so far, would end too late.

    What comes before the first step and behind the last one, evaluations among it, is not counted. The last step is
    saved where checkpoints are, so that the run can be gone on with.

    Args:
        trainer (`Trainer`):
            The trainer, whose processes stop together.
        minutes (`float`):
            From the beginning of the first step.
    """

    def __init__(self, trainer: Any, minutes: float) -> None:
        self.trainer, self.seconds = trainer, 60 * minutes
        self._has_begun = False

    def on_train_begin(self, args, state, control, **kwargs):
        self._has_begun = False

    def on_step_begin(self, args, state, control, **kwargs):
        if not self._has_begun:
            self._has_begun = True
            self._began = self._latest = monotonic()
            self._longest = 0.0

    def on_step_end(self, args, state, control, **kwargs):
        now = monotonic()
        self._longest, self._latest = max(self._longest, now - self._latest), now
        if is_so_anywhere(self.trainer.accelerator, now + self._longest - self._began > self.seconds):
            control.should_training_stop = True
            control.should_save = control.should_save or args.save_strategy != "no"


def check_settings(training_args: GRPOExtConfig, model_args: ModelConfig) -> None:
    """End if training could not begin with these settings: what TRL would say later, or in many lines."""
    if model_args.model_name_or_path is None:
        stop(2, "--model_name_or_path is missing: name a model on the hub, a folder, or 'embedded'")
    if training_args.temperature <= 0:
        stop(
            2, f"--temperature must be greater than 0, got {training_args.temperature}: all samples would be the same"
        )
    trackers = get_available_reporting_integrations()
    for name in training_args.report_to:
        if name not in trackers:
            found = ", ".join(trackers) or "none"
            stop(
                2,
                f"--report_to {name}: no such tracker is installed ({found})"
                f"{suggestion(name, INTEGRATION_TO_CALLBACK)}; install it, or set --report_to none",
            )


def announce(training_args: GRPOExtConfig, model: str | None, dataset: str) -> None:
    """Say what is going to happen, in one line, on the first process."""
    if training_args.process_index > 0:
        return
    steps, epochs = training_args.max_steps, training_args.num_train_epochs
    length = f"{steps} steps" if steps > 0 else f"{epochs:g} epoch{'' if epochs == 1 else 's'}"
    processes = training_args.world_size
    if training_args.device.type == "cpu":
        place = "the CPU"
    else:
        place = torch.cuda.get_device_name() if torch.cuda.is_available() else training_args.device.type
    place = place if processes == 1 else f"{processes} processes ({place})"
    policy = "the embedded policy" if model == EMBEDDED_POLICY else model
    line = f"GRPO on {dataset} with {policy}: {length} on {place}, into {training_args.output_dir}"
    print(hide_home(line), flush=True)


def set_cpu_threads(training_args: GRPOExtConfig, threads: int | None) -> None:
    """Use all cores of a CPU: `accelerate launch` leaves each process a single thread."""
    if training_args.device.type == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(threads or max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def find_start(run_args: RunArguments, training_args: GRPOExtConfig, settings: dict[str, Any]) -> Start:
    """How this run begins, by its settings; ends if another one is in its place."""
    try:
        start = choose_start(
            training_args.output_dir,
            settings,
            training_args.resume_from_checkpoint,
            overwrite_run=run_args.overwrite_run,
            allow_changed_settings=run_args.allow_changed_settings,
        )
    except RunError as error:
        stop(2, error)
    if training_args.process_index == 0:
        for note in start.notes:
            print(f"note: {hide_home(note)}", file=sys.stderr)
    return start


def find_bundle(
    option: str, names: str | list[str], training_args: GRPOExtConfig, others: RewardBundle | None = None
) -> RewardBundle:
    """The rewards that an option names, behind others, with the weights of `--reward_weights` if that is there."""
    try:
        bundle = (RewardBundle() if others is None else others) + find_rewards(names)
    except ValueError as error:
        stop(2, f"--{option}: {error}")
    try:
        bundle = RewardBundle(bundle, training_args.reward_weights)
    except ValueError as error:
        stop(2, f"--reward_weights: {error}; the rewards are {', '.join(bundle.names)}")
    if training_args.reward_weights is not None:
        training_args.reward_weights = bundle.weights
    return bundle


@contextmanager
def data_errors(option: str, name: Any, remedy: str = "") -> Iterator[None]:
    """Ends with one line, which names the option, if a data set cannot be loaded."""
    try:
        yield
    except (OSError, ValueError) as error:
        stop(1, f"--{option}: data set {name!r} cannot be loaded. {remedy}Cause: {error}")


def model_path(model_args: ModelConfig) -> str:
    """The model's name as transformers takes it: the embedded policy's is its folder's."""
    name = model_args.model_name_or_path
    return embedded_policy_path() if name == EMBEDDED_POLICY else name


def check_model(model_args: ModelConfig, trust_remote_code: bool) -> None:
    """End if there is no such model."""
    with model_errors(model_args.model_name_or_path):
        AutoConfig.from_pretrained(
            model_path(model_args), revision=model_args.model_revision, trust_remote_code=trust_remote_code
        )


def load_tokenizer(model_args: ModelConfig, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The model's tokenizer; ends if there is no such model, or if it does not know how messages are written."""
    check_model(model_args, trust_remote_code)
    with model_errors(model_args.model_name_or_path):
        tokenizer = AutoTokenizer.from_pretrained(
            model_path(model_args), revision=model_args.model_revision, trust_remote_code=trust_remote_code
        )
    check_chat_template(tokenizer, model_args.model_name_or_path)
    return tokenizer


def check_chat_template(processing_class: Any, model: str, prompt: Any = ()) -> None:
    """End if prompts are messages and the model's tokenizer, or processor, does not know how these are written."""
    if not isinstance(prompt, str) and getattr(processing_class, "chat_template", None) is None:
        stop(1, f"model {model!r} has no chat template: choose an instruction-tuned model, the prompts are messages")


@contextmanager
def model_errors(name: str) -> Iterator[None]:
    """Ends with one line if a model cannot be loaded."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        stop(
            1,
            f"model {name!r} cannot be loaded. Without a network, name the folder of a downloaded model with "
            f"--model_name_or_path, or use the embedded policy (--model_name_or_path embedded). Cause: {error}",
        )


def model_init_kwargs(training_args: GRPOExtConfig, model_args: ModelConfig) -> dict[str, Any]:
    """How the model is loaded, as TRL's scripts have it: its options, and over them what is given for this."""
    return {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }


def make_trainer(trainer_class: type[GRPOTrainer], start: Start, **options: Any) -> Any:
    """A trainer that knows which run it is; ends if its settings do not go together, or a package is missing."""
    disable_progress_bar()  # of loading weights, and of each file of a checkpoint in the middle of the training bar
    try:
        trainer = trainer_class(**options)
    except (ValueError, ImportError, OSError) as error:
        stop(1, error)
    trainer.run_record = start.record
    if not trainer.args.disable_tqdm and trainer.pop_callback(ProgressCallback) is not None:  # none in a notebook
        trainer.add_callback(CompactProgress)
    trainer.add_callback(DescribeRun(trainer, start.record.settings.get("dataset_name")))
    trainer.add_callback(BoundCollectiveCalls)
    trainer.add_callback(BeginRun(start))
    return trainer


def add_evaluation(
    trainer: Any, problems: "Dataset | Mapping[str, Dataset]", run_args: RunArguments
) -> EvaluationCallback:
    """Let the trainer evaluate its policy on these problems: at both ends, and as `--eval_strategy` says."""
    try:
        evaluation = EvaluationCallback(
            trainer, problems, samples_per_item=run_args.eval_samples, batch_size=run_args.eval_batch_size
        )
    except ValueError as error:
        stop(1, error)
    trainer.add_callback(evaluation)
    return evaluation


def train(trainer: Any, start: Start, max_minutes: float | None = None) -> None:
    """Train, from the beginning or the checkpoint; ends if the run, a checkpoint or a setting is not as it must be.

    Ctrl-C and SIGTERM save a checkpoint and end it, see [`SaveOnInterrupt`].

    Args:
        trainer (`GRPOTrainer`):
            From [`make_trainer`].
        start ([`~trl_grpo_ext.runs.Start`]):
            From [`find_start`].
        max_minutes (`float`, *optional*):
            Stop after so long, see [`TimeBudget`].
    """
    if max_minutes is not None:
        trainer.add_callback(TimeBudget(trainer, max_minutes))
    command = command_that_goes_on(command_line())
    if start.checkpoint is not None:
        SIGNALS.goes_on = f"the last checkpoint is {hide_home(start.checkpoint)}; to go on: {command}"
    trainer.add_callback(SaveOnInterrupt(trainer, command))  # the last one
    if start.checkpoint is None and trainer.accelerator.is_main_process:
        Path(trainer.args.output_dir, SUMMARY_FILE).unlink(missing_ok=True)  # an earlier attempt's
    try:
        with logging_redirect_tqdm(), whole_lines(trainer):
            trainer.train(resume_from_checkpoint=start.checkpoint)
    except (RunError, CheckpointError, ImportError, ValueError) as error:
        stop(1, error)


@contextmanager
def whole_lines(trainer: Any) -> Iterator[None]:
    """Ends the training bar where an exception ends training: the line that says so is to stand alone, and last."""
    try:
        yield
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                callback.training_bar.close()


def save(trainer: Any) -> None:
    """Save the model and the trainer's state to the output folder, beside what the run was."""
    trainer.save_model(trainer.args.output_dir)
    trainer.save_state()


def write_summary(
    trainer: Any,
    before: Mapping[str, Figures] | None,
    after: Mapping[str, Figures] | None,
    *,
    seconds: float,
    model: str,
    dataset: str,
) -> dict[str, Any]:
    """Write `summary.json`: figures before and after, and what they were made with. Returns what is in it.

    Figures of the first set of problems are its `accuracy`, those of others `accuracy_<set>`; `None` where nothing was
    measured.
    """
    sets = list(after or before or {})
    accuracy = {
        "accuracy" if number == 0 else f"accuracy_{name}": {
            "before": None if before is None else before[name].to_dict(),
            "after": None if after is None else after[name].to_dict(),
        }
        for number, name in enumerate(sets)
    }
    summary = {
        **accuracy,
        "optimizer_steps": trainer.state.global_step,
        "seconds": round(seconds, 1),
        "model": shorten_home(model),
        "dataset": shorten_home(dataset),
        "output_dir": shorten_home(trainer.args.output_dir),
        "seed": trainer.args.seed,
        "processes": trainer.accelerator.num_processes,
        "versions": installed_versions(),
    }
    file = Path(trainer.args.output_dir, SUMMARY_FILE)
    file.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def print_summary(
    summary: Mapping[str, Any],
    before: Mapping[str, Figures] | None,
    after: Mapping[str, Figures] | None,
    titles: Mapping[str, str] | None = None,
) -> None:
    """Show the main figures before and after side by side, each with its interval; the file has all.

    Args:
        summary, before, after:
            What [`write_summary`] has returned and been given.
        titles (`Mapping[str, str]`, *optional*):
            What the sets of problems are called.
    """
    for name in after or before or {}:
        columns = {when: sets[name] for when, sets in (("before", before), ("after", after)) if sets is not None}
        items = next(iter(columns.values())).items
        print(f"\n{(titles or {}).get(name, name)}, {items} items, in %")
        show(partial(table_of, columns, is_short=True))
    print(
        f"{summary['optimizer_steps']} optimizer steps, {summary['seconds']:.0f} s; "
        f"summary and model are in {summary['output_dir']}"
    )


def write_report(trainer: Any) -> Path | None:
    """Write the run's report beside its record, and say where it is; a run never fails for it.

    Returns:
        `Path`, *optional*:
            The file, or `None` where there is no record, or no package to draw it with.
    """
    from .extras import PackageMissingError
    from .report.page import REPORT_FILE
    from .report.page import write_report as write
    from .report.record import RecordError, read_record

    folder = Path(trainer.args.output_dir)
    try:
        file = write([read_record(folder)], folder / REPORT_FILE)
    except PackageMissingError as error:
        print(f"note: there is no report of the run: {one_line(error)}", file=sys.stderr)
        print(f"With these, `trl-grpo-ext report {hide_home(folder)}` writes one.")
    except RecordError:  # record_run=False
        print("note: there is no report of the run, because it kept no record of itself", file=sys.stderr)
    except Exception as error:  # what was trained must not be lost for a page
        print(f"note: no report was written ({type(error).__name__}: {one_line(error)})", file=sys.stderr)
    else:
        print(f"The report is in {hide_home(file)}")
        return file
    return None
