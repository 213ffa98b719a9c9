"""Every reward, with every option, on anything: no exception, finite or `None`, and the same whatever is around it."""

import inspect
import math
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import COMPLETION, FACTORIES, OPTIONS, REFERENCE, TEXT, made_rewards

from trl_grpo_ext.evaluation import grade
from trl_grpo_ext.rewards import (
    ANSWER_EXTRACTORS,
    completion_to_text,
    get_answer_extractor,
    is_reference_number,
    numerically_equal,
    parse_answer_number,
    parse_number,
    parse_plain_number,
    reference_to_text,
)


CORPUS = Path(__file__).parent / "corpus"
SCRIPT = Path(__file__).parents[1] / "scripts" / "fuzz_rewards.py"


def scores_of(reward, completions, answers):
    return reward(prompts=[None] * len(completions), completions=completions, answer=answers)


def check(rewards, completions, answers):
    for reward in rewards:
        scores = scores_of(reward, completions, answers)
        assert len(scores) == len(completions)
        assert all(score is None or math.isfinite(score) for score in scores)
        alone = [scores_of(reward, [completions[row]], [answers[row]])[0] for row in range(len(completions))]
        assert alone == scores
        assert scores_of(pickle.loads(pickle.dumps(reward)), completions, answers) == scores


def check_texts(text, reference):
    for name in ANSWER_EXTRACTORS:
        answer = get_answer_extractor(name)(text)
        assert answer is None or answer in text
    for number in (parse_number(text), parse_answer_number(text), parse_plain_number(text)):
        assert number is None or number == number
    assert numerically_equal(text, text) in (True, False)
    right = reference_to_text(reference)
    if right is not None:
        assert is_reference_number(right, right) in (True, False)
        assert set(grade(text, reference).correct.values()) <= {True, False}
        if right.isalnum():
            assert grade(f"<answer>{right}</answer>", right).correct["strict"]


@pytest.mark.parametrize("name", FACTORIES)
def test_every_option_is_drawn(name):
    assert set(inspect.signature(FACTORIES[name]).parameters) <= OPTIONS.keys()


@pytest.mark.parametrize("name", FACTORIES)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_rewards(name, data):
    rows = data.draw(st.lists(st.tuples(COMPLETION, REFERENCE), max_size=3))
    check(data.draw(made_rewards(name)), [row[0] for row in rows], [row[1] for row in rows])


@pytest.mark.slow
@pytest.mark.parametrize("name", FACTORIES)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_rewards_at_length(name, data):
    rows = data.draw(st.lists(st.tuples(COMPLETION, REFERENCE), max_size=3))
    check(data.draw(made_rewards(name)), [row[0] for row in rows], [row[1] for row in rows])


@settings(max_examples=60, deadline=None)
@given(TEXT, COMPLETION, REFERENCE)
def test_texts(text, completion, reference):
    assert isinstance(completion_to_text(completion), str)
    check_texts(text, reference)


@pytest.mark.parametrize("file", sorted(CORPUS.glob("*")), ids=lambda file: file.name)
def test_what_was_found(file):
    """Texts on which something has failed once, and where the search for more begins."""
    text = file.read_bytes().decode("utf-8", "surrogateescape")
    check_texts(text, text)
    for name in FACTORIES:
        made = FACTORIES[name]()
        check(made if isinstance(made, list) else [made], [text, f"<answer>{text}</answer>"], ["12", text])


@pytest.mark.slow
def test_generated_completions():
    """A short run of what `scripts/fuzz_rewards.py --generated 100000` does."""
    run = subprocess.run(
        [sys.executable, SCRIPT, "--generated", "500"], capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "correctness_reward_func" in run.stdout
