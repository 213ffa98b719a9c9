"""Each line of the table in `recipes/guides/porting.md` pays what its notebook asks for.

The notebooks' own functions are written anew here from what they do, and import nothing from the package.
"""

import pickle
import random
import re

import pytest
from guides import GUIDES, blocks_of

from trl_grpo_ext.rewards.audit import audit, with_solutions
from trl_grpo_ext.rewards.correctness import AnswerReward


PAGE = GUIDES / "porting.md"
ROW = re.compile(r"^\| (?P<notebook>[^|]*\]\(https://[^|]+) \| `(?P<format>[^`|]+)` \| `(?P<line>[^`|]+)` \|$", re.M)
ROWS = [match.groupdict() for match in ROW.finditer(PAGE.read_text())]
REASONING = "12 + 12 = 24\n24 - 10 = 14, so 14."  # the right answer stands in it, and counts only in its place


def bundle_of(line):
    (first, *_) = blocks_of(PAGE)
    namespace = {}
    exec(compile(f"{first.text}\nbundle = {line}", str(PAGE), "exec"), namespace)
    return namespace["bundle"]


def completion_of(layout, answer, reasoning=REASONING):
    """A completion in a format as the table writes it: the last `...` is the answer."""
    before, _, after = layout.replace(r"\n", "\n").rpartition("...")
    return before.replace("...", reasoning) + answer + after


def scores_of(bundle, completion):
    return [reward(completions=[completion], answer=["14"])[0] for reward in bundle]


each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: re.findall(r"\[(.+?)\]", row["notebook"])[0])


def test_the_table_is_read():
    assert len(ROWS) >= 18
    assert len(ROWS) == sum(line.startswith("| ") for line in PAGE.read_text().splitlines()) - 1  # less the heading
    assert len({row["format"] for row in ROWS}) >= 10


@each_row
def test_a_line_ports_its_notebook(row):
    bundle = pickle.loads(pickle.dumps(bundle_of(row["line"])))
    best = [reward.full_marks for reward in bundle]
    right = completion_of(row["format"], "14")
    assert scores_of(bundle, right) == pytest.approx(best), right
    assert scores_of(bundle, [{"role": "assistant", "content": right}]) == pytest.approx(best)
    wrong = scores_of(bundle, completion_of(row["format"], "15"))
    for reward, score, full_marks in zip(bundle, wrong, best, strict=True):
        assert score == (reward.wrong_score if isinstance(reward, AnswerReward) else pytest.approx(full_marks))
    for unformatted in ("The answer is 14.", "", REASONING):
        assert all(score < full for score, full in zip(scores_of(bundle, unformatted), best, strict=True))
    # what `audit` writes, and what `check_references` takes for the shortest right completion, is right
    rows = with_solutions(bundle, [{"answer": "14"}, {"answer": "-3.5"}, {"answer": "1,080"}])
    assert audit(bundle.select("correctness_reward_func"), rows).ok
    assert audit(bundle, rows[:1]).ok
    (correctness,) = (reward for reward in bundle if isinstance(reward, AnswerReward))
    assert correctness(completions=[correctness.completion_giving("14")], answer=["14"]) == [correctness.full_marks]


@each_row
def test_an_answer_in_the_reasoning_is_none(row):
    bundle = bundle_of(row["line"])
    (correctness,) = (reward for reward in bundle if isinstance(reward, AnswerReward))
    hack = completion_of(row["format"], "15", reasoning=completion_of(row["format"], "14").replace("15", "14"))
    assert correctness(completions=[hack], answer=["14"]) == [correctness.wrong_score]
    if "</think>" in row["format"]:
        unsure = r"<think>It is \boxed{14} or <answer>15</answer></think> I do not know."
        assert correctness(completions=[unsure], answer=["14"]) == [correctness.wrong_score]


# What the notebooks' functions do. `EXACTLY` says that scores are the same for every text, `WITHIN` that what has full
# marks here has them there.


def each_tag_once(tags, found, missing):
    return lambda text: sum(found if text.count(tag) == 1 else missing for tag in tags)


def pattern(expression, score, flags=re.DOTALL):
    return lambda text: score if re.search(expression, text, flags) else 0.0


WORKING_OUT = ("<start_working_out>", "<end_working_out>", "<SOLUTION>", "</SOLUTION>")
GEMMA = r"^\s*<start_working_out>.+?<end_working_out>.*?<SOLUTION>(.+?)</SOLUTION>\s*$"
EXACTLY, WITHIN = "exactly", "within"


def tag_count(text):
    places = ("<think>\n", "\n</think>\n", "\n<answer>\n", "\n</answer>")
    return sum(0.25 for place in places if text.count(place) == 1)


def verl_gsm8k(text):  # but that it wants one space
    numbers = re.findall(r"#### *(\-?[0-9\.\,]+)", text)
    return 1.0 if numbers and numbers[-1].replace(",", "") == "14" else 0.0


def dapo(text):  # but that the last one counts of a line that has several
    answers = re.findall(r"Answer:\s*((?:(?!Answer:)[^\n])+)", text)
    return 1.0 if answers and answers[-1].strip() == "14" else -1.0


ORACLES = [
    ("Gemma 3 (1B)", "format_reward_func", EXACTLY, each_tag_once(WORKING_OUT, 0.5, -0.5)),
    ("Gemma 3 (1B)", "soft_format_reward_func", WITHIN, pattern(GEMMA, 3.0, re.M | re.S)),
    ("Advanced Llama 3.2", "format_reward_func", EXACTLY, each_tag_once(WORKING_OUT, 0.5, -1.0)),
    ("Qwen3 (4B)", "format_reward_func", EXACTLY, each_tag_once(WORKING_OUT[1:], 0.5, -1.0)),
    ("DeepSeek-R1-0528", "format_reward_func", EXACTLY, each_tag_once(("<think>", "</think>"), 0.5, -1.0)),
    ("DeepSeek-R1-0528", "soft_format_reward_func", EXACTLY, pattern("</think>(.*)", 3.0)),
    ("open-r1", "xmlcount_reward_func", EXACTLY, tag_count),
    (
        "open-r1",
        "strict_format_reward_func",
        WITHIN,
        pattern(r"\A<think>\n.*?\n</think>\n<answer>\n.*?\n</answer>$", 1.0, re.M | re.S),
    ),
    (
        "ms-swift",
        "soft_format_reward_func",
        EXACTLY,
        pattern(r"\A<think>.*?</think>\s*<answer>.*?</answer>(?![\s\S])", 1.0),
    ),
    ("EasyR1", "soft_format_reward_func", WITHIN, pattern(r"\A<think>.*</think>", 0.1)),
    ("[GSM8K]", "correctness_reward_func", WITHIN, verl_gsm8k),
    ("[DAPO]", "correctness_reward_func", WITHIN, dapo),
]


def texts_of(layout, number):
    """Completions in the format, and texts from its pieces: most of them nearly right."""
    rng = random.Random(layout)
    pieces = [*re.findall(r"<.+?>|\n|####|Answer:|\\boxed\{", layout.replace(r"\n", "\n")), "14", "x", " ", "\n"]
    for _ in range(number):
        drawn = rng.choices(pieces, k=rng.randrange(1, 12))
        yield "".join(drawn)
        yield completion_of(layout, rng.choice(["14", "15", " 14 ", "1,400", "x"]), reasoning="".join(drawn[:2]))


@pytest.mark.parametrize(
    ("notebook", "name", "relation", "oracle"), ORACLES, ids=[f"{notebook}-{name}" for notebook, name, *_ in ORACLES]
)
def test_scores_are_the_notebooks(notebook, name, relation, oracle):
    (row,) = (row for row in ROWS if notebook in row["notebook"])
    (reward,) = bundle_of(row["line"]).select(name)
    plain = completion_of(row["format"], "14", reasoning="r")
    assert reward(completions=[plain], answer=["14"]) == [pytest.approx(oracle(plain))]
    seen = set()
    for text in texts_of(row["format"], 300):
        (score,) = reward(completions=[text], answer=["14"])
        if relation == EXACTLY:
            assert score == pytest.approx(oracle(text)), text
        elif score == reward.full_marks:
            assert oracle(text) == score, text
        seen.add(score == reward.full_marks)
    assert seen == {True, False}


def test_think_format_is_trls():
    from trl.rewards import think_format_reward

    (row,) = (row for row in ROWS if "LoRA and QLoRA" in row["notebook"])
    (reward,) = bundle_of(row["line"]).select("soft_format_reward_func")
    for text in texts_of(row["format"], 300):
        if text.count("</think>") <= 1:  # TRL lets any number of them follow
            assert reward(completions=[text]) == think_format_reward([[{"content": text}]]), text
