"""What ends the passes over a batch of rollouts, and what each of them reports. Knows no trainer."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .metrics import FIELDS, Statistics


OF_PASS = ("live_tokens", "live_kl_to_old")
assert FIELDS[: len(OF_PASS)] == OF_PASS


def can_stop(num_iterations: int, steps_per_generation: int, gradient_accumulation_steps: int) -> bool:
    """Whether the policy can move between two passes: not if all of them are in one optimizer step.

    Args:
        num_iterations (`int`):
            Passes over a batch of rollouts.
        steps_per_generation (`int`):
            Micro-batches of a pass.
        gradient_accumulation_steps (`int`):
            Micro-batches of an optimizer step.

    Example:
    ```python
    >>> can_stop(num_iterations=4, steps_per_generation=8, gradient_accumulation_steps=8)
    True
    ```
    """
    return gradient_accumulation_steps % (num_iterations * steps_per_generation) != 0


def can_shorten(num_iterations: int, steps_per_generation: int, gradient_accumulation_steps: int) -> bool:
    """Whether a pass is left to be given up when the policy has moved: else the one that moved it was the last.

    Arguments are those of [`can_stop`]. With two passes of one optimizer step each, the first is made by the policy
    that sampled, and after the second there is nothing to end.
    """
    micro_batches = num_iterations * steps_per_generation
    if micro_batches % gradient_accumulation_steps and gradient_accumulation_steps % micro_batches:
        return True  # optimizer steps begin in the middle of passes
    return micro_batches - steps_per_generation > gradient_accumulation_steps


def window_within_pass(steps_per_generation: int, gradient_accumulation_steps: int) -> int | None:
    """Micro-batches of an optimizer step within a pass; `None` if passes and optimizer steps do not line up.

    Arguments are those of [`can_stop`]. An optimizer step of several whole passes has all micro-batches of each.
    """
    if gradient_accumulation_steps % steps_per_generation == 0:
        return steps_per_generation
    lines_up = steps_per_generation % gradient_accumulation_steps == 0
    return gradient_accumulation_steps if lines_up else None


def exceeds_target(kl: float, tokens: float, target_kl: float) -> bool:
    """Whether the mean KL over tokens is above the target.

    Args:
        kl (`float`):
            Sum of the KL from the old to the new policy over tokens, in nats.
        tokens (`float`):
            Number of these tokens; where there are none, the sum is 0, and nothing has moved away.
        target_kl (`float`):
            Nats a token.
    """
    return kl > target_kl * tokens


@dataclass
class PassStatistics:
    """The statistics of micro-batches until the processes put them together, and the sums over a pass.

    Attributes:
        pass_sums (`torch.Tensor` or `None`):
            Of the pass so far on this process: live tokens, and their KL to the old policy. `None` before the first
            micro-batch.
    """

    pass_sums: torch.Tensor | None = None
    _pending: list[tuple[int, bool, torch.Tensor]] = field(default_factory=list)

    def observe(self, statistics: torch.Tensor, iteration: int, replaces_trls: bool) -> None:
        """Take the statistics of a micro-batch, `(len(FIELDS),)`.

        Args:
            statistics (`torch.Tensor`):
                See [`~trl_grpo_ext.metrics.micro_batch_statistics`].
            iteration (`int`):
                The pass that it belongs to, from 1.
            replaces_trls (`bool`):
                Whether TRL's own metrics of the loss are to be made of them, because its loss was not called.
        """
        self._pending.append((iteration, replaces_trls, statistics))
        sums = statistics[: len(OF_PASS)]
        self.pass_sums = sums if self.pass_sums is None else self.pass_sums + sums

    def report(
        self, gather: Callable[[torch.Tensor], torch.Tensor], surrogate: str, with_reference: bool
    ) -> dict[str, float]:
        """The metrics of the micro-batches since the last report, over all processes: one collective call.

        Args:
            gather (`Callable`):
                Brings a tensor of all processes together along its first dimension.
            surrogate (`str`):
                That of the [`~trl_grpo_ext.objective.LossType`]: what there is to report of it.
            with_reference (`bool`):
                Whether there is a KL term.
        """
        if not self._pending:
            return {}
        iterations, replaces_trls, statistics = zip(*self._pending, strict=True)
        self._pending.clear()
        values = gather(torch.stack(statistics).unsqueeze(0)).cpu()  # (processes, micro-batches, fields)

        def of(places: list[int]) -> Statistics:
            return Statistics(values[:, places].flatten(0, 1))

        metrics: dict[str, float] = {}
        if any(replaces_trls):
            places = [place for place, replaces in enumerate(replaces_trls) if replaces]
            metrics.update(of(places).of_trl(surrogate, with_reference))
        for iteration in sorted(set(iterations)):
            places = [place for place, found in enumerate(iterations) if found == iteration]
            for name, value in of(places).of_iteration(surrogate).items():
                metrics[f"iteration/{iteration}/{name}"] = value
        return metrics

    def end_pass(self) -> torch.Tensor | None:
        """The sums over the pass that ends here."""
        sums, self.pass_sums = self.pass_sums, None
        return sums
