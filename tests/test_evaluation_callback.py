"""`EvaluationCallback`, and evaluations that leave no trace in training."""

import json
from pathlib import Path

import pytest
import torch
from canned import (
    CannedRollouts,
    NoSampler,
    assert_same_weights,
    canned_config,
    canned_prompts,
    canned_reward,
    schedule_options,
    train_canned,
    whole_weights,
)
from datasets import Dataset
from read_wandb import logged_to_wandb
from safetensors.torch import load_file
from tiny import tiny_model, tiny_tokenizer
from transformers import EarlyStoppingCallback, ProgressCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_grpo_ext import (
    EvaluationCallback,
    GRPOExtConfig,
    GRPOExtTrainer,
    MultiIterationMixin,
    SharedPrefixMixin,
    UndisturbedEvaluationMixin,
    compat,
)
from trl_grpo_ext.evaluation import Answer, Evaluation, callback, figures_of, read_answers
from trl_grpo_ext.trackers import finish_trackers


PROBLEMS = Dataset.from_dict({"prompt": [f"problem {n}" for n in range(10)], "answer": [str(n) for n in range(10)]})
OTHERS = Dataset.from_dict({"prompt": ["one"], "answer": [1], "id": ["the only one"]})
EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1}


def make_trainer(policy, output_dir, trainer_class=GRPOTrainer, callbacks=(), eval_dataset=None, **options):
    config_class = GRPOExtConfig if issubclass(trainer_class, GRPOExtTrainer) else GRPOConfig
    return trainer_class(
        model=policy,
        reward_funcs=canned_reward,
        args=canned_config(output_dir, config_class, **options),
        train_dataset=canned_prompts(),
        eval_dataset=canned_prompts(num_prompts=2) if eval_dataset is None else eval_dataset,
        processing_class=tiny_tokenizer(),
        rollout_func=CannedRollouts(),
        callbacks=list(callbacks),
    )


class Scripted:
    """In place of `evaluate`: of ten problems so many are right, greedily and in each of two samples."""

    def __init__(self, *right: int) -> None:
        self.right = list(right)
        self.calls = []  # step, set of problems, options

    def of(self, trainer, problems=PROBLEMS, **options) -> EvaluationCallback:
        self.trainer = trainer
        found = EvaluationCallback(trainer, problems, samples_per_item=2, **options)
        trainer.add_callback(found)
        return found

    @property
    def steps(self) -> list[int]:
        return [step for step, _, _ in self.calls]

    def __call__(self, model, tokenizer, dataset, **options):
        right = self.right[min(len(self.calls), len(self.right) - 1)]
        self.calls.append((self.trainer.state.global_step, dataset, {**options, "model": model}))
        torch.rand(3)  # an evaluation leaves the generator as it was; this one does not, and must do no harm
        ids = dataset["id"] if "id" in dataset.column_names else range(len(dataset))
        answers = [
            Answer(
                id=name,
                completion=f"<answer>\n{answer if n < right else 'none'}\n</answer>",
                answer=answer,
                temperature=temperature,
                sample=sample,
                tokens=3,
                finish_reason="stop",
            ).graded()
            for n, (name, answer) in enumerate(zip(ids, dataset["answer"], strict=True))
            for temperature, sample in ((0.0, 0), (1.0, 0), (1.0, 1))
        ]
        return Evaluation(answers, figures_of(answers), generated=len(answers))


@pytest.fixture
def scripted(monkeypatch):
    def script(*right):
        found = Scripted(*right)
        monkeypatch.setattr(callback, "evaluate", found)
        return found

    return script


def logged(trainer, name="eval_answer"):
    """The values of a figure by their place in the log."""
    return [(entry["step"], entry[name]) for entry in trainer.state.log_history if name in entry]


def recorded(folder):
    lines = (Path(folder) / "answers" / "figures.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def names(folder):
    return sorted(path.name for path in (Path(folder) / "answers").iterdir())


# When, and what becomes of it


@pytest.mark.parametrize("trainer_class", [GRPOTrainer, GRPOExtTrainer])
def test_before_between_and_after(policy, tmp_path, scripted, trainer_class):
    seen = []

    class See(TrainerCallback):
        """What others see of an evaluation, though they were there earlier."""

        def on_evaluate(self, args, state, control, metrics, **kwargs):
            seen.append((state.global_step, metrics["eval_answer"], metrics["eval_reward"]))

    script = scripted(1, 2, 3, 4)
    trainer = make_trainer(
        policy, tmp_path, trainer_class, [See()], max_steps=5, eval_strategy="steps", eval_steps=2, logging_steps=5
    )
    evaluation = script.of(trainer)
    trainer.train()
    assert script.steps == [0, 2, 4, 5]
    assert logged(trainer) == [(0, 0.1), (2, 0.2), (4, 0.3), (5, 0.4)]
    assert logged(trainer, "eval_pass@2") == logged(trainer, "eval_strict") == logged(trainer)
    assert [(step, answer) for step, answer, _ in seen] == [(2, 0.2), (4, 0.3), (5, 0.4)]
    assert evaluation.before["heldout"].estimates["answer"].mean == 0.1
    assert evaluation.after["heldout"].estimates["answer"].mean == 0.4
    assert evaluation.after["heldout"].estimates["answer"].low < 0.2
    assert {step: figures["heldout"].estimates["maj@2"].mean for step, figures in evaluation.history.items()} == {
        2: 0.2,
        4: 0.3,
        5: 0.4,  # transformers evaluates at the last step whenever it evaluates at steps
    }
    options = script.calls[0][2]
    assert (options["max_new_tokens"], options["samples_per_item"], options["seed"]) == (12, 2, 42)
    assert options["vllm"] is None
    assert options["description"] is None  # disable_tqdm

    # TRL's own metrics are as they would be: those of training are averaged over all its steps
    of_training = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in of_training] == [5]
    assert not any(name.startswith("eval_") for name in of_training[0])
    assert "reward" in of_training[0]
    assert not any("reward" in entry and "eval_answer" in entry for entry in trainer.state.log_history)

    assert names(tmp_path) == [
        "after.jsonl",
        "before.jsonl",
        "figures.jsonl",
        "step-000002.jsonl",
        "step-000004.jsonl",
        "step-000005.jsonl",
    ]
    answers = read_answers(tmp_path / "answers" / "step-000004.jsonl")
    assert len(answers) == 30
    assert sum(answer.correct["strict"] for answer in answers) == 9
    lines = recorded(tmp_path)
    assert [(line["evaluation"], line["step"], line["set"]) for line in lines] == [
        ("before", 0, "heldout"),
        ("step", 2, "heldout"),
        ("step", 4, "heldout"),
        ("step", 5, "heldout"),
        ("after", 5, "heldout"),
    ]
    strict = lines[-1]["figures"]["strict"]
    assert 0 < strict["low"] < strict["mean"] == 0.4 < strict["high"] < 1


def test_several_sets_of_problems_and_of_eval_datasets(policy, tmp_path, scripted):
    """The trainer evaluates on each of its sets, and says so each time: one evaluation belongs to all of them."""
    script = scripted(0, 0, 5, 1)
    eval_dataset = {"one": canned_prompts(num_prompts=2), "two": canned_prompts(num_prompts=2)}
    trainer = make_trainer(
        policy,
        tmp_path,
        eval_dataset=eval_dataset,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="other_answer",
        save_strategy="best",
    )
    evaluation = script.of(trainer, {"main": PROBLEMS, "other": OTHERS})
    trainer.train()
    assert script.steps == [0, 0, 1, 1, 2, 2]
    assert logged(trainer) == [(0, 0.0), (1, 0.5), (2, 0.1)]
    assert logged(trainer, "eval_other_answer") == [(0, 0.0), (1, 1.0), (2, 1.0)]
    assert trainer.state.best_metric == 1.0
    assert trainer.state.best_global_step == 1
    assert list(evaluation.after) == ["main", "other"]
    assert "step-000001.other.jsonl" in names(tmp_path)
    assert {answer.id for answer in read_answers(tmp_path / "answers" / "after.other.jsonl")} == {"the only one"}


def test_the_same_weights_are_measured_once(policy, tmp_path, scripted):
    script = scripted(1, 2)
    trainer = make_trainer(
        policy, tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2, eval_on_start=True, save_strategy="no"
    )
    evaluation = script.of(trainer)
    trainer.train()
    assert script.steps == [0, 2]
    assert logged(trainer) == [(0, 0.1), (2, 0.2)]
    assert list(evaluation.history) == [0, 2]
    assert evaluation.after == evaluation.history[2]
    files = tmp_path / "answers"
    assert (files / "after.jsonl").read_bytes() == (files / "step-000002.jsonl").read_bytes()
    assert [line["evaluation"] for line in recorded(tmp_path)] == ["before", "step", "after"]


def test_the_best_model_is_not_the_last(policy, tmp_path, scripted):
    """It is found by our figure and loaded, and `after` measures it; so does whoever stops by that figure."""
    script = scripted(1, 3, 6, 2, 2, 6)
    trainer = make_trainer(
        policy,
        tmp_path,
        GRPOExtTrainer,
        [EarlyStoppingCallback(early_stopping_patience=2)],
        max_steps=8,
        **EVERY_STEP,
        save_strategy="steps",
        save_steps=1,
        metric_for_best_model="answer",
        load_best_model_at_end=True,
    )
    evaluation = script.of(trainer)
    trainer.train()
    assert script.steps == [0, 1, 2, 3, 4, 4]
    assert trainer.state.best_global_step == 2
    assert trainer.state.best_metric == 0.6
    assert evaluation.history[4]["heldout"].estimates["answer"].mean == 0.2
    assert evaluation.after["heldout"].estimates["answer"].mean == 0.6
    assert logged(trainer)[-2:] == [(4, 0.2), (4, 0.6)]
    best = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    measured = script.calls[-1][2]["model"].state_dict()
    assert all(measured[name].equal(weight) for name, weight in best.items())


@pytest.mark.parametrize("strategy", ["no", "steps"])
def test_only_between(policy, tmp_path, scripted, strategy):
    script = scripted(1)
    trainer = make_trainer(policy, tmp_path, max_steps=2, eval_strategy=strategy, eval_steps=1, eval_on_start=True)
    evaluation = script.of(trainer, at_ends=False)
    trainer.train()
    assert script.steps == [0, 1, 2] if strategy == "steps" else [0]
    assert evaluation.before is evaluation.after is None


def test_a_trainer_that_evaluates_by_itself(policy, tmp_path, scripted):
    """Outside of training anybody may have changed the weights: each call measures, and once for all its sets."""
    script = scripted(1, 2, 3)
    eval_dataset = {"one": canned_prompts(num_prompts=2), "two": canned_prompts(num_prompts=2)}
    trainer = make_trainer(policy, tmp_path, eval_dataset=eval_dataset)
    script.of(trainer)
    assert [trainer.evaluate()["eval_answer"] for _ in range(3)] == [0.1, 0.2, 0.3]
    assert len(script.calls) == 3


def test_each_evaluation_knows_the_one_before(policy, tmp_path, scripted):
    """Whose answers' lengths are much like its own; of each set its own, and nothing of an earlier training."""
    script = scripted(1, 2, 3, 4)
    trainer = make_trainer(policy, tmp_path, max_steps=1)
    script.of(trainer, {"main": PROBLEMS, "others": OTHERS})
    trainer.train()
    earlier = [[answer.id for answer in options["earlier"]] for _, _, options in script.calls]
    of_sets = [[name for name in range(10) for _ in range(3)], ["the only one"] * 3]
    assert earlier == [[], [], *of_sets]
    script.calls.clear()
    trainer.state.global_step = 0
    trainer.train()
    assert [len(options["earlier"]) for _, _, options in script.calls] == [0, 0, 30, 3]


def test_the_policys_engine_generates(policy, tmp_path, scripted, monkeypatch):
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", NoSampler)
    script = scripted(1)
    trainer = make_trainer(
        policy, tmp_path, max_steps=1, use_vllm=True, vllm_importance_sampling_correction=False, bf16=False
    )
    script.of(trainer, seed=7, max_new_tokens=5, batch_size=3, temperature=0.5)
    trainer.train()
    for _, _, options in script.calls:
        assert options["vllm"] is trainer.vllm_generation
        assert (options["seed"], options["max_new_tokens"], options["batch_size"]) == (7, 5, 3)
        assert options["temperature"] == 0.5
    assert len(script.calls) == 2


def test_bars_do_not_stand_in_each_others_way(policy, tmp_path, monkeypatch):
    """The bar of the trainer's own evaluation is closed before ours begins."""
    events = []

    class Bars(ProgressCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            events.append("closed" if self.prediction_bar is None else "closes")
            super().on_evaluate(args, state, control, **kwargs)

    class Seeing(Scripted):
        def __call__(self, *args, **options):
            events.append(options["description"])
            return super().__call__(*args, **options)

    script = Seeing(1)
    monkeypatch.setattr(callback, "evaluate", script)
    trainer = make_trainer(policy, tmp_path, max_steps=1, **EVERY_STEP, disable_tqdm=False)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Bars)
    script.of(trainer)
    trainer.train()
    assert events == ["Evaluating before", "closes", "Evaluating at step 1", "closed"]


@pytest.mark.parametrize(
    ("problems", "options", "message"),
    [
        ({}, {}, "problems is empty"),
        ({"a/b": PROBLEMS}, {}, "a set is called 'a/b'"),
        ({"a": PROBLEMS.remove_columns("answer")}, {}, "set 'a': problems need the columns"),
        (PROBLEMS, {"samples_per_item": -1}, "samples_per_item must be an integer from 0 on, got -1"),
        (PROBLEMS, {"batch_size": 0}, "batch_size must be an integer from 1 on"),
        (PROBLEMS, {"max_new_tokens": 0}, "max_new_tokens must be an integer from 1 on"),
        (PROBLEMS, {"temperature": 0.0}, "temperature must be above 0"),
    ],
)
def test_bad_arguments(policy, tmp_path, problems, options, message):
    trainer = make_trainer(policy, tmp_path)
    with pytest.raises(ValueError, match=message):
        EvaluationCallback(trainer, problems, **options)


# Attempts


def run(policy, folder, script, resume=None, **options):
    trainer = make_trainer(
        policy, folder, **{"max_steps": 4, **EVERY_STEP, "save_strategy": "steps", "save_steps": 2, **options}
    )
    evaluation = script.of(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return evaluation


def test_going_on_from_a_checkpoint(policy, tmp_path, scripted):
    """What was measured behind it goes; before is what it was at the beginning, and is not measured again."""
    first = run(policy, tmp_path, scripted(1, 2, 3, 9, 9))
    (tmp_path / "answers" / "step-000003.of-mine.jsonl.txt").write_text("mine")
    script = scripted(4, 5)
    second = run(policy, tmp_path, script, str(tmp_path / "checkpoint-2"), max_steps=4)
    assert script.steps == [3, 4]
    assert second.before == first.before
    assert {step: figures["heldout"].estimates["answer"].mean for step, figures in second.history.items()} == {
        1: 0.2,
        2: 0.3,
        3: 0.4,
        4: 0.5,
    }
    assert [line["figures"]["answer"]["mean"] for line in recorded(tmp_path)] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.5]
    assert "step-000003.of-mine.jsonl.txt" in names(tmp_path)


def test_a_run_that_goes_on_knows_the_evaluation_before(policy, tmp_path, scripted):
    """As it would have without being interrupted: answers are generated together with the same others."""
    first = scripted(1, 2, 3, 9, 9)
    run(policy, tmp_path, first)
    second = scripted(4, 5)
    run(policy, tmp_path, second, str(tmp_path / "checkpoint-2"), max_steps=4)
    step_of = {step: options["earlier"] for step, _, options in first.calls}
    earlier = second.calls[0][2]["earlier"]
    assert [answer.completion for answer in earlier] == [answer.completion for answer in step_of[3]]
    assert [answer.tokens for answer in earlier] == [3] * 30
    (tmp_path / "answers" / "step-000002.jsonl").unlink()
    third = scripted(4, 5)
    run(policy, tmp_path, third, str(tmp_path / "checkpoint-2"), max_steps=3)
    assert third.calls[0][2]["earlier"] == []  # gone, and no harm done


def test_an_attempt_that_ends_before_the_next_checkpoint(policy, tmp_path, scripted):
    """What lies there from behind the checkpoint is gone as soon as the run goes on."""
    run(policy, tmp_path, scripted(1, 2, 3, 9, 9))
    script = scripted(4)
    run(policy, tmp_path, script, str(tmp_path / "checkpoint-2"), max_steps=3, eval_strategy="no")
    assert script.steps == [3]
    assert names(tmp_path) == [
        "after.jsonl",
        "before.jsonl",
        "figures.jsonl",
        "step-000001.jsonl",
        "step-000002.jsonl",
    ]


@pytest.mark.parametrize("what", ["missing", "of another run", "cut off", "of other problems"])
def test_before_is_not_known(policy, tmp_path, scripted, what):
    """It is not taken from the policy that a checkpoint holds, and not from another run either."""
    run(policy, tmp_path, scripted(1, 2, 3, 4, 5))
    before = tmp_path / "answers" / "before.jsonl"
    if what == "missing":
        before.unlink()
    elif what == "of another run":
        run(policy, tmp_path / "other", scripted(8, 2, 3, 4, 5))
        for name in ("before.jsonl", "figures.jsonl"):
            (tmp_path / "other" / "answers" / name).replace(tmp_path / "answers" / name)
    elif what == "cut off":
        lines = before.read_text().splitlines(keepends=True)
        before.write_text("".join(lines[:-4]) + lines[-4][:20])
    else:
        before.write_text("".join(line for line in before.read_text().splitlines(True) if '"id": 3,' not in line))
    script = scripted(6)
    evaluation = run(policy, tmp_path, script, str(tmp_path / "checkpoint-2"), max_steps=3)
    assert evaluation.before is None
    assert script.steps == [3]
    assert logged(script.trainer)[0] != (0, 0.6)
    assert before.exists() == (what in ("cut off", "of other problems"))


def test_a_fresh_start_takes_nothing_of_an_earlier_attempt(policy, tmp_path, scripted):
    run(policy, tmp_path, scripted(1, 2, 3, 4, 5))
    (tmp_path / "answers" / "notes.jsonl").write_text("mine")
    script = scripted(6)
    evaluation = run(policy, tmp_path, script, max_steps=1)
    assert script.steps == [0, 1]
    assert evaluation.before["heldout"].estimates["answer"].mean == 0.6
    assert names(tmp_path) == ["after.jsonl", "before.jsonl", "figures.jsonl", "notes.jsonl", "step-000001.jsonl"]
    assert [line["step"] for line in recorded(tmp_path)] == [0, 1, 1]


# No disturbance


class DisturbedTrainer(MultiIterationMixin, SharedPrefixMixin, GRPOTrainer):
    """Ours without the mixin."""


@pytest.fixture(scope="module")
def policy_with_dropout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy-with-dropout")
    model = tiny_model()
    model.config.attention_dropout = 0.2
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def weights_after(policy, folder, trainer_class=GRPOExtTrainer, evaluates=False, **options):
    """Weights after ten steps: eight passes over two micro-batches of one generation, and the next generation."""

    class Evaluated(trainer_class):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, eval_dataset=canned_prompts(num_prompts=2), **kwargs)
            if evaluates:
                self.add_callback(EvaluationCallback(self, PROBLEMS.select(range(2)), max_new_tokens=3))

    args = canned_config(
        folder,
        GRPOExtConfig,
        max_steps=10,
        **schedule_options(4, 1, 2),
        **(EVERY_STEP if evaluates else {}),
        **options,
    )
    found = train_canned(Evaluated, args, policy)
    assert len(found.metric("eval_strict")) == (11 if evaluates else 0)
    assert len(found.metric("eval_reward")) == (10 if evaluates else 0)
    return found


@pytest.mark.parametrize("shared_prefix", ["on", pytest.param("off", marks=pytest.mark.slow)])
def test_a_run_with_evaluations_ends_with_the_weights_of_one_without(policy, tmp_path, shared_prefix):
    without = weights_after(policy, tmp_path / "without", shared_prefix=shared_prefix)
    evaluated = weights_after(policy, tmp_path / "with", evaluates=True, shared_prefix=shared_prefix)
    assert_same_weights(evaluated.weights, without.weights)
    assert without.metric("rollouts/iterations_used") == [4.0]
    for name in ("loss", "reward", "completions/mean_length"):
        assert evaluated.metric(name) == without.metric(name), name
    disturbed = weights_after(policy, tmp_path / "other", DisturbedTrainer, True, shared_prefix=shared_prefix)
    assert not all(disturbed.weights[name].equal(weight) for name, weight in without.weights.items())


def test_dropout_goes_on_where_it_was(policy_with_dropout, tmp_path):
    """Each forward in training takes random numbers, between two generations too; and gradients are checkpointed."""
    options = {
        "shared_prefix": "off",
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    }
    without = weights_after(policy_with_dropout, tmp_path / "without", **options)
    evaluated = weights_after(policy_with_dropout, tmp_path / "with", evaluates=True, **options)
    assert_same_weights(evaluated.weights, without.weights)
    dry = weights_after(policy_with_dropout, tmp_path / "again", **{**options, "seed": 1})
    assert not all(dry.weights[name].equal(weight) for name, weight in without.weights.items())


def test_an_evaluation_leaves_the_trainer_as_it_was(policy, tmp_path):
    trainer = make_trainer(policy, tmp_path, GRPOExtTrainer, max_steps=1, num_iterations=4, log_completions=True)
    trainer.train()
    trainer.model.train()
    trainer.model.lm_head.eval()
    modes = [module.training for module in trainer.model.modules()]
    rollouts, step = compat.buffered_micro_batches(trainer), compat.step(trainer)
    prompts = list(trainer._logs["prompt"]), {name: list(values) for name, values in trainer._logs["rewards"].items()}
    state = torch.get_rng_state()
    weights = whole_weights(trainer.model)
    trainer.evaluate()
    assert rollouts is not None
    assert compat.buffered_micro_batches(trainer) is rollouts
    assert compat.step(trainer) == step == 1
    assert [module.training for module in trainer.model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert (
        list(trainer._logs["prompt"]),
        {name: list(values) for name, values in trainer._logs["rewards"].items()},
    ) == prompts
    trainer._logs["rewards"]["another"].append(1.0)  # still columns that are made when they are needed
    assert_same_weights(whole_weights(trainer.model), weights)


def test_a_sampler_that_leaves_the_model_in_training_mode(policy, tmp_path):
    """As TRL's continuous batching does: the rest of the evaluation would be taken for training."""

    class Sloppy(GRPOTrainer):
        def _generate(self, prompts):
            output = super()._generate(prompts)
            self.model.train()
            return output

    class Undisturbed(UndisturbedEvaluationMixin, Sloppy):
        pass

    eval_dataset = canned_prompts(num_prompts=4)

    def metrics_of(trainer_class, **options):
        trainer = make_trainer(
            policy, tmp_path, trainer_class, eval_dataset=eval_dataset, per_device_eval_batch_size=4, **options
        )
        torch.manual_seed(0)
        metrics = trainer.evaluate()
        return {name: value for name, value in metrics.items() if "second" not in name and "time" not in name}

    assert metrics_of(Undisturbed) == metrics_of(GRPOTrainer)
    assert "eval_reward" in metrics_of(GRPOTrainer)


# Trackers


TRACKED = {
    "eval/strict": [(0, 0.1), (1, 0.2), (2, 0.3)],
    "eval/answer": [(0, 0.1), (1, 0.2), (2, 0.3)],
    "eval/lm_eval_strict": [(0, 0.0), (1, 0.0), (2, 0.0)],
    "eval/pass@2": [(0, 0.1), (1, 0.2), (2, 0.3)],
    "eval/maj@2": [(0, 0.1), (1, 0.2), (2, 0.3)],
    "eval/never_right": [(0, 0.9), (1, 0.8), (2, 0.7)],
    "eval/tokens": [(0, 3.0), (1, 3.0), (2, 3.0)],
}


def train_tracked(policy, folder, script, tracker):
    trainer = make_trainer(
        policy, folder, max_steps=2, eval_strategy="steps", eval_steps=1, eval_on_start=True, report_to=tracker
    )
    trainer.args.eval_steps = trainer.state.eval_steps = 1
    script.of(trainer)
    trainer.train()


def test_tensorboard(policy, tmp_path, scripted, monkeypatch):
    """After is in the same file: the tracker has not been closed when it is measured."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    train_tracked(policy, tmp_path / "out", scripted(1, 2, 3), "tensorboard")
    (file,) = (tmp_path / "events").glob("events*")
    events = EventAccumulator(str(file))
    events.Reload()
    for name, values in TRACKED.items():
        assert [(event.step, event.value) for event in events.Scalars(name)] == [
            (step, pytest.approx(value)) for step, value in values
        ], name
    assert "eval/reward" in events.Tags()["scalars"]


def test_wandb(policy, tmp_path, scripted, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DISABLE_GIT", "true")
    try:
        train_tracked(policy, tmp_path / "out", scripted(1, 2, 3), "wandb")
    finally:
        finish_trackers(0, 60)  # and with it the service
    assert wandb.run is None
    history = logged_to_wandb(tmp_path)
    for name, values in TRACKED.items():
        found = [(row["train/global_step"], row[name]) for row in history if name in row]
        assert found == [(step, pytest.approx(value)) for step, value in values], name
    assert any("eval/reward" in row for row in history)
