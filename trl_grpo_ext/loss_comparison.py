"""Made-up rows by which TRL's loss is held against the one of this package, before that takes its place.

A release may change what a loss type means and no name with it. So the gradient that each loss gives a few
log-probabilities is compared once for each kind of loss; no model takes part.
"""

import torch

from .rollouts import MicroBatch


# Largest norm of the difference over the norm, in float32
TOLERANCE = 1e-4
_LENGTHS = (6, 3, 1, 5)  # of the completions, in tokens
_PROMPT_TOKENS = 2


def made_up_micro_batch(device: torch.device) -> tuple[MicroBatch, torch.Tensor]:
    """Rows as TRL's loss gets them, whose ratios are on both sides of any usual clip.

    Returns:
        `tuple[dict[str, torch.Tensor], torch.Tensor]`:
            The rows, with log-probabilities of the old policy, of the reference and of a sampler; and those of the
            policy, `(B, C)`, for which a gradient can be had.
    """
    numbers = torch.Generator().manual_seed(0)
    rows, width = len(_LENGTHS), max(_LENGTHS)
    mask = (torch.arange(width) < torch.tensor(_LENGTHS).unsqueeze(1)).long()

    def away_from(logps: torch.Tensor, nats: float) -> torch.Tensor:  # at padding too, which is not to count
        return logps + nats * torch.randn(logps.shape, generator=numbers)

    old = away_from(torch.full((rows, width), -2.0), 0.5)
    micro_batch = {
        "prompt_ids": torch.ones(rows, _PROMPT_TOKENS, dtype=torch.long),
        "prompt_mask": torch.ones(rows, _PROMPT_TOKENS, dtype=torch.long),
        "completion_ids": torch.ones(rows, width, dtype=torch.long),
        "completion_mask": mask,
        "advantages": torch.tensor([1.5, -0.5, -1.2, 0.7]),
        "num_items_in_batch": mask.sum().float(),
        "old_per_token_logps": old,
        "ref_per_token_logps": away_from(old, 0.4),
        "sampling_per_token_logps": away_from(old, 0.05),
    }
    logps = away_from(old, 0.3)
    return {name: values.to(device) for name, values in micro_batch.items()}, logps.to(device).requires_grad_()


def differ(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two gradients are not the same up to rounding."""
    norms = torch.stack([torch.linalg.vector_norm(found - expected), torch.linalg.vector_norm(expected)])
    difference, norm = norms.tolist()
    return not difference <= TOLERANCE * norm
