"""The rewards as the notebooks write them, in their plainest form. Imports nothing from the package.

Slow on hostile texts, which is why the package does not look like this.
"""

import re
from fractions import Fraction


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
