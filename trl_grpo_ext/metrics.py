"""What is worth knowing about a micro-batch of the update, as one vector that processes can put together."""

from dataclasses import dataclass

import torch

from .objective import ObjectiveOutput


# Sums, but for those that say otherwise. Tokens are those that count; "live" are those of rows that carry a gradient.
FIELDS = (
    # of live rows: what is said about a pass
    "live_tokens",
    "live_kl_to_old",
    "live_low_clipped",
    "live_high_clipped",
    "live_region_clipped",
    "live_ratio_max",
    # of all rows that were computed
    "tokens",
    "kl_to_reference",
    "entropy",
    # TRL counts clipping in tokens, or in rows where the ratio is one of a whole sequence; rows that were left out too
    "units",
    "low_clipped_units",
    "high_clipped_units",
    "region_clipped_units",
    # over rows, of a row's share of clipped tokens
    "low_share_min",
    "high_share_max",
)


@dataclass(frozen=True)
class LeftOut:
    """Rows that are not computed because they carry no gradient. In none of them a clip can bind.

    Args:
        rows (`int`):
            All of them.
        rows_with_tokens (`int`):
            Those with a token that counts.
        tokens (`int`):
            Their tokens that count.
    """

    rows: int = 0
    rows_with_tokens: int = 0
    tokens: int = 0


@torch.no_grad()
def micro_batch_statistics(
    mask: torch.Tensor,
    log_ratio: torch.Tensor,
    is_low_clipped: torch.Tensor,
    is_high_clipped: torch.Tensor,
    is_live: torch.Tensor,
    entropies: torch.Tensor | None = None,
    per_token_kl: torch.Tensor | None = None,
    left_out: LeftOut | None = None,
    is_placeholder: bool = False,
) -> torch.Tensor:
    """The `FIELDS` of one micro-batch, `(len(FIELDS),)`, without waiting for the device.

    Args:
        mask (`torch.Tensor`):
            1 for the tokens that count, `(B, C)`.
        log_ratio (`torch.Tensor`):
            Log-probabilities under the policy less those under the old policy, `(B, C)`.
        is_low_clipped (`torch.Tensor`), is_high_clipped (`torch.Tensor`):
            Where the clip binds, `(B, C)` or `(B, 1)`.
        is_live (`torch.Tensor`):
            Which rows carry a gradient, `(B,)`.
        entropies (`torch.Tensor`, *optional*), per_token_kl (`torch.Tensor`, *optional*):
            Entropies and the KL to the reference policy, `(B, C)`, in nats.
        left_out ([`LeftOut`], *optional*):
            Rows of the micro-batch that are not in these tensors.
        is_placeholder (`bool`, *optional*, defaults to `False`):
            Whether the one row is none of the batch's, and stands there so that there is something to compute.
    """
    left_out = left_out or LeftOut()
    mask = mask.float()
    live_mask = mask * is_live.float().unsqueeze(1)
    log_ratio = log_ratio.float()
    clipped = [values.float() for values in (is_low_clipped, is_high_clipped, is_low_clipped | is_high_clipped)]
    on_tokens = is_low_clipped.size(1) == mask.size(1)
    weight = mask if on_tokens else torch.full_like(clipped[0], 0.0 if is_placeholder else 1.0)
    has_share = weight.any(dim=1)
    shares = [(values * weight).sum(-1) / weight.sum(-1) for values in clipped[:2]]
    left_out_shares = left_out.rows_with_tokens if on_tokens else left_out.rows
    low_share_min = torch.where(has_share, shares[0], torch.inf).amin()
    high_share_max = torch.where(has_share, shares[1], -torch.inf).amax()
    live_log_ratio = log_ratio.masked_fill(live_mask == 0, 0.0)
    zero = mask.new_zeros(())
    return torch.stack(
        [
            live_mask.sum(),
            (torch.expm1(live_log_ratio) - live_log_ratio).sum(),
            *[(values * live_mask).sum() for values in clipped],
            torch.exp(log_ratio.masked_fill(live_mask == 0, -torch.inf).amax()),
            mask.sum(),
            zero if per_token_kl is None else (per_token_kl.float() * mask).sum(),
            zero if entropies is None else (entropies.float() * mask).sum(),
            weight.sum() + (left_out.tokens if on_tokens else left_out.rows),
            *[(values * weight).sum() for values in clipped],
            low_share_min.clamp(max=0.0) if left_out_shares else low_share_min,
            high_share_max.clamp(min=0.0) if left_out_shares else high_share_max,
        ]
    )


def nothing_seen(device: torch.device) -> torch.Tensor:
    """The `FIELDS` of a micro-batch of which nothing is known: every process has as many micro-batches."""
    empty = {"live_ratio_max": -torch.inf, "low_share_min": torch.inf, "high_share_max": -torch.inf}
    return torch.tensor([empty.get(name, 0.0) for name in FIELDS], device=device)


def objective_statistics(
    output: ObjectiveOutput,
    log_ratio: torch.Tensor,
    is_live: torch.Tensor,
    entropies: torch.Tensor | None,
    left_out: LeftOut,
    is_placeholder: bool,
) -> torch.Tensor:
    """[`micro_batch_statistics`] of an objective's output."""
    return micro_batch_statistics(
        output.mask,
        log_ratio,
        output.is_low_clipped,
        output.is_high_clipped,
        is_live,
        entropies,
        output.per_token_kl,
        left_out,
        is_placeholder,
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

    def _means(self, fields: dict[str, str], over: str) -> dict[str, float]:
        """Sums over a count, by the name that they are logged under; nothing where nothing was counted."""
        count = self.total(over)
        return {name: self.total(field) / count for name, field in fields.items()} if count else {}

    def of_iteration(self) -> dict[str, float]:
        """What is reported of a pass, over the rows that carry a gradient; nothing if none does."""
        means = self._means(
            {
                "approx_kl": "live_kl_to_old",
                "clip_ratio": "live_region_clipped",
                "clip_ratio_low": "live_low_clipped",
                "clip_ratio_high": "live_high_clipped",
            },
            over="live_tokens",
        )
        return {**means, "ratio_max": self.largest("live_ratio_max")} if means else {}

    def of_trl(self, with_reference: bool) -> dict[str, float]:
        """What TRL reports of a micro-batch, under its names, here weighed by tokens; nothing of what was not seen."""
        clipping = self._means(
            {
                "clip_ratio/low_mean": "low_clipped_units",
                "clip_ratio/high_mean": "high_clipped_units",
                "clip_ratio/region_mean": "region_clipped_units",
            },
            over="units",
        )
        if clipping:  # then there is a row with a share
            clipping["clip_ratio/low_min"] = self.smallest("low_share_min")
            clipping["clip_ratio/high_max"] = self.largest("high_share_max")
        of_tokens = {"entropy": "entropy", **({"kl": "kl_to_reference"} if with_reference else {})}
        return {**self._means(of_tokens, over="tokens"), **clipping}
