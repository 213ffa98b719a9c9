"""`GRPOExtTrainer`: its arguments, and what it knows of rewards."""

import inspect

import pytest
from canned import short_run_config
from datasets import Dataset, IterableDataset
from tiny import CHAT_TEMPLATE, save_tiny_policy, save_tiny_reward_model, tiny_model, tiny_tokenizer
from trl import GRPOConfig, GRPOTrainer

import trl_grpo_ext.trainer as trainer_module
from trl_grpo_ext import GRPOExtConfig, GRPOExtTrainer
from trl_grpo_ext.rewards import (
    correctness_reward_func,
    get_correctness_reward,
    gsm8k_bundle,
    tag_bundle,
)
from trl_grpo_ext.tasks import load_arithmetic


def config(output_dir, config_class=GRPOExtConfig, **options):
    return short_run_config(output_dir, config_class, **options)


def make(folder, reward_funcs, dataset=None, args=None, trainer_class=GRPOExtTrainer, **options):
    return trainer_class(
        model=tiny_model(),
        reward_funcs=reward_funcs,
        args=args or config(folder),
        train_dataset=load_arithmetic("train", 8) if dataset is None else dataset,
        processing_class=options.pop("processing_class", None) or tiny_tokenizer(),
        **options,
    )


def refuses_to_make(*arguments, error=ValueError, match, **options):
    """Before a model is loaded: the folder that is named here is not there."""
    with pytest.raises(error, match=match) as raised:
        GRPOExtTrainer("no/such/model", *arguments, **options)
    assert "\n" not in str(raised.value)


def test_arguments_stand_where_trls_do(tmp_path):
    ours, trls = (inspect.signature(cls).parameters.values() for cls in (GRPOExtTrainer, GRPOTrainer))
    # not the annotations: pdoc, in another test, makes types of those that are texts, in place
    assert [(it.name, it.kind, it.default) for it in ours] == [(it.name, it.kind, it.default) for it in trls]
    dataset, tokenizer = load_arithmetic("train", 8), tiny_tokenizer()
    trainer = GRPOExtTrainer(tiny_model(), gsm8k_bundle(), config(tmp_path), dataset, None, tokenizer)
    assert trainer.train_dataset is dataset
    assert trainer.processing_class is tokenizer
    with pytest.raises(TypeError, match="no_such_argument"):
        GRPOExtTrainer(tiny_model(), gsm8k_bundle(), config(tmp_path), no_such_argument=1)


def test_a_run_without_arguments_is_named_after_its_model(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "GRPOExtConfig", lambda name: config(tmp_path / name))
    trainer = GRPOExtTrainer(
        save_tiny_policy(tmp_path / "policy"), tag_bundle(), train_dataset=load_arithmetic("train", 8)
    )
    assert trainer.args.output_dir == str(tmp_path / "policy-GRPO")


def test_arguments_of_another_trainers_own_reach_it(tmp_path):
    class WithTeacher(GRPOTrainer):
        def __init__(self, *args, teacher, **kwargs):
            super().__init__(*args, **kwargs)
            self.teacher = teacher

    class Both(GRPOExtTrainer, WithTeacher):
        pass

    assert make(tmp_path, tag_bundle(), trainer_class=Both, teacher="a teacher").teacher == "a teacher"


def test_a_bundles_weights_are_taken(tmp_path):
    bundle = gsm8k_bundle().with_weights(correctness_reward_func=4.0, int_reward_func=0.0)
    args = config(tmp_path)
    trainer = make(tmp_path, bundle, args=args)
    assert trainer.reward_weights.tolist() == [1.0, 1.0, 1.0, 0.0, 4.0]
    assert args.reward_weights is None  # whoever makes another trainer with them has other rewards
    assert trainer.reward_func_names == bundle.names
    assert make(tmp_path, bundle, args=config(tmp_path, reward_weights=bundle.weights)).reward_weights.tolist() == (
        bundle.weights
    )


@pytest.mark.parametrize("config_class", [GRPOExtConfig, GRPOConfig])
def test_weights_that_contradict_a_bundle_are_refused(tmp_path, config_class):
    bundle = tag_bundle().with_weights(correctness_reward_func=4.0)

    def args(*weights):
        return config(tmp_path, config_class, reward_weights=list(weights))

    remedy = "leave args.reward_weights out"
    refuses_to_make(bundle, args(1.0, 1.0), match=rf"\[1.0, 1.0\] contradicts RewardBundle\(correct.*: {remedy}")
    more = bundle + ["some/reward-model"]
    refuses_to_make(more, args(*bundle.weights), match=f"has 2 weights for the 3 rewards of .*: {remedy}")
    refuses_to_make(tag_bundle().with_weights(format_reward_func=1.0), args(2.0, 1.0), match="contradicts")
    # nobody has set a bundle's weights: then the arguments' are the only ones
    assert make(tmp_path, tag_bundle(), args=args(2.0, 0.5)).reward_weights.tolist() == [2.0, 0.5]


def test_a_reward_model_beside_a_bundle(tmp_path):
    folder = save_tiny_reward_model(tmp_path / "reward-model")
    bundle = (tag_bundle() + [folder]).with_weights({"reward-model": 0.5})
    trainer = make(tmp_path, bundle)
    assert trainer.reward_func_names == ["correctness_reward_func", "format_reward_func", "reward-model"]
    assert trainer.reward_weights.tolist() == [1.0, 1.0, 0.5]
    assert bundle[-1] == folder  # the bundle is as it was


class Counter:
    """An environment that rewards its rollouts itself."""

    def reset(self, **kwargs) -> None:
        return None

    def get_reward(self) -> float:
        return 0.5


TOOL_TEMPLATE = CHAT_TEMPLATE.replace("{{ message['content'] }}", "{{ message['content'] }}{{ message.tool_calls }}")


@pytest.mark.filterwarnings("ignore:You are using 'environment_factory'")
@pytest.mark.parametrize("reward_weights", [None, [4.0, 1.0]])
def test_an_environments_reward_beside_a_bundle(tmp_path, reward_weights):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    bundle = tag_bundle().with_weights(correctness_reward_func=4.0)
    trainer = make(
        tmp_path,
        bundle,
        args=config(tmp_path, reward_weights=reward_weights),
        processing_class=tokenizer,
        environment_factory=Counter,
    )
    assert trainer.reward_func_names == [*bundle.names, "Counter"]
    assert trainer.reward_weights.tolist() == [4.0, 1.0, 1.0]
    trainer.train()
    assert trainer.state.log_history[0]["rewards/Counter/mean"] == 0.5
    assert len(bundle) == 2


def test_rewards_in_a_tuple(tmp_path):
    trainer = make(tmp_path, tuple(tag_bundle()))
    assert trainer.reward_func_names == tag_bundle().names
    assert make(tmp_path, correctness_reward_func).reward_func_names == ["correctness_reward_func"]


def test_what_is_no_reward_is_refused(tmp_path):
    for reward_funcs, fix in (
        (gsm8k_bundle, r"when it is called, gsm8k_bundle\(\)"),
        ([get_correctness_reward], r"when it is called, get_correctness_reward\(\)"),
        ([tag_bundle(), correctness_reward_func], r"pass `bundle \+ \[other_reward\]`"),
    ):
        refuses_to_make(reward_funcs, config(tmp_path), error=TypeError, match=fix)


PROMPT = [{"role": "user", "content": "q"}]


def streamed(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


@pytest.mark.parametrize("form", [Dataset.from_list, streamed])
@pytest.mark.parametrize("prompt", ["q", PROMPT])
def test_data_that_the_rewards_cannot_grade_is_refused(tmp_path, form, prompt):
    def refused(match, **columns):
        dataset = form([{"prompt": prompt, **columns}] * 4)
        refuses_to_make(gsm8k_bundle(), config(tmp_path), dataset, match=f"correctness_reward_func .*{match}")

    refused("'answer', which row 0 of train_dataset does not have", target="5")
    refused("0.0 of 2 for its own reference, '<answer>5</answer>'", answer="<answer>5</answer>")
    refused("is empty in each of the first 4 rows", answer=None)
    refused("holds a list", answer=["5"])


@pytest.mark.parametrize("form", [Dataset.from_list, streamed])
def test_raw_gsm8k_references_are_trained_on(tmp_path, form):
    """Each row once, in the order in which they come: the look at the first ones has used none up."""
    rows = [{"prompt": f"q{n}", "answer": f"So.\n#### {n}"} for n in range(4)]
    seen = []

    def watch(prompts, completions, answer, **kwargs):
        seen.extend(prompts[::4])
        return correctness_reward_func(
            completions=[f"<answer>{prompt[1:]}</answer>" for prompt in prompts], answer=answer
        )

    args = config(tmp_path, shuffle_dataset=False)
    args.max_steps = 4
    trainer = make(tmp_path, [watch, correctness_reward_func], form(rows), args)
    trainer.train()
    assert seen == ["q0", "q1", "q2", "q3"]
    assert trainer.state.log_history[0]["rewards/watch/mean"] == 2.0


def test_evaluation_data_is_checked_where_it_is_used(tmp_path):
    train, bad = load_arithmetic("train", 8), Dataset.from_list([{"prompt": "q"}] * 4)
    for eval_dataset in (bad, {"good": train, "bad": bad}):
        args = config(tmp_path, eval_strategy="steps", eval_steps=1)
        refuses_to_make(tag_bundle(), args, train, eval_dataset, match="row 0 of eval_dataset does not have")
    assert make(tmp_path, tag_bundle(), eval_dataset=bad)


def test_what_makes_the_column_itself_is_let_through(tmp_path):
    no_column = Dataset.from_list([{"prompt": "q"}] * 4)
    assert make(tmp_path, tag_bundle(), no_column, config(tmp_path, check_references=False))
    assert make(tmp_path, tag_bundle(), no_column, rollout_func=lambda prompts, trainer: {})
    assert make(tmp_path, [lambda completions, **kwargs: [0.0] * len(completions)], no_column)


def test_a_seed_that_makes_the_completions_of_a_prompt_the_same_is_refused(tmp_path):
    """Colocated, vLLM begins each completion from it; a server counts on from it, without vLLM it is not read."""
    reads_text = "generation_kwargs" in GRPOExtConfig._VALID_DICT_FIELDS  # from TRL 1.11 on
    seed = {"use_vllm": True, "generation_kwargs": '{"seed": 3}' if reads_text else {"seed": 3}}
    with pytest.raises(ValueError, match=r"makes all completions of a prompt the same.*leave it out"):
        config(tmp_path, vllm_mode="colocate", **seed)
    assert config(tmp_path, vllm_mode="server", **seed).generation_kwargs == {"seed": 3}
    for kept in ({}, {"seed": None}, {"seed": -1}, None):
        config(tmp_path, use_vllm=True, vllm_mode="colocate", generation_kwargs=kept)
    config(tmp_path, generation_kwargs={"seed": 3})
