"""A guarded function: what it fails on is `None`, the rest is scored, and nothing hangs."""

import asyncio
import math
import pickle
import threading
import time

import guarded_rewards
import numpy
import pytest

from trl_grpo_ext.rewards import RewardBundle, RewardFailure, correctness_reward_func, gsm8k_bundle, guard
from trl_grpo_ext.rewards.score import score


def scores_of(reward_func, completions, **columns):
    return reward_func(prompts=[f"prompt {text}" for text in completions], completions=completions, **columns)


def of_values(*values):
    """A reward that returns what it is given as a column."""

    def reward(completions, value, **columns):
        return value

    return guard(reward, max_failure_rate=None)(completions=["x"] * len(values), value=list(values))


def test_what_is_a_score():
    class NoFloat:
        def __float__(self):
            raise RuntimeError

    scores = of_values(
        1, 0.5, None, True, numpy.float32(2), numpy.array(3), math.nan, math.inf, "4", b"5", [6], NoFloat()
    )
    assert scores == [1.0, 0.5, None, 1.0, 2.0, 3.0, None, None, None, None, None, None]


@pytest.mark.parametrize("bad", [[], [0], [7], [2, 3], [0, 3, 7], [0, 1, 2, 3, 4, 5, 6]])
def test_only_those_that_fail_are_not_scored(bad):
    completions = ["raise" if row in bad else "x" * (row + 1) for row in range(8)]
    scores = scores_of(guard(guarded_rewards.by_text, max_failure_rate=None), completions)
    assert scores == [None if row in bad else float(row + 1) for row in range(8)]


def test_a_function_that_always_fails_is_not_called_for_each():
    calls = []

    def reward(completions, **columns):
        calls.append(len(completions))
        raise ConnectionError("down")

    assert scores_of(guard(reward, max_failure_rate=None), ["x"] * 64) == [None] * 64
    assert len(calls) < 20


@pytest.mark.parametrize("returned", [[], [1.0] * 3, None, 5.0, iter([1.0] * 3)])
def test_a_wrong_length_is_no_score(returned):
    assert scores_of(guard(lambda completions, **columns: returned, max_failure_rate=None), ["a", "b"]) == [None] * 2


def test_raising_names_function_row_and_prompt():
    guarded = guard(guarded_rewards.by_text, on_error="raise")
    assert scores_of(guarded, ["a", "bb"]) == [1.0, 2.0]
    with pytest.raises(RewardFailure, match=r"by_text.*row 2.*prompt raise.*no such thing") as caught:
        scores_of(guarded, ["a", "bb", "raise"])
    assert "\n" not in str(caught.value)


def test_a_function_that_fails_too_often_ends_the_run():
    guarded = guard(guarded_rewards.by_text, max_failure_rate=0.25)
    for _ in range(8):
        assert scores_of(guarded, ["a", "b", "c", "d"]) == [1.0] * 4
    for _ in range(2):  # 8 of 40 is not above a quarter
        assert scores_of(guarded, ["raise"] * 4) == [None] * 4
    with pytest.raises(RewardFailure, match=r"by_text has failed on 27% of the last 44.*no such thing"):
        scores_of(guarded, ["raise"] * 4)


def test_logs_are_written_once_and_whole():
    guarded = guard(guarded_rewards.with_logs, max_failure_rate=None)
    columns, metrics = {}, {}
    points = [1.0, -1.0, 3.0, 4.0]
    found = scores_of(
        guarded, ["a", "bb", "ccc", "d"], points=points, log_extra=columns.__setitem__, log_metric=metrics.__setitem__
    )
    assert found == [1.0, None, 3.0, 4.0]
    assert columns == {"length": [1, None, 3, 1]}
    assert metrics == {"points": pytest.approx((1 + 3 + 4) / 3), "rewards/unscored": 0.25}


def test_a_call_that_runs_over():
    """In a thread: nobody waits for it any more, and the number of those is bounded."""
    going_on = threading.Event()
    called = []

    def reward(completions, **columns):
        called.append(completions)
        if "wait" in completions:
            going_on.wait()
        return [1.0] * len(completions)

    guarded = guard(reward, timeout_s=0.1, max_failure_rate=None)
    started = time.monotonic()
    assert scores_of(guarded, ["a", "wait"]) == [1.0, None]
    for _ in range(10):
        assert scores_of(guarded, ["wait"]) == [None]
    assert time.monotonic() - started < 3.0
    assert len([texts for texts in called if "wait" in texts]) == 4
    going_on.set()
    for thread in guarded._abandoned:
        thread.join(5.0)
    assert scores_of(guarded, ["a"]) == [1.0]


def run(coroutine):
    return asyncio.run(coroutine)


def test_asynchronous_functions():
    cancelled = []

    async def reward(completions, **columns):
        if "raise" in completions:
            raise ConnectionError
        if "wait" in completions:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                cancelled.append(completions)
                raise
        if "deaf" in completions:
            end = time.monotonic() + 0.5
            while time.monotonic() < end:
                try:
                    await asyncio.sleep(0.01)
                except asyncio.CancelledError:
                    continue
        return [1.0] * len(completions)

    guarded = guard(reward, timeout_s=0.1, max_failure_rate=None)
    assert run(scores_of(guarded, ["a", "raise", "b", "wait"])) == [1.0, None, 1.0, None]
    assert cancelled == [["b", "wait"], ["wait"]]
    assert run(scores_of(guarded, ["deaf"])) == [None]
    assert score([guarded], [{"completion": "a"}]).total == [1.0]


def test_a_coroutine_of_a_plain_function():
    async def later(completions):
        return [2.0] * len(completions)

    assert scores_of(guard(lambda completions, **columns: later(completions)), ["a"]) == [2.0]


@pytest.mark.slow
def test_isolated():
    guarded = guard(guarded_rewards.by_text, timeout_s=1.0, isolate=True, memory_limit_mb=256, max_failure_rate=None)
    for text in ("hang", "wait", "exit", "memory", "raise"):
        assert scores_of(guarded, ["a", text]) == [1.0, None], text
    assert scores_of(guarded, ["a", object()]) == [1.0, None]
    logged = {}
    isolated = guard(guarded_rewards.with_logs, isolate=True)
    assert scores_of(isolated, ["a"], points=[2.0], log_extra=logged.__setitem__, log_metric=logged.__setitem__) == [
        2.0
    ]
    assert logged == {"length": [1], "points": 2.0, "rewards/unscored": 0.0}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"timeout_s": 0}, "timeout_s"),
        ({"timeout_s": True}, "timeout_s"),
        ({"on_error": "zero"}, "on_error"),
        ({"max_failure_rate": 2}, "max_failure_rate"),
    ],
)
def test_bad_options_are_refused(options, named):
    with pytest.raises(ValueError, match=named):
        guard(guarded_rewards.by_text, **options)


def test_what_is_no_function_and_what_cannot_be_isolated():
    with pytest.raises(TypeError, match="reward_func"):
        guard("some/model")
    for function in (lambda completions, **columns: [], test_isolated.__call__):
        with pytest.raises(ValueError, match="module of its own"):
            guard(function, isolate=True)


def test_in_bundles():
    def mine(completions, **columns):
        return [1.0] * len(completions)

    bundle = RewardBundle([guarded_rewards.by_text, correctness_reward_func, "some/model"], [1, 2, 3], guard=True)
    assert bundle.names == ["by_text", "correctness_reward_func", "model"]
    assert bundle[1] is correctness_reward_func
    assert bundle[2] == "some/model"
    assert scores_of(bundle[0], ["raise", "abc"]) == [None, 3.0]
    for other in (pickle.loads(pickle.dumps(bundle)), bundle.copy(), bundle.select(*bundle.names), bundle + []):
        assert other == bundle
        assert scores_of(other[0], ["raise", "abc"]) == [None, 3.0]
    with_options = RewardBundle([mine], guard={"on_error": "raise"})
    assert with_options[0].on_error == "raise"
    assert guard(with_options[0]) is with_options[0]
    assert (gsm8k_bundle() + with_options).names[-1] == "mine"
    assert RewardBundle([mine], guard=False)[0] is mine
    with pytest.raises(TypeError, match="guard"):
        RewardBundle([mine], guard=5)
    with pytest.raises(TypeError, match="timeout"):
        RewardBundle([mine], guard={"timeout": 5})


def test_what_the_function_has_is_there():
    def mine(completions, **columns):
        return []

    mine.full_marks = 3.0
    guarded = guard(mine, name="yours")
    assert (guarded.__name__, guarded.full_marks, guarded.reward_func) == ("yours", 3.0, mine)
