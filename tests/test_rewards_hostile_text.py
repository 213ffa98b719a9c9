"""No text makes a reward raise, return nonsense, or take more than linear time."""

import math
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_grpo_ext.rewards import (
    exact_correctness_reward_func,
    extract_boxed_answer,
    extract_last_number,
    get_correctness_reward,
    get_format_reward,
    get_hardened_format_reward,
    get_int_reward,
    get_soft_format_reward,
    get_strict_format_reward,
    gsm8k_bundle,
    numerically_equal,
    parse_answer_number,
    parse_number,
    parse_plain_number,
    tag_bundle,
)
from trl_grpo_ext.rewards.numbers import MAX_ANSWER_LENGTH


REWARDS = [
    *gsm8k_bundle(),
    *gsm8k_bundle(as_in_notebooks=True)[:-1],
    *tag_bundle().select("format_reward_func"),
    get_hardened_format_reward(),
    get_hardened_format_reward(max_chars=10**9, max_answer_chars=10**9, name="hardened_long"),
    get_correctness_reward(numeric="seed", name="correctness_of_seeds"),
    exact_correctness_reward_func,
    get_soft_format_reward(exactly_once=True, name="soft_once"),
]
REWARDS_OF_OTHER_FORMATS = [
    get_soft_format_reward(sections=[("", "</reasoning>"), "plan", ("<answer>", "")], name="soft_open"),
    get_strict_format_reward(sections=["reasoning", "answer", ("", "")], name="strict_open"),
    get_format_reward(sections=["reasoning"], exactly_once=True, missing_score=-1.0, name="tags_once"),
    *(
        get_correctness_reward(answer_extractor=answer_extractor, answer_tag=answer_tag, name=f"by_{place}")
        for place, (answer_extractor, answer_tag) in enumerate(
            [(("think", "boxed", "last_number"), "answer"), ("tag", ("<answer>", "")), ("xml", ("", "</answer>"))]
        )
    ),
    get_correctness_reward(answer_extractor=lambda text: text.split()[3], name="by_a_function_that_fails"),
    get_int_reward(answer_extractor=lambda text: int(text), name="integer_by_a_function_that_fails"),
]

TEXT = st.text() | st.text(alphabet="<>/answer reasoning\n0123456789.,-$%\\{}eE", max_size=200)
MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["assistant", "user", "tool", None]),
        "content": TEXT
        | st.none()
        | st.integers()
        | st.lists(st.dictionaries(st.sampled_from(["type", "text"]), TEXT)),
    },
)
COMPLETION = TEXT | st.none() | st.lists(MESSAGE, max_size=3)


@given(st.lists(st.tuples(COMPLETION, TEXT), max_size=4))
def test_every_reward_scores_every_text(rows):
    completions = [completion for completion, _ in rows]
    answers = [answer for _, answer in rows]
    for reward_func in REWARDS + REWARDS_OF_OTHER_FORMATS:
        scores = reward_func(prompts=[None] * len(rows), completions=completions, answer=answers)
        assert len(scores) == len(rows)
        for score, answer in zip(scores, answers, strict=True):
            assert (score is None and not answer.strip()) or math.isfinite(score)


@given(TEXT, TEXT)
def test_numbers_never_raise(a, b):
    assert numerically_equal(a, b) in (True, False)
    assert numerically_equal(a, b) == numerically_equal(b, a)
    assert parse_plain_number(a) is None or parse_answer_number(a) in (None, parse_plain_number(a))
    parse_number(a)
    extract_last_number(a)


# Each makes a text of about `size` characters.
HOSTILE = {
    "opening reasoning tags": lambda size: "<reasoning>" * (size // 11),
    "opening reasoning lines": lambda size: "<reasoning>\n" * (size // 12),
    "closing reasoning tags": lambda size: "<reasoning>" + "</reasoning>" * (size // 12),
    "closed reasoning, white space": lambda size: "<reasoning>" + "</reasoning>  " * (size // 14) + "</answer>",
    "pairs of tags": lambda size: "<reasoning></reasoning><answer>" * (size // 31),
    "strict middles": lambda size: "<reasoning>\n" + "\n</reasoning>\n<answer>" * (size // 22) + "\n</answer>",
    "answer tags": lambda size: "<answer></answer>" * (size // 17),
    "unclosed answer tags": lambda size: "<answer>" * (size // 8),
    "nested tags": lambda size: "<answer>" * (size // 17) + "1" + "</answer>" * (size // 17),
    "white space": lambda size: " " * size,
    "white space after a tag": lambda size: "<reasoning></reasoning>" + " \n\t" * (size // 3) + "</answer>",
    "line breaks": lambda size: "\n" * size,
    "digits": lambda size: "<answer>" + "9" * size + "</answer>",
    "digits and dots": lambda size: "<answer>" + "1." * (size // 2) + "</answer>",
    "commas": lambda size: "<answer>1" + ",111" * (size // 4) + ",1</answer>",
    "fractions": lambda size: "<answer>" + "1/" * (size // 2) + "</answer>",
    "spaced fractions": lambda size: "<answer>" + "1 / " * (size // 4) + "</answer>",
    "latex fractions": lambda size: "<answer>" + r"\frac{1}{" * (size // 9) + "</answer>",
    "long numerator": lambda size: r"<answer>\frac{" + "1" * size + "</answer>",
    "exponents": lambda size: "<answer>" + "1e" * (size // 2) + "</answer>",
    "a huge exponent": lambda size: "<answer>1e999999999</answer>" + " " * size,
    "a long exponent": lambda size: "<answer>1e" + "9" * size + "</answer>",
    "signs": lambda size: "<answer>" + "-" * size + "5</answer>",
    "signs and currency": lambda size: "<answer>" + "-$" * (size // 2) + "5</answer>",
    "boxes": lambda size: "<answer>" + "\\boxed{" * (size // 7) + "</answer>",
    "closed boxes": lambda size: "\\boxed{1} " * (size // 10),
    "deep boxes": lambda size: "\\boxed{" * (size // 16) + "\\fbox{" + "{}" * (size // 8) + "}" * (size // 16),
    "bare boxes": lambda size: "\\boxed  " * (size // 8),
    "overlapping tags": lambda size: "\n<answer>\n" + "\n</answer>" * (size // 10) + "\n",
    "backslashes": lambda size: "<answer>" + "\\" * size + "</answer>",
    "spaced thousands": lambda size: "<answer>1" + " 000" * (size // 4) + " 00</answer>",
    "runs of spaced thousands": lambda size: "<answer>" + "1 000 0, " * (size // 9) + "</answer>",
    "spaces of LaTeX": lambda size: "<answer>1" + r"\,000" * (size // 5) + "x</answer>",
    "Indian thousands": lambda size: "<answer>1" + ",11" * (size // 3) + ",1</answer>",
    "mixed numbers": lambda size: "<answer>" + "1 1/" * (size // 4) + "</answer>",
    "a long mixed number": lambda size: "<answer>" + "1" * (size // 2) + " " + "1" * (size // 2) + "/2</answer>",
    "short fractions": lambda size: "<answer>" + r"1\frac12" * (size // 8) + "</answer>",
    "equations": lambda size: "<answer>" + "1=" * (size // 2) + "1</answer>",
    "relations": lambda size: "<answer>" + "!  " * (size // 3) + "=1</answer>",
    "minuses in words": lambda size: "<answer>" + "minus " * (size // 6) + "5</answer>",
    "denials": lambda size: "<answer>" + "not " * (size // 4) + "5</answer>",
    "parts": lambda size: "<answer>5" + " and a " * (size // 7) + "</answer>",
    "tags of all names": lambda size: "<reasoning>" + "<a" * (size // 2) + "</reasoning><answer>1</answer>",
    "boxes in the reasoning": lambda size: "<reasoning>" + "\\boxed" * (size // 6) + "x</reasoning><answer>1</answer>",
    "words": lambda size: "<answer>" + "word " * (size // 5) + "</answer>",
}
HOSTILE_TO_OTHER_FORMATS = {
    "ends of thinking": lambda size: "</think>" * (size // 8),
    "white space between two sections": lambda size: "x</reasoning>" + " \n" * (size // 2) + "<plan>",
    **{kind: HOSTILE[kind] for kind in ("closed reasoning, white space", "strict middles", "pairs of tags")},
}


def seconds(function, *args, **kwargs):
    """The processor's time, whatever else it does: the best of several, enough for the clock's resolution."""
    best = math.inf
    deadline = time.process_time() + 0.03
    while time.process_time() < deadline or best is math.inf:
        start = time.process_time()
        function(*args, **kwargs)
        best = min(best, time.process_time() - start)
    return best


@pytest.mark.parametrize("kind", HOSTILE)
def test_time_grows_linearly(kind):
    small, large = HOSTILE[kind](100_000), HOSTILE[kind](1_000_000)

    def score(text):
        for reward_func in REWARDS:
            (value,) = reward_func(completions=[text], answer=["72"])
            assert math.isfinite(value)
        numerically_equal(text, text)
        parse_plain_number(text)
        parse_plain_number(text.removeprefix("<answer>").removesuffix("</answer>"))
        extract_last_number(text)
        extract_boxed_answer(text)

    assert_linear(score, small, large)


@pytest.mark.parametrize("kind", HOSTILE_TO_OTHER_FORMATS)
def test_time_grows_linearly_for_other_formats(kind):
    def score(text):
        for reward_func in REWARDS_OF_OTHER_FORMATS:
            (value,) = reward_func(completions=[text], answer=["72"])
            assert math.isfinite(value)

    assert_linear(score, *map(HOSTILE_TO_OTHER_FORMATS[kind], (100_000, 1_000_000)))


def assert_linear(function, small, large):
    # Linear is 10, quadratic is 100. What is done in microseconds is fast enough, whatever its ratio.
    ratio = seconds(function, large) / max(seconds(function, small), 1e-4)
    assert ratio < 35, f"10 times the text took {ratio:.0f} times as long"


def test_importing_the_rewards_imports_no_torch():
    code = (
        "import sys, trl_grpo_ext, trl_grpo_ext.rewards as rewards; rewards.gsm8k_bundle()\n"
        "assert not {'torch', 'transformers', 'trl', 'datasets', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("kind", HOSTILE)
def test_numbers_are_read_quickly_up_to_the_longest_answer(kind):
    """Beyond it no number is looked for, so that the time above says nothing about what reads them."""
    text = HOSTILE[kind](MAX_ANSWER_LENGTH - 40).removeprefix("<answer>").removesuffix("</answer>")
    assert len(text) <= MAX_ANSWER_LENGTH
    assert seconds(parse_answer_number, text) < 0.02
    assert seconds(parse_plain_number, text) < 0.02
