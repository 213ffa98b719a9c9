"""What is worth knowing about a micro-batch of the update, as one vector that processes can put together."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .objective import CLIPPED_SURROGATES, ObjectiveOutput


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
    # VESPO's weights, a number for each row, or for each token where tokens have advantages of their own
    "gamma",
    "gamma_units",
    # over rows, of a row's share of clipped tokens
    "low_share_min",
    "high_share_max",
)


@dataclass(frozen=True)
class LeftOut:
    """Rows that are not computed because they carry no gradient.

    Args:
        rows (`int`):
            Those without an advantage, or without a token that counts. In none of them a clip can bind.
        rows_with_tokens (`int`):
            Those of them with a token that counts.
        tokens (`int`):
            Their tokens that count.
        rows_without_weight (`int`):
            Others, whose tokens all have weight 0. They are in no clip ratio: where the clip would bind is not known.
    """

    rows: int = 0
    rows_with_tokens: int = 0
    tokens: int = 0
    rows_without_weight: int = 0


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
    gamma: torch.Tensor | None = None,
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
        gamma (`torch.Tensor`, *optional*):
            VESPO's weights, `(B, 1)` or `(B, C)`.
    """
    left_out = left_out or LeftOut()
    mask = mask.float()
    live_mask = mask * is_live.float().unsqueeze(1)
    log_ratio = log_ratio.float()
    clipped = [values.float() for values in (is_low_clipped, is_high_clipped, is_low_clipped | is_high_clipped)]
    on_tokens = is_low_clipped.size(1) == mask.size(1)
    weight = _units(is_low_clipped, mask, is_placeholder)
    has_share = weight.any(dim=1)
    shares = [(values * weight).sum(-1) / weight.sum(-1) for values in clipped[:2]]
    left_out_shares = left_out.rows_with_tokens if on_tokens else left_out.rows
    low_share_min = torch.where(has_share, shares[0], torch.inf).amin()
    high_share_max = torch.where(has_share, shares[1], -torch.inf).amax()
    live_log_ratio = log_ratio.masked_fill(live_mask == 0, 0.0)
    zero = mask.new_zeros(())
    gamma_sum = gamma_units = zero
    if gamma is not None:
        gamma_weight = _units(gamma, mask, is_placeholder)
        gamma_sum, gamma_units = (gamma.float() * gamma_weight).sum(), gamma_weight.sum()
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
            gamma_sum,
            gamma_units,
            low_share_min.clamp(max=0.0) if left_out_shares else low_share_min,
            high_share_max.clamp(min=0.0) if left_out_shares else high_share_max,
        ]
    )


def _units(values: torch.Tensor, mask: torch.Tensor, is_placeholder: bool) -> torch.Tensor:
    """What values are counted over, in the mask's type: tokens that count, `(B, C)`, or rows, `(B, 1)`."""
    return mask if values.size(1) == mask.size(1) else torch.full_like(mask[:, :1], not is_placeholder)


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
        entropies=entropies,
        per_token_kl=output.per_token_kl,
        left_out=left_out,
        is_placeholder=is_placeholder,
        gamma=output.gamma,
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

    def of_iteration(self, surrogate: str) -> dict[str, float]:
        """What is reported of a pass, over the rows that carry a gradient; nothing if none does."""
        clipping = {
            "clip_ratio": "live_region_clipped",
            "clip_ratio_low": "live_low_clipped",
            "clip_ratio_high": "live_high_clipped",
        }
        fields = {"approx_kl": "live_kl_to_old", **(clipping if surrogate in CLIPPED_SURROGATES else {})}
        means = self._means(fields, over="live_tokens")
        return {**means, "ratio_max": self.largest("live_ratio_max")} if means else {}

    def of_trl(self, surrogate: str, with_reference: bool) -> dict[str, float]:
        """What TRL reports of a micro-batch, under its names, here weighed by tokens; nothing of what was not seen."""
        of_tokens = {"entropy": "entropy", **({"kl": "kl_to_reference"} if with_reference else {})}
        metrics = self._means(of_tokens, over="tokens")
        if surrogate == "clipped":
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
            metrics.update(clipping)
        elif surrogate == "cispo":
            metrics.update(self._means({"cispo_clip_ratio": "high_clipped_units"}, over="units"))
        elif surrogate == "vespo":
            metrics.update(self._means({"vespo/phi_seq_mean": "gamma"}, over="gamma_units"))
        return metrics


# Of the differences of log-probabilities, in tokens that count and have one, and of the weights, in tokens or in rows.
# Of the smallest weight the negative is kept, so that there are sums and largest values alone.
SAMPLING_SUMS = ("difference", "differences", "weight", "weights")
SAMPLING_LARGEST = ("difference_max", "weight_max", "negative_weight_max")


@torch.no_grad()
def sampling_statistics(
    old_per_token_logps: torch.Tensor,
    sampling_per_token_logps: torch.Tensor,
    mask: torch.Tensor,
    weights: torch.Tensor,
    is_placeholder: bool = False,
) -> torch.Tensor:
    """How far the sampler was from the policy that it ran, in some rows; see [`SamplingStatistics`].

    Args:
        old_per_token_logps (`torch.Tensor`), sampling_per_token_logps (`torch.Tensor`):
            Log-probabilities under the old policy and as the sampler gave them, `(B, C)`, in nats.
        mask (`torch.Tensor`):
            1 for the tokens that count, `(B, C)`.
        weights (`torch.Tensor`):
            [`~trl_grpo_ext.objective.sampling_weights`], `(B, C)` or `(B, 1)`.
        is_placeholder (`bool`, *optional*, defaults to `False`):
            Whether the one row is none of the batch's. It counts nothing, but its process has something to report.

    Returns:
        `torch.Tensor`:
            `SAMPLING_SUMS` and `SAMPLING_LARGEST`, `(7,)`.
    """
    counts = mask.bool()
    difference = (old_per_token_logps - sampling_per_token_logps).abs().float()
    is_known = counts & ~difference.isnan()
    weights = weights.float()
    is_weight = _units(weights, counts, is_placeholder)

    def largest(values: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        return values.masked_fill(~chosen, -torch.inf).amax()

    return torch.stack(
        [
            difference.masked_fill(~is_known, 0.0).sum(),
            is_known.sum(),
            weights.masked_fill(~is_weight, 0.0).sum(),
            is_weight.sum(),
            largest(difference, is_known),
            largest(weights, is_weight),
            largest(-weights, is_weight),
        ]
    )


@dataclass
class SamplingStatistics:
    """Collects [`sampling_statistics`] until the processes put them together, under TRL's names."""

    _pending: list[torch.Tensor] = field(default_factory=list)

    def observe(self, statistics: torch.Tensor) -> None:
        self._pending.append(statistics)

    def report(self, gather: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """The metrics of the rows since the last report: one collective call if there are any.

        As TRL does it, means are those of the processes' means. A process that has seen no row is none of them.
        """
        if not self._pending:
            return {}
        pending = torch.stack(self._pending)
        self._pending.clear()
        sums, largest = pending.split([len(SAMPLING_SUMS), len(SAMPLING_LARGEST)], dim=1)
        processes = gather(torch.cat([sums.sum(0), largest.amax(0)]).unsqueeze(0)).cpu()
        of = dict(zip(SAMPLING_SUMS + SAMPLING_LARGEST, processes.T, strict=True))

        def mean(total: str, number: str) -> float:
            has_seen = of[number] > 0
            return (of[total][has_seen] / of[number][has_seen]).mean().item()

        metrics = {}
        if of["differences"].any():
            metrics["sampling/sampling_logp_difference/mean"] = mean("difference", "differences")
            metrics["sampling/sampling_logp_difference/max"] = of["difference_max"].max().item()
        if of["weights"].any():
            metrics["sampling/importance_sampling_ratio/min"] = -of["negative_weight_max"].max().item()
            metrics["sampling/importance_sampling_ratio/mean"] = mean("weight", "weights")
            metrics["sampling/importance_sampling_ratio/max"] = of["weight_max"].max().item()
        return metrics
