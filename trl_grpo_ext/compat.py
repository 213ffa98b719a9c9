"""All that this package knows of private names of TRL, transformers, accelerate and torch, and what they mean.

The mixins override and call the methods in `SEAMS`; every other private name is used here alone. A test looks for
others, and `tests/test_trl_contract.py` holds these against what is installed, so that a release that moves one fails
with its name.
"""

import logging
import math
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import MISSING, fields
from datetime import timedelta
from functools import cache, partial
from inspect import Parameter, getattr_static, signature, unwrap
from pathlib import Path
from threading import Lock
from types import CodeType
from typing import Any

import numpy
import torch
import trl
from packaging.version import Version
from torch import nn
from torch.distributed import distributed_c10d
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer import grpo_trainer
from trl.trainer import utils as trl_utils

from .exits import is_first_rank
from .objective import LOSS_TYPES
from .ranks import is_so_anywhere


logger = logging.getLogger(__name__)

RELEASE: str = trl.__version__
# The minors of TRL with which tests were run: all with the last one, those of `scripts/test_matrix.py` with each. None
# could be with 1.15, which does not train on a CPU.
TESTED_TRL = ("1.9", "1.10", "1.11", "1.12", "1.13", "1.14", "1.16")

# Members of TRL's trainer that mixins override, and call through `super()`.
SEAMS = (
    "_calculate_rewards",  # scores of a generation batch
    "_compute_loss",  # the loss of a micro-batch
    "_generate",  # completions, from wherever they come
    "_generate_and_score_completions",  # a generation batch: completions, rewards, advantages
    "_get_output_dir",  # where a run's checkpoints lie
    "_get_per_token_logps_and_entropies",  # every forward, of the policy and of the reference
    "_get_train_sampler",  # the order of prompts
    "_init_training_state",  # epoch and batches to begin with
    "_load_optimizer_and_scheduler",  # the last thing that is read of a checkpoint before training goes on
    "_prepare_inputs",  # the rows of the next micro-batch, generated where it is time
    "_push_from_checkpoint",  # what is done with a checkpoint when it has been written
    "_save_checkpoint",
    "_tag_names",  # of the model card
)

FORWARD = "_get_per_token_logps_and_entropies"
# With which arguments seams are called here, by place; what else they take is handed on.
PLACES = {
    "_calculate_rewards": ("inputs",),
    "_compute_loss": ("model", "inputs"),
    "_generate": ("prompts",),
    "_generate_and_score_completions": ("inputs",),
    FORWARD: ("model", "input_ids", "attention_mask", "logits_to_keep"),
    "_prepare_inputs": ("generation_batch",),
    "_save_checkpoint": ("model", "trial"),
}
# What a trainer has when it is made, and is read or written here.
STATE = ("_buffered_inputs", "_entropy_bonus_enabled", "_logs", "_metrics", "_pending_extra_logs", "_step")
_TRL_FOLDER, _OWN_FOLDER, _TORCH_FOLDER = (Path(file).parent for file in (trl.__file__, __file__, torch.__file__))


class IncompatibleReleaseError(RuntimeError):
    """The installed TRL, or transformers, has moved something that the mixins need; the message is one line."""


def check_release() -> None:
    """Look at what the mixins need of TRL's trainer before one is made, and say once if this release was not tested.

    It goes by what is there and not by versions, but for those before the oldest that was tested, whose losses mean
    something else under the same names. A newer release that has all of it may work.

    Raises:
        IncompatibleReleaseError: If a seam is missing, or takes other arguments; the message names it and the releases
            that work.
    """
    if Version(RELEASE).release[:2] < Version(TESTED_TRL[0]).release:
        raise _moved("the losses have other normalizers")  # and no name says so
    for name in SEAMS:
        member = getattr(GRPOTrainer, name, None)
        if member is None:
            raise _moved(f"GRPOTrainer.{name} is not there")
        if name not in PLACES:
            continue
        parameters = [*signature(member).parameters.values()][1 : 1 + len(PLACES[name])]
        places = tuple(parameter.name for parameter in parameters)
        # as a patch of somebody's does
        takes_all = any(parameter.kind is Parameter.VAR_POSITIONAL for parameter in parameters)
        if places != PLACES[name] and not takes_all:
            raise _moved(f"GRPOTrainer.{name} takes {', '.join(places)} and not {', '.join(PLACES[name])}")
    _say_if_untested()


def check_state(trainer: GRPOTrainer) -> None:
    """Look at what the mixins need of a trainer that was made.

    Raises:
        IncompatibleReleaseError: If something is missing.
    """
    for name in STATE:
        if not hasattr(trainer, name):
            raise _moved(f"the trainer has no {name}")


def check_arguments(trainer: GRPOTrainer) -> None:
    """Refuse what the installed TRL lets through, and would compute in another way than the mixins know.

    Raises:
        ValueError: If a process would train on several GPUs, or Liger would compute the loss.
    """
    if trainer.args.n_gpu > 1:  # refused by TRL itself from 1.15 on
        raise ValueError(
            f"one process would train on {trainer.args.n_gpu} GPUs (nn.DataParallel), where losses are divided by the "
            "rows of one: start a process for each with accelerate launch, or set CUDA_VISIBLE_DEVICES to one"
        )
    if trainer.args.use_liger_kernel and hasattr(GRPOTrainer, "compute_liger_loss"):
        raise ValueError(
            f"use_liger_kernel=True: in TRL {RELEASE} Liger then computes the loss, beside the methods by which "
            "rollouts are reused and packed: set it to False, or install TRL 1.14 or later"
        )


def _moved(what: str) -> IncompatibleReleaseError:
    return IncompatibleReleaseError(
        f"trl_grpo_ext does not work with TRL {RELEASE}, of which {what}: install a release that does "
        f"({TESTED_TRL[0]} to {TESTED_TRL[-1]}), as with pip install 'trl=={TESTED_TRL[-1]}.*'"
    )


@cache
def _say_if_untested() -> None:
    installed = Version(RELEASE)
    if installed.release[:2] not in [Version(minor).release for minor in TESTED_TRL] and is_first_rank():
        logger.warning(
            "TRL %s is none of the releases that trl_grpo_ext was tested with (%s). What it needs is there; whether "
            "that means the same, only tests can tell.",
            installed,
            ", ".join(TESTED_TRL),
        )


def step(trainer: GRPOTrainer) -> int:
    """Number of micro-batches trained on so far; TRL's schedule of generations goes by it."""
    return trainer._step


def set_step(trainer: GRPOTrainer, value: int) -> None:
    """Set [`step`] back or forward."""
    trainer._step = value


def buffered_micro_batches(trainer: GRPOTrainer) -> Any:
    """The list of micro-batches of the current generation batch; `None` makes TRL generate at its next step."""
    return trainer._buffered_inputs


def set_buffered_micro_batches(trainer: GRPOTrainer, micro_batches: Sequence[dict[str, Any]] | None) -> None:
    """Put micro-batches in the place of [`buffered_micro_batches`]."""
    trainer._buffered_inputs = micro_batches


def append_metric(trainer: GRPOTrainer, name: str, value: float, mode: str = "train") -> None:
    """Add a value to what TRL averages and logs under `name`."""
    trainer._metrics[mode][name].append(value)


def metrics_of_training(trainer: GRPOTrainer) -> Mapping[str, list[float]]:
    """The values that TRL has collected since it last logged, by the metric's name; it then begins new lists."""
    metrics: Mapping[str, list[float]] = trainer._metrics["train"]
    return metrics


def drop_metrics_without_value(trainer: GRPOTrainer) -> None:
    """Forget metrics whose values are all NaN, which TRL would log as `None`."""
    for metrics in trainer._metrics.values():
        for name in [name for name, values in metrics.items() if all(map(math.isnan, values))]:
            del metrics[name]


def log_column(trainer: GRPOTrainer, name: str, values: list[Any]) -> None:
    """Show a column with the completions: what `log_extra` does for reward functions, an entry for each row."""
    trainer._log_completion_extra(name, values)


@contextmanager
def completions_shown_by(function: Callable[..., None]) -> Iterator[None]:
    """Within it TRL shows completions by a function, which gets TRL's own and the call's arguments."""
    show = grpo_trainer.print_prompt_completions_sample
    grpo_trainer.print_prompt_completions_sample = partial(function, show)
    try:
        yield
    finally:
        grpo_trainer.print_prompt_completions_sample = show


def columns_logged_by_rewards(trainer: GRPOTrainer) -> Mapping[str, list[Any]]:
    """What reward functions have given to `log_extra` for this process' rows, until TRL has gathered it."""
    columns: Mapping[str, list[Any]] = trainer._pending_extra_logs
    return columns


def takes_old_policy_forward(trainer: GRPOTrainer) -> bool:
    """Whether TRL would compute the old policy's log-probabilities when it generates (all rows, one extra forward)."""
    args = trainer.args
    misaligned = args.gradient_accumulation_steps % (args.steps_per_generation * trainer.num_iterations) != 0
    return misaligned or corrects_sampling(trainer)


def corrects_sampling(trainer: GRPOTrainer) -> bool:
    """Whether completions are weighed by vLLM's log-probabilities: TRL then needs the old policy's at generation."""
    return bool(trainer.use_vllm and trainer.vllm_importance_sampling_correction)


def sampling_logps_of(generated: tuple[Any, ...]) -> list[list[float | None]] | None:
    """The log-probabilities of whoever sampled, in what `_generate` returns; `None` if they did not come with it."""
    logps: list[list[float | None]] | None = generated[4]
    return logps


@contextmanager
def evaluation_undone(trainer: GRPOTrainer) -> Iterator[None]:
    """Behind it the trainer goes on as if it had not evaluated within.

    Restored are the random generators, the modes of the model's modules, what TRL goes on with in training (the number
    of micro-batches and the current ones), and the completions that it shows and writes with the next log, which else
    were those of the evaluation until training generates again.
    """
    modes = {module: module.training for module in trainer.model_wrapped.modules()}
    going_on_with = step(trainer), buffered_micro_batches(trainer), _copied_completions(trainer._logs)
    with generators_restored(trainer.accelerator.device):
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            trainer._step, trainer._buffered_inputs, trainer._logs = going_on_with


def _copied_completions(logs: dict[str, Any]) -> dict[str, Any]:
    """TRL's columns of logged completions, each a deque or, by name, some of them."""
    copies: dict[str, Any] = {}
    for name, values in logs.items():
        copies[name] = copy(values)
        if isinstance(values, dict):
            copies[name].update({inner: copy(column) for inner, column in values.items()})
    return copies


# Whose method it is


def foreign_override(trainer: GRPOTrainer, name: str) -> str | None:
    """Whose method a call really reaches, where that is neither TRL's own nor one of this package's.

    Args:
        trainer (`GRPOTrainer`):
            The trainer; methods replaced on the object itself count too.
        name (`str`):
            A method of `GRPOTrainer`.

    Returns:
        `str` or `None`:
            The method that stands before TRL's, or in its place; `None` if there is none.
    """
    on_object = vars(trainer).get(name)
    while isinstance(on_object, _StandIn):
        on_object = on_object.set_before
    if on_object is not None:
        return f"the method {name!r} that was set on this {type(trainer).__name__}"
    for cls in type(trainer).__mro__:
        method = vars(cls).get(name)
        if cls is GRPOTrainer:
            is_trls = _comes_from(method, _TRL_FOLDER, f"GRPOTrainer.{name}")
            return None if is_trls else f"a function put in place of GRPOTrainer.{name}"
        if method is not None and not _comes_from(method, _OWN_FOLDER, f"{cls.__name__}.{name}"):
            return f"{cls.__name__}.{name}"
    return None


# Static methods that TRL's loss calls; a trainer may have its own.
PARTS_OF_THE_LOSS = ("get_gamma_weights", "get_off_policy_mask")


def foreign_part_of_the_loss(trainer: GRPOTrainer) -> str | None:
    """Which of the `PARTS_OF_THE_LOSS` is not TRL's own, in a subclass, on the object or put in its place."""
    for name in PARTS_OF_THE_LOSS:
        method = getattr_static(trainer, name)
        function = getattr(method, "__func__", method)
        wrapped = getattr(function, "__wrapped__", None)
        if wrapped is not None and Path(function.__code__.co_filename).is_relative_to(_TORCH_FOLDER):
            function = wrapped  # of `torch.no_grad()`
        if not _comes_from(function, _TRL_FOLDER, f"GRPOTrainer.{name}"):
            return name
    return None


def _comes_from(method: Any, folder: Path, qualified_name: str) -> bool:
    """Whether a function was written in a folder under this name, and each decorator around it there as well.

    Its code says so; `__module__` and `__qualname__` are copied by `functools.wraps`.
    """
    code: CodeType | None = getattr(method, "__code__", None)
    if code is None or not Path(code.co_filename).is_relative_to(folder):
        return False
    wrapped = getattr(method, "__wrapped__", None)
    return code.co_qualname == qualified_name if wrapped is None else _comes_from(wrapped, folder, qualified_name)


# What TRL's loss reads of its configuration and of the trainer's state, and what is known of it here: either
# `ClippedObjective` has it, or `is_clipped_objective` asks for its default, or it changes no gradient.
KNOWN_TO_THE_LOSS = frozenset(
    {
        *("beta", "delta", "epsilon_low", "epsilon_high", "importance_sampling_level", "loss_type"),
        *(
            "max_completion_length",
            "steps_per_generation",
            "use_bias_correction_kl",
            "current_gradient_accumulation_steps",
        ),
        *("top_entropy_quantile", "off_policy_mask_threshold", "use_vllm", "vllm_importance_sampling_correction"),
        *("aux_loss_enabled", "router_aux_loss_coef", "_entropy_bonus_enabled", "_entropy_window_stats"),
        *("_last_world_entropy", "entropy_coef", "entropy_coef_delta", "entropy_coef_max", "entropy_coef_min"),
        *("entropy_target", "use_adaptive_entropy", "sapo_temperature_neg", "sapo_temperature_pos", "vespo_k_neg"),
        *("vespo_k_pos", "vespo_lambda_neg", "vespo_lambda_pos", "accelerator", "args", "model", "_metrics"),
    }
)


def unknown_loss_options(trainer: GRPOTrainer) -> list[str]:
    """What TRL's loss reads, is set to something, and is not known here: options of a later release.

    Read are all names that are fields of the configuration or attributes of the trainer, in the function's code and in
    that of the methods which it calls.
    """
    names = _names_in(unwrap(GRPOTrainer._compute_loss).__code__)
    for name in names & vars(GRPOTrainer).keys() - {FORWARD}:
        method = unwrap(getattr(GRPOTrainer, name))
        names |= _names_in(method.__code__) if hasattr(method, "__code__") else frozenset()
    names -= KNOWN_TO_THE_LOSS
    options = {option.name: option for option in fields(trainer.args) if option.name in names}
    changed = []
    for name, option in options.items():
        default = option.default_factory() if option.default_factory is not MISSING else option.default
        if getattr(trainer.args, name) != default:
            changed.append(name)
    for name in (names & vars(trainer).keys()) - options.keys():
        value = vars(trainer)[name]
        if isinstance(value, bool | int | float | str) and value:
            changed.append(name)
    return sorted(changed)


@cache
def _names_in(code: CodeType) -> frozenset[str]:
    """Attributes, globals and string constants of a function and of those defined in it."""
    names = {*code.co_names, *(constant for constant in code.co_consts if isinstance(constant, str))}
    inner = (_names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return frozenset(names.union(*inner))


def gradient_of_trls_loss(
    trainer: GRPOTrainer, micro_batch: dict[str, torch.Tensor], per_token_logps: torch.Tensor
) -> torch.Tensor:
    """What TRL's own loss gives the policy's log-probabilities of a micro-batch, `(B, C)`; asked by all processes.

    No forward is made, and the trainer is as it was behind it, its metrics too. Accumulation is left out: losses are
    those of an optimizer step of one micro-batch.

    Args:
        trainer (`GRPOTrainer`):
            Whose settings the loss goes by.
        micro_batch (`dict[str, torch.Tensor]`):
            The rows.
        per_token_logps (`torch.Tensor`):
            The log-probabilities, which need a gradient.
    """
    state, was_training = dict(vars(trainer)), trainer.model.training
    trainer.model.training = True  # of this module alone: what the loss asks
    trainer.current_gradient_accumulation_steps, trainer._metrics = 1, {"train": defaultdict(list)}
    scores = per_token_logps, torch.zeros_like(per_token_logps), None
    try:
        with _replaced_forward(trainer, lambda *args, **kwargs: scores), torch.enable_grad():
            loss = GRPOTrainer._compute_loss(trainer, trainer.model, micro_batch)
        (gradient,) = torch.autograd.grad(loss, per_token_logps)
    finally:
        trainer.model.training = was_training
        del trainer.current_gradient_accumulation_steps, trainer._metrics
        vars(trainer).update(state)
    return gradient


def is_clipped_objective(trainer: GRPOTrainer) -> bool:
    """Whether TRL's loss is one that `ClippedObjective` has: no feature on, besides those, that changes the loss."""
    return feature_beside_objective(trainer) is None


def feature_beside_objective(trainer: GRPOTrainer) -> str | None:
    """What TRL's loss has that `ClippedObjective` has not; `None` if it is one of those."""
    if trainer.loss_type not in LOSS_TYPES:
        return f"loss_type {trainer.loss_type!r}"
    if trainer.top_entropy_quantile != 1.0:
        return f"a quantile of the entropy (top_entropy_quantile {trainer.top_entropy_quantile})"
    if trainer._entropy_bonus_enabled:
        return "an entropy bonus"
    return "a MoE's auxiliary loss" if trainer.aux_loss_enabled else None


# Randomness in a forward

# Names of numbers by which a forward is random where they are above 0, and of those that another head than a language
# model's goes by.
_OF_RANDOMNESS, _OF_OTHER_HEADS = ("drop", "jitter", "noise", "stochastic"), ("classifier", "seq_classif", "summary")


def has_active_randomness(model: nn.Module) -> bool:
    """Whether two forwards of the model in training mode can differ, by what modules and configurations say.

    That is dropout, layers left out, and noise in a router or on embeddings, as the model's configuration, one inside
    of it, or a module has it, and a generator of a module's own; [`forwards_are_random`] asks the forward itself.
    """
    settings: dict[int, Any] = {}  # by identity: modules share configurations
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            return True
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            settings[id(config)] = vars(config)
        settings[id(module)] = {name: value for name, value in vars(module).items() if not isinstance(value, dict)}
    return any(map(_says_randomness, settings.values()))


def _says_randomness(settings: dict[Any, Any]) -> bool:
    for name, value in settings.items():
        if isinstance(value, PreTrainedConfig):
            value = vars(value)
        if isinstance(value, torch.Generator) or (isinstance(value, dict) and _says_randomness(value)):
            return True
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and value > 0 and _is_of_randomness(str(name).lower()):
            return True
    return False


def _is_of_randomness(name: str) -> bool:
    return any(word in name for word in _OF_RANDOMNESS) and not name.startswith(_OF_OTHER_HEADS)


def has_noise_on_embeddings(trainer: GRPOTrainer) -> bool:
    """Whether NEFTune is on, by the arguments or by the hook that it leaves on the embeddings while training."""
    return trainer.neftune_noise_alpha is not None or any(
        hasattr(module, "neftune_noise_alpha") for module in trainer.model.modules()
    )


def forwards_are_random(trainer: GRPOTrainer) -> bool:
    """Whether two forwards of the policy in training mode can differ; asked by all processes together.

    First by what is known of it by name. Then a made-up row is computed, once for each trainer: whatever is random
    takes numbers from one of the generators, so that a generator that has moved on is the proof, for any model.
    """
    if has_noise_on_embeddings(trainer) or has_active_randomness(trainer.model):
        return True
    if not trainer.model.training:
        return False
    if not hasattr(trainer, "_draws_random_numbers"):
        trainer._draws_random_numbers = _draws_random_numbers(trainer)
    return trainer._draws_random_numbers


def _draws_random_numbers(trainer: GRPOTrainer) -> bool:
    device = trainer.accelerator.device
    ids = torch.arange(8, device=device).unsqueeze(0)
    checkpointing = trainer.args.gradient_checkpointing_kwargs
    with generators_restored(device) as before, torch.no_grad():
        try:
            with disable_gradient_checkpointing(trainer.model, checkpointing):
                # TRL's own, whatever a subclass makes of it
                GRPOTrainer._get_per_token_logps_and_entropies(trainer, trainer.model, ids, torch.ones_like(ids), 4)
        except Exception:  # models of others, which may want more than text: nothing is known of them
            draws = True
        else:
            draws = any(_differs(state, before[name]) for name, state in _generator_states(device).items())
    return is_so_anywhere(trainer.accelerator, draws)


@contextmanager
def generators_restored(device: torch.device) -> Iterator[dict[str, Any]]:
    """Random generators go on behind it as if nothing had been drawn within; yields their states."""
    states = _generator_states(device)
    try:
        yield states
    finally:
        random.setstate(states["python"])
        numpy.random.set_state(states["numpy"])
        torch.set_rng_state(states["torch"])
        if "device" in states:
            torch.get_device_module(device).set_rng_state(states["device"])


def _generator_states(device: torch.device) -> dict[str, Any]:
    states = {"python": random.getstate(), "numpy": numpy.random.get_state(), "torch": torch.get_rng_state()}
    if device.type != "cpu":
        states["device"] = torch.get_device_module(device).get_rng_state()
    return states


def _differs(state: Any, other: Any) -> bool:
    if isinstance(state, tuple):  # Python's and numpy's
        return any(_differs(part, other_part) for part, other_part in zip(state, other, strict=True))
    return bool((state != other).any()) if isinstance(state, torch.Tensor | numpy.ndarray) else bool(state != other)


# What packing relies on in transformers, torch and accelerate


def attention_name(model: PreTrainedModel) -> str:
    """The name of the model's attention in transformers' `AttentionInterface`; it is in a private attribute."""
    return str(model.config._attn_implementation)


def carries_state_along_rows(model: PreTrainedModel) -> bool:
    """Whether transformers says of the model that it is recurrent."""
    return bool(getattr(model, "_is_stateful", False))


def holds_parts_of_parameters(model: nn.Module) -> bool:
    """Whether a process has only its part of a parameter between forwards: ZeRO-3, FSDP, tensor parallelism."""
    return any(
        hasattr(parameter, "ds_id") or isinstance(parameter, DTensor) for parameter in model.parameters()
    ) or any(isinstance(module, FullyShardedDataParallel) for module in model.modules())


def _no_compaction(device: torch.device) -> bool:
    return False


# Whether TRL gives its models a head that scores labels, chunk by chunk (from 1.15 on); before, they return logits.
HAS_SCORING_HEAD = hasattr(trl_utils, "add_fused_lm_head")


def scores_of_logits(
    trainer: GRPOTrainer, logits: torch.Tensor, labels: torch.Tensor, compute_entropy: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What TRL makes of logits, where its models have no head that scores labels.

    Args:
        trainer (`GRPOTrainer`):
            Whose temperature it is, and whether its loss has a gradient by way of entropies.
        logits (`torch.Tensor`):
            `(1, S, V)`.
        labels (`torch.Tensor`):
            The token that each place predicts, `(1, S)`.
        compute_entropy (`bool`):
            Whether entropies are asked for.

    Returns:
        `tuple[torch.Tensor, torch.Tensor | None]`:
            Log-probabilities and entropies in nats, each `(1, S)`.
    """
    logits = logits / trainer.temperature
    entropies = None
    if compute_entropy:
        with torch.set_grad_enabled(torch.is_grad_enabled() and trainer._entropy_bonus_enabled):
            entropies = trl_utils.entropy_from_logits(logits)
    return trl_utils.selective_log_softmax(logits, labels), entropies


# What stood in TRL's module at each entry of `every_row_scored`; its entries may overlap, in threads.
_set_before: list[Callable[[torch.device], bool]] = []
_set_before_lock = Lock()


@contextmanager
def every_row_scored() -> Iterator[None]:
    """Within it TRL's fused LM head scores all that it is given.

    On a GPU it first takes out what has no label, and waits to learn how much that is. A packed row has a label
    wherever the head is called. Other threads' padded forwards meanwhile score what has no label too, and set it to 0.
    """
    if not hasattr(trl_utils, "_use_triton"):  # releases that do not ask
        yield
        return
    with _set_before_lock:
        _set_before.append(trl_utils._use_triton)
        trl_utils._use_triton = _no_compaction
    try:
        yield
    finally:
        with _set_before_lock:  # so whoever leaves last puts TRL's own back
            trl_utils._use_triton = _set_before.pop()


# The kernels that `scaled_dot_product_attention` takes on CPUs; they return the log-sum-exp too, which it does not.
flash_attention_on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_attention_on_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# And those on GPUs, for sequences of any length one after the other.
flash_attention = torch.ops.aten._flash_attention_forward
flash_attention_backward = torch.ops.aten._flash_attention_backward


def flash_attention_in_use() -> str | None:
    """Whose FlashAttention these are, if it was changed by `torch.nn.attention.activate_flash_attention_impl`."""
    current = getattr(torch.nn.attention, "current_flash_attention_impl", None)  # from torch 2.11 or so
    return None if current is None else current()


# Methods that are looked at from outside


class _StandIn:
    """A function in front of one of the trainer's methods, whoever overrides it; it gets that method, and the call.

    Args:
        trainer (`GRPOTrainer`):
            The trainer.
        name (`str`):
            The method's name.
        function (`Callable`):
            Called with the method that stood there, and the call's arguments.
    """

    def __init__(self, trainer: GRPOTrainer, name: str, function: Callable[..., Any]) -> None:
        self.set_before = vars(trainer).get(name)  # on the object itself
        self._name, self._method = name, getattr(trainer, name)
        self._function: Callable[..., Any] | None = function
        setattr(trainer, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._function is None:
            return self._method(*args, **kwargs)
        return self._function(self._method, *args, **kwargs)

    def remove(self, trainer: GRPOTrainer) -> None:
        """Stand there no longer; behind what others have put before it since, let calls through."""
        self._function = None
        if vars(trainer).get(self._name) is not self:
            return
        if self.set_before is None:
            delattr(trainer, self._name)
        else:
            setattr(trainer, self._name, self.set_before)


@contextmanager
def _replaced_forward(trainer: GRPOTrainer, function: Callable[..., Any]) -> Iterator[None]:
    stand_in = _StandIn(trainer, FORWARD, function)
    try:
        yield
    finally:
        stand_in.remove(trainer)


class ObservedGenerations:
    """Lets functions stand before the methods that make a generation batch, until [`~ObservedGenerations.end`].

    Each is called with the method and the call's arguments, and returns what the method does. What subclasses override
    is called as before, and [`foreign_override`] takes none of this for a user's method.

    Args:
        trainer (`GRPOTrainer`):
            The trainer.
        batch (`Callable`):
            Before the method that makes the batch: it is given its inputs, and returns its rows as tensors.
        completions (`Callable`):
            Before the one that generates, within it.
        rewards (`Callable`):
            Before the one that scores, within it: it is given `inputs`, `prompts`, `completions` and the completions'
            ids, all of this process, and returns the scores of all processes, `(N, number of functions)`.
    """

    def __init__(
        self,
        trainer: GRPOTrainer,
        *,
        batch: Callable[..., Any],
        completions: Callable[..., Any],
        rewards: Callable[..., Any],
    ) -> None:
        functions = {
            "_generate_and_score_completions": batch,
            "_generate": completions,
            "_calculate_rewards": rewards,
        }
        self._trainer = trainer
        self._stand_ins = [_StandIn(trainer, name, function) for name, function in functions.items()]

    def end(self) -> None:
        for stand_in in self._stand_ins:
            stand_in.remove(self._trainer)


@contextmanager
def without_old_policy_forward(trainer: GRPOTrainer) -> Iterator[None]:
    """Within it TRL's forward for the old policy, the first that it asks for when it generates, yields `None`s.

    Only that one: those of rollout functions, rewards and subclasses are made. Nor does TRL then weigh completions by
    these log-probabilities: from that forward on, while rewards are computed, the trainer says that it corrects for
    none.
    """
    of_trl = unwrap(GRPOTrainer._generate_and_score_completions).__code__
    is_awaited, corrects = True, trainer.vllm_importance_sampling_correction

    def skip_the_first(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal is_awaited
        caller = sys._getframe(2)  # beyond the function that stands in the method's place
        if is_awaited and caller.f_code is of_trl:
            is_awaited = trainer.vllm_importance_sampling_correction = False
            return None, None, None
        return forward(*args, **kwargs)

    try:
        with _replaced_forward(trainer, skip_the_first):
            yield
    finally:
        if not is_awaited:
            trainer.vllm_importance_sampling_correction = corrects


@contextmanager
def recorded_policy_forwards(trainer: GRPOTrainer, model: Any) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Within it, the policy's forwards that carry a gradient are collected, as whoever asks for them gets them.

    Args:
        trainer (`GRPOTrainer`):
            The trainer.
        model (`nn.Module`):
            The policy, as the loss gets it.

    Yields:
        `list[tuple[torch.Tensor, torch.Tensor]]`:
            For each of them the token ids, `(B, T)`, and the log-probabilities without their graph, `(B, C)`.
    """
    found: list[tuple[torch.Tensor, torch.Tensor]] = []

    def record(forward: Callable[..., Any], of_model: Any, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(of_model, input_ids, *args, **kwargs)
        if of_model is model and isinstance(output[0], torch.Tensor) and output[0].requires_grad:
            found.append((input_ids, output[0].detach()))
        return output

    with _replaced_forward(trainer, record):
        yield found


def save_on_signal_behind_optimizer_steps(trainer: GRPOTrainer) -> None:
    """Let `enable_jit_checkpoint` save at the end of an optimizer step, and not between its gradient and the step.

    There the counter of micro-batches is ahead of the weights: a run that went on from there would leave a step out.
    """
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, JITCheckpointCallback):
            callback.on_pre_optimizer_step = lambda *args, **kwargs: None  # it asks again in `on_step_end`


# What the forward takes beside token ids where there are images
IMAGE_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


def forward_inputs(micro_batch: dict[str, Any]) -> tuple[tuple[torch.Tensor, torch.Tensor, int], dict[str, Any]]:
    """What the forward of a micro-batch is called with: token ids and mask, both `(B, P + C)`, `C`, and of images."""
    ids = torch.cat([micro_batch["prompt_ids"], micro_batch["completion_ids"]], dim=1)
    mask = torch.cat([micro_batch["prompt_mask"], micro_batch["completion_mask"]], dim=1)
    images = {name: micro_batch[name] for name in IMAGE_INPUTS if micro_batch.get(name) is not None}
    return (ids, mask, micro_batch["completion_ids"].size(1)), images


def bound_collective_calls(timeout: timedelta) -> None:
    """Let the calls of every group of processes give up after so long, also of groups that others have made."""
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timeout, group)
