"""`GRPOExtConfig`: TRL's `GRPOConfig` and the settings of the mixins."""

import math
import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, fields
from typing import Any, Self

from transformers import TrainingArguments
from trl import GRPOConfig

from .passes import can_stop, window_within_pass
from .private import is_secret


@dataclass
class GRPOExtConfig(GRPOConfig):
    """Arguments of [`GRPOExtTrainer`]: all of TRL's, and these.

    Args:
        reuse_first_pass_logps (`bool`, *optional*, defaults to `True`):
            Take the old policy's log-probabilities from the first pass over the rollouts instead of a forward of their
            own, for the micro-batches for which both are the same: those of the first optimizer step after a
            generation, without active dropout.
        target_kl (`float`, *optional*):
            Stop passing over a batch of rollouts when the mean KL from the old to the new policy over a pass exceeds
            this many nats a token, over the completions that carry a gradient, whether the others are computed or not.
            The passes that remain are made with completions sampled afresh for the same prompts, so neither the number
            of steps nor the order of prompts changes.
        skip_zero_advantage (`bool`, *optional*, defaults to `True`):
            Leave out completions that carry no gradient (zero advantage, no token that counts, or masked out by
            vLLM's importance sampling correction, once that is known), and spread the others evenly over the
            micro-batches of their optimizer step. Loss and gradient are the same. Applies to TRL's own loss with every
            `loss_type` but bnpo, and `beta=0`. Clip ratios count the completions left out, as TRL does, but for those
            that are masked out; the entropy and the metrics of sampler and VESPO's weights are those of the others.
        save_rollouts (`bool`, *optional*, defaults to `True`):
            Keep the rollouts in checkpoints, so that a run stopped between two passes ends where it would have.
        reshuffle_iterations (`bool`, *optional*, defaults to `False`):
            Deal the rows out to the micro-batches anew before each pass but the first.
        shared_prefix (`str`, *optional*, defaults to `"auto"`):
            Compute each prompt once for all its completions, and no padding: `"auto"` where the model and the batch
            allow it, `"on"` or an error that says why not, `"off"` never. Loss and gradient are the same.
        tokens_per_micro_batch (`int` or `str`, *optional*):
            Deal the rows of an optimizer step out to as few of its micro-batches as can be with at most so many tokens
            each, a prompt counted once; the others compute a single token. `"auto"`: as many tokens as TRL's padded
            micro-batch has, so no more memory. Where rows are padded, padding counts. Loss and gradient are the same.
            It pays where a micro-batch does not fill the device: packed rows of a small model on a GPU. On a CPU half
            the tokens take half the time, and under ZeRO-3 a micro-batch without rows still gathers all weights.
            Applies where rows can be dealt out: to TRL's own loss with every `loss_type` but bnpo.
        balance_ranks (`bool`, *optional*, defaults to `True`):
            With several processes, deal the rows of an optimizer step out over all of them, so that each has about
            equal work, because a step takes as long as the slowest. Loss and gradient are the same. Applies where rows
            can be dealt out, as `tokens_per_micro_batch` does.
        check_references (`bool`, *optional*, defaults to `True`):
            Raise when the trainer is made if this package's answer rewards cannot grade the first rows of the data
            sets: a column that is missing, references that do not get full marks. `False` is for trainers that make
            the column themselves.
        record_run (`bool`, *optional*, defaults to `True`):
            Write `record.jsonl` in the output folder: metrics and times of each step, rewards in numbers, and a sample
            of completions, for `trl-grpo-ext report`. See [`RunRecordCallback`].
        diagnose (`bool`, *optional*, defaults to `True`):
            Look at the record after steps, and warn of what is wrong: once for each of the rules of
            [`trl_grpo_ext.report.doctor`]. It takes less than a thousandth of a second, and needs `record_run`.
    """

    reuse_first_pass_logps: bool = field(
        default=True,
        metadata={
            "help": "Take the old policy's log-probabilities from the first pass over the rollouts, where exact."
        },
    )
    target_kl: float | None = field(
        default=None,
        metadata={"help": "Stop passing over the rollouts above this mean KL to the old policy, in nats a token."},
    )
    skip_zero_advantage: bool = field(
        default=True, metadata={"help": "Leave out completions that carry no gradient; the gradient is the same."}
    )
    save_rollouts: bool = field(default=True, metadata={"help": "Keep the rollouts in checkpoints."})
    reshuffle_iterations: bool = field(
        default=False, metadata={"help": "Deal the rows out to the micro-batches anew before each pass."}
    )
    shared_prefix: str = field(
        default="auto",
        metadata={
            "help": "Compute each prompt once for all its completions, and no padding; the gradient is the same. "
            "'auto': where it can be done; 'on': or raise an error that says why not; 'off': never.",
            "choices": ["auto", "on", "off"],
        },
    )
    tokens_per_micro_batch: int | str | None = field(
        default=None,
        metadata={
            "help": "Deal the rows of an optimizer step out to as few of its micro-batches as can be with at most so "
            "many tokens each; the gradient is the same. 'auto': as many as TRL's padded micro-batch has."
        },
    )
    balance_ranks: bool = field(
        default=True,
        metadata={
            "help": "With several processes, deal the rows of an optimizer step out over all of them, about as much "
            "work to each; the gradient is the same."
        },
    )
    check_references: bool = field(
        default=True, metadata={"help": "Raise if the answer rewards cannot grade the data sets' first rows."}
    )
    record_run: bool = field(
        default=True,
        metadata={"help": "Write the run's record, record.jsonl in the output folder, for `trl-grpo-ext report`."},
    )
    diagnose: bool = field(default=True, metadata={"help": "Warn during training of what is wrong with the run."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self)
        self.tokens_per_micro_batch = tokens_per_micro_batch(self)

    # transformers pickles the arguments into `training_args.bin`, in each checkpoint and beside the model that is
    # pushed to the hub. A token must not be in there; a copy within the process has it.

    def __getstate__(self) -> dict[str, Any]:
        return {name: None if is_secret(name) else value for name, value in vars(self).items()}

    def __copy__(self) -> Self:
        made = type(self).__new__(type(self))
        made.__dict__.update(self.__dict__)
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        made = type(self).__new__(type(self))
        made.__dict__.update(deepcopy(self.__dict__, memo))
        return made


# The fields above, with their defaults: a plain `GRPOConfig` works as if it had them.
EXTENSION_DEFAULTS: dict[str, Any] = {
    item.name: item.default
    for item in fields(GRPOExtConfig)
    if item.name not in {base_item.name for base_item in fields(GRPOConfig)}
}


def extension_setting(args: GRPOConfig, name: str) -> Any:
    """A field of [`GRPOExtConfig`], or its default where the arguments are a plain `GRPOConfig`."""
    return getattr(args, name, EXTENSION_DEFAULTS[name])


def tokens_per_micro_batch(args: GRPOConfig) -> int | str | None:
    """The field of this name, where a command line may have given a number as text."""
    value: int | str | None = extension_setting(args, "tokens_per_micro_batch")
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def check_settings(args: GRPOConfig) -> None:
    """Raise `ValueError` for settings that cannot work, naming field, value and remedy."""
    if args.num_iterations < 1:
        raise ValueError(f"num_iterations must be at least 1, got {args.num_iterations!r}")
    target_kl = extension_setting(args, "target_kl")
    if target_kl is not None and not (math.isfinite(target_kl) and target_kl > 0):
        raise ValueError(f"target_kl must be a positive number of nats, or None for no stop; got {target_kl!r}")
    if target_kl is not None and args.num_iterations == 1:
        raise ValueError(
            f"target_kl={target_kl!r} stops the passes over a batch of rollouts, and num_iterations=1 makes a single "
            "one: set num_iterations to 2 or more, or target_kl to None"
        )
    if extension_setting(args, "reshuffle_iterations") and args.num_iterations == 1:
        raise ValueError(
            "reshuffle_iterations=True deals rows out anew between passes, and num_iterations=1 makes a single one: "
            "set num_iterations to 2 or more"
        )
    if target_kl is not None and not can_stop(
        args.num_iterations, args.steps_per_generation, args.gradient_accumulation_steps
    ):
        raise ValueError(
            f"target_kl={target_kl!r} can never stop a pass: gradient_accumulation_steps="
            f"{args.gradient_accumulation_steps} takes all num_iterations * steps_per_generation = "
            f"{args.num_iterations} * {args.steps_per_generation} micro-batches of the passes into one optimizer "
            "step, in which the policy stays the same: set a smaller gradient_accumulation_steps, or target_kl to None"
        )
    # TRL before 1.11 keeps a text, of which it makes no use
    sampling_seed = args.generation_kwargs.get("seed") if isinstance(args.generation_kwargs, Mapping) else None
    if args.use_vllm and args.vllm_mode == "colocate" and sampling_seed not in (None, -1):  # -1 is vLLM's for none
        raise ValueError(
            f"generation_kwargs={args.generation_kwargs!r} with vllm_mode='colocate' makes all completions of a "
            "prompt the same, because vLLM begins each of them from that seed: leave it out; colocated, vLLM samples "
            "with this process's random generators, which checkpoints keep"
        )
    shared_prefix = extension_setting(args, "shared_prefix")
    if shared_prefix not in ("auto", "on", "off"):
        raise ValueError(f"shared_prefix must be 'auto', 'on' or 'off', got {shared_prefix!r}")
    _check_tokens_per_micro_batch(args)


def _check_tokens_per_micro_batch(args: GRPOConfig) -> None:
    tokens = tokens_per_micro_batch(args)
    if tokens is None:
        return
    if tokens != "auto" and (type(tokens) is not int or tokens < 1):
        raise ValueError(
            f"tokens_per_micro_batch must be a positive number of tokens, 'auto', or None for off; got {tokens!r}"
        )
    setting = f"tokens_per_micro_batch={tokens!r} deals the rows of an optimizer step out to fewer micro-batches"
    if args.loss_type == "bnpo":
        raise ValueError(
            f"{setting}, and loss_type='bnpo' is a mean over each of them, which would be another loss: set "
            "tokens_per_micro_batch to None, or another loss_type"
        )
    schedule = args.steps_per_generation, args.gradient_accumulation_steps
    window = window_within_pass(*schedule)
    if window is None:
        raise ValueError(
            f"{setting}, and with steps_per_generation={schedule[0]} and gradient_accumulation_steps={schedule[1]} "
            "optimizer steps begin in the middle of passes: make one of them a multiple of the other, or set "
            "tokens_per_micro_batch to None"
        )
    if window == 1:
        raise ValueError(
            f"{setting}, and with steps_per_generation={schedule[0]} and gradient_accumulation_steps={schedule[1]} it "
            "has only one in a pass: set both to 2 or more, or tokens_per_micro_batch to None"
        )


# Fields of `GRPOConfig` on which neither the rows of a batch nor what is done with them depends.
_INDIFFERENT_TO_ROLLOUTS = frozenset(
    {
        *("trust_remote_code", "num_generations_eval", "ds3_gather_for_generation", "save_rollouts", "target_kl"),
        *("check_references", "record_run", "diagnose", "balance_ranks"),  # rows are where they were dealt out by then
        *("log_completions", "log_multimodal", "num_completions_to_print", "log_unique_prompts"),
        *("log_completions_hub_repo", "vllm_server_base_url", "vllm_server_host", "vllm_server_port"),
        *("vllm_server_timeout", "vllm_group_port", "vllm_gpu_memory_utilization", "vllm_enable_sleep_mode"),
    }
)
_BATCH_FIELDS = ("per_device_train_batch_size", "gradient_accumulation_steps")


def rollout_settings(args: GRPOConfig) -> dict[str, Any]:
    """The settings on which a batch of rollouts depends, of JSON's types: all of TRL's and ours but harmless ones.

    How the rows were sampled and scored, which of them were left out, and where they were dealt out: a run that is
    resumed with another one of these cannot go on with them.
    """
    of_trainer = {item.name for item in fields(TrainingArguments)} - set(_BATCH_FIELDS)
    names = {item.name for item in fields(args)} - of_trainer - _INDIFFERENT_TO_ROLLOUTS
    names |= EXTENSION_DEFAULTS.keys() - _INDIFFERENT_TO_ROLLOUTS
    values = {name: getattr(args, name, EXTENSION_DEFAULTS.get(name)) for name in sorted(names)}
    return {name: _comparable(value) for name, value in values.items()}


def _comparable(value: Any) -> Any:
    """A setting in JSON's types: the same whenever the setting is the same, in whatever process."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(name): _comparable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_comparable(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((_comparable(item) for item in value), key=repr)
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
