"""The rewards as the notebooks write them, and the objective token by token. Imports nothing from the package.

Slow, on hostile texts very slow, which is why the package does not look like this.
"""

import math
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
    weights=None,
    sampled=None,
    off_policy_threshold=None,
    temperatures=(1.0, 1.05),
    gamma_shapes=((2.0, 3.0), (3.0, 2.0)),
):
    """The objective of one micro-batch, token by token; to be minimized.

    `weights` are of tokens, and `sampled` the sampler's log-probabilities; temperatures and gamma shapes are for
    advantages above (from) 0 and below.
    """
    rows, columns = mask.shape
    sums, counts = [], []
    for i in range(rows):
        tokens = [t for t in range(columns) if mask[i, t]]
        log_ratios = {t: logps[i, t] - old[i, t] for t in tokens}
        row_ratio = (sum(log_ratios.values()) / max(1, len(tokens)) + logps.new_zeros(())).exp()
        advantage = advantages[i].item()
        is_kept = True
        if off_policy_threshold is not None and advantage < 0 and tokens:
            moved = [(sampled[i, t] - logps[i, t]).item() for t in tokens]
            is_kept = sum(0.0 if math.isnan(m) else m for m in moved) / len(tokens) <= off_policy_threshold
        total = logps[i, 0] * 0.0
        for t in tokens:
            ratio = log_ratios[t].exp() if level == "token" else row_ratio
            weight = 1.0 if weights is None else weights[i, t].item()
            if loss_type == "cispo":
                gain = min(ratio.item(), epsilon_high) * advantage * logps[i, t]
            elif loss_type == "sapo":
                temperature = temperatures[0] if advantage > 0 else temperatures[1]
                gain = 4 / temperature / (1 + (-temperature * (ratio - 1)).exp()) * advantage
            elif loss_type == "vespo":
                k, scale = gamma_shapes[0] if advantage >= 0 else gamma_shapes[1]
                log_weight = sum(value.item() for value in log_ratios.values())
                if weights is not None:
                    log_weight += sum(math.log(max(weights[i, s].item(), 1e-8)) for s in tokens)
                log_weight = min(max(log_weight, math.log(1e-8)), 20.0)
                gamma = math.exp(scale + k * log_weight - scale * math.exp(log_weight))
                gain, weight = gamma * advantage * logps[i, t], 1.0
            else:
                clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
                bounded = ratio if delta is None else ratio.clamp(max=delta)
                gain = torch.minimum(bounded * advantage, clipped * advantage)
            total = total - (gain * weight if is_kept else 0.0)
            difference = reference[i, t] - logps[i, t]
            kl = difference.exp() - difference - 1
            total = total + beta * (kl * ratio if correct_kl else kl)
        sums.append(total)
        counts.append(len(tokens))
    if loss_type in ("grpo", "sapo"):
        return sum(total / max(1, count) for total, count in zip(sums, counts, strict=True)) / rows
    if loss_type == "luspo":
        return sum(sums) / rows
    if loss_type == "bnpo":
        return sum(sums) / max(1, sum(counts))
    return sum(sums) / (rows * max_completion_length if loss_type == "dr_grpo" else num_tokens)


def sampling_weights(old, sampled, mask, mode, clip_min, clip_max):
    """What tokens weigh, token by token: `(B, C)` in every mode."""
    weights = torch.ones_like(old)
    for i, row in enumerate(mask.tolist()):
        differences = {t: (old[i, t] - sampled[i, t]).item() for t, counts in enumerate(row) if counts}
        differences = {t: 0.0 if math.isnan(value) else value for t, value in differences.items()}
        for t in differences:
            weight = math.exp(sum(differences.values()) if "sequence" in mode else differences[t])
            if "truncate" in mode:
                weights[i, t] = min(max(weight, clip_min or 0.0), clip_max or math.inf)
            else:
                weights[i, t] = weight if (clip_min or 0.0) <= weight <= (clip_max or math.inf) else 0.0
    return weights
