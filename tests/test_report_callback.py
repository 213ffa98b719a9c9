"""What a trainer writes of its run, held against what was really sampled and scored; and that it changes nothing."""

import json
import math
import statistics
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from canned import (
    NUM_GENERATIONS,
    assert_same_weights,
    canned_config,
    canned_prompts,
    canned_reward,
    schedule_options,
    train_canned,
)
from launch import launcher, ran_on, run_canned
from tiny import save_tiny_policy, tiny_tokenizer
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_grpo_ext import GRPOExtConfig, GRPOExtTrainer, RunRecordCallback
from trl_grpo_ext.report import callback as module
from trl_grpo_ext.report import windows
from trl_grpo_ext.report.record import RECORD_FILE, read_record
from trl_grpo_ext.rewards.text import conversation_to_text
from trl_grpo_ext.runs import RunError


SCHEDULE = {**schedule_options(2, 2, 2), "max_steps": 4}


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_tiny_policy(tmp_path_factory.mktemp("policy"))


class RecordingTrainer(GRPOTrainer):
    """TRL's own trainer with the callback."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(RunRecordCallback(self, dataset_name="letters"))


class NotedReward:
    """`canned_reward`, which notes what it has scored and how."""

    __name__ = "canned_reward"

    def __init__(self) -> None:
        self.calls = []

    def __call__(self, prompts, completions, completion_ids, **kwargs):
        scores = canned_reward(prompts, completion_ids)
        self.calls.append((prompts, completions, completion_ids, scores))
        return scores


def train(folder, policy, trainer_class=GRPOExtTrainer, *, resume=None, reward=canned_reward, callbacks=(), **options):
    config_class = GRPOConfig if trainer_class is RecordingTrainer else GRPOExtConfig
    args = canned_config(folder, config_class, **{**SCHEDULE, **options})
    return train_canned(trainer_class, args, policy, resume=resume, reward=reward, callbacks=callbacks)


def events(folder):
    return [json.loads(line) for line in (folder / RECORD_FILE).read_text().splitlines()]


@pytest.mark.parametrize("trainer_class", [GRPOExtTrainer, RecordingTrainer])
def test_a_record_says_what_happened(policy, tmp_path, trainer_class):
    reward = NotedReward()
    done = train(tmp_path, policy, trainer_class, reward=reward, hub_token="hf_secret")
    found = read_record(tmp_path)
    assert found.begins[0][0] == 0
    assert found.end["status"] == "finished"
    assert found.unreadable_lines == 0

    assert [generation.step for generation in found.generations] == [0, 2]
    for generation, (prompts, completions, ids, scores) in zip(found.generations, reward.calls, strict=True):
        groups = [scores[i : i + NUM_GENERATIONS] for i in range(0, len(scores), NUM_GENERATIONS)]
        counted = generation.statistics
        assert (counted.completions, counted.groups) == (len(scores), len(groups))
        assert counted.silent == sum(len(set(group)) == 1 for group in groups)
        assert counted.rewards["canned_reward"].mean == pytest.approx(statistics.fmean(scores), rel=1e-5)
        assert counted.rewards["canned_reward"].std == pytest.approx(statistics.pstdev(scores), rel=1e-5)

        place = prompts.index(generation.samples[0].prompt)
        group = scores[place : place + NUM_GENERATIONS]
        deviation = statistics.stdev(group) + 1e-4
        for row, sample in enumerate(generation.samples):
            assert sample.completion == completions[place + row]
            assert sample.tokens == len(ids[place + row])
            assert sample.rewards == {"canned_reward": group[row]}
            assert sample.advantage == pytest.approx((group[row] - statistics.fmean(group)) / deviation, rel=1e-4)
        assert len(generation.samples) == NUM_GENERATIONS

    logged = [entry for entry in done.log if "loss" in entry]
    assert [step.step for step in found.steps] == [1, 2, 3, 4]
    for step, log, entry in zip(found.steps, found.logs, logged, strict=True):
        of_step = {**step.metrics, **log.logs}
        assert of_step == {name: pytest.approx(entry[name], rel=1e-4) for name in of_step}
        assert {*entry} - {"epoch", "step"} == {*of_step}
        assert set(step.seconds) == {"generation", "rewards", "update", "between"}
    assert [step.seconds["generation"] > 0 for step in found.steps] == [True, False, True, False]
    assert found.about["rewards"][0]["name"] == "canned_reward"
    assert found.about["dataset"]["rows"] == 64
    assert found.settings["learning_rate"] == 0.2
    assert found.about["fast_paths"]["generation"] == "rollout_func"
    text = (tmp_path / RECORD_FILE).read_text()
    assert "hf_secret" not in text
    assert str(Path.home()) + "/" not in text or Path.home() == Path("/")
    assert done.trainer.callback_handler  # and nothing stands before its methods any more
    assert not {"_generate", "_calculate_rewards", "_generate_and_score_completions"} & vars(done.trainer).keys()


def test_the_run_in_memory_is_the_one_in_the_file(policy, tmp_path):
    done = train(tmp_path, policy)
    (callback,) = [item for item in done.trainer.callback_handler.callbacks if isinstance(item, RunRecordCallback)]
    found = read_record(tmp_path)
    assert (callback.run.steps, callback.run.logs) == (found.steps, found.logs)
    assert callback.run.generations == found.generations


@pytest.mark.slow
def test_fast_paths_are_told(policy, tmp_path):
    train(tmp_path, policy, num_iterations=4)
    paths = read_record(tmp_path).about["fast_paths"]
    assert (paths["packed_rows"], paths["rows_left_out"]) == ("on", "on")
    assert paths["reuse_first_pass_logps"] == "on"
    train(tmp_path, policy, shared_prefix="off", skip_zero_advantage=False)
    paths = read_record(tmp_path).about["fast_paths"]
    assert paths["packed_rows"].startswith("off: ")
    assert paths["rows_left_out"] == "off"


def test_training_is_the_same_without(policy, tmp_path):
    recorded = train(tmp_path / "recorded", policy)
    without = train(tmp_path / "without", policy, record_run=False)
    assert_same_weights(recorded.weights, without.weights)
    assert (tmp_path / "recorded" / RECORD_FILE).exists()
    assert not (tmp_path / "without" / RECORD_FILE).exists()


@pytest.mark.slow
def test_of_two_callbacks_one_writes(policy, tmp_path):
    class Twice(GRPOExtTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.add_callback(RunRecordCallback(self, dataset_name="mine"))

    train(tmp_path, policy, Twice)
    assert [event["step"] for event in events(tmp_path) if event["event"] == "step"] == [1, 2, 3, 4]
    assert read_record(tmp_path).about["dataset"]["name"] == "mine"


def test_a_fresh_start_begins_a_new_file(policy, tmp_path):
    train(tmp_path, policy)
    train(tmp_path, policy, max_steps=2)
    found = read_record(tmp_path)
    assert (found.last_step, len(found.begins)) == (2, 1)


class Refuse(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        raise RunError("another run is here")


def test_a_run_that_is_refused_leaves_the_record_of_another(policy, tmp_path):
    train(tmp_path, policy)
    before = (tmp_path / RECORD_FILE).read_bytes()

    class Refused(GRPOExtTrainer):
        def train(self, *args, **kwargs):
            self.add_callback(Refuse())  # behind the record's
            return super().train(*args, **kwargs)

    with pytest.raises(RunError):
        train(tmp_path, policy, Refused)
    assert (tmp_path / RECORD_FILE).read_bytes() == before


def test_a_run_that_was_killed_in_a_line_goes_on(policy, tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    train(straight, policy)
    train(killed, policy, max_steps=3, save_strategy="steps", save_steps=2)
    file = killed / RECORD_FILE
    whole = file.read_bytes()
    file.write_bytes(whole[: whole.rindex(b'"event": "step"') + 40])  # in the midst of the third step's
    assert read_record(killed).last_step == 2
    train(killed, policy, resume=str(killed / "checkpoint-2"))
    found, expected = read_record(killed), read_record(straight)
    assert [step for step, _ in found.begins] == [0, 2]
    assert found.unreadable_lines == 1
    assert [step.step for step in found.steps] == [1, 2, 3, 4]
    # the generation behind the checkpoint, which both attempts have written, counts once
    assert [generation.statistics for generation in found.generations] == [
        generation.statistics for generation in expected.generations
    ]
    assert found.series("reward") == expected.series("reward")


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


def test_a_run_that_is_stopped_says_so(policy, tmp_path):
    train(tmp_path, policy, callbacks=[Stop()])
    assert read_record(tmp_path).end == {**read_record(tmp_path).end, "status": "stopped", "step": 2}


class Fail(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        raise ZeroDivisionError


def test_a_run_without_completions(policy, tmp_path):
    with pytest.raises(ZeroDivisionError):
        train(tmp_path, policy, callbacks=[Fail()])
    found = read_record(tmp_path)
    assert (found.generations, found.steps, found.end) == ([], [], None)
    assert found.about["rewards"]


@pytest.mark.slow
def test_nothing_left_to_train(policy, tmp_path):
    train(tmp_path, policy, max_steps=2, save_strategy="steps", save_steps=2)
    train(tmp_path, policy, max_steps=2, resume=str(tmp_path / "checkpoint-2"))
    found = read_record(tmp_path)
    assert [step for step, _ in found.begins] == [0, 2]
    assert (found.last_step, found.end["status"]) == (2, "finished")


def test_a_file_that_cannot_be_written_ends_no_training(policy, tmp_path, caplog):
    (tmp_path / RECORD_FILE).mkdir()
    done = train(tmp_path, policy)
    assert done.trainer.state.global_step == 4
    assert len([record for record in caplog.records if RECORD_FILE in record.message]) == 1


def test_what_a_record_cannot_take_in_ends_no_training(policy, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(module, "generation_statistics", lambda *args: 1 / 0)
    done = train(tmp_path, policy)
    assert done.trainer.state.global_step == 4
    assert len([record for record in caplog.records if "not recorded" in record.message]) == 1


HOSTILE = "</script><script>alert(1)</script>\ud800" + "9" * 200_000


class Hostile(GRPOExtTrainer):
    """Its policy writes what a page must not be hurt by."""

    def _generate(self, *args, **kwargs):
        generated = list(super()._generate(*args, **kwargs))
        generated[3] = [HOSTILE] * len(generated[3])
        return tuple(generated)


def test_a_completion_of_200_kb(policy, tmp_path):
    train(tmp_path, policy, Hostile, max_steps=1)
    assert (tmp_path / RECORD_FILE).stat().st_size < 50_000
    (sample, *_) = read_record(tmp_path).generations[0].samples
    assert sample.chars == len(HOSTILE)
    assert sample.completion.startswith("</script><script>alert(1)</script>?999")
    assert len(sample.completion) < 5_000


def named(name, function):
    function.__name__ = name
    return function


def test_rewards_with_one_name(policy, tmp_path):
    """TRL logs both under it; in the record each has its own scores, and showing completions does not fail."""
    constant = named("reward", lambda completions, **kwargs: [1.0] * len(completions))
    other = named("reward", lambda completion_ids, **kwargs: [float(sum(ids) % 5) for ids in completion_ids])
    rewards = [constant, other, named("third", lambda completions, **kwargs: [0.0] * len(completions))]
    rewards.append(named("fourth", lambda completions, **kwargs: [0.0] * len(completions)))
    train(tmp_path, policy, reward=rewards, log_completions=True)
    found = read_record(tmp_path)
    assert [reward.name for reward in found.rewards] == ["reward", "reward (2)", "third", "fourth"]
    assert found.generations[0].statistics.rewards["reward"].std == 0
    assert found.generations[0].statistics.rewards["reward (2)"].std > 0
    assert found.generations[0].samples[0].rewards.keys() == {reward.name for reward in found.rewards}
    assert found.end is not None


def test_groups_without_signal_where_rewards_are_normalized_first(policy, tmp_path):
    """Two rewards that cancel in the sum do not after each is normalized, and then have an advantage."""
    one = named("one", lambda completion_ids, **kwargs: [float(len(ids) % 3) for ids in completion_ids])
    other = named("other", lambda completion_ids, **kwargs: [-2.0 * (len(ids) % 3) for ids in completion_ids])
    options = {"reward_weights": [2.0, 1.0], "max_steps": 1, "multi_objective_aggregation": "normalize_then_sum"}
    train(tmp_path, policy, reward=[one, other], **options)
    (generation,) = read_record(tmp_path).generations
    assert generation.statistics.silent < generation.statistics.groups
    assert any(sample.advantage for sample in generation.samples)


class OtherBatches(RecordingTrainer):
    """Leaves rows out of the batch, or makes one without rewards of TRL's."""

    def _generate_and_score_completions(self, inputs):
        rows = super()._generate_and_score_completions(inputs)
        return {name: value[2:] if torch.is_tensor(value) and value.dim() else value for name, value in rows.items()}


class OwnRewards(RecordingTrainer):
    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        return torch.arange(float(len(prompts))).view(-1, 1)

    def _generate_and_score_completions(self, inputs):
        calculate = vars(self).pop("_calculate_rewards", None)  # what stands before it does not see this one
        rows = super()._generate_and_score_completions(inputs)
        if calculate is not None:
            self._calculate_rewards = calculate
        return rows


@pytest.mark.parametrize("trainer_class", [OtherBatches, OwnRewards])
def test_trainers_that_make_batches_in_another_way_are_recorded_as_far_as_can_be(policy, tmp_path, trainer_class):
    train(tmp_path, policy, trainer_class, num_iterations=1)
    found = read_record(tmp_path)
    assert [step.step for step in found.steps] == [1, 2, 3, 4]
    assert found.end is not None
    samples = [sample for generation in found.generations for sample in generation.samples]
    assert len(samples) == (0 if trainer_class is OwnRewards else NUM_GENERATIONS * len(found.generations))
    assert not any(sample.advantage for sample in samples)
    assert all(generation.statistics.groups for generation in found.generations)


@pytest.mark.slow
def test_truncated_completions(policy, tmp_path):
    reward = NotedReward()
    train(tmp_path, policy, reward=reward, max_steps=8)
    found = read_record(tmp_path)
    ends = {tiny_tokenizer().eos_token_id, tiny_tokenizer().pad_token_id}
    seen = set()
    for generation, (prompts, _, ids, _) in zip(found.generations, reward.calls, strict=True):
        place = prompts.index(generation.samples[0].prompt)
        for row, sample in enumerate(generation.samples):
            assert sample.is_truncated is (ids[place + row][-1] not in ends)
            seen.add(sample.is_truncated)
    assert seen == {True, False}


def test_which_generations_are_sampled():
    """All at first, and then ever fewer: a hundred or so of ten thousand."""
    kept = [number for number in range(1, 10_001) if module.is_sampled(number)]
    assert kept[:20] == list(range(1, 21))
    assert 100 <= len(kept) <= 120
    assert max(later - earlier for earlier, later in pairwise(kept)) == 512


@pytest.mark.slow
def test_a_problem_that_comes_again_is_seen_again(policy, tmp_path):
    class FewPrompts(GRPOExtTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{**kwargs, "train_dataset": canned_prompts(num_prompts=8)})

    train(tmp_path, policy, FewPrompts, max_steps=12, num_iterations=1)
    prompts = [generation.samples[0].prompt for generation in read_record(tmp_path).generations]
    assert len(prompts) == 12
    # of eight prompts four come at a time: once known, the same one in each epoch but for those of the other half
    assert len(set(prompts)) <= 8
    assert max(map(prompts.count, prompts)) >= 4


@pytest.mark.slow
def test_a_long_run_does_not_fill_memory(policy, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST_IN_MEMORY", 6)
    monkeypatch.setattr(module, "TEXTS_IN_MEMORY", 1)
    monkeypatch.setattr(windows, "LOOK_BACK", 1)
    done = train(tmp_path, policy, max_steps=20, num_iterations=1)
    (callback,) = [item for item in done.trainer.callback_handler.callbacks if isinstance(item, RunRecordCallback)]
    run = callback.run
    assert max(len(run.steps), len(run.generations), len(run.logs)) <= 7
    assert [step.step for step in run.steps][-2:] == [19, 20]
    assert run.steps[0].step == 1
    assert sum(bool(generation.samples) for generation in run.generations) == 1
    assert len(read_record(tmp_path).steps) == 20  # the file has all


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ("a", "a"),
        (None, ""),
        ([{"role": "user", "content": "2 + 2?"}], "2 + 2?"),
        ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}], None),
        ([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}], "What?"),
        (
            [
                {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]},
                {"role": "tool", "content": "4"},
                {"role": "assistant", "content": "It is 4."},
            ],
            "assistant: [calls add({'a': 2})]\n\ntool: 4\n\nassistant: It is 4.",
        ),
        ([{"role": "assistant", "content": None, "tool_calls": "none"}], ""),
        (3, ""),
    ],
)
def test_conversations_as_text(messages, text):
    found = conversation_to_text(messages)
    assert found == ("system: Be brief.\n\nuser: 2 + 2?" if text is None else text)


@pytest.mark.slow
@pytest.mark.distributed
def test_rows_of_all_processes(policy, tmp_path):
    options = {"bf16": False, **SCHEDULE}
    result = run_canned(tmp_path, "out", launcher("ddp_cpu.yaml"), policy=policy, options=options)
    assert result.returncode == 0, result.stderr[-5000:]
    found = read_record(tmp_path / "out")
    assert found.about["processes"] == 2
    logs = [entry for entry in ran_on(tmp_path / "out")["log"] if "reward" in entry]
    for generation, entry in zip(found.generations, logs, strict=True):
        assert generation.statistics.completions == 2 * 2 * 8  # processes, micro-batches, rows
        assert generation.statistics.rewards["canned_reward"].mean == pytest.approx(entry["reward"], rel=1e-4)
        silent = generation.statistics.silent / generation.statistics.groups
        assert silent == pytest.approx(entry["frac_reward_zero_std"])
    assert all(1 <= value <= 2 for _, value in found.series("update/slowest_rank"))
    assert len(found.series("update/slowest_rank")) == 2


def test_scores_that_are_none(policy, tmp_path):
    """A reward function that scores nothing: counted as such, and nothing of it is logged as `None`."""

    def unscored(completions, **kwargs):
        return [None] * len(completions)

    done = train(tmp_path, policy, reward=unscored)
    assert all(value is not None for entry in done.log for value in entry.values())
    assert all(math.isfinite(value) for entry in done.log for value in entry.values())
    (first, *_) = read_record(tmp_path).generations
    assert first.statistics.rewards["unscored"].unscored == first.statistics.completions
    assert first.samples[0].rewards == {"unscored": None}
