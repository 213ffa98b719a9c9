"""The clipped GRPO objective and its relatives as pure functions on tensors.

Source: DeepSeekMath (https://huggingface.co/papers/2402.03300), section 4.1 and equation 21; the sequence level is
GSPO's (https://huggingface.co/papers/2507.18071), `delta` is INTELLECT-2's (https://huggingface.co/papers/2505.07291).
Where the surrogates and normalizers of the loss types are from is in [`LOSS_TYPES`].

Axes: `B` rows, `G` completions of a group, `C` completion tokens. A ratio is `(B, C)` on the token level and `(B, 1)`
on the sequence level; everything computed from it broadcasts.

Two consequences that look like mistakes and are none. On the first pass over a batch of rollouts the policy is the old
policy, so every ratio is exactly 1 and the clip cannot bind. And then the *value* of the surrogate is the mean
advantage, which is 0 for a normalized group, so the loss that is logged is beta times the KL (with `"grpo"` exactly;
where tokens and not answers are averaged, near it). Its gradient is not 0: see [`gradient_coefficient`].
"""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LossType:
    """What a loss type is made of.

    Args:
        surrogate (`str`):
            What is maximized at a token: `"clipped"`, `"cispo"`, `"sapo"` or `"vespo"`, the functions
            [`clipped_surrogate`], [`cispo_surrogate`], [`sapo_surrogate`] and [`vespo_surrogate`].
        normalizer (`str`):
            What a micro-batch makes of its tokens: `"mean_of_means"` (over rows, of the mean over a row's tokens),
            `"mean_of_sums"` (over rows, of the sum over them), `"tokens"` (the sum over the tokens of the
            micro-batch), `"step_tokens"` (over those of the optimizer step), `"longest"` (over as many tokens as its
            rows could have).
    """

    surrogate: str
    normalizer: str


LOSS_TYPES = {
    # DeepSeekMath, https://huggingface.co/papers/2402.03300, equation 3
    "grpo": LossType("clipped", "mean_of_means"),
    # TRL's own name for the mean over the tokens of a micro-batch
    "bnpo": LossType("clipped", "tokens"),
    # Dr. GRPO, https://huggingface.co/papers/2503.20783
    "dr_grpo": LossType("clipped", "longest"),
    # DAPO, https://huggingface.co/papers/2503.14476, equation 8
    "dapo": LossType("clipped", "step_tokens"),
    # Length-unbiased sequence policy optimization, https://huggingface.co/papers/2602.05261
    "luspo": LossType("clipped", "mean_of_sums"),
    # MiniMax-M1, https://huggingface.co/papers/2506.13585
    "cispo": LossType("cispo", "step_tokens"),
    # Soft adaptive policy optimization, https://huggingface.co/papers/2511.20347
    "sapo": LossType("sapo", "mean_of_means"),
    # Variational sequence-level soft policy optimization, https://huggingface.co/papers/2602.10693
    "vespo": LossType("vespo", "step_tokens"),
}


def loss_type_of(name: str) -> LossType:
    """One of [`LOSS_TYPES`].

    Raises:
        ValueError: If there is none of that name.
    """
    if name not in LOSS_TYPES:
        raise ValueError(f"loss_type must be one of {', '.join(LOSS_TYPES)}, got {name!r}")
    return LOSS_TYPES[name]


SAMPLING_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


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

    Example:
    ```python
    >>> group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0]), 4, scale=False)
    tensor([ 0.5000, -0.5000, -0.5000,  0.5000])
    ```
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

    Example:
    ```python
    >>> new, old = torch.tensor([[0.7]]).log(), torch.tensor([[0.5]]).log()
    >>> importance_ratio(new, old, mask=torch.ones(1, 1))
    tensor([[1.4000]])
    ```
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

    Example:
    ```python
    >>> ratio = torch.tensor([[0.5, 1.0, 1.4]])
    >>> clipped_surrogate(ratio, torch.tensor([[1.0]]), 0.2, 0.2)
    tensor([[0.5000, 1.0000, 1.2000]])
    ```
    """
    clipped = torch.clamp(ratio, 1 - epsilon_low, 1 + epsilon_high)
    if delta is not None:
        ratio = torch.clamp(ratio, max=delta)
    return torch.min(ratio * advantages, clipped * advantages)


def cispo_surrogate(
    ratio: torch.Tensor, advantages: torch.Tensor, per_token_logps: torch.Tensor, epsilon_high: float
) -> torch.Tensor:
    """REINFORCE weighed by the bounded ratio, `min(rho, epsilon_high) A log pi`: each token keeps a gradient."""
    return torch.clamp(ratio, max=epsilon_high).detach() * advantages * per_token_logps


def sapo_surrogate(
    ratio: torch.Tensor, advantages: torch.Tensor, temperature_pos: float, temperature_neg: float
) -> torch.Tensor:
    """`4 / tau * sigmoid(tau (rho - 1)) A`: a soft gate in the clip's place, with a `tau` for each sign of `A`."""
    temperature = torch.full_like(advantages, temperature_neg).masked_fill(advantages > 0, temperature_pos)
    return torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature * advantages


def vespo_surrogate(gamma: torch.Tensor, advantages: torch.Tensor, per_token_logps: torch.Tensor) -> torch.Tensor:
    """REINFORCE weighed by [`gamma_weights`], `phi(w) A log pi`, `(B, C)`."""
    return gamma * advantages * per_token_logps


# VESPO's bounds of the logarithm of a weight
_LOWEST_LOG_WEIGHT, _HIGHEST_LOG_WEIGHT = math.log(1e-8), 20.0


@torch.no_grad()
def gamma_weights(
    log_ratio: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    k_pos: float,
    lambda_pos: float,
    k_neg: float,
    lambda_neg: float,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """`phi(w) = w^k exp(lambda (1 - w))` of a completion's importance weight `w`, so that `phi(1) = 1`; `(B, 1)`.

    Args:
        log_ratio (`torch.Tensor`):
            Log-probabilities under the policy less those under the old policy, `(B, C)`. Unlike the sequence level's
            ratio, `w` is the product over tokens.
        advantages (`torch.Tensor`):
            `(B, 1)` or `(B, C)`; their sign chooses `k` and `lambda`.
        mask (`torch.Tensor`):
            1 for the tokens that count, `(B, C)`.
        k_pos (`float`), lambda_pos (`float`), k_neg (`float`), lambda_neg (`float`):
            Shape of the weighting for advantages from 0, and below.
        weights (`torch.Tensor`, *optional*):
            [`sampling_weights`] of the tokens, `(B, C)`, by which `w` is relative to the sampler. Those of padding do
            not count; in TRL they do where 1 is not within the bounds of the weights.
    """
    log_weight = (log_ratio.clamp(-_HIGHEST_LOG_WEIGHT, _HIGHEST_LOG_WEIGHT) * mask).sum(-1, keepdim=True)
    if weights is not None:
        of_sampler = weights.log().clamp(_LOWEST_LOG_WEIGHT, _HIGHEST_LOG_WEIGHT)
        log_weight = log_weight + (of_sampler * mask).sum(-1, keepdim=True)
    log_weight = log_weight.clamp(_LOWEST_LOG_WEIGHT, _HIGHEST_LOG_WEIGHT)
    is_good = advantages >= 0
    k = torch.full_like(advantages, k_neg).masked_fill(is_good, k_pos)
    lambda_ = torch.full_like(advantages, lambda_neg).masked_fill(is_good, lambda_pos).clamp(min=1e-4)
    gamma = torch.exp(lambda_ + k * log_weight - lambda_ * log_weight.exp())
    return gamma.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def sampling_weights(
    old_per_token_logps: torch.Tensor,
    sampling_per_token_logps: torch.Tensor,
    mask: torch.Tensor,
    mode: str,
    clip_min: float | None,
    clip_max: float | None,
) -> torch.Tensor:
    """What a sampler's completions weigh, because it computes other probabilities than the policy that it runs.

    The probability under the old policy over that under the sampler, bounded: truncated importance sampling
    (https://fengyao.notion.site/off-policy-rl), or masked (Liu, Li et al., "When speed kills stability", 2025), as TRL
    has them.

    Args:
        old_per_token_logps (`torch.Tensor`), sampling_per_token_logps (`torch.Tensor`):
            Log-probabilities under the old policy and as the sampler gave them, `(B, C)`, in nats. A token for which
            the sampler gave NaN has weight 1.
        mask (`torch.Tensor`):
            1 for the tokens that count, `(B, C)`.
        mode (`str`):
            `"token_..."` for a weight a token, `(B, C)`, or `"sequence_..."` for the product over a completion,
            `(B, 1)`; `"..._truncate"` to bound it, or `"..._mask"` for 0 where it is beyond the bounds.
        clip_min (`float`, *optional*), clip_max (`float`, *optional*):
            The bounds.

    Raises:
        ValueError: If the mode is another.
    """
    if mode not in SAMPLING_MODES:
        raise ValueError(f"mode must be one of {', '.join(SAMPLING_MODES)}, got {mode!r}")
    log_weights = ((old_per_token_logps - sampling_per_token_logps) * mask).nan_to_num(nan=0.0)
    if mode.startswith("sequence"):
        log_weights = log_weights.sum(-1, keepdim=True)
    weights = torch.exp(log_weights)
    lowest, highest = -math.inf if clip_min is None else clip_min, math.inf if clip_max is None else clip_max
    if mode.endswith("truncate"):
        return weights.clamp(lowest, highest)
    return weights.masked_fill((weights < lowest) | (weights > highest), 0.0)


def off_policy_mask(
    per_token_logps: torch.Tensor,
    sampling_per_token_logps: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    threshold: float,
) -> torch.Tensor:
    """Which completions are kept: not bad ones that the policy has moved away from; booleans, `(B, 1)` or `(B, C)`.

    DeepSeek-V3.2 (https://huggingface.co/papers/2512.02556), equation 9: those with a negative advantage whose
    log-probability under the policy has fallen by more than `threshold` nats a token since they were sampled. Tokens
    for which the sampler gave NaN are taken for unmoved.
    """
    fallen = (sampling_per_token_logps - per_token_logps.detach()).nan_to_num(nan=0.0)
    mean = (fallen * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1.0)
    return (advantages >= 0) | (mean <= threshold)


def clip_binds(
    ratio: torch.Tensor, advantages: torch.Tensor, epsilon_low: float, epsilon_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the clip binds below and above, in the ratio's shape: where the ratio has moved far enough already."""
    return (ratio < 1 - epsilon_low) & (advantages < 0), (ratio > 1 + epsilon_high) & (advantages > 0)


CLIPPED_SURROGATES = ("clipped", "cispo")  # those with bounds beyond which a ratio counts as clipped


def clipped_places(
    surrogate: str, ratio: torch.Tensor, advantages: torch.Tensor, epsilon_low: float, epsilon_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the ratio is beyond its bounds below and above; nowhere for a surrogate of a loss type without bounds."""
    if surrogate == "clipped":
        return clip_binds(ratio, advantages, epsilon_low, epsilon_high)
    nowhere = torch.zeros_like(ratio * advantages, dtype=torch.bool)
    return nowhere, (ratio > epsilon_high) & (advantages > 0) if surrogate == "cispo" else nowhere


def k3_kl(per_token_logps: torch.Tensor, ref_per_token_logps: torch.Tensor) -> torch.Tensor:
    """Unbiased, non-negative estimate of KL(policy || reference) at each token, in nats.

    DeepSeekMath, equation 4: `exp(logp_ref - logp) - (logp_ref - logp) - 1`.

    Example:
    ```python
    >>> k3_kl(torch.tensor([0.5, 0.4]).log(), torch.tensor([0.4, 0.4]).log())
    tensor([0.0231, 0.0000])
    ```
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
            One of [`LOSS_TYPES`], for its normalizer.
        num_rows (`int`, *optional*):
            Rows to divide by where some that would add 0 have been left out. Default: `B`.
        num_tokens (`torch.Tensor` or `float`, *optional*):
            Tokens to divide by: needed where they are those of the optimizer step; by default those of `mask` where
            they are the micro-batch's.
        max_completion_length (`int`, *optional*):
            Needed by `dr_grpo`, in tokens.

    Raises:
        ValueError: If the loss type is another, or lacks what it needs.
    """
    normalizer = loss_type_of(loss_type).normalizer
    num_rows = mask.size(0) if num_rows is None else num_rows
    summed = (per_token_loss * mask).sum(-1)
    if normalizer == "mean_of_means":
        return (summed / mask.sum(-1).clamp(min=1.0)).sum() / num_rows
    if normalizer == "mean_of_sums":
        return summed.sum() / num_rows
    if normalizer == "longest":
        if max_completion_length is None:
            raise ValueError(f"loss_type={loss_type!r} needs max_completion_length")
        return summed.sum() / (num_rows * max_completion_length)
    if normalizer == "tokens":
        return summed.sum() / (mask.sum().clamp(min=1.0) if num_tokens is None else num_tokens)
    if num_tokens is None:
        raise ValueError(f"loss_type={loss_type!r} needs num_tokens")
    return summed.sum() / num_tokens


@dataclass(frozen=True)
class ClippedObjective:
    """The settings of the objective; call it on tensors.

    Args:
        epsilon_low (`float`), epsilon_high (`float`):
            Clip range of the ratio below and above 1; `cispo` bounds the ratio by `epsilon_high` itself.
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
            Surrogate and normalizer, see [`LOSS_TYPES`].
        max_completion_length (`int`, *optional*):
            Needed by `dr_grpo`, in tokens.
        off_policy_threshold (`float`, *optional*):
            Leave bad completions that the policy has moved away from by so many nats a token out of the loss, see
            [`off_policy_mask`].
        sapo_temperature_pos (`float`), sapo_temperature_neg (`float`):
            Used by `sapo`, see [`sapo_surrogate`]. The defaults are TRL's.
        vespo_k_pos (`float`), vespo_lambda_pos (`float`), vespo_k_neg (`float`), vespo_lambda_neg (`float`):
            Used by `vespo`, see [`gamma_weights`]. The defaults are TRL's.

    Example:
    ```python
    >>> objective = ClippedObjective(epsilon_low=0.2, epsilon_high=0.2)
    >>> logps = torch.tensor([[-0.5], [-0.5]], requires_grad=True)
    >>> output = objective(logps, logps.detach(), torch.tensor([1.0, -1.0]), torch.ones(2, 1))
    >>> output.loss.item(), torch.autograd.grad(output.loss, logps)[0].tolist()
    (0.0, [[-0.5], [0.5]])
    ```
    """

    epsilon_low: float
    epsilon_high: float
    delta: float | None = None
    beta: float = 0.0
    correct_kl: bool = False
    level: str = "token"
    loss_type: str = "grpo"
    max_completion_length: int | None = None
    off_policy_threshold: float | None = None
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0

    def __post_init__(self) -> None:
        loss_type_of(self.loss_type)

    def __call__(
        self,
        per_token_logps: torch.Tensor,
        old_per_token_logps: torch.Tensor,
        advantages: torch.Tensor,
        mask: torch.Tensor,
        ref_per_token_logps: torch.Tensor | None = None,
        *,
        weights: torch.Tensor | None = None,
        sampling_per_token_logps: torch.Tensor | None = None,
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
            weights (`torch.Tensor`, *optional*):
                [`sampling_weights`] of the completions, `(B, C)` or `(B, 1)`: they multiply the surrogate, not the KL.
            sampling_per_token_logps (`torch.Tensor`, *optional*):
                Log-probabilities as the sampler gave them, `(B, C)`, from which `off_policy_threshold` counts.
                Default: the old policy's.
            num_rows (`int`, *optional*), num_tokens (`torch.Tensor` or `float`, *optional*):
                See [`aggregate`].
        """
        if advantages.dim() == 1:
            advantages = advantages.unsqueeze(1)
        ratio = importance_ratio(per_token_logps, old_per_token_logps, mask, self.level)
        surrogate, gamma = self._surrogate(ratio, per_token_logps, old_per_token_logps, advantages, mask, weights)
        if self.off_policy_threshold is not None:
            sampled = old_per_token_logps if sampling_per_token_logps is None else sampling_per_token_logps
            surrogate = surrogate * off_policy_mask(
                per_token_logps, sampled, advantages, mask, self.off_policy_threshold
            )
        if weights is not None and gamma is None:  # gamma has them already
            surrogate = surrogate * weights
        per_token_loss, per_token_kl = -surrogate, None
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
        is_low_clipped, is_high_clipped = clipped_places(
            LOSS_TYPES[self.loss_type].surrogate, ratio, advantages, self.epsilon_low, self.epsilon_high
        )
        return ObjectiveOutput(
            loss=loss,
            mask=mask,
            ratio=ratio,
            is_low_clipped=is_low_clipped,
            is_high_clipped=is_high_clipped,
            per_token_kl=None if per_token_kl is None else per_token_kl.detach(),
            gamma=gamma,
        )

    def _surrogate(
        self,
        ratio: torch.Tensor,
        per_token_logps: torch.Tensor,
        old_per_token_logps: torch.Tensor,
        advantages: torch.Tensor,
        mask: torch.Tensor,
        weights: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What is maximized at each token, and VESPO's weights."""
        surrogate = LOSS_TYPES[self.loss_type].surrogate
        if surrogate == "cispo":
            return cispo_surrogate(ratio, advantages, per_token_logps, self.epsilon_high), None
        if surrogate == "sapo":
            return sapo_surrogate(ratio, advantages, self.sapo_temperature_pos, self.sapo_temperature_neg), None
        if surrogate == "vespo":
            shape = self.vespo_k_pos, self.vespo_lambda_pos, self.vespo_k_neg, self.vespo_lambda_neg
            gamma = gamma_weights(per_token_logps - old_per_token_logps, advantages, mask, *shape, weights)
            return vespo_surrogate(gamma, advantages, per_token_logps), gamma
        return clipped_surrogate(ratio, advantages, self.epsilon_low, self.epsilon_high, self.delta), None


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
        gamma (`torch.Tensor` or `None`, defaults to `None`):
            VESPO's [`gamma_weights`], `(B, 1)` or `(B, C)`; `None` for the other loss types.
    """

    loss: torch.Tensor
    mask: torch.Tensor
    ratio: torch.Tensor
    is_low_clipped: torch.Tensor
    is_high_clipped: torch.Tensor
    per_token_kl: torch.Tensor | None
    gamma: torch.Tensor | None = None

    @property
    def metrics(self) -> dict[str, torch.Tensor]:
        """Means over the tokens that count (over rows on the sequence level), under TRL's names of a clipped loss."""

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
