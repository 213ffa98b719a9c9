"""The doctor's rules over made-up records: each fires where it should, and is silent where little is missing."""

import json
import math
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from records import REWARDS, made_up_events, made_up_run

from trl_grpo_ext.report.doctor import HINT, PROBLEM, RULES, diagnose, doctor_markdown, doctor_table, holding
from trl_grpo_ext.report.generations import (
    GenerationStatistics,
    RewardAbout,
    RewardStatistics,
    generation_statistics,
)
from trl_grpo_ext.report.record import FindingEvent, Generation, Log, Run, Sample, Step
from trl_grpo_ext.report.watch import LOOKS_TO_WITHDRAW, Watch
from trl_grpo_ext.report.windows import LOOK_BACK, thinned


GUIDE = Path(__file__).resolve().parent.parent / "recipes" / "guides" / "doctor.md"
CORRECTNESS, FORMAT = REWARDS
GROUPS = SIZE = 8


def scores(
    right: int = 4, tags: int = 6, silent: int = 0, silent_right: bool = False, silent_tags: bool = True
) -> dict[str, list[float | None]]:
    """Scores of 8 groups of 8: the first `silent` of them all alike, of the others so many right and with tags."""
    places = [(group, row) for group in range(GROUPS) for row in range(SIZE)]
    return {
        CORRECTNESS.name: [2.0 * (silent_right if group < silent else row < right) for group, row in places],
        FORMAT.name: [0.5 * (silent_tags if group < silent else row < tags) for group, row in places],
    }


def run_of(
    scores_of: Callable[[float], dict[str, Any]] | dict[str, Any] | None = None,
    *,
    steps: int = 40,
    metrics: dict[str, Any] | None = None,
    logs: dict[str, Any] | None = None,
    seconds: dict[str, float] | None = None,
    rewards: list[RewardAbout] = REWARDS,
    about: dict[str, Any] | None = None,
    **settings: Any,
) -> Run:
    """The healthy run with some of it replaced; what is a function is one of how much of the run is done, 0 to 1."""

    def at(value: Any, step: int) -> Any:
        return value(step / steps) if callable(value) else value

    events = made_up_events(steps, **settings)
    for event in events:
        if event["event"] == "begin":
            event["about"] |= {"rewards": [vars(reward) for reward in rewards], **(about or {})}
        elif event["event"] == "generation" and scores_of is not None:
            found = at(scores_of, event["step"])
            event["statistics"] = generation_statistics(found, rewards, SIZE).to_dict()
        elif event["event"] == "step":
            event["metrics"] |= {name: at(value, event["step"]) for name, value in (metrics or {}).items()}
            event["seconds"] |= seconds or {}
        elif event["event"] == "log":
            event["logs"] |= {name: at(value, event["step"]) for name, value in (logs or {}).items()}
    return made_up_run(events)


def with_reward(values: Callable[[float], Any], **about: Any) -> Run:
    """A run with one more reward, which gives the first completion of each group a score and the others another."""
    rewards = [*REWARDS, RewardAbout(**{"name": "quality", "weight": 1.0, "kind": "other", **about})]

    def all_scores(done: float) -> dict[str, Any]:
        first, others = values(done)
        return {**scores(), "quality": [others if place % SIZE else first for place in range(GROUPS * SIZE)]}

    return run_of(all_scores, rewards=rewards)


def unscored(rows: range) -> dict[str, Any]:
    found = scores()
    graded = [None if row in rows else score for row, score in enumerate(found[CORRECTNESS.name])]
    return {**found, CORRECTNESS.name: graded}


def format_alone(silent: int, value: float | None) -> Run:
    """A run with no reward for correctness: groups in which all have that score."""
    found = [value if row < silent * SIZE else 0.5 * (row % 2) for row in range(GROUPS * SIZE)]
    return run_of({FORMAT.name: found}, rewards=[FORMAT])


def weighted(weight: float) -> Run:
    return run_of(scores(right=4, tags=4), rewards=[CORRECTNESS, replace(FORMAT, weight=weight)])


def from_to(before: float, after: float, at: float = 0.4) -> Callable[[float], float]:
    return lambda done: before if done < at else after


def learned(silent: int) -> Run:
    return run_of(lambda done: scores(right=1) if done < 0.4 else scores(silent=silent, silent_right=True), steps=80)


@dataclass(frozen=True)
class Case:
    """What makes a rule fire, what makes it say, and what is nearly the same and well."""

    sick: Callable[[], Run]
    well: Callable[[], Run]
    says: tuple[str, ...]


CASES = {
    "truncated-completions": Case(
        lambda: run_of(metrics={"completions/clipped_ratio": 0.6}, steps=5, max_completion_length=256),
        lambda: run_of(metrics={"completions/clipped_ratio": 0.4}, steps=5, max_completion_length=256),
        ("60% of the last", "max_completion_length=256", "mask_truncated_completions=False"),
    ),
    "unscored-references": Case(
        lambda: run_of(unscored(range(0, 64, 8))), lambda: run_of(unscored(range(0, 64, 16))), ("12%",)
    ),
    "reward-not-finite": Case(
        lambda: with_reward(lambda done: (math.inf if done > 0.9 else 1.0, 0.0)),
        lambda: with_reward(lambda done: (math.inf if done < 0.5 else 1.0, 0.0)),
        ("quality", "8 of the last 256"),
    ),
    "reward-without-scores": Case(
        lambda: with_reward(lambda done: (None, None)), lambda: with_reward(lambda done: (1.0, None)), ("quality",)
    ),
    "no-format": Case(
        lambda: run_of(scores(right=0, tags=0)), lambda: run_of(scores(right=0, tags=1)), ("192", "0.0%")
    ),
    "never-right": Case(
        lambda: run_of(scores(right=0)),
        lambda: run_of(lambda done: scores(right=0 if done < 0.95 else 1)),
        ("320", "'14'", "75% of full marks"),
    ),
    "groups-unscored": Case(lambda: format_alone(6, None), lambda: format_alone(5, None), ("36 of the last 48",)),
    "groups-without-format": Case(
        lambda: run_of(scores(silent=6, silent_tags=False)),
        lambda: run_of(scores(silent=5, silent_tags=False)),
        ("36 of the last 48",),
    ),
    "groups-all-wrong": Case(
        lambda: run_of(scores(silent=6)), lambda: run_of(scores(silent=5)), ("36 of the last 48",)
    ),
    "groups-all-right": Case(
        lambda: run_of(scores(silent=6, silent_right=True)), lambda: learned(silent=6), ("36 of the last 48",)
    ),
    "groups-all-equal": Case(lambda: format_alone(6, 0.5), lambda: format_alone(5, 0.5), ("36 of the last 48",)),
    "constant-reward": Case(
        lambda: with_reward(lambda done: (0.3, 0.3)),
        lambda: with_reward(lambda done: (0.3, 0.3 if done else 0.2)),
        ("quality gave 0.3", "256"),
    ),
    "dominant-reward": Case(lambda: weighted(100), lambda: weighted(60), ("soft_format_reward_func", "86%", "50%")),
    "learning-rate-zero": Case(
        lambda: run_of(metrics={"learning_rate": 0.0}, learning_rate=0.0),
        lambda: run_of(metrics={"learning_rate": lambda done: 0.0 if done < 0.04 or done > 0.96 else 1e-5}),
        ("steps 38 to 40", "learning_rate=0"),
    ),
    "learning-rate-too-high": Case(
        lambda: run_of(
            lambda done: scores(right=4 if done < 0.4 else 1),
            metrics={"iteration/2/approx_kl": 0.1},
            steps=10,
            learning_rate=1e-2,
        ),
        lambda: run_of(
            lambda done: scores(right=4 if done < 0.4 else 3),
            metrics={"iteration/2/approx_kl": 0.1},
            steps=10,
            learning_rate=1e-2,
        ),
        ("from 50% to 12%", "learning_rate=0.01"),
    ),
    "no-gradient": Case(
        lambda: run_of(logs={"grad_norm": 0.0}),
        lambda: run_of(logs={"grad_norm": lambda done: 0.0 if done > 0.9 else 0.1}),
        ("from step 36 to 40",),
    ),
    "kl-to-reference": Case(
        lambda: run_of(scores(right=2), metrics={"kl": 0.6}, beta=0.04),
        lambda: run_of(scores(right=2), metrics={"kl": 0.4}, beta=0.04),
        ("0.6 nats",),
    ),
    "old-rollouts": Case(
        lambda: run_of(metrics={"iteration/8/approx_kl": 0.06}, num_iterations=8),
        lambda: run_of(metrics={"iteration/7/approx_kl": 0.06}, num_iterations=7),
        ("8 optimizer steps", "0.06 nats"),
    ),
    "kl-of-passes": Case(
        lambda: run_of(metrics={"iteration/2/approx_kl": 0.03}),
        lambda: run_of(metrics={"iteration/2/approx_kl": 0.02}),
        ("pass 2", "0.03 nats", "num_iterations=2"),
    ),
    "clip-binds-mostly": Case(
        lambda: run_of(metrics={"iteration/2/clip_ratio": 0.6}),
        lambda: run_of(metrics={"iteration/2/clip_ratio": 0.4}),
        ("pass 2", "60%"),
    ),
    "sampler-disagrees": Case(
        lambda: run_of(metrics={"sampling/importance_sampling_ratio/mean": 0.6}),
        lambda: run_of(metrics={"sampling/importance_sampling_ratio/mean": 0.8}),
        ("weight is 0.6",),
    ),
    "entropy-collapse": Case(
        lambda: run_of(scores(right=2), metrics={"entropy": from_to(0.6, 0.05)}),
        lambda: run_of(scores(right=2), metrics={"entropy": from_to(0.6, 0.07)}),
        ("from 0.6 to 0.05", "25%"),
    ),
    "format-without-correctness": Case(
        lambda: run_of(lambda done: scores(right=2, tags=2 if done < 0.4 else 6), steps=160),
        lambda: run_of(lambda done: scores(right=2 if done < 0.7 else 3, tags=2 if done < 0.4 else 6), steps=160),
        ("from 25% to 75%", "from 25% to 25%"),
    ),
    "length-without-correctness": Case(
        lambda: run_of(scores(right=2), metrics={"completions/mean_length": from_to(30, 60)}, steps=160),
        lambda: run_of(
            lambda done: scores(right=2 if done < 0.7 else 3),
            metrics={"completions/mean_length": from_to(30, 60)},
            steps=160,
        ),
        ("from 30 to 60 tokens", "25% to 25%"),
    ),
    "slow-rewards": Case(lambda: run_of(seconds={"rewards": 0.5}), lambda: run_of(seconds={"rewards": 0.3}), ("38%",)),
    "waiting-ranks": Case(
        lambda: run_of(metrics={"update/slowest_rank": 1.4}),
        lambda: run_of(metrics={"update/slowest_rank": 1.2}),
        ("1.40 times",),
    ),
    "data-too-easy": Case(lambda: learned(silent=6), lambda: learned(silent=5), ("48 of the last 64",)),
    "nothing-changes": Case(
        lambda: run_of(scores(right=2), metrics={"iteration/2/approx_kl": 1e-6}, steps=60),
        lambda: run_of(scores(right=2), metrics={"iteration/2/approx_kl": 1e-4}, steps=60),
        ("25% to 25%", "1e-06 nats", "learning_rate=1e-05"),
    ),
    "clip-never-binds": Case(
        lambda: run_of(metrics={"iteration/2/clip_ratio": 0.0}),
        lambda: run_of(metrics={"iteration/2/clip_ratio": lambda done: 0.001 if done > 0.9 else 0.0}),
        ("pass 2",),
    ),
    "learning-rate-small": Case(
        lambda: run_of(learning_rate=1e-9), lambda: run_of(learning_rate=1e-7), ("learning_rate=1e-09",)
    ),
    "gpu-waits": Case(
        lambda: run_of(metrics={"gpu/utilization": 0.4}), lambda: run_of(metrics={"gpu/utilization": 0.6}), ("40%",)
    ),
    "slow-generation": Case(
        lambda: run_of(seconds={"generation": 3.0}, about={"device": "cuda"}),
        lambda: run_of(seconds={"generation": 3.0}, about={"device": "cuda"}, use_vllm=True),
        ("85%",),
    ),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_rule_fires_where_it_should_and_nowhere_near(rule):
    case = CASES[rule.name]
    found = {finding.rule: finding for finding in diagnose(case.sick())}
    assert rule.name in found, list(found)
    finding = found[rule.name]
    for words in case.says:
        assert words in finding.evidence
    assert (finding.severity, finding.threshold) == (rule.severity, rule.threshold)
    assert finding.step >= 1
    assert "\n" not in finding.message
    assert rule.name not in holding(case.well())


def test_each_rule_has_a_case_and_a_name_of_its_own():
    names = [rule.name for rule in RULES]
    assert sorted(names) == sorted(CASES)
    assert len(set(names)) == len(names)
    assert {name for rule in RULES for name in rule.explained_by} <= set(names)


@pytest.mark.parametrize("seed", range(20))
def test_a_healthy_run_is_silent_all_the_time(seed):
    watch, run, said = Watch(), Run(), []
    for event in made_up_events(40, seed=seed):
        run.add(json.loads(json.dumps(event)))
        if event["event"] == "step":
            said += watch.look(run)
    assert said == []
    assert diagnose(run) == []


# What single rules have besides


def test_the_settings_of_a_quickstart_whose_model_thinks_are_named_by_step_five():
    """TRL's issue 5697: 8 completions a generation, one pass, all of them cut off at the default length, rewards 0."""
    reward = RewardAbout("accuracy_reward", 1.0, "correctness")
    settings = {"num_iterations": 1, "num_generations": 8, "max_completion_length": 256}
    events = made_up_events(5, groups=1, **settings)
    for event in events:
        if event["event"] == "begin":
            event["about"]["rewards"] = [vars(reward)]
        elif event["event"] == "generation":
            statistics = generation_statistics({reward.name: [0.0] * 8}, [reward], 8)
            event.update(statistics=statistics.to_dict(), samples=[])
        elif event["event"] == "step":
            event["metrics"] = {"completions/clipped_ratio": 1.0, "completions/mean_length": 256.0}
        elif event["event"] == "log":
            event["logs"] = {"loss": 0.0, "grad_norm": 0.0}
    run, watch, said = Run(), Watch(), []
    for event in events:
        run.add(json.loads(json.dumps(event)))
        said += watch.look(run) if event["event"] == "log" else []
    assert [(event["rule"], event["holds"]) for event in said] == [("truncated-completions", True)]
    assert "max_completion_length=256" in said[0]["message"]
    assert said[0]["step"] <= 5
    assert [finding.rule for finding in diagnose(run)] == ["truncated-completions"]  # and nothing that follows from it


def test_a_run_that_is_thinned_out_keeps_its_beginning():
    """Rules compare it with the end, however long the run is."""
    steps, longest = [], 0
    for number in range(1, 20_001):
        steps = thinned([*steps, Step(number, float(number), {}, {})], 5 * LOOK_BACK)
        longest = max(longest, len(steps))
    kept = [step.step for step in steps]
    assert longest <= 5 * LOOK_BACK
    assert kept[:LOOK_BACK] == list(range(1, LOOK_BACK + 1))
    assert kept[-LOOK_BACK:] == list(range(20_001 - LOOK_BACK, 20_001))
    # of the rest so many that no part of it is missing
    assert max(later - earlier for earlier, later in pairwise(kept)) < 1000


def test_a_run_that_is_read_from_a_long_record_is_thinned_out_at_once():
    steps = [Step(number, float(number), {}, {}) for number in range(1, 20_001)]
    assert 2 * LOOK_BACK < len(thinned(steps, 5 * LOOK_BACK)) <= 5 * LOOK_BACK // 2
    assert thinned(steps[:1000], 5 * LOOK_BACK) == steps[:1000]


def test_truncation_with_the_cut_ones_masked_says_what_that_does():
    run = run_of(metrics={"completions/clipped_ratio": 1.0}, mask_truncated_completions=True)
    assert "mask_truncated_completions=True they carry no gradient" in diagnose(run)[0].evidence


def test_the_format_that_is_lost_is_a_rate_too_high_as_well():
    run = run_of(lambda done: scores(tags=8 if done < 0.4 else 3), steps=40)
    assert "the format fell from 100% to 38%" in diagnose(run)[0].evidence


def test_length_that_costs_right_answers_is_named_sooner_and_explains_their_loss():
    run = run_of(
        lambda done: scores(right=4 if done < 0.4 else 0),
        metrics={"completions/mean_length": from_to(30, 60)},
        steps=32,
    )
    assert "learning-rate-too-high" in holding(run)
    found = [finding.rule for finding in diagnose(run)]
    assert "length-without-correctness" in found
    assert "learning-rate-too-high" not in found


def test_an_unscored_reference_is_shown():
    run = run_of(unscored(range(64)))
    unscored_samples = [replace(sample, rewards={}) for sample in run.generations[-1].samples]
    run.generations[-1] = replace(run.generations[-1], samples=tuple(unscored_samples))
    assert "the reference '14'" in holding(run)["unscored-references"].evidence


def test_a_policy_that_stays_as_it_is_does_not_get_worse():
    """Right answers of a prompt come together: in few groups their share goes up and down by itself."""
    for seed in range(5):
        numbers = random.Random(seed)
        run, watch, said = Run(about=made_up_events(1)[0]["about"]), Watch(), []
        for step in range(1, 151):
            chance = numbers.betavariate(0.3, 1.2)  # of the one prompt of a generation; 20 % in the mean
            right = {CORRECTNESS.name: [2.0 * (numbers.random() < chance) for _ in range(SIZE)]}
            run.generations.append(Generation(step - 1, generation_statistics(right, [CORRECTNESS], SIZE)))
            run.steps.append(Step(step, 0.0, {}, {}))
            said += watch.look(run)
        assert [event["rule"] for event in said if event["rule"] == "learning-rate-too-high"] == []


@pytest.mark.parametrize("seed", range(3))
def test_a_large_model_that_learns_slowly_has_no_problem(seed):
    """8 completions of 4 prompts a step: problems easy and hard, and shares that go up and down by much.

    The format is learned first and makes the advantage until then, entropy falls, completions grow, the KL to the
    reference becomes large, a penalty is never called for, and all the while a few more are right.
    """
    numbers = random.Random(seed)
    rewards = [RewardAbout(f"{kind}_reward", 1.0, kind) for kind in ("correctness", "format")]
    rewards.append(RewardAbout("overlong_penalty", 1.0, "other"))
    run, watch, said = Run(about={"rewards": [vars(reward) for reward in rewards], "settings": {}}), Watch(), []
    for step in range(1, 301):
        done = step / 300
        chances = [[numbers.betavariate(mean, 1 - mean) for _ in range(4)] for mean in (0.1 + 0.4 * done, 0.97 * done)]
        chances[1] = [min(1.0, 3 * done)] * 4
        found = {
            reward.name: [float(numbers.random() < chance) for chance in each for _ in range(SIZE)]
            for reward, each in zip(rewards, [*chances, [0.0] * 4], strict=True)
        }
        counted = generation_statistics(found, rewards, SIZE)
        run.generations.append(Generation(step - 1, counted))
        metrics = {
            "entropy": 1.5 * 0.09**done,
            "completions/mean_length": 200 * 2.5**done,
            "kl": 0.8 * done,
            "completions/clipped_ratio": 0.05,
            "learning_rate": 1e-6,
        }
        run.steps.append(Step(step, 0.0, metrics, {}))
        said += watch.look(run)
        run.logs.append(Log(step, {"grad_norm": 0.0 if counted.silent == counted.groups else 0.3}))
    assert [(event["step"], event["rule"]) for event in said if event["severity"] == PROBLEM] == []


def test_steps_whose_groups_are_all_silent_are_no_gradient_that_is_missing():
    """A group a step, most of them silent: five in a row have no gradient now and then, the sixth has one."""
    run = run_of(lambda done: scores(silent=8 if done < 0.9 else 0, silent_right=True), steps=20, num_iterations=1)
    run.logs = [Log(log.step, {"grad_norm": 0.0 if log.step <= 18 else 0.4}) for log in run.logs][:18]
    assert run.generations[-1].statistics.silent == 0
    assert "no-gradient" not in holding(run)


def test_a_problem_that_was_solved_once_is_not_never_solved():
    run = run_of(lambda done: scores(right=1 if done == 0 else 0))
    assert "never-right" not in holding(run)


def test_rewards_of_the_same_range_do_not_drown_correctness():
    """While the format is not learned it makes most of the advantage, and then no more."""
    same = [RewardAbout(f"{kind}_reward", 1.0, kind) for kind in ("correctness", "format")]
    found = {
        same[0].name: [float(row == 0 and group < 2) for group in range(GROUPS) for row in range(SIZE)],
        same[1].name: [float(row % 2) for row in range(GROUPS * SIZE)],
    }
    assert sum(found[same[0].name]) > 0
    assert "dominant-reward" not in holding(run_of(found, rewards=same))
    heavy = [same[0], replace(same[1], weight=3.0)]
    assert "dominant-reward" in holding(run_of(found, rewards=heavy))


def test_a_format_alone_that_is_learned_leaves_groups_equal_for_a_good_reason():
    def tags(done: float) -> dict[str, Any]:
        return {FORMAT.name: [0.5 if done > 0.4 else 0.5 * (row % 2) for row in range(GROUPS * SIZE)]}

    assert "groups-all-equal" not in holding(run_of(tags, rewards=[FORMAT], steps=80))


def test_a_policy_that_stands_still_is_named_after_its_schedule_has_ended():
    rate = {"learning_rate": lambda done: 2e-6 * (1 - done)}
    still = {"iteration/2/approx_kl": lambda done: 1e-6 * (1 - done), "iteration/2/clip_ratio": 0.0, **rate}
    assert [finding.rule for finding in diagnose(run_of(scores(right=2), metrics=still, steps=120))] == [
        "nothing-changes"
    ]
    assert "nothing-changes" not in holding(run_of(metrics=still, steps=120))  # for more and more is right


def test_rewards_for_some_rows_each_leave_none_unscored():
    """As TRL has it for several tasks in one data set: each function gives None for the rows of the others."""
    rewards = [CORRECTNESS, replace(CORRECTNESS, name="other_correctness")]
    half = [2.0 * (row % 2) if row < 32 else None for row in range(64)]
    found = {rewards[0].name: half, rewards[1].name: half[::-1]}
    assert "unscored-references" not in holding(run_of(found, rewards=rewards))
    found = {rewards[0].name: half, rewards[1].name: [None] * 64}
    assert "50%" in holding(run_of(found, rewards=rewards))["unscored-references"].evidence


def constant_reward(value: float, **about: Any) -> Run:
    reward = RewardAbout(**{"name": "quality", "weight": 1.0, "kind": "other", **about})
    found = {**scores(), reward.name: [value] * (GROUPS * SIZE)}
    return run_of(found, rewards=[*REWARDS, reward])


@pytest.mark.parametrize(
    ("value", "about", "severity"),
    [
        (0.3, {"weight": 0.0}, HINT),  # a metric
        (0.0, {"kind": "format"}, HINT),  # format that may come yet
        (0.5, {"kind": "format"}, PROBLEM),
        (0.5, {"kind": "format", "full_marks": 0.5}, None),  # what is wanted
        (1.0, {"kind": "format"}, None),  # by those who do not say so, such as TRL's think_format_reward
        (0.0, {"name": "overlong_penalty"}, None),  # which nothing deserves
        (0.0, {}, PROBLEM),
    ],
)
def test_a_constant_reward_is_not_always_a_problem(value, about, severity):
    found = holding(constant_reward(value, **about)).get("constant-reward")
    assert (found.severity if found else None) == severity


def test_all_rewards_without_scores_are_named():
    rewards = [CORRECTNESS, replace(FORMAT, name="one", weight=0.0), replace(FORMAT, name="other", weight=0.0)]
    nothing = [None] * (GROUPS * SIZE)
    run = run_of({CORRECTNESS.name: scores()[CORRECTNESS.name], "one": nothing, "other": nothing}, rewards=rewards)
    finding = holding(run)["reward-without-scores"]
    assert "one returned None" in finding.evidence
    assert "other returned None" in finding.evidence
    assert finding.severity == HINT  # metrics, both of them
    run.about["rewards"][2]["weight"] = 1.0
    assert holding(run)["reward-without-scores"].severity == PROBLEM


def test_who_asks_for_more_kl_gets_it_without_a_finding():
    assert "kl-of-passes" not in holding(run_of(metrics={"iteration/2/approx_kl": 0.03}, target_kl=0.04))


def test_log_probabilities_of_sampler_and_trainer_that_drift_apart():
    name = "sampling/sampling_logp_difference/mean"
    assert "sampler-disagrees" not in holding(run_of(metrics={name: 0.04}))
    assert "0.04 nats" in holding(run_of(metrics={name: from_to(0.01, 0.04)}))["sampler-disagrees"].evidence


def test_no_gradient_where_no_group_has_signal_has_that_for_a_reason():
    run = run_of(scores(silent=8, silent_right=True), logs={"grad_norm": 0.0})
    assert [finding.rule for finding in diagnose(run)] == ["groups-all-right"]
    assert "no-gradient" not in holding(run)


def test_a_schedule_that_ends_at_zero_is_no_reason_to_say_that_passes_change_nothing():
    run = run_of(metrics={"iteration/2/clip_ratio": 0.0, "learning_rate": lambda done: 1e-5 * (1 - done)})
    assert "clip-never-binds" not in holding(run)


def test_texts_are_quoted_in_one_short_line():
    hostile = "\x1b[2J</script>\n" + "\u202e" * 5000
    run = run_of(scores(right=0, tags=0))
    run.generations = [
        replace(generation, samples=tuple(replace(s, completion=hostile) for s in generation.samples))
        for generation in run.generations
    ]
    message = next(finding for finding in diagnose(run) if finding.rule == "no-format").message
    assert message.isprintable()
    assert len(message) < 1200


def test_names_of_rewards_do_not_break_the_line():
    message = holding(constant_reward(0.3, name="a\n\x1b[2J\u202eb"))["constant-reward"].message
    assert message.isprintable()
    assert "\\n" in message


def test_what_follows_from_something_else_is_left_out():
    run = run_of(scores(right=0, tags=0), metrics={"completions/clipped_ratio": 1.0})
    assert {"no-format", "groups-without-format"} < holding(run).keys()
    assert [finding.rule for finding in diagnose(run)] == ["truncated-completions"]


def test_problems_come_first_and_hold_since_they_were_found():
    run = run_of(metrics={"completions/clipped_ratio": 1.0, "gpu/utilization": 0.1})
    assert [finding.severity for finding in diagnose(run)] == [PROBLEM, HINT]
    assert diagnose(run)[0].step > 30
    run.findings.append(FindingEvent(3, "truncated-completions", True, ""))
    assert diagnose(run)[0].step == 3
    run.findings.append(FindingEvent(20, "truncated-completions", False, ""))
    assert diagnose(run)[0].step > 30


def test_old_steps_that_were_thinned_out_change_nothing():
    for name, case in CASES.items():
        run = case.sick()
        before = holding(run)
        del run.steps[1:10:2], run.logs[1:10:2]
        assert name in holding(run), name
        assert before[name].evidence == holding(run)[name].evidence


# During training


def looks(watch: Watch, run: Run, first: int, last: int) -> list[tuple[int, str, bool]]:
    """What is said after each of some steps, of a run that stays as it is."""
    said = []
    for step in range(first, last + 1):
        run.steps[-1] = replace(run.steps[-1], step=step)
        said += [(step, event["rule"], event["holds"], event["is_first"]) for event in watch.look(run)]
    return said


def test_a_finding_is_said_once_and_withdrawn_once():
    sick, well = CASES["kl-of-passes"].sick(), CASES["kl-of-passes"].well()
    watch = Watch()
    assert looks(watch, sick, 10, 12) == [(10, "kl-of-passes", True, True)]
    assert looks(watch, well, 13, 18) == [(12 + LOOKS_TO_WITHDRAW, "kl-of-passes", False, True)]
    assert looks(watch, sick, 19, 19) == [(19, "kl-of-passes", True, False)]  # in the record, and no warning
    assert looks(watch, well, 20, 60) == [(30, "kl-of-passes", False, False)]


def test_later_it_looks_at_every_tenth_step_and_at_the_last():
    sick = CASES["kl-of-passes"].sick()
    assert looks(Watch(), sick, 21, 29) == []
    assert looks(Watch(), sick, 21, 45) == [(30, "kl-of-passes", True, True)]
    sick.steps[-1] = replace(sick.steps[-1], step=33)
    assert [event["rule"] for event in Watch().look(sick, is_last=True)] == ["kl-of-passes"]


def test_a_near_miss_does_not_make_it_come_and_go():
    sick, well = CASES["kl-of-passes"].sick(), CASES["kl-of-passes"].well()
    watch = Watch()
    said = [looks(watch, sick if step % 2 else well, step, step) for step in range(1, 20)]
    assert [item for items in said for item in items] == [(1, "kl-of-passes", True, True)]


def test_what_is_found_a_cause_for_is_not_withdrawn():
    watch = Watch()
    assert looks(watch, run_of(scores(right=0)), 1, 1) == [(1, "never-right", True, True)]
    cut = run_of(scores(right=0), metrics={"completions/clipped_ratio": 1.0})
    assert looks(watch, cut, 2, 10) == [(2, "truncated-completions", True, True)]


def test_a_run_that_goes_on_is_not_told_again_what_it_was_told():
    run = CASES["kl-of-passes"].sick()
    run.findings.append(FindingEvent(9, "kl-of-passes", True, "said"))
    watch = Watch()
    assert looks(watch, run, 10, 20) == []
    well = CASES["kl-of-passes"].well()
    assert looks(watch, well, 30, 60) == [(40, "kl-of-passes", False, True)]


# Any record


METRICS = st.dictionaries(
    st.sampled_from(
        [
            *("completions/clipped_ratio", "completions/mean_length", "entropy", "kl", "learning_rate", "grad_norm"),
            *("iteration/1/approx_kl", "iteration/2/approx_kl", "iteration/2/clip_ratio", "gpu/utilization"),
            *("sampling/sampling_logp_difference/mean", "sampling/importance_sampling_ratio/mean"),
            "update/slowest_rank",
        ]
    ),
    st.floats(),
)
COUNTS = st.integers(0, 64)
MAYBE = st.none() | st.floats()
REWARD_STATISTICS = st.builds(
    RewardStatistics, *[MAYBE] * 4, unscored=COUNTS, infinite=COUNTS, groups_with_spread=COUNTS, advantage_share=MAYBE
)
SAMPLES = st.builds(
    Sample,
    step=COUNTS,
    prompt=st.text(max_size=5),
    completion=st.text(max_size=5),
    reference=st.none() | st.text(max_size=5),
    extracted=st.none() | st.text(max_size=5),
    rewards=st.dictionaries(st.sampled_from(["a", "b"]), MAYBE),
    advantage=MAYBE,
    tokens=st.none() | COUNTS,
    is_truncated=st.none() | st.booleans(),
    chars=COUNTS,
)
GENERATIONS = st.builds(
    Generation,
    COUNTS,
    st.builds(
        GenerationStatistics,
        *[COUNTS] * 7,
        right=MAYBE,
        formatted=MAYBE,
        rewards=st.dictionaries(st.sampled_from(["a", "b"]), REWARD_STATISTICS),
    ),
    st.lists(SAMPLES, max_size=2).map(tuple),
)
ABOUT = st.fixed_dictionaries(
    {},
    optional={
        "rewards": st.lists(
            st.fixed_dictionaries(
                {
                    "name": st.sampled_from(["a", "b"]),
                    "weight": st.sampled_from([0.0, 1.0]),
                    "kind": st.sampled_from(["correctness", "format", "other"]),
                    "full_marks": MAYBE,
                }
            )
        ),
        "settings": st.dictionaries(
            st.sampled_from(["num_iterations", "learning_rate", "steps_per_generation", "beta"]),
            st.none() | st.text(max_size=3) | st.floats() | st.integers() | st.booleans(),
        ),
        "device": st.none() | st.sampled_from(["cpu", "cuda"]),
    },
)
RUNS = st.builds(
    Run,
    about=ABOUT,
    steps=st.lists(
        st.builds(Step, COUNTS, st.floats(), METRICS, st.dictionaries(st.just("rewards"), st.floats(0, 10)))
    ).map(lambda items: items * 12),
    generations=st.lists(GENERATIONS, max_size=4).map(lambda items: items * 12),
    logs=st.lists(st.builds(Log, COUNTS, METRICS)).map(lambda items: items * 12),
    findings=st.lists(st.builds(FindingEvent, COUNTS, st.just("never-right"), st.booleans(), st.text(max_size=3))),
)


@given(RUNS)
@settings(max_examples=40)
def test_no_record_is_too_odd(run):
    for finding in diagnose(run):
        assert "\n" not in finding.message
    assert Watch().look(run, is_last=True) == Watch().look(run, is_last=True)


@pytest.mark.parametrize("steps", range(4))
def test_a_run_that_has_hardly_begun(steps):
    assert diagnose(Run()) == []
    assert diagnose(made_up_run(steps=steps)) == []


def test_the_guide_has_the_table_of_the_rules():
    assert doctor_markdown() in GUIDE.read_text(encoding="utf-8")
    assert [name for name, _, _ in doctor_table()] == [rule.name for rule in RULES]


def test_a_diagnosis_needs_no_torch():
    code = (
        "import sys, trl_grpo_ext.report.doctor, trl_grpo_ext.report.watch; "
        "sys.exit(', '.join({'torch', 'transformers', 'trl'} & set(sys.modules)) or 0)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (process.returncode, process.stderr.strip()) == (0, "")
