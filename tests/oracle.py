"""The rewards as the notebooks write them, and the objective token by token. Imports nothing from the package.

Slow, on hostile texts very slow, which is why the package does not look like this.
"""

import re
from fractions import Fraction

import torch


def xmlcount(text: str) -> float:
    count = 0.0
    if text.count("<reasoning>\n") == 1:
        count += 0.125
    if text.count("\n</reasoning>\n") == 1:
        count += 0.125
    if text.count("\n<answer>\n") == 1:
        count += 0.125
        count -= len(text.split("\n</answer>\n")[-1]) * 0.001
    if text.count("\n</answer>") == 1:
        count += 0.125
        count -= (len(text.split("\n</answer>")[-1]) - 1) * 0.001
    return count


def soft_format(text: str) -> float:
    pattern = r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>"
    return 0.5 if re.fullmatch(pattern, text, re.DOTALL) else 0.0


def strict_format(text: str) -> float:
    pattern = r"<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>"
    return 0.5 if re.fullmatch(pattern, text, re.DOTALL) else 0.0


def xml_answer(text: str) -> str:
    return text.split("<answer>")[-1].split("</answer>")[0].strip()


def int_reward(text: str) -> float:
    return 0.5 if xml_answer(text).isdigit() else 0.0


def tags(text: str) -> float:
    return 0.2 * sum(tag in text for tag in ("<reasoning>", "</reasoning>", "<answer>", "</answer>"))


def simple_number(text: str) -> Fraction | None:
    numbers = re.findall(r"-?\d*\.?\d+", text)
    return Fraction(numbers[0]) if len(numbers) == 1 else None


def grpo_objective(
    logps,
    old,
    reference,
    advantages,
    mask,
    *,
    epsilon_low,
    epsilon_high,
    delta,
    beta,
    correct_kl,
    level,
    loss_type,
    max_completion_length,
    num_tokens,
):
    """The clipped objective of one micro-batch, token by token; to be minimized."""
    rows, columns = mask.shape
    sums, counts = [], []
    for i in range(rows):
        tokens = [t for t in range(columns) if mask[i, t]]
        log_ratios = {t: logps[i, t] - old[i, t] for t in tokens}
        row_ratio = (sum(log_ratios.values()) / max(1, len(tokens)) + logps.new_zeros(())).exp()
        total = logps[i, 0] * 0.0
        for t in tokens:
            ratio = log_ratios[t].exp() if level == "token" else row_ratio
            clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
            bounded = ratio if delta is None else ratio.clamp(max=delta)
            total = total - torch.minimum(bounded * advantages[i], clipped * advantages[i])
            difference = reference[i, t] - logps[i, t]
            kl = difference.exp() - difference - 1
            total = total + beta * (kl * ratio if correct_kl else kl)
        sums.append(total)
        counts.append(len(tokens))
    if loss_type == "grpo":
        return sum(total / max(1, count) for total, count in zip(sums, counts, strict=True)) / rows
    if loss_type == "bnpo":
        return sum(sums) / max(1, sum(counts))
    return sum(sums) / (num_tokens if loss_type == "dapo" else rows * max_completion_length)
