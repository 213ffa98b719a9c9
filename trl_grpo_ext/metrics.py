"""What is worth knowing about a micro-batch of the update, kept on its device until it is logged."""

import math
from dataclasses import dataclass

import torch

from .objective import ObjectiveOutput


# Sums are over the tokens that count.
FIELDS = (
    "tokens",
    "kl_to_old",
    "kl_to_reference",
    "entropy",
    "low_clipped",
    "high_clipped",
    "region_clipped",
    "ratio_max",
    # TRL averages clipping over tokens, or over rows where the ratio is one of a whole sequence
    "units",
    "low_clipped_units",
    "high_clipped_units",
    "region_clipped_units",
    # over rows, of a row's share of clipped tokens
    "low_share_min",
    "high_share_max",
)


@torch.no_grad()
def micro_batch_statistics(
    mask: torch.Tensor,
    log_ratio: torch.Tensor,
    is_low_clipped: torch.Tensor,
    is_high_clipped: torch.Tensor,
    entropies: torch.Tensor | None = None,
    per_token_kl: torch.Tensor | None = None,
) -> torch.Tensor:
    """The `FIELDS` of one micro-batch, `(len(FIELDS),)`, without waiting for the device.

    Args:
        mask (`torch.Tensor`):
            1 for the tokens that count, `(B, C)`.
        log_ratio (`torch.Tensor`):
            Log-probabilities under the policy less those under the old policy, `(B, C)`.
        is_low_clipped (`torch.Tensor`), is_high_clipped (`torch.Tensor`):
            Where the clip binds, `(B, C)` or `(B, 1)`.
        entropies (`torch.Tensor`, *optional*), per_token_kl (`torch.Tensor`, *optional*):
            Entropies and the KL to the reference policy, `(B, C)`, in nats.
    """
    mask = mask.float()
    tokens_of_row = mask.sum(-1)
    has_tokens = tokens_of_row > 0
    log_ratio = log_ratio.float().masked_fill(mask == 0, 0.0)
    clipped = [values.float() for values in (is_low_clipped, is_high_clipped, is_low_clipped | is_high_clipped)]
    on_tokens = is_low_clipped.size(1) == mask.size(1)
    weight = mask if on_tokens else has_tokens.float().unsqueeze(1)
    shares = [(values * weight).sum(-1) / weight.sum(-1) for values in clipped[:2]]
    zero = mask.new_zeros(())
    return torch.stack(
        [
            mask.sum(),
            ((torch.expm1(log_ratio) - log_ratio) * mask).sum(),
            zero if per_token_kl is None else (per_token_kl.float() * mask).sum(),
            zero if entropies is None else (entropies.float() * mask).sum(),
            *[(values * mask).sum() for values in clipped],
            torch.exp(log_ratio.masked_fill(mask == 0, -torch.inf).amax()),
            weight.sum(),
            *[(values * weight).sum() for values in clipped],
            torch.where(has_tokens, shares[0], torch.inf).amin(),
            torch.where(has_tokens, shares[1], -torch.inf).amax(),
        ]
    )


def objective_statistics(
    output: ObjectiveOutput, log_ratio: torch.Tensor, entropies: torch.Tensor | None
) -> torch.Tensor:
    """[`micro_batch_statistics`] of an objective's output."""
    return micro_batch_statistics(
        output.mask, log_ratio, output.is_low_clipped, output.is_high_clipped, entropies, output.per_token_kl
    )


@dataclass(frozen=True)
class Statistics:
    """Statistics of some micro-batches of all processes, brought together.

    Args:
        values (`torch.Tensor`):
            [`micro_batch_statistics`] of shape `(N, len(FIELDS))`, on the CPU.
    """

    values: torch.Tensor

    def total(self, name: str) -> float:
        return self.values[:, FIELDS.index(name)].double().sum().item()

    def largest(self, name: str) -> float:
        return self.values[:, FIELDS.index(name)].max().item()

    def smallest(self, name: str) -> float:
        return self.values[:, FIELDS.index(name)].min().item()

    def mean(self, name: str, over: str = "tokens") -> float:
        """A mean over tokens (or units); NaN, which TRL's log leaves out, where there are none."""
        count = self.total(over)
        return self.total(name) / count if count else math.nan

    def of_iteration(self) -> dict[str, float]:
        """What is reported of a pass."""
        return {
            "approx_kl": self.mean("kl_to_old"),
            "clip_ratio": self.mean("region_clipped"),
            "clip_ratio_low": self.mean("low_clipped"),
            "clip_ratio_high": self.mean("high_clipped"),
            "ratio_max": self.largest("ratio_max") if self.total("tokens") else math.nan,
        }

    def of_trl(self, with_reference: bool) -> dict[str, float]:
        """What TRL reports of a micro-batch, under its names."""
        low_share_min, high_share_max = self.smallest("low_share_min"), self.largest("high_share_max")
        metrics = {
            "entropy": self.mean("entropy"),
            "clip_ratio/low_mean": self.mean("low_clipped_units", "units"),
            "clip_ratio/high_mean": self.mean("high_clipped_units", "units"),
            "clip_ratio/region_mean": self.mean("region_clipped_units", "units"),
            "clip_ratio/low_min": low_share_min if math.isfinite(low_share_min) else math.nan,
            "clip_ratio/high_max": high_share_max if math.isfinite(high_share_max) else math.nan,
        }
        if with_reference:
            metrics["kl"] = self.mean("kl_to_reference")
        return metrics
