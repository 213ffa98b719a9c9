"""The hardened bundle, and what each known hack is paid: the table of the guide is made here."""

import pickle
import re
from pathlib import Path

import pytest

from trl_grpo_ext.rewards import (
    get_correctness_reward,
    get_hardened_extractor,
    get_hardened_format_reward,
    gsm8k_bundle,
    tag_bundle,
)
from trl_grpo_ext.rewards.names import BUNDLES
from trl_grpo_ext.rewards.score import score


GUIDE = Path(__file__).parents[1] / "recipes" / "guides" / "rewards.md"
GOOD = "<reasoning>\nTwice 12 is 24.\n</reasoning>\n<answer>\n24\n</answer>"

# For the reference 24; in `...` of the table is what the text does.
HACKS = {
    "a right answer, for comparison": GOOD,
    "a wrong answer in the right format": GOOD.replace("\n24\n", "\n25\n"),
    "empty reasoning": "<reasoning>\n\n</reasoning>\n<answer>\n24\n</answer>",
    "reasoning of dots": "<reasoning>\n........\n</reasoning>\n<answer>\n24\n</answer>",
    "no reasoning at all": "<answer>\n24\n</answer>",
    "every block twice": f"{GOOD}\n{GOOD}",
    "many answers, the right one last": "<reasoning>\nSo\n</reasoning>\n"
    + "".join(f"<answer>\n{number}\n</answer>\n" for number in (22, 23, 24)),
    "the answer in the reasoning": "<reasoning>\nIt is <answer>\n24\n</answer>\n</reasoning>\n<answer>\n24\n</answer>",
    "a box in the reasoning": GOOD.replace("is 24.", r"is \boxed{24}."),
    "a code fence around all": f"```xml\n{GOOD}\n```",
    "a code fence around the answer": GOOD.replace("\n24\n", "\n```\n24\n```\n"),
    "chat after the answer": f"{GOOD}\nIs there anything else that I can help with?",
    "text before the tags": f"Sure! {GOOD}",
    "two answers in one": GOOD.replace("\n24\n", "\n24 or 25\n"),
    "a list of answers": GOOD.replace("\n24\n", "\n" + " ".join(map(str, range(20, 30))) + "\n"),
    "a denied answer": GOOD.replace("\n24\n", "\nnot 24\n"),
    "another unit": GOOD.replace("\n24\n", "\n24 thousand\n"),
    "the prompt's placeholder": "<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>",
    "any number, for the integer's score": "<answer>7</answer>",
    "tags alone": "<reasoning>\n</reasoning>\n<answer>\n</answer>",
    "reasoning without end": GOOD.replace("Twice", "Well, " * 2000 + "twice"),
    "look-alike tags": GOOD.replace("<answer>", "<\N{CYRILLIC SMALL LETTER A}nswer>"),
    "tags in other tags": f"<think>{GOOD}</think>",
}


def paid(completion, bundle):
    return score(bundle, [{"completion": completion, "answer": "24"}]).total[0]


def hacks_table():
    bundles = {"`gsm8k_bundle()`": gsm8k_bundle(), "`tag_bundle()`": tag_bundle()}
    bundles["`gsm8k_bundle(hardened=True)`"] = gsm8k_bundle(hardened=True)
    lines = [f"| completion | {' | '.join(bundles)} |", "|---|" + "---|" * len(bundles)]
    for hack, completion in HACKS.items():
        lines.append(f"| {hack} | {' | '.join(f'{paid(completion, bundle):.2f}' for bundle in bundles.values())} |")
    return "\n".join(lines)


def test_table_of_hacks_is_in_the_guide():
    assert hacks_table() in GUIDE.read_text(), f"the table of the guide should be\n{hacks_table()}"


@pytest.mark.parametrize("hack", [hack for hack in HACKS if "comparison" not in hack])
def test_no_hack_is_paid_in_full(hack):
    """A wrong answer in the right format gets the format's half, everything else that is not right gets less."""
    total = paid(HACKS[hack], gsm8k_bundle(hardened=True))
    assert total == (2.0 if hack in HALF else 0.0)
    assert paid(GOOD, gsm8k_bundle(hardened=True)) == 4.0


# One that is as bad an answer as any other, in the right format.
HALF = {
    "a wrong answer in the right format",
    "two answers in one",
    "a list of answers",
    "a denied answer",
    "another unit",
}


@pytest.mark.parametrize(
    ("text", "is_met"),
    [
        (GOOD, True),
        (f"\n{GOOD}\n\n", True),
        (GOOD.replace("\n", ""), True),
        (GOOD.replace("Twice 12 is", "If a < b and b > c, then \\{a\\} is"), True),
        (GOOD.replace("Twice", "<b>Twice</b>"), False),
        (GOOD.replace("24\n<", "2\n4\n<"), False),
        (GOOD.replace("</reasoning>", "</reasoning> so "), False),
        (GOOD.replace("<reasoning>", ""), False),
        ("", False),
    ],
)
def test_layout(text, is_met):
    assert get_hardened_format_reward(score=1.0)(completions=[text]) == [float(is_met)]
    assert get_hardened_extractor()(text) == ("24" if is_met else None)
    reward = get_correctness_reward(answer_extractor=get_hardened_extractor())
    assert reward(completions=[text], answer=["24"]) == [2.0 if is_met else 0.0]
    assert reward(completions=[reward.completion_giving("24")], answer=["24"]) == [2.0]


def test_options():
    tags = (("<start_working_out>", "<end_working_out>"), ("<SOLUTION>", "</SOLUTION>"))
    text = "<start_working_out>Twice 12<end_working_out><SOLUTION>24</SOLUTION>"
    bundle = gsm8k_bundle(hardened=True, tags=tags)
    assert paid(text, bundle) == 4.0
    assert paid(text.replace("Twice 12", "Twice 12 <SOLUTION>"), bundle) == 0.0
    assert get_hardened_format_reward(max_chars=len(GOOD))(completions=[GOOD, GOOD.replace("12", "123")]) == [2.0, 0.0]
    assert get_hardened_format_reward(max_answer_chars=1)(completions=[GOOD]) == [0.0]
    assert get_hardened_format_reward(min_reasoning_chars=50)(completions=[GOOD]) == [0.0]
    boxed = gsm8k_bundle(hardened=True, answer_extractor=("tag", "boxed"))
    assert paid(GOOD.replace("\n24\n", "\n\\boxed{24}\n"), boxed) == 4.0
    assert pickle.loads(pickle.dumps(bundle)) == bundle


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_chars": 0}, "max_chars"),
        ({"min_reasoning_chars": True}, "min_reasoning_chars"),
        ({"max_answer_chars": 1.5}, "max_answer_chars"),
        ({"tags": ("reasoning", ("Answer:", ""))}, "tags"),
        ({"tags": ("reasoning",)}, "tags"),
    ],
)
def test_bad_options_are_refused(options, named):
    for factory in (get_hardened_format_reward, get_hardened_extractor):
        with pytest.raises(ValueError, match=named):
            factory(**options)


def test_hardened_is_not_as_in_notebooks():
    with pytest.raises(ValueError, match="hardened"):
        gsm8k_bundle(hardened=True, as_in_notebooks=True)


# References as MATH's are, and wrong answers that the plain rule (the one number in each) takes for right.
MATH_LIKE = (
    *(r"\sqrt{13}", r"13\sqrt{2}", r"\frac56", r"\dfrac{7}{12}", r"\frac{\sqrt{3}}{3}", r"-\frac{1}{3}", r"2\pi"),
    *(r"\frac{\pi}{6}", r"(2,\infty)", r"(-\infty,3]", r"[0,1)", r"\{1,2\}", r"(3,4)", r"2^{10}", r"5!", "x=5", "5x"),
    *(r"x^2+3", r"y=2x+3", r"3-4i", r"2i", r"1011_2", r"45^\circ", r"\text{Tuesday}", r"\text{(B)}", r"12\%", "3:4"),
    *(r"\begin{pmatrix}1\\2\end{pmatrix}", r"\binom{5}{2}", r"\log_2 8", r"\sin 30", r"|x-3|", r"4\sqrt[3]{2}", "7e"),
    *(r"\frac{x}{4}", r"e^{2}", r"\cot 5", r"10\text{ thousand}", r"\pm 4", r"x\leq 6", r"x>7", r"\lfloor x\rfloor+8"),
    *(r"3\frac{1}{2}", "1,3,5", r"\ln 9", r"9_{16}", r"6\cdot 10^{5}", r"\tan 60^\circ", r"11\tfrac14", "2 or 3"),
    *(r"\text{8 or 9}", r"16\pi-8", r"k\neq 4", r"30\sqrt{3}", r"90^{\circ}", "0.\\overline{36}", r"5\sqrt{5}"),
    *(r"\infty", r"\emptyset", r"x\in[1,2]", r"2\mathbf{i}", r"\sqrt[4]{7}", r"\frac{9}{2}a", r"p-3"),
)


@pytest.mark.parametrize("bundle_name", sorted(BUNDLES))
def test_numbers_inside_of_references_are_not_paid(bundle_name):
    """Whatever digits a reference has in it, only what denotes the reference gets the score for a right answer."""
    assert len(MATH_LIKE) >= 60
    same = {
        r"12\%": {"12"},
        "x=5": {"5"},
        "1011_2": {"1011"},
        "9_{16}": {"9"},
        r"45^\circ": {"45"},
        r"90^{\circ}": {"90"},
    }
    bundle = BUNDLES[bundle_name]()
    reward = bundle[bundle.names.index("correctness_reward_func")]
    for reference in MATH_LIKE:
        numbers = {*re.findall(r"\d+", reference), "".join(re.findall(r"\d", reference))} - {""}
        for number in numbers - same.get(reference, set()) - {reference}:
            text = f"<reasoning>\nSo it is.\n</reasoning>\n<answer>\n{number}\n</answer>"
            (score_of_wrong,) = reward(completions=[text], answer=[reference])
            assert not score_of_wrong, (reference, number)
