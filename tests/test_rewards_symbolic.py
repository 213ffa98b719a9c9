import json
import logging
import os
import pickle
import re
import subprocess
import sys
import threading
import time
from fractions import Fraction
from itertools import pairwise

import pytest
from hostile_answers import HOSTILE, REFERENCE, score
from launch import ROOT, launcher, run_to_the_end
from test_rewards_worker_pool import ENVIRONMENT, workers_of

from trl_grpo_ext.rewards import (
    audit,
    check_references,
    close_workers,
    correctness_reward_func,
    exact_correctness_reward_func,
    get_math_correctness_reward,
    gsm8k_bundle,
    math_bundle,
    numerically_equal,
    tag_bundle,
)
from trl_grpo_ext.rewards.names import find_rewards
from trl_grpo_ext.rewards.symbolic import MAX_ANSWER_LENGTH
from trl_grpo_ext.rewards.worker_pool import WorkerPool


math_verify = pytest.importorskip("math_verify")
# References as MATH has them, of every kind.
MATH_REFERENCES = [
    *(
        r"\sqrt{13}",
        r"2\sqrt{3}",
        r"\frac{\sqrt{3}}{2}",
        r"-\sqrt{2}",
        r"3+2\sqrt{2}",
        r"\sqrt[3]{7}",
        r"7\pm\sqrt{5}",
    ),
    *(r"\frac56", r"\frac{3}{4}", r"-\frac{7}{3}", r"\dfrac{11}{12}", r"\tfrac12", r"3\frac{1}{2}", r"5\frac14"),
    *(r"(2,\infty)", r"(-\infty,3]", "[0,5)", "[-2,7]", r"(-\infty,2)\cup(5,\infty)", "x<5", r"x \ge 3"),
    *(r"\{1,2\}", r"\{-3,0,3\}", "(3,4)", "(1,-2,5)", "(0,0)", "1,2,3", "-1, 4", r"13 \text{ or } 17"),
    *(r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{pmatrix} -2 \\ 7 \end{pmatrix}", r"1 \le x \le 4"),
    *("x^2+1", "3x^2-2x+7", "(x+2)(x-3)", "2x+3", "-5x", r"\frac{x+1}{x-2}", "a+b", "n(n+1)", r"\frac{1}{x}"),
    *(r"90^\circ", r"45^{\circ}", r"60\text{ degrees}", r"50\%", r"12.5\%", r"\$32.50", r"\$1,250", r"5\text{ cm}^2"),
    *("1011_2", "2132_5", r"6\text{ cm}", r"25\text{ miles per hour}", "1{,}000", r"10,\!000", "3:5"),
    *(r"\text{Tuesday}", r"\text{(C)}", r"\text{Evelyn}", r"\text{even}", "y = 2x+3", "x=5", "x^2+y^2=25", "x+y=5"),
    *("2^{10}", "3^{2004}", "5!", "10^{6}", r"\pi", r"4\pi", r"\frac{\pi}{3}", r"2\pi+6", "3+4i", "-2i", "e^2"),
    *("0.25", "17", "-8", "0", r"\log_2 7", r"\binom{10}{3}", r"\infty"),
]
# Numbers of a reference that are its value, in spite of what stands around them.
VALUES = {
    *((r"90^\circ", "90"), (r"45^{\circ}", "45"), (r"60\text{ degrees}", "60"), (r"50\%", "50"), ("x=5", "5")),
    *((r"\$1,250", "1250"), ("1011_2", "1011"), ("2132_5", "2132"), (r"6\text{ cm}", "6"), ("1{,}000", "1000")),
    *((r"25\text{ miles per hour}", "25"), (r"10,\!000", "10000"), (r"5\text{ cm}^2", "5"), ("0", "-0")),
    *((r"12.5\%", "12.5"), (r"\$32.50", "32.50")),
}


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left():
    yield
    close_workers()
    assert not workers_of(os.getpid())


def rewards_of(answers, reference, **options):
    logged = {}
    reward = get_math_correctness_reward(answer_extractor="none", **options)
    return reward(completions=answers, answer=[reference] * len(answers), log_metric=logged.__setitem__), logged


def test_text_number_formula_and_nothing():
    """Each kind of equality has its score; a text that is no answer to be scored has none, and is counted."""
    options = {"exact_score": 4.0, "numeric_score": 3.0, "symbolic_score": 2.0, "wrong_score": -1.0, "workers": 1}
    answers = [
        "0.5",
        ".50",
        r"2^{-1}",
        r"$\frac{1}{2}$",
        r"\boxed{\tfrac12}",
        "0.6",
        "half",
        "",
        "1" * MAX_ANSWER_LENGTH,
    ]
    scores, logged = rewards_of([*answers, r"\frac{1}{3}+" * MAX_ANSWER_LENGTH], "0.5", **options)
    assert scores == [4.0, 3.0, 2.0, 3.0, 3.0, -1.0, -1.0, -1.0, -1.0, None]
    assert logged["rewards/unscored"] == pytest.approx(1 / 10)
    assert logged["math_correctness/accuracy"] == pytest.approx(5 / 9)


def test_a_reference_that_is_no_mathematics_is_not_scored():
    scores, logged = rewards_of([r"\frac{", "5", ""], r"\frac{", workers=1)
    assert scores == [2.0, None, 0.0]
    assert logged["rewards/unscored"] == pytest.approx(1 / 3)
    assert rewards_of(["5"], None, workers=1) == ([None], {"rewards/unscored": 0.0})
    assert rewards_of([], "5", workers=1) == ([], {"rewards/unscored": 0.0})


def test_an_answer_that_hangs_takes_its_deadline_and_nobody_elses():
    """In one batch, from a reward that was pickled; the same pair is compared once."""
    reward = pickle.loads(pickle.dumps(get_math_correctness_reward(timeout_s=0.7, workers=1, answer_extractor="none")))
    assert reward(completions=[r"\sqrt{26/2}"], answer=[REFERENCE]) == [2.0]
    answers = ["9^{9^{9}}", r"13^{1/2}", "9^{9^{9}}", "9^{9^{9}}", "14"]
    assert reward(completions=answers, answer=[REFERENCE] * 5) == [None, 2.0, None, None, 0.0]
    started = time.monotonic()
    assert reward(completions=["8^{9^{9}}"], answer=[REFERENCE]) == [None]
    assert time.monotonic() - started < 0.7 + 1.0


def test_gold_and_answer_are_not_mixed_up():
    """An interval answers an inequality, but no inequality an interval; a number is no equation in two variables."""
    assert rewards_of([r"(-\infty, 5)"], "x<5", workers=1)[0] == [2.0]
    assert rewards_of(["x<5"], r"(-\infty, 5)", workers=1)[0] == [0.0]
    assert rewards_of(["x = 5", "6"], "5", workers=1)[0] == [2.0, 0.0]
    assert rewards_of(["5", "y + x = 5"], "x+y=5", workers=1)[0] == [0.0, 2.0]
    assert rewards_of(["5", "y=5"], r"\angle A - 1 = 5", workers=1)[0][0] == 0.0


def test_bases():
    """Math-verify does not look at them."""
    answers = ["1011", "1011_{2}", "1011_3", "1011_{10}"]
    assert rewards_of(answers, "1011_2", workers=1)[0] == [2.0, 2.0, 0.0, 0.0]
    assert rewards_of(["1011_2"], "1011", workers=1)[0] == [0.0]


def test_no_number_of_a_formula_is_the_formula():
    """Whatever the notebooks' rule would pay: 13 for the square root of 13, 56 for 5/6, 2 for the numbers above 2."""
    pairs = []
    for reference in MATH_REFERENCES:
        numbers = re.findall(r"[0-9]+", reference)
        answers = {*numbers, "".join(numbers), *(f"-{number}" for number in numbers), ".".join(numbers[:2]), "7919"}
        pairs += [(answer, reference) for answer in sorted(answers - {""}) if (reference, answer) not in VALUES]
    wrong = [(answer, reference) for answer, reference in pairs if not is_value(answer, reference)]
    assert len(wrong) > 200
    assert sum(numerically_equal(answer, reference) for answer, reference in wrong) > 15
    answers, references = map(list, zip(*wrong, strict=True))
    rewards = [
        *(
            get_math_correctness_reward(answer_extractor="none"),
            correctness_reward_func,
            exact_correctness_reward_func,
        ),
        *(bundle.select("correctness_reward_func")[0] for bundle in (gsm8k_bundle(), tag_bundle())),
    ]
    for reward in rewards:
        scores = reward(completions=[reward.completion_giving(answer) for answer in answers], answer=references)
        paid = [pair for pair, score in zip(wrong, scores, strict=True) if score != 0.0]
        assert not paid, (reward.name, paid)


def is_value(answer, reference):
    try:
        return Fraction(answer) == Fraction(reference)
    except ValueError:
        return False


@pytest.mark.slow
def test_references_answer_themselves():
    """Exactly as they stand without any comparison, and by math-verify with something around them."""
    reward = get_math_correctness_reward(symbolic_score=1.0, numeric_score=1.0)
    same = reward(completions=[rf"so $\boxed{{{text}}}$" for text in MATH_REFERENCES], answer=MATH_REFERENCES)
    assert same == [2.0] * len(MATH_REFERENCES)
    other = reward(completions=[rf"\boxed{{${text}$}}" for text in MATH_REFERENCES], answer=MATH_REFERENCES)
    assert other == [1.0] * len(MATH_REFERENCES)


def pairs_of_every_category():
    """300 pairs of an answer and a reference: each reference of a category with right answers and wrong ones."""
    classes = {
        "fractions": [
            [r"\frac{1}{2}", r"\frac12", r"\dfrac{2}{4}", "1/2"],
            [r"\frac{3}{4}", r"\tfrac34", "3/4"],
            ["2/3"],
        ],
        "decimals": [["0.75", "0.750", ".75", r"\frac{3}{4}"], ["0.125", r"\frac18"], ["3.14"], ["0.3333333"]],
        "surds": [
            [r"\sqrt{12}", r"2\sqrt{3}", r"2\sqrt3"],
            [r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}"],
            [r"\sqrt{13}"],
        ],
        "intervals": [
            [r"(2,\infty)", r"(2, +\infty)", "x>2"],
            ["[1,3]", r"1 \le x \le 3"],
            ["(1,3]"],
            [r"(-\infty,2)"],
        ],
        "sets": [[r"\{1,2\}", r"\{2, 1\}", "1,2"], [r"\{1,2,3\}"], [r"\{-1,1\}", r"\pm 1"], [r"\emptyset"]],
        "tuples": [["(3,4)", "(3, 4)"], ["(4,3)"], ["(1,2,3)", r"(1,\,2,\,3)"], ["(3,4,5)"]],
        "matrices": [
            [r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}"],
            [r"\begin{pmatrix} 1 & 2 \\ 3 & 5 \end{pmatrix}"],
            [r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"],
        ],
        "equations": [["y=2x+3", "y = 3+2x", "2x+3=y"], ["y=2x-3"], ["x=5", "5"], [r"x^2+y^2=25"], ["x<5", "5>x"]],
        "polynomials": [["x^2+2x+1", "(x+1)^2", "1+2x+x^2"], ["x^2-1", "(x-1)(x+1)"], ["x^2+1"], ["2x"], ["-5x"]],
        "percent": [[r"50\%", "50%", "50", "0.5"], [r"12.5\%", "12.5%"], [r"25\%"], ["75"]],
        "units": [[r"5\text{ cm}", "5", r"5\,\text{cm}"], [r"90^\circ", "90", r"90^{\circ}"], [r"\$32.50", "32.50"]],
        "text": [[r"\text{Tuesday}", "Tuesday"], [r"\text{Monday}"], [r"\text{(C)}", "C"], [r"\text{even}"]],
        "complex": [["3+4i", "4i+3"], ["3-4i"], ["-2i"], ["i^2", "-1"]],
        "constants": [[r"\frac{\pi}{3}", r"\pi/3"], [r"2\pi", r"\pi \cdot 2"], ["e^2"], [r"\pi"], ["3.14159"]],
        "functions": [
            [r"\log_2 8", "3"],
            [r"\sin 30^\circ"],
            ["5!", "120"],
            [r"\binom{5}{2}", "10"],
            ["2^{10}", "1024"],
        ],
        "thousands": [["1,000", "1000", "1{,}000"], [r"10,\!000", "10000"], ["100"], ["12,345", "12345"]],
        "mixed numbers": [[r"3\frac{1}{2}", r"\frac{7}{2}", "3.5"], [r"5\frac14", "5.25"], [r"\frac{31}{2}"]],
    }
    pairs = []
    for groups in classes.values():
        texts = [text for group in groups for text in group]
        pairs += [(answer, reference) for reference in texts for answer in texts]
    return list(dict.fromkeys(pairs))


@pytest.mark.slow
def test_agrees_with_math_verify_called_directly():
    """But for plain numbers, which are compared exactly and with their units, before it is asked."""
    pairs = pairs_of_every_category()
    assert len(pairs) >= 300
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    direct = [
        math_verify.verify(*(math_verify.parse(rf"\boxed{{{text}}}") for text in (reference, answer)))
        for answer, reference in pairs
    ]
    assert 0.2 < sum(direct) / len(direct) < 0.6
    reward = get_math_correctness_reward(answer_extractor="none", timeout_s=20)
    answers, references = map(list, zip(*pairs, strict=True))
    scores = reward(completions=answers, answer=references)
    differ = [
        (pair, theirs, ours) for pair, theirs, ours in zip(pairs, direct, scores, strict=True) if ours != 2.0 * theirs
    ]
    assert not differ


def check(report, timeout_s):
    assert report["hostile"] == [None] * report["count"]
    assert report["harmless"] == report["right"]
    assert report["logged"]["rewards/unscored"] == 0.5
    assert report["stopped"] < 0.2
    # each takes its deadline and less than a second more
    assert report["seconds"] < report["count"] * (timeout_s + 1)


@pytest.mark.slow
def test_hostile_answers_from_another_thread():
    assert len(HOSTILE) == 30
    reports = []
    thread = threading.Thread(target=lambda: reports.append(score(0.5)))
    thread.start()
    thread.join()
    check(reports[0], 0.5)


@pytest.mark.slow
@pytest.mark.distributed
def test_hostile_answers_from_the_main_threads_of_two_ranks(tmp_path):
    command = [
        *launcher("ddp_cpu.yaml", is_warm=False),
        str(ROOT / "tests" / "hostile_answers.py"),
        str(tmp_path / "rank"),
        "0.7",
    ]
    result = run_to_the_end(command, environment=ENVIRONMENT)
    assert result.returncode == 0, result.stderr
    for rank in ("0", "1"):
        report = json.loads((tmp_path / f"rank-{rank}").read_text())
        check(report, 0.7)
        assert report["count"] == 15
        assert not workers_of(report["pid"])


def test_workers_import_neither_torch_nor_trl():
    code = "import sys; from trl_grpo_ext.rewards.symbolic import make_verifier; make_verifier(); print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True
    ).stdout.split()
    assert "sympy" in modules
    assert not {"torch", "trl", "transformers", "datasets"} & set(modules)


def test_without_math_verify(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for make in (get_math_correctness_reward, math_bundle, lambda: gsm8k_bundle(symbolic=True)):
        with pytest.raises(ImportError, match=re.escape("pip install 'trl_grpo_ext[math]'")):
            make()
    with pytest.raises(ValueError, match=r"^math: correctness_reward_func needs math-verify"):
        find_rewards("math")
    gsm8k_bundle()


@pytest.mark.parametrize(
    ("option", "value"), [("timeout_s", 0), ("workers", -1), ("memory_limit_mb", 0.5), ("symbolic_score", None)]
)
def test_options_that_cannot_be_used(option, value):
    with pytest.raises(ValueError, match=rf"math_correctness_reward_func: {option} must be"):
        get_math_correctness_reward(**{option: value})


def test_bundles():
    """Names and the scale of scores are those of the bundle without mathematics."""
    bundle = gsm8k_bundle(symbolic=True, tags=("think", "solution"), answer_column="target", answer_extractor="tag")
    assert bundle.names == gsm8k_bundle().names
    reward = bundle[-1]
    completions = [f"<solution>{answer}</solution>" for answer in ("1/2", "0.5", r"\sqrt{1/4}", "2")]
    logged = {}
    assert reward(completions=completions, target=["1/2"] * 4, log_metric=logged.__setitem__) == [2.0, 1.5, 1.5, 0.0]
    assert logged == {"accuracy": 0.75, "rewards/unscored": 0.0}
    assert find_rewards("math") == math_bundle()
    assert math_bundle().names == tag_bundle().names
    assert math_bundle(answer_extractor="boxed").names == ["correctness_reward_func"]


def test_references_are_audited():
    rows = [
        {"answer": text, "solution": rf"<reasoning>so \boxed{{{text}}}</reasoning><answer>{text}</answer>"}
        for text in MATH_REFERENCES
    ]
    assert audit(math_bundle(), rows).ok
    check_references(math_bundle(), rows)


def test_time_is_linear_in_the_number_of_completions():
    """Most of a batch are equal texts and whole numbers, for which no worker is asked."""
    reward = get_math_correctness_reward(answer_extractor="none", workers=1)
    reward(completions=["1"], answer=["2"])
    started = [time.monotonic()]
    for count in (2_000, 4_000):
        reward(completions=[str(number) for number in range(count)], answer=["7"] * count)
        started.append(time.monotonic())
    first, second = (after - before for before, after in pairwise(started))
    assert second < 10 * first + 0.5


def test_running_out_of_stack_is_not_taken_for_wrong():
    """As math-verify does with every exception."""
    with WorkerPool("trl_grpo_ext.rewards.symbolic:make_verifier", options={}, workers=1, timeout_s=20) as pool:
        (outcome,) = pool.map([["1/" * 2000 + "1", "2"]])
    assert outcome.failure.startswith("error: RecursionError")


@pytest.mark.slow
def test_a_training_with_it(tmp_path):
    """Workers need nothing of the model, which cannot be pickled here, and end with the training."""
    from canned import short_run_config
    from datasets import Dataset
    from tiny import tiny_model, tiny_tokenizer

    from trl_grpo_ext import GRPOExtConfig, GRPOExtTrainer

    close_workers()  # of other tests
    seen = []

    def look(completions, **columns):
        seen.append(workers_of(os.getpid()))
        return [0.0] * len(completions)

    model = tiny_model()
    model.not_to_be_pickled = threading.Lock()
    rows = [{"prompt": [{"role": "user", "content": "half of x"}], "answer": r"\frac{x}{2}"}] * 8
    trainer = GRPOExtTrainer(
        model=model,
        reward_funcs=[get_math_correctness_reward(answer_extractor="none", workers=2), look],
        args=short_run_config(tmp_path, GRPOExtConfig),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    assert 1 <= len(seen[-1]) <= 2
    assert not workers_of(os.getpid())
    (unscored,) = {row["rewards/unscored"] for row in trainer.state.log_history if "rewards/unscored" in row}
    assert unscored == 0.0
