"""What this package knows of TRL's private members: their names, where they came from, and what they mean.

The mixins override public and underscored *methods* of `trl.GRPOTrainer` and call `super()`; its underscored *state*
is read and written here alone. `tests/test_trl_contract.py` holds every one of these against the installed TRL, so
that a release that moves one fails with its name.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn
from trl import GRPOTrainer

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


def has_active_randomness(model: nn.Module) -> bool:
    """Whether two forwards of the model in training mode can differ: dropout, or noise in a router."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            return True
    config = getattr(model, "config", None)
    values = vars(config) if config is not None else {}
    return any(
        isinstance(value, float) and value > 0 and any(word in name for word in ("dropout", "pdrop", "jitter"))
        for name, value in values.items()
    )
