"""However completions came about, the update is TRL's: the mixins look at the rows alone, never at who made them."""

import json
import random
from types import SimpleNamespace

import pytest
from canned import (
    MISSING,
    ROWS,
    ExactGradNorms,
    Run,
    assert_same_training,
    assert_same_weights,
    canned_config,
    canned_prompts,
    note_forwards,
    schedule_options,
    whole_weights,
)
from datasets import Dataset
from test_iterations import start, steps_of_two_generations  # noqa: F401 (a fixture)
from tiny import tiny_tokenizer
from trl import GRPOConfig, GRPOTrainer

from trl_grpo_ext.config import GRPOExtConfig
from trl_grpo_ext.trainer import GRPOExtTrainer


pytestmark = [
    pytest.mark.filterwarnings("ignore:You are using 'environment_factory'"),
    pytest.mark.usefixtures("stand_in_for_vllm"),
]

# (num_iterations, gradient_accumulation_steps, steps_per_generation): the policy is the old one throughout, or on half
# of the micro-batches, or on the first pass
SCHEDULES = [(1, 2, 2), (1, 2, 4), (2, 2, 4), (4, 2, 2)]
KINDS = ("dead", "live", "x", "also live, and longer")  # prompts; the second but last is a single token


# What is sampled: made up from the prompt's tokens and the place in the batch, so that whoever asks gets the same


def is_dead(prompt):
    return "dead" in str(prompt)


def reward(prompts, completion_ids, **kwargs):
    return [
        1.0 if is_dead(prompt) else float(sum(ids) % 5) for prompt, ids in zip(prompts, completion_ids, strict=True)
    ]


def canned_completion(tokenizer, prompt_ids, place, longest=12):
    """Random letters, at every fourth place a single token; a mark of the end may stand anywhere."""
    numbers = random.Random(f"{prompt_ids} {place}")
    length = 1 if place % 4 == 3 else numbers.randint(1, longest)
    return [tokenizer.eos_token_id if numbers.random() < 0.1 else numbers.randrange(65, 91) for _ in range(length)]


def sampler_logps(prompt_ids, completion_ids):
    """Those of a sampler near the policy, which is near to knowing nothing; `None` as where vLLM says NaN."""
    numbers = random.Random(f"{prompt_ids} {completion_ids}")
    return [None if numbers.random() < MISSING else -5.6 + numbers.gauss(0.0, 0.4) for _ in completion_ids]


# Who is asked


class Rollouts:
    """A `rollout_func`.

    Args:
        logprobs (`bool`):
            Whether it says with which probability its tokens were sampled.
        is_policys (`Callable`, *optional*):
            Whether the policy, and not an environment, has said a token; called with the numbers of row and token.
        own_prompts (`bool`):
            Whether the prompts of a group differ, as where each row is told something else.
        longest (`int`):
            Tokens of the longest completion.
        extra (`dict`):
            What else it returns.
    """

    def __init__(self, logprobs=False, is_policys=None, own_prompts=False, longest=12, **extra):
        self.logprobs, self.is_policys, self.own_prompts = logprobs, is_policys, own_prompts
        self.longest, self.extra = longest, extra
        self.num_calls = 0

    def __call__(self, prompts, trainer):
        self.num_calls += 1
        tokenizer = trainer.processing_class
        prompt_ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        if self.own_prompts:
            prompt_ids = [[*ids, 97 + place % 3] for place, ids in enumerate(prompt_ids)]
        completion_ids = [
            canned_completion(tokenizer, ids, place, self.longest) for place, ids in enumerate(prompt_ids)
        ]
        logps = list(map(sampler_logps, prompt_ids, completion_ids))
        output = {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None, **self.extra}
        if self.logprobs:
            output["logprobs"] = logps
        if self.is_policys is not None:
            output["env_mask"] = [
                [int(self.is_policys(row, token)) for token in range(len(ids))]
                for row, ids in enumerate(completion_ids)
            ]
        return output


def says_two_of_three(row, token):
    """The policy, in most rows; every third row is an environment's from beginning to end."""
    return row % 3 != 0 and token % 3 != 1


def says_nothing(row, token):
    return False


class OwnGeneration(GRPOTrainer):
    """A trainer with a generation of its own in the place where TRL asks transformers or vLLM."""

    completion = staticmethod(canned_completion)

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):  # which TRL has changed
        return [self.completion(self.processing_class, ids, place) for place, ids in enumerate(prompt_ids)], None


class OwnGenerationOurs(GRPOExtTrainer, OwnGeneration):
    pass


class StandInForVLLM:
    """What TRL asks of its `VLLMGeneration`."""

    completion = staticmethod(canned_completion)

    def __init__(self, *, processing_class, **options):
        self.processing_class = processing_class
        self.num_syncs = self.num_calls = 0
        self.llm = SimpleNamespace(llm_engine=SimpleNamespace(model_config=SimpleNamespace(max_model_len=512)))

    def sync_weights(self):
        self.num_syncs += 1

    def generate(self, prompts, images, num_generations, profiler=None):
        self.num_calls += 1
        rows = [self.completion(self.processing_class, ids, place) for place, ids in enumerate(prompts)]
        return prompts, rows, [[[logp] for logp in logps] for logps in map(sampler_logps, prompts, rows)], None


@pytest.fixture
def stand_in_for_vllm(monkeypatch):
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", StandInForVLLM)


# Training on it


def train(trainer_class, policy, folder, schedule=(1, 1, 1), *, resume=None, **options):
    """Options that are no setting are passed to the trainer."""
    passed = {
        "train_dataset": canned_prompts(KINDS),
        "processing_class": tiny_tokenizer(),
        "reward_funcs": reward,
    }
    passed |= {
        name: options.pop(name)
        for name in ("rollout_func", "tools", "environment_factory", *passed)
        if name in options
    }
    settings = {
        **schedule_options(*schedule),
        "max_steps": steps_of_two_generations(*schedule),
        **options,
    }
    ours = issubclass(trainer_class, GRPOExtTrainer)
    if ours:
        settings = {"shared_prefix": "on", **settings}
    forwards, norms = [], ExactGradNorms()
    trainer = trainer_class(
        model=policy,
        args=canned_config(folder, GRPOExtConfig if ours else GRPOConfig, **settings),
        callbacks=[norms],
        **passed,
    )
    note_forwards(trainer, forwards)
    before = whole_weights(trainer.model)
    trainer.train(resume_from_checkpoint=resume)
    return Run(trainer, before, whole_weights(trainer.model), trainer.state.log_history, forwards, norms.values)


def check_parity(policy, tmp_path, schedule, theirs=GRPOTrainer, ours=GRPOExtTrainer, **options):
    expected = train(theirs, policy, tmp_path / "theirs", schedule, **options)
    actual = train(ours, policy, tmp_path / "ours", schedule, **options)
    # not vacuous
    assert len(expected.exact_grad_norms) == steps_of_two_generations(*schedule)
    assert 4 * sum(norm > 1e-3 for norm in expected.exact_grad_norms) >= 3 * len(expected.exact_grad_norms)
    assert_same_training(actual, expected, expected.start)
    assert actual.metric("loss") == pytest.approx(expected.metric("loss"), rel=1e-4, abs=1e-6)
    for name in ("completions/mean_length", "completions/clipped_ratio", "reward", "tools/call_frequency"):
        assert actual.metric(name) == expected.metric(name)
    return expected, actual


def each_with_each(backends, schedules=SCHEDULES, quick=2):
    """All pairs; quick is one for each of the first backends, with the schedules in turn."""
    return pytest.mark.parametrize(
        ("backend", "schedule"),
        [
            pytest.param(
                backend,
                schedule,
                marks=[] if row < quick and (row + column) % len(schedules) == 0 else [pytest.mark.slow],
            )
            for row, backend in enumerate(backends)
            for column, schedule in enumerate(schedules)
        ],
        ids=str,
    )


# Rollout functions

ROLLOUTS = {
    "no more than tokens": {},
    "log-probabilities": {"logprobs": True},
    "tokens of an environment": {"is_policys": says_two_of_three},
    "both": {"logprobs": True, "is_policys": says_two_of_three},
    "prompts of one's own": {"own_prompts": True, "is_policys": says_two_of_three},
    "single tokens": {"logprobs": True, "longest": 1},
}


@each_with_each(ROLLOUTS)
def test_a_rollout_function(policy, tmp_path, backend, schedule):
    _, ours = check_parity(policy, tmp_path, schedule, rollout_func=Rollouts(**ROLLOUTS[backend]))
    assert sum(ours.metric("update/rows_skipped")) > 0


def test_extra_fields_reach_rewards(policy, tmp_path):
    """One value a row, or one for all; they are no part of the rows that are trained on."""
    schedule, seen = (2, 1, 2), []

    def bonus(completion_ids, grade, source, **kwargs):
        seen.append(source)
        return [sum(ids) % 5 * number for ids, number in zip(completion_ids, grade, strict=True)]

    rollouts = Rollouts(grade=[float(place % 3) for place in range(2 * ROWS)], source="a game")
    _, ours = check_parity(policy, tmp_path, schedule, rollout_func=rollouts, reward_funcs=[reward, bonus])
    assert seen[-1] == ["a game"] * 2 * ROWS
    assert sum(ours.metric("rewards/bonus/mean")) > 0


@pytest.mark.parametrize("use_vllm", [False, True])
def test_an_environment_may_say_everything(policy, tmp_path, use_vllm):
    """Then there is no gradient, and nothing breaks."""
    rollouts = Rollouts(logprobs=True, is_policys=says_nothing)
    ours = train(GRPOExtTrainer, policy, tmp_path, (2, 2, 4), rollout_func=rollouts, use_vllm=use_vllm)
    assert set(ours.exact_grad_norms) == {0.0}
    assert_same_weights(ours.weights, ours.start)


@pytest.mark.parametrize("use_vllm", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("schedule", [SCHEDULES[2], pytest.param(SCHEDULES[3], marks=pytest.mark.slow)], ids=str)
def test_the_off_policy_mask_is_made_from_what_the_sampler_says(policy, tmp_path, use_vllm, schedule):
    """Wherever rows have log-probabilities of their own, corrected or not."""
    options = {"use_vllm": use_vllm, "off_policy_mask_threshold": 0.0}
    norms = {}
    for logprobs in {True, use_vllm}:
        _, ours = check_parity(
            policy, tmp_path, schedule, rollout_func=Rollouts(logprobs, is_policys=says_two_of_three), **options
        )
        norms[logprobs] = ours.exact_grad_norms
    assert use_vllm or norms[True] != pytest.approx(norms[False], rel=1e-2)


# vLLM

CORRECTIONS = {
    "not corrected": {"vllm_importance_sampling_correction": False},
    "TRL's defaults": {},  # sequence_mask, at most 3
    "tokens masked": {"vllm_importance_sampling_mode": "token_mask", "vllm_importance_sampling_clip_max": 1.1},
    "tokens truncated": {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": 1.1},
}


@each_with_each(CORRECTIONS)
def test_vllm(policy, tmp_path, backend, schedule):
    expected, ours = check_parity(policy, tmp_path, schedule, use_vllm=True, **CORRECTIONS[backend])
    weights = [ours.metric(f"sampling/importance_sampling_ratio/{which}") for which in ("min", "max")]
    if backend == "not corrected":
        assert weights == [[], []]
    else:
        smallest, largest = min(weights[0]), max(weights[1])
        assert (smallest == 0.0) == (backend != "tokens truncated")  # some are masked
        assert 1.0 < largest < 3.0 if backend == "TRL's defaults" else largest == pytest.approx(1.1, rel=0.02)
    for run in (expected, ours):
        engine = run.trainer.vllm_generation
        assert engine.num_syncs == engine.num_calls == 3  # one for each generation


@each_with_each([name for name, options in ROLLOUTS.items() if options.get("logprobs")], quick=1)
def test_a_rollout_function_that_samples_with_vllm(policy, tmp_path, backend, schedule):
    options = {"use_vllm": True, "rollout_func": Rollouts(**ROLLOUTS[backend])}
    expected, ours = check_parity(policy, tmp_path, schedule, **options)
    assert max(ours.metric("sampling/importance_sampling_ratio/max")) > 1.0
    for run in (expected, ours):
        assert run.trainer.vllm_generation.num_syncs == 3
        assert run.trainer.vllm_generation.num_calls == 0


@pytest.mark.parametrize("option", [{}, {"entropy_coef": 0.1}], ids=["our loss", "TRL's"])
def test_log_probabilities_that_are_missing_are_asked_for(policy, tmp_path, option):
    """Before TRL fails where it subtracts what is not there."""
    with pytest.raises(ValueError, match="logprobs") as raised:
        train(GRPOExtTrainer, policy, tmp_path, use_vllm=True, rollout_func=Rollouts(), **option)
    assert "\n" not in str(raised.value)


def test_log_probabilities_are_not_asked_for_where_nothing_is_corrected(policy, tmp_path):
    options = {"use_vllm": True, "vllm_importance_sampling_correction": False, "rollout_func": Rollouts()}
    check_parity(policy, tmp_path, (2, 1, 1), **options)


@pytest.mark.slow
@pytest.mark.parametrize("cut", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_resuming_between_passes_over_rows_of_vllm(policy, tmp_path, cut):
    schedule = (4, 2, 2)
    options = {
        "use_vllm": True,
        "rollout_func": Rollouts(logprobs=True, is_policys=says_two_of_three),
        "save_strategy": "steps",
    }
    whole = train(GRPOExtTrainer, policy, tmp_path / "whole", schedule, save_steps=1, **options)
    checkpoint = str(tmp_path / "whole" / f"checkpoint-{cut}")
    calls = options["rollout_func"].num_calls
    resumed = train(GRPOExtTrainer, policy, tmp_path / "resumed", schedule, resume=checkpoint, save_steps=9, **options)
    assert options["rollout_func"].num_calls == 2 * calls - 1  # the first batch's passes go on with its rows
    assert_same_weights(resumed.weights, whole.weights)


# The same rows from elsewhere


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [SCHEDULES[1], pytest.param(SCHEDULES[3], marks=pytest.mark.slow)], ids=str)
def test_where_rows_come_from_makes_no_difference(policy, tmp_path, schedule):
    """Bit for bit the same training, by as many forwards, whoever generates."""
    uncorrected = {"use_vllm": True, **CORRECTIONS["not corrected"]}
    first, *others = [
        train(trainer_class, policy, tmp_path, schedule, **options)
        for trainer_class, options in (
            (GRPOExtTrainer, {"rollout_func": Rollouts()}),
            (GRPOExtTrainer, {"rollout_func": Rollouts(logprobs=True)}),
            (GRPOExtTrainer, {"rollout_func": Rollouts(), **uncorrected}),
            (GRPOExtTrainer, uncorrected),
            (OwnGenerationOurs, {}),
        )
    ]
    assert max(first.exact_grad_norms) > 1e-3
    for other in others:
        assert_same_weights(other.weights, first.weights)
        assert other.forwards == first.forwards


def test_where_vllms_rows_come_from_makes_no_difference(policy, tmp_path):
    first, other = [
        train(GRPOExtTrainer, policy, tmp_path, SCHEDULES[3], use_vllm=True, **options)
        for options in ({}, {"rollout_func": Rollouts(logprobs=True)})
    ]
    assert max(first.exact_grad_norms) > 1e-3
    assert_same_weights(other.weights, first.weights)
    assert other.forwards == first.forwards


# Tools and environments

TOOL_TEMPLATE = (
    "{% for message in messages %}<s>{{ message.role }}: {{ message.content }}"
    "{% for call in message.tool_calls or [] %}[{{ call.function | tojson }}]{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
CALLS_AS_JSON = {  # for transformers, which parses completions
    "defaults": {"role": "assistant"},
    "start_anchor": "<s>assistant: ",
    "fields": {
        "tool_calls": {
            "open": "[",
            "close": "]",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close": "</s>", "content": "text"},
    },
}
LONGEST_WITH_TOOLS = 110


def tool_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template, tokenizer.response_template = TOOL_TEMPLATE, CALLS_AS_JSON
    return tokenizer


def call(name, place):
    return "[" + json.dumps({"name": name, "arguments": {"place": place}}) + "]"


def completion_with_calls(tokenizer, prompt_ids, place):
    """No call, one, one that fails, two, or one whose result leaves no room for more; after it perhaps another one."""
    numbers = random.Random(f"{prompt_ids} {place}")
    letters = "".join(numbers.choices("ABCDEFG", k=numbers.randint(1, 5)))
    turns = tokenizer.decode(prompt_ids).count("<s>tool: ")
    if turns == 0:
        text = (letters, call("look", 3), call("jump", 1), call("look", 2) + call("look", 4), filling())[place % 5]
    else:
        text = call("look", 1) if turns == 1 and numbers.random() < 0.3 else letters
    return tokenizer(text + "</s>")["input_ids"]


def filling():
    """A call whose result goes to the very end of what a completion may have."""
    result = "</s><s>tool: " + look(20) + "</s><s>assistant: "
    length = len(tool_tokenizer()(call("look", 20) + result)["input_ids"])
    return "A" * (LONGEST_WITH_TOOLS - length) + call("look", 20)


def look(place: int) -> str:
    """
    Look somewhere.

    Args:
        place: Where.

    Returns:
        What is there.
    """
    return "ab" * place


class Room:
    """An environment with a state, which it describes; its tool changes it, and it has a reward of its own."""

    def reset(self, **kwargs):
        self.seen = []
        return " There is a door."

    def look(self, place: int) -> str:
        """
        Look somewhere.

        Args:
            place: Where.

        Returns:
            What is there.
        """
        self.seen.append(place)
        return look(place)

    def get_reward(self):
        return float(sum(self.seen))


class Void:
    """An environment without a tool, an observation or a reward."""

    def reset(self, **kwargs):
        return None


class WithCalls(OwnGeneration):
    completion = staticmethod(completion_with_calls)


class WithCallsOurs(GRPOExtTrainer, WithCalls):
    pass


class StandInWithCalls(StandInForVLLM):
    completion = staticmethod(completion_with_calls)


TOOL_USES = {
    "tools": {"tools": [look]},
    "an environment": {"environment_factory": Room},
    "several environments": {"environment_factory": {"room": Room, "void": Void}},
}


@pytest.mark.parametrize("through", ["a method", pytest.param("vLLM", marks=pytest.mark.slow)])
@each_with_each(TOOL_USES, SCHEDULES[1:], quick=1)
def test_tools(policy, tmp_path, monkeypatch, through, backend, schedule):
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", StandInWithCalls)
    last_roles = []

    def note_and_reward(prompts, completions, completion_ids, **kwargs):
        last_roles.extend(completion[-1]["role"] for completion in completions)
        return reward(prompts, completion_ids)

    prompts = [[{"role": "user", "content": prompt}] for prompt in canned_prompts(KINDS)["prompt"]]
    columns = {"prompt": prompts}
    if backend == "several environments":
        columns["environment"] = ["room" if number % 3 else "void" for number in range(len(prompts))]
    options = {
        "train_dataset": Dataset.from_dict(columns),
        "processing_class": tool_tokenizer(),
        "reward_funcs": note_and_reward,
        "max_completion_length": LONGEST_WITH_TOOLS,
        **TOOL_USES[backend],
    }
    if through == "vLLM":
        options |= {"use_vllm": True, "vllm_importance_sampling_mode": "token_truncate"}
        theirs, ours = GRPOTrainer, GRPOExtTrainer
    else:
        theirs, ours = WithCalls, WithCallsOurs
    _, actual = check_parity(policy, tmp_path, schedule, theirs, ours, **options)
    assert max(actual.metric("tools/call_frequency")) > 0.5
    assert max(actual.metric("tools/failure_frequency")) > 0
    assert "tool" in last_roles  # a completion of which the end is not the policy's
    if backend != "tools":
        assert max(actual.metric("rewards/Room/mean")) > 0


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [SCHEDULES[2], pytest.param(SCHEDULES[3], marks=pytest.mark.slow)], ids=str)
def test_tools_that_transformers_calls(policy, tmp_path, schedule):
    """Sampled in earnest, at first from shared prompts: each capital letter of the first half is a call."""
    tokenizer = tool_tokenizer()
    tokenizer.response_template = {
        "defaults": {"role": "assistant"},
        "start_anchor": "<s>assistant: ",
        "fields": {
            "tool_calls": {
                "open_pattern": "[A-M]",
                "close_pattern": "(?s:.)",
                "repeats": True,
                "content": "text",
                "transform": {"type": "function", "function": {"name": "look", "arguments": {"place": 2}}},
            },
            "content": {"close": "</s>", "content": "text"},
        },
    }
    prompts = [[{"role": "user", "content": prompt}] for prompt in canned_prompts(KINDS)["prompt"]]
    options = {
        "train_dataset": Dataset.from_dict({"prompt": prompts}),
        "processing_class": tokenizer,
        "tools": [look],
        "max_completion_length": 64,
        "generation_kwargs": {"max_new_tokens": 8},
    }
    _, ours = check_parity(policy, tmp_path, schedule, **options)
    assert max(ours.metric("tools/call_frequency")) > 0.1
    assert max(ours.metric("tools/failure_frequency")) == 0.0
