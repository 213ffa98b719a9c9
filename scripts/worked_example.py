"""GRPO by hand: eight answers to one question, from rewards to the gradient, with the package's own functions.

python scripts/worked_example.py
"""

from trl_grpo_ext.extras import require_or_stop


if __name__ == "__main__":
    require_or_stop()

import torch

from trl_grpo_ext.objective import (
    ClippedObjective,
    clipped_surrogate,
    gradient_coefficient,
    group_advantages,
    importance_ratio,
    k3_kl,
)
from trl_grpo_ext.rewards import exact_correctness_reward_func


QUESTION, REFERENCE = "2 + 2 x 6", "14"
ANSWERS = ["14", "24", "16", "14", "14", "10", "14", "26"]
EPSILON, BETA = 0.2, 0.04


def numbers(tensor: torch.Tensor) -> str:
    return "  ".join(f"{value:+.2f}" for value in tensor.flatten().tolist())


def main() -> None:
    print(f"Question: {QUESTION}. A group of G = {len(ANSWERS)} answers, sampled from the old policy:")
    print(f"  {'  '.join(ANSWERS)}")

    print("\n1. Rewards: 1 where the answer is right.")
    scores = exact_correctness_reward_func(completions=ANSWERS, answer=[REFERENCE] * len(ANSWERS))
    rewards = torch.tensor([1.0 if score else 0.0 for score in scores])
    print(f"   r    = {numbers(rewards)}")
    print(f"   mean = {rewards.mean():.2f}, standard deviation = {rewards.std():.2f}")

    print("\n2. Advantages: A = (r - mean) / std, how much better than its group an answer is.")
    advantages = group_advantages(rewards, len(rewards), std_epsilon=0.0)
    print(f"   A    = {numbers(advantages)}")
    three = torch.tensor([1.0, 0.0, 2.0])
    print(
        f"   Without the division (Dr. GRPO), rewards 1, 0, 2 give {numbers(group_advantages(three, 3, scale=False))}"
    )

    print("\n3. First pass: the policy is the old policy, so each ratio is 1 and no clip binds.")
    logps = torch.full((8, 1), 0.5).log().requires_grad_()
    mask = torch.ones(8, 1)
    reference = torch.full((8, 1), 0.4).log()
    first = ClippedObjective(EPSILON, EPSILON, beta=BETA)(logps, logps.detach(), advantages, mask, reference)
    kl = k3_kl(logps.detach(), reference).mean()
    print(f"   KL to the reference = {kl:.4f}; loss = beta KL = {BETA} x {kl:.4f} = {first.loss:.5f}")
    (gradient,) = torch.autograd.grad(first.loss, logps)
    coefficient = gradient_coefficient(
        torch.ones(8, 1),
        advantages.unsqueeze(1),
        EPSILON,
        EPSILON,
        beta=BETA,
        per_token_logps=logps.detach(),
        ref_per_token_logps=reference,
    )
    print("   The loss is almost 0, the gradient is not. Coefficients A + beta (pi_ref / pi - 1):")
    print(f"          {numbers(coefficient)}")
    is_gradient = torch.allclose(-len(ANSWERS) * gradient, coefficient)
    print(f"   which is -G times the gradient of the loss: {'yes' if is_gradient else 'no'}")

    print("\n4. Second pass: the first update moved the probability of a right answer from 0.5 to 0.7.")
    ratio = importance_ratio(torch.tensor([[0.7]]).log(), torch.tensor([[0.5]]).log(), torch.ones(1, 1))
    surrogate = clipped_surrogate(ratio, torch.ones(1, 1), EPSILON, EPSILON)
    after = gradient_coefficient(ratio, torch.ones(1, 1), EPSILON, EPSILON)
    print(f"   ratio = 0.7 / 0.5 = {ratio.item():.1f}, clipped at 1 + {EPSILON} to {surrogate.item():.1f} for A = 1;")
    print(f"   its gradient coefficient is {after.item():.1f}: from here on the answer is left alone.")


if __name__ == "__main__":
    main()
