"""Figures of answers against counting by hand, and against brute force over subsets."""

import io
import itertools
import json
import random

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from trl_grpo_ext.evaluation import CONVENTIONS, Answer, Figures, figures_of, table_of


def make(problem, completion, **options):
    return Answer(id=problem, completion=completion, answer=5, **options)


RIGHT, WRONG, ELSEWHERE = "<answer>5</answer>", "<answer>6</answer>", "it is 5"


def wilson(successes, n):
    found = stats.binomtest(successes, n).proportion_ci(method="wilson")
    return found.low, found.high


def test_one_completion_of_each_problem():
    texts = [RIGHT] * 5 + [ELSEWHERE] * 3 + [WRONG] * 2
    figures = figures_of(
        make(
            problem,
            text,
            temperature=0.0,
            tokens=10 + problem,
            finish_reason="length" if problem == 3 else "stop",
        )
        for problem, text in enumerate(texts)
    )
    assert (figures.items, figures.completions, figures.samples_per_item) == (10, 10, 0)
    shares = {"strict": 5, "answer": 8, "lm_eval_strict": 0, "lm_eval_flexible": 8, "format": 7, "truncated": 1}
    assert list(figures.estimates) == [*shares, "tokens"]
    for name, count in shares.items():
        found = figures.estimates[name]
        assert found.mean == count / 10
        assert (found.low, found.high) == pytest.approx(wilson(count, 10))
    assert figures.estimates["tokens"].mean == 14.5
    assert 10 < figures.estimates["tokens"].low < 14.5 < figures.estimates["tokens"].high < 19


def test_what_is_not_known_is_no_figure():
    figures = figures_of([make(1, RIGHT, tokens=5), make(2, RIGHT, finish_reason="stop")])
    assert list(figures.estimates) == [*CONVENTIONS, "format"]


@pytest.fixture(scope="module")
def sampled():
    """5 samples of 40 problems at temperature 1, and a greedy completion, which is always right."""
    draw = random.Random(0)
    texts = [RIGHT, RIGHT, "<answer>5.0</answer>", ELSEWHERE, WRONG, "<answer>7</answer>", "none", "#### 5", "#### 6"]
    answers = []
    for problem in range(40):
        kinds = [draw.choice(texts) for _ in range(5)] if problem > 3 else [RIGHT] * 5
        answers += [make(problem, text, sample=i, temperature=1.0) for i, text in enumerate(kinds)]
        answers.append(make(problem, RIGHT, temperature=0.0, tokens=3, finish_reason="stop"))
    return answers


def by_hand(text, convention):
    """What those few texts give, and whether it is 5."""
    tagged = {RIGHT: 5, "<answer>5.0</answer>": 5, WRONG: 6, "<answer>7</answer>": 7}
    if convention == "strict":
        found = tagged.get(text)
    elif convention == "answer":
        found = {**tagged, ELSEWHERE: 5, "#### 5": 5, "#### 6": 6}.get(text)
    else:
        found = {"#### 5": 5, "#### 6": 6}.get(text)
    return found, found == 5


@pytest.mark.parametrize("convention", ["answer", "strict", "lm_eval_strict"])
def test_several_samples_of_each_problem(sampled, convention):
    figures = figures_of(sampled)
    assert (figures.items, figures.completions, figures.samples_per_item) == (40, 240, 5)
    assert figures.estimates["strict"].mean == 1  # greedy
    assert figures.estimates["lm_eval_strict"].mean == 0
    prefix = "" if convention == "answer" else f"{convention}_"
    groups = [
        [by_hand(answer.completion, convention) for answer in sampled if answer.id == problem and answer.temperature]
        for problem in range(40)
    ]
    means = {"mean@5": np.mean([[right for _, right in group] for group in groups])}
    for k in (1, 2, 4, 5):
        means[f"pass@{k}"] = np.mean(
            [any(right for _, right in subset) for group in groups for subset in itertools.combinations(group, k)]
        )
    for k in (2, 4, 5):
        worth = []
        for group in groups:
            for subset in itertools.combinations(group, k):
                votes = [found for found, _ in subset if found is not None]
                top = [vote for vote in set(votes) if votes.count(vote) == max(map(votes.count, votes))]
                worth.append(sum(vote == 5 for vote in top) / len(top) if top else 0)
        means[f"maj@{k}"] = np.mean(worth)
    rights = [sum(right for _, right in group) for group in groups]
    means["never_right"] = np.mean([right == 0 for right in rights])
    means["always_right"] = np.mean([right == 5 for right in rights])
    for name, mean in means.items():
        found = figures.estimates[f"{prefix}{name}"]
        assert found.mean == pytest.approx(mean), name
        assert found.low <= found.mean <= found.high
        assert 0 < found.high - found.low < 0.35
    names = [name for name in figures.estimates if name.startswith(prefix) and name[len(prefix) :] in means]
    assert [name[len(prefix) :] for name in names] == list(means)
    never = sum(right == 0 for right in rights)
    found = figures.estimates[f"{prefix}never_right"]
    assert (found.low, found.high) == pytest.approx(wilson(never, 40))


def test_order_does_not_show_and_verdicts_may_be_there(sampled):
    graded = [answer.graded() for answer in sampled]
    shuffled = random.Random(1).sample(graded, len(graded))
    assert figures_of(shuffled) == figures_of(sampled)
    assert figures_of(sampled, seed=1) != figures_of(sampled)


def test_answers_to_one_problem_are_not_independent():
    """Four equal answers to each of 50 problems say no more than one: the interval is that wide."""
    answers = [make(i, RIGHT if i < 25 else WRONG, sample=j, temperature=1) for i in range(50) for j in range(4)]
    found = figures_of(answers).estimates
    low, high = wilson(25, 50)
    assert found["answer"].high - found["answer"].low == pytest.approx(high - low, rel=0.1)
    assert found["mean@4"] == found["answer"]


def test_problems_with_different_numbers_of_samples():
    answers = [make(1, RIGHT, sample=i) for i in range(4)] + [make(2, WRONG, sample=i) for i in range(2)]
    figures = figures_of(answers)
    assert figures.samples_per_item == 2
    assert figures.estimates["answer"].mean == pytest.approx(4 / 6)  # of completions
    assert figures.estimates["mean@2"].mean == 0.5  # of problems
    assert [name for name in figures.estimates if "pass" in name and "_" not in name] == ["pass@1", "pass@2"]
    assert figures.estimates["pass@2"].mean == 0.5


def test_an_evaluation_that_was_interrupted():
    """Greedy completions of two problems, samples of one of them."""
    answers = [make(i, RIGHT, temperature=0.0) for i in (1, 2)] + [
        make(1, WRONG, sample=i, temperature=1) for i in (0, 1)
    ]
    figures = figures_of(answers)
    assert (figures.items, figures.samples_per_item) == (2, 2)
    assert figures.estimates["answer"].mean == 1
    assert figures.estimates["mean@2"].mean == 0


def test_greedy_completions_that_differ_are_samples():
    figures = figures_of([make(1, text, sample=i, temperature=0.0) for i, text in enumerate([RIGHT, WRONG])])
    assert figures.samples_per_item == 2
    assert figures.estimates["pass@2"].mean == 1


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([], "no answers"),
        ([make(1, RIGHT), make(1, WRONG)], "twice"),
        ([make(1, RIGHT, temperature=0.5), make(1, RIGHT, temperature=1.0)], r"several temperatures \(0.5, 1\)"),
        ([make(1, RIGHT), make(2, RIGHT, temperature=1.0)], "several temperatures"),
    ],
)
def test_what_cannot_be_counted(answers, message):
    with pytest.raises(ValueError, match=message):
        figures_of(answers)


def test_files_and_trackers(sampled):
    figures = figures_of(sampled)
    content = figures.to_dict()
    assert Figures.from_dict(json.loads(json.dumps(content))) == figures
    assert content["items"] == 40
    assert set(content["strict"]) == {"mean", "low", "high"}
    logs = figures.to_logs()
    assert set(logs) == {
        f"eval_{name}"
        for name in (
            *CONVENTIONS,
            *("format", "truncated", "tokens", "mean@5", "pass@1", "pass@2", "pass@4", "pass@5"),
            *("maj@2", "maj@4", "maj@5", "never_right", "always_right", "strict_mean@5"),
        )
    }
    assert logs["eval_pass@4"] == figures.estimates["pass@4"].mean
    assert all(type(value) is float for value in logs.values())


def test_table(sampled):
    greedy = [answer for answer in sampled if answer.temperature == 0]
    for width in (80, 120):
        console = Console(width=width, record=True, file=io.StringIO())
        console.print(table_of({"before": figures_of(greedy), "after": figures_of(sampled)}))
        text = console.export_text()
        assert "…" not in text
        rows = {line.split()[1]: line for line in text.splitlines() if line.startswith("│")}
        assert "100.0" in rows["strict"]
        assert "91.2 to 100.0" in rows["strict"]  # Wilson's bound for 40 of 40
        assert list(rows)[:4] == list(CONVENTIONS)
        assert "pass@4" in rows
        assert "3.0" in rows["tokens"]
