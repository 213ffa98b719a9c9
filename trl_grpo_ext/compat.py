"""What this package knows of TRL's private members: their names, where they came from, and what they mean.

The mixins override public and underscored *methods* of `trl.GRPOTrainer` and call `super()`; its underscored *state*
is read and written here alone. `tests/test_trl_contract.py` holds every one of these against the installed TRL, so
that a release that moves one fails with its name.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from accelerate.utils import DynamoBackend, is_compiled_module
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing

from .objective import LOSS_TYPES


def step(trainer: GRPOTrainer) -> int:
    """Number of micro-batches trained on so far; TRL's schedule of generations goes by it."""
    return trainer._step


def set_step(trainer: GRPOTrainer, value: int) -> None:
    trainer._step = value


def buffered_micro_batches(trainer: GRPOTrainer) -> Any:
    """The list of micro-batches of the current generation batch; `None` makes TRL generate at its next step."""
    return trainer._buffered_inputs


def set_buffered_micro_batches(trainer: GRPOTrainer, micro_batches: Sequence[dict[str, Any]] | None) -> None:
    trainer._buffered_inputs = micro_batches


def append_metric(trainer: GRPOTrainer, name: str, value: float, mode: str = "train") -> None:
    """Add a value to what TRL averages and logs under `name`."""
    trainer._metrics[mode][name].append(value)


def takes_old_policy_forward(trainer: GRPOTrainer) -> bool:
    """Whether TRL would compute the old policy's log-probabilities when it generates (all rows, one extra forward)."""
    args = trainer.args
    misaligned = args.gradient_accumulation_steps % (args.steps_per_generation * trainer.num_iterations) != 0
    return misaligned or corrects_sampling(trainer)


def corrects_sampling(trainer: GRPOTrainer) -> bool:
    """Whether vLLM's log-probabilities are corrected for: TRL then needs the old policy's at generation."""
    return bool(trainer.use_vllm and trainer.vllm_importance_sampling_correction)


def has_own_loss(next_compute_loss: Any) -> bool:
    """Whether another class than TRL's `GRPOTrainer` computes the loss that comes next in the method order."""
    return getattr(next_compute_loss, "__func__", next_compute_loss) is not GRPOTrainer._compute_loss


def is_clipped_objective(trainer: GRPOTrainer) -> bool:
    """Whether TRL's loss is the plain clipped objective: no feature on, besides it, that changes the loss."""
    return (
        trainer.loss_type in LOSS_TYPES
        and trainer.top_entropy_quantile == 1.0
        and trainer.off_policy_mask_threshold is None
        and not trainer._entropy_bonus_enabled
        and not trainer.aux_loss_enabled
        and not corrects_sampling(trainer)
    )


# Randomness in a forward

# Names of numbers by which a forward is random where they are above 0, and of those that another head than a language
# model's goes by.
_OF_RANDOMNESS, _OF_OTHER_HEADS = ("drop", "jitter", "noise", "stochastic"), ("classifier", "seq_classif", "summary")


def has_active_randomness(model: nn.Module) -> bool:
    """Whether two forwards of the model in training mode can differ, by what modules and configurations say.

    That is dropout, layers left out, and noise in a router or on embeddings, as the model's configuration, one inside
    of it, or a module has it; [`forwards_are_random`] asks the forward itself.
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
        if isinstance(value, dict) and _says_randomness(value):
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
    found = torch.tensor([float(draws)], device=device)
    return bool(trainer.accelerator.reduce(found, reduction="sum").item() > 0)


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


def attention_name(model: PreTrainedModel) -> str | None:
    """The name of the model's attention in transformers' `AttentionInterface`; it is in a private attribute."""
    return model.config._attn_implementation


def carries_state_along_rows(model: PreTrainedModel) -> bool:
    """Whether transformers says of the model that it is recurrent."""
    return bool(getattr(model, "_is_stateful", False))


def compiles(trainer: GRPOTrainer) -> bool:
    """Whether the policy is compiled, or will be when it is prepared for training."""
    return trainer.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO or any(
        is_compiled_module(module) or module._compiled_call_impl is not None for module in trainer.model.modules()
    )


def holds_parts_of_parameters(model: nn.Module) -> bool:
    """Whether a process has only its part of a parameter between forwards: ZeRO-3, FSDP, tensor parallelism."""
    return any(
        hasattr(parameter, "ds_id") or isinstance(parameter, DTensor) for parameter in model.parameters()
    ) or any(isinstance(module, FullyShardedDataParallel) for module in model.modules())


# The kernels that `scaled_dot_product_attention` takes on CPUs; they return the log-sum-exp too, which it does not.
flash_attention_on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_attention_on_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
