"""`record.jsonl` as it is read: whole, half written, gone on with, and what is none."""

import json

import numpy as np
import pytest
from records import REWARDS, made_up_events, made_up_run, write_record

from trl_grpo_ext.report.generations import RewardAbout, generation_statistics
from trl_grpo_ext.report.record import RECORD_FILE, RecordError, read_record, shortened, to_line
from trl_grpo_ext.rewards import gsm8k_bundle


def test_a_record_is_read_as_it_was_written(tmp_path):
    run = read_record(write_record(tmp_path / "run", steps=6))
    assert run.name == "run"
    assert [step.step for step in run.steps] == [1, 2, 3, 4, 5, 6]
    assert [generation.step for generation in run.generations] == [0, 2, 4]
    assert len(run.generations[0].samples) == 8
    assert run.rewards == REWARDS
    assert run.series("loss")[0] == (1, 0.0)
    assert run.series("entropy")[-1][0] == 6
    assert run.series("nothing") == []
    assert run.end["status"] == "finished"
    assert run.unreadable_lines == 0


def test_names_are_in_memory_once(tmp_path):
    """A long run has thousands of steps, all with the same names."""
    run = read_record(write_record(tmp_path / "run", steps=6))
    for first, second in (
        (run.steps[0].metrics, run.steps[1].metrics),
        (run.steps[0].seconds, run.steps[1].seconds),
        (run.logs[0].logs, run.logs[1].logs),
        (run.generations[0].statistics.rewards, run.generations[1].statistics.rewards),
    ):
        assert first
        assert {id(name) for name in first} == {id(name) for name in second}


def test_a_run_that_was_killed_in_the_middle_of_a_line(tmp_path):
    folder = write_record(tmp_path, made_up_events(steps=6)[:-1])
    whole = read_record(folder)
    file = folder / RECORD_FILE
    file.write_bytes(file.read_bytes()[:-25])
    run = read_record(file)
    assert run.unreadable_lines == 1
    assert run.steps == whole.steps
    assert len(run.logs) == len(whole.logs) - 1
    assert run.end is None
    with file.open("a") as lines:
        lines.write("\n")
        lines.writelines(map(to_line, [{**made_up_events(steps=1)[0], "step": 4}, *made_up_events(steps=6)[10:]]))
    assert read_record(file).unreadable_lines == 1


def test_what_lies_behind_the_step_that_a_run_goes_on_from_does_not_count():
    events = made_up_events(steps=6)
    behind = [event for event in events if event["event"] in ("step", "log") and event["step"] > 4]
    again = [{**events[0], "step": 4}, *[event for event in events if event["event"] == "generation"][-1:], *behind]
    run = made_up_run([*events, *again])
    assert [step.step for step in run.steps] == [1, 2, 3, 4, 5, 6]
    assert [log.step for log in run.logs] == [1, 2, 3, 4, 5, 6]
    assert [generation.step for generation in run.generations] == [0, 2, 4]
    assert run.begins == [(0, 1000.0), (4, 1000.0)]
    assert run.end is None


@pytest.mark.parametrize(
    "line", ["{}", "[]", "1", "null", '{"event": "step"}', '{"event": "step", "step": "x"}', "{", "\ufffd", "[" * 5000]
)
def test_lines_that_are_no_events_are_counted_and_passed_over(tmp_path, line):
    folder = write_record(tmp_path, steps=2)
    with (folder / RECORD_FILE).open("a") as file:
        file.write(line + "\n")
    assert read_record(folder).unreadable_lines == 1


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("generation", {"statistics": {"groups": "eight"}}),
        ("generation", {"statistics": {"right": [0.5]}}),
        ("generation", {"samples": [{"prompt": 1}]}),
        ("generation", {"samples": [{"rewards": {"correctness_reward_func": "much"}}]}),
        ("begin", {"about": {"rewards": [{"name": "a", "weight": "1", "kind": "other"}]}}),
        ("step", {"time": None}),
    ],
)
def test_values_of_other_types_are_no_events(tmp_path, kind, change):
    events = made_up_events(steps=2)
    event = next(event for event in events if event["event"] == kind)
    for name, value in change.items():
        if isinstance(value, dict):
            value = {**event[name], **value}
        elif isinstance(value, list):
            value = [{**event[name][0], **value[0]}]
        event = {**event, name: value}
    run = read_record(write_record(tmp_path, [*events, event]))
    assert run.unreadable_lines == 1
    assert len(run.steps) == 2


def test_folders_without_a_record_are_named(tmp_path):
    with pytest.raises(RecordError, match="has no record"):
        read_record(tmp_path)
    (tmp_path / RECORD_FILE).write_text("no record\n")
    with pytest.raises(RecordError, match="no record of a run"):
        read_record(tmp_path)


def test_numbers_that_json_has_not_and_texts_that_utf_8_has_not():
    line = to_line({"metrics": {"a": float("nan"), "b\ud800": float("inf")}, "text": "\ud800é", "list": (1, 2.5)})
    assert json.loads(line.encode()) == {"metrics": {"a": None, "b?": None}, "text": "?é", "list": [1, 2.5]}


def test_long_texts_keep_beginning_and_end():
    text = "a" * 100_000 + "b" * 100_000
    short = shortened(text)
    assert len(short) < 4_100
    assert short.startswith("aaa")
    assert short.endswith("bbb")
    assert "196,000" in short
    assert shortened("short") == "short"


def test_what_rewards_look_at():
    def accuracy_reward(completions, **kwargs):
        return []

    def brevity(completions, **kwargs):
        return []

    kinds = {about.name: about.kind for about in (RewardAbout.of(reward, 1.0) for reward in gsm8k_bundle())}
    assert kinds.pop("correctness_reward_func") == "correctness"
    assert set(kinds.values()) == {"format"}
    assert RewardAbout.of(accuracy_reward, 2).kind == "correctness"
    assert RewardAbout.of(brevity, 2) == RewardAbout("brevity", 2.0, "other", None)


def test_statistics_of_a_generation():
    scores = {
        #               learns          all right       all wrong       no tags
        "correctness": [2.0, 0.0, 2.0, 2.0, 0.0, 0.0, 0.0, 0.0],
        "format": [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.0, 0.0],
    }
    rewards = [RewardAbout("correctness", 4.0, "correctness", 2.0), RewardAbout("format", 1.0, "format", 0.5)]
    found = generation_statistics(scores, rewards, 2)
    assert (found.completions, found.groups, found.silent) == (8, 4, 3)
    assert (found.silent_right, found.silent_wrong, found.silent_wrong_without_format) == (1, 2, 1)
    assert found.right == 3 / 8
    assert found.formatted == 6 / 8
    assert found.rewards["correctness"].advantage_share == pytest.approx(1.0)
    assert found.rewards["format"].groups_with_spread == 0
    assert type(found).from_dict(json.loads(to_line(found.to_dict()))) == found


def test_shares_of_the_advantage_are_those_of_its_variance():
    numbers = np.random.default_rng(0)
    scores = {"a": numbers.normal(size=64).tolist(), "b": numbers.normal(size=64).tolist()}
    rewards = [RewardAbout("a", 3.0, "other"), RewardAbout("b", 1.0, "other")]
    shares = {name: found.advantage_share for name, found in generation_statistics(scores, rewards, 8).rewards.items()}
    assert sum(shares.values()) == pytest.approx(1.0)
    sums = 3 * np.array(scores["a"]) + np.array(scores["b"])
    within = (sums.reshape(8, 8) - sums.reshape(8, 8).mean(1, keepdims=True)).ravel()
    assert shares["a"] == pytest.approx((3 * np.array(scores["a"]) * within).sum() / (within**2).sum())


def test_completions_that_were_not_scored():
    nothing = [None] * 4
    rewards = [RewardAbout("correctness", 1.0, "correctness", 2.0), RewardAbout("b", 1.0, "other")]
    found = generation_statistics({"correctness": nothing, "b": [float("nan"), float("inf"), 1.0, 1.0]}, rewards, 2)
    assert found.rewards["correctness"].unscored == 4
    assert found.rewards["correctness"].mean is None
    assert (found.rewards["b"].unscored, found.rewards["b"].infinite, found.rewards["b"].mean) == (1, 1, 1.0)
    assert found.right is None
    assert found.formatted is None
    assert generation_statistics({"correctness": nothing, "b": nothing}, rewards, 2).silent_unscored == 2
    assert generation_statistics({}, [], 8).groups == 0


def test_rewards_that_are_normalized_before_they_are_summed():
    """TRL's `normalize_then_sum`: small and large scores weigh the same, and what cancels in the sum may not then."""
    rewards = [RewardAbout("large", 1.0, "other"), RewardAbout("small", 2.0, "other")]
    scores = {"large": [8.0, 0.0, 8.0, 0.0, 1.0, 1.0], "small": [0.0, 4.0, 0.1, None, 3.0, 3.0]}
    summed = generation_statistics(scores, rewards, 2)
    assert summed.silent == 2
    assert summed.rewards["large"].advantage_share > 0.9
    normalized = generation_statistics(scores, rewards, 2, normalizes_first=True)
    assert normalized.silent == 1  # the scores of the last group are equal
    # +-0.707 of the large one, and twice as much of the small one, against it: 0.707 is left; then the large one alone
    assert normalized.rewards["large"].advantage_share == pytest.approx((-0.5 + 0.5) / (0.5 + 0.5), abs=1e-3)
    assert normalized.rewards["small"].advantage_share == pytest.approx(1.0, abs=1e-3)
