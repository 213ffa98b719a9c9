"""The clipped GRPO objective as pure functions on tensors.

Source: DeepSeekMath (https://huggingface.co/papers/2402.03300), section 4.1 and equation 21; the sequence level is
GSPO's (https://huggingface.co/papers/2507.18071), `delta` is INTELLECT-2's (https://huggingface.co/papers/2505.07291),
and the normalizers are DAPO's (https://huggingface.co/papers/2503.14476) and Dr. GRPO's
(https://huggingface.co/papers/2503.20783).

Axes: `B` rows, `G` completions of a group, `C` completion tokens. A ratio is `(B, C)` on the token level and `(B, 1)`
on the sequence level; everything computed from it broadcasts.

Two consequences that look like mistakes and are none. On the first pass over a batch of rollouts the policy is the old
policy, so every ratio is exactly 1 and the clip cannot bind. And then the *value* of the surrogate is the mean
advantage, which is 0 for a normalized group, so the loss that is logged is beta times the KL. Its gradient is not 0:
see [`gradient_coefficient`].
"""

from dataclasses import dataclass

import torch


LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")


def group_advantages(
    rewards: torch.Tensor, num_generations: int, *, scale: bool = True, std_epsilon: float = 1e-4
) -> torch.Tensor:
    """Rewards relative to their group: `(r - mean) / (std + std_epsilon)`, with Bessel's correction in the deviation.

    Args:
        rewards (`torch.Tensor`):
            Rewards of shape `(B,)`, the completions of a group one after the other.
        num_generations (`int`):
            Completions of a group (`G`), at least 2.
        scale (`bool`, *optional*, defaults to `True`):
            Divide by the deviation (GRPO) or not (Dr. GRPO).
        std_epsilon (`float`, *optional*, defaults to `1e-4`):
            Added to the deviation, as TRL does; a group whose rewards are all equal has advantage 0.

    Returns:
        `torch.Tensor`:
            Advantages of shape `(B,)`.

    Raises:
        ValueError: If `B` is not a multiple of `num_generations`, or a group has a single completion.
    """
    if num_generations < 2 or rewards.dim() != 1 or len(rewards) % num_generations:
        raise ValueError(
            f"rewards must be of shape (B,) with B a multiple of num_generations >= 2; got {tuple(rewards.shape)} and "
            f"num_generations={num_generations}"
        )
    groups = rewards.view(-1, num_generations)
    advantages = groups - groups.mean(dim=1, keepdim=True)
    if scale:
        advantages = advantages / (groups.std(dim=1, keepdim=True) + std_epsilon)
    return advantages.view(-1)


def importance_ratio(
    per_token_logps: torch.Tensor, old_per_token_logps: torch.Tensor, mask: torch.Tensor, level: str = "token"
) -> torch.Tensor:
    """Probability under the policy over probability under the old policy.

    Args:
        per_token_logps (`torch.Tensor`):
            Log-probabilities under the policy, `(B, C)`, in nats.
        old_per_token_logps (`torch.Tensor`):
            Log-probabilities under the policy that sampled, `(B, C)`.
        mask (`torch.Tensor`):
            1 for the tokens that count, `(B, C)`.
        level (`str`, *optional*, defaults to `"token"`):
            `"token"`, or `"sequence"` for the geometric mean over a completion's tokens.

    Returns:
        `torch.Tensor`:
            Ratios, `(B, C)` or `(B, 1)`.
    """
    log_ratio = per_token_logps - old_per_token_logps
    if level == "token":
        return torch.exp(log_ratio)
    if level == "sequence":
        return torch.exp((log_ratio * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1.0))
    raise ValueError(f"level must be 'token' or 'sequence', got {level!r}")


def clipped_surrogate(
    ratio: torch.Tensor,
    advantages: torch.Tensor,
    epsilon_low: float,
    epsilon_high: float,
    delta: float | None = None,
) -> torch.Tensor:
    """`min(rho A, clip(rho, 1 - epsilon_low, 1 + epsilon_high) A)`, to be maximized.

    Args:
        ratio (`torch.Tensor`):
            Ratios, `(B, C)` or `(B, 1)`.
        advantages (`torch.Tensor`):
            Advantages, `(B, 1)` or `(B, C)`.
        epsilon_low (`float`), epsilon_high (`float`):
            How far the ratio pays below and above 1.
        delta (`float`, *optional*):
            Upper bound of the unclipped ratio, which bounds the loss of a negative advantage.
    """
    clipped = torch.clamp(ratio, 1 - epsilon_low, 1 + epsilon_high)
    if delta is not None:
        ratio = torch.clamp(ratio, max=delta)
    return torch.min(ratio * advantages, clipped * advantages)


def clip_binds(
    ratio: torch.Tensor, advantages: torch.Tensor, epsilon_low: float, epsilon_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the clip binds below and above, in the ratio's shape: where the ratio has moved far enough already."""
    return (ratio < 1 - epsilon_low) & (advantages < 0), (ratio > 1 + epsilon_high) & (advantages > 0)


def k3_kl(per_token_logps: torch.Tensor, ref_per_token_logps: torch.Tensor) -> torch.Tensor:
    """Unbiased, non-negative estimate of KL(policy || reference) at each token, in nats.

    DeepSeekMath, equation 4: `exp(logp_ref - logp) - (logp_ref - logp) - 1`.
    """
    log_ratio = ref_per_token_logps - per_token_logps
    return torch.exp(log_ratio) - log_ratio - 1


def gradient_coefficient(
    ratio: torch.Tensor,
    advantages: torch.Tensor,
    epsilon_low: float,
    epsilon_high: float,
    delta: float | None = None,
    *,
    beta: float = 0.0,
    correct_kl: bool = False,
    per_token_logps: torch.Tensor | None = None,
    ref_per_token_logps: torch.Tensor | None = None,
) -> torch.Tensor:
    """What multiplies the gradient of a token's log-probability in the gradient of the objective (token level).

    DeepSeekMath, equation 21, with the clip: `rho A + beta (pi_ref / pi - 1)`, where the first term is 0 for a token
    whose clip binds. On the first pass it is `A + beta (pi_ref / pi - 1)`. With `correct_kl`, the second term is
    `-beta rho log(pi / pi_ref)`.

    Raises:
        ValueError: If `beta` is not 0 and the log-probabilities are missing.
    """
    binds = torch.logical_or(*clip_binds(ratio, advantages, epsilon_low, epsilon_high))
    if delta is not None:
        binds = binds | (ratio > delta)
    coefficient = torch.where(binds, 0.0, ratio * advantages)
    if beta:
        if per_token_logps is None or ref_per_token_logps is None:
            raise ValueError("with beta != 0, per_token_logps and ref_per_token_logps are needed")
        log_ratio = ref_per_token_logps - per_token_logps
        coefficient = coefficient + beta * (ratio * log_ratio if correct_kl else torch.exp(log_ratio) - 1)
    return coefficient


def aggregate(
    per_token_loss: torch.Tensor,
    mask: torch.Tensor,
    loss_type: str,
    *,
    num_rows: int | None = None,
    num_tokens: torch.Tensor | float | None = None,
    max_completion_length: int | None = None,
) -> torch.Tensor:
    """One number from the losses of the tokens, by the normalizer of a loss type.

    Args:
        per_token_loss (`torch.Tensor`):
            `(B, C)`, or `(B, 1)` on the sequence level.
        mask (`torch.Tensor`):
            1 for the tokens that count, `(B, C)`.
        loss_type (`str`):
            `"grpo"`: the mean over rows of the mean over their tokens. `"bnpo"`: the mean over tokens. `"dr_grpo"`:
            the sum over `num_rows * max_completion_length`. `"dapo"`: the sum over `num_tokens`.
        num_rows (`int`, *optional*):
            Rows to divide by where some that would add 0 have been left out (`grpo`, `dr_grpo`). Default: `B`.
        num_tokens (`torch.Tensor` or `float`, *optional*):
            Tokens to divide by (`bnpo`, default the tokens of `mask`; `dapo`, where it is needed).
        max_completion_length (`int`, *optional*):
            Needed by `dr_grpo`, in tokens.

    Raises:
        ValueError: If the loss type is another, or lacks what it needs.
    """
    num_rows = mask.size(0) if num_rows is None else num_rows
    summed = (per_token_loss * mask).sum(-1)
    if loss_type == "grpo":
        return (summed / mask.sum(-1).clamp(min=1.0)).sum() / num_rows
    if loss_type == "bnpo":
        return summed.sum() / (mask.sum().clamp(min=1.0) if num_tokens is None else num_tokens)
    if loss_type == "dr_grpo":
        if max_completion_length is None:
            raise ValueError("loss_type='dr_grpo' needs max_completion_length")
        return summed.sum() / (num_rows * max_completion_length)
    if loss_type == "dapo":
        if num_tokens is None:
            raise ValueError("loss_type='dapo' needs num_tokens")
        return summed.sum() / num_tokens
    raise ValueError(f"loss_type must be one of {', '.join(LOSS_TYPES)}, got {loss_type!r}")


@dataclass(frozen=True)
class ClippedObjective:
    """The settings of the objective; call it on tensors.

    Args:
        epsilon_low (`float`), epsilon_high (`float`):
            Clip range of the ratio below and above 1.
        delta (`float`, *optional*):
            Upper bound of the unclipped ratio.
        beta (`float`, *optional*, defaults to `0.0`):
            Weight of the KL to the reference policy.
        correct_kl (`bool`, *optional*, defaults to `False`):
            Multiply the KL by the ratio, whose gradient then is the reverse KL's (DeepSeek-V3.2,
            https://huggingface.co/papers/2512.02556): TRL's `use_bias_correction_kl`, on there by default.
        level (`str`, *optional*, defaults to `"token"`):
            Level of the ratio, `"token"` or `"sequence"`.
        loss_type (`str`, *optional*, defaults to `"grpo"`):
            The normalizer, see [`aggregate`].
        max_completion_length (`int`, *optional*):
            Needed by `dr_grpo`, in tokens.
    """

    epsilon_low: float
    epsilon_high: float
    delta: float | None = None
    beta: float = 0.0
    correct_kl: bool = False
    level: str = "token"
    loss_type: str = "grpo"
    max_completion_length: int | None = None

    def __call__(
        self,
        per_token_logps: torch.Tensor,
        old_per_token_logps: torch.Tensor,
        advantages: torch.Tensor,
        mask: torch.Tensor,
        ref_per_token_logps: torch.Tensor | None = None,
        *,
        num_rows: int | None = None,
        num_tokens: torch.Tensor | float | None = None,
    ) -> "ObjectiveOutput":
        """The loss of one micro-batch, to be minimized.

        Args:
            per_token_logps (`torch.Tensor`), old_per_token_logps (`torch.Tensor`):
                Log-probabilities under the policy and the old policy, `(B, C)`, in nats.
            advantages (`torch.Tensor`):
                `(B,)` or `(B, C)`.
            mask (`torch.Tensor`):
                1 for the tokens that count, `(B, C)`.
            ref_per_token_logps (`torch.Tensor`, *optional*):
                Log-probabilities under the reference policy, `(B, C)`; needed if `beta` is not 0.
            num_rows (`int`, *optional*), num_tokens (`torch.Tensor` or `float`, *optional*):
                See [`aggregate`].
        """
        if advantages.dim() == 1:
            advantages = advantages.unsqueeze(1)
        ratio = importance_ratio(per_token_logps, old_per_token_logps, mask, self.level)
        per_token_loss = -clipped_surrogate(ratio, advantages, self.epsilon_low, self.epsilon_high, self.delta)
        per_token_kl = None
        if self.beta:
            if ref_per_token_logps is None:
                raise ValueError(f"beta={self.beta} needs ref_per_token_logps")
            per_token_kl = k3_kl(per_token_logps, ref_per_token_logps)
            if self.correct_kl:
                per_token_kl = per_token_kl * ratio
            per_token_loss = per_token_loss + self.beta * per_token_kl
        loss = aggregate(
            per_token_loss,
            mask,
            self.loss_type,
            num_rows=num_rows,
            num_tokens=num_tokens,
            max_completion_length=self.max_completion_length,
        )
        ratio = ratio.detach()
        is_low_clipped, is_high_clipped = clip_binds(ratio, advantages, self.epsilon_low, self.epsilon_high)
        return ObjectiveOutput(
            loss=loss,
            mask=mask,
            ratio=ratio,
            is_low_clipped=is_low_clipped,
            is_high_clipped=is_high_clipped,
            per_token_kl=None if per_token_kl is None else per_token_kl.detach(),
        )


@dataclass(frozen=True)
class ObjectiveOutput:
    """The loss, and what there is to say about it. Nothing here but `loss` carries a gradient.

    Args:
        loss (`torch.Tensor`):
            To be minimized, a single number.
        mask (`torch.Tensor`):
            The tokens that count, `(B, C)`.
        ratio (`torch.Tensor`):
            `(B, C)`, or `(B, 1)` on the sequence level.
        is_low_clipped (`torch.Tensor`), is_high_clipped (`torch.Tensor`):
            Where the clip binds, in the ratio's shape.
        per_token_kl (`torch.Tensor` or `None`):
            KL to the reference policy (times the ratio with `correct_kl`), `(B, C)`, in nats; `None` without one.
    """

    loss: torch.Tensor
    mask: torch.Tensor
    ratio: torch.Tensor
    is_low_clipped: torch.Tensor
    is_high_clipped: torch.Tensor
    per_token_kl: torch.Tensor | None

    @property
    def metrics(self) -> dict[str, torch.Tensor]:
        """Means over the tokens that count (over rows on the sequence level), under TRL's names."""

        def mean(values: torch.Tensor) -> torch.Tensor:
            if values.size(1) == 1:
                return values.float().mean()
            return (values * self.mask).sum() / self.mask.sum().clamp(min=1.0)

        metrics = {
            "clip_ratio/low_mean": mean(self.is_low_clipped),
            "clip_ratio/high_mean": mean(self.is_high_clipped),
            "clip_ratio/region_mean": mean(self.is_low_clipped | self.is_high_clipped),
        }
        if self.per_token_kl is not None:
            metrics["kl"] = mean(self.per_token_kl)
        return metrics
