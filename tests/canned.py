"""Training on rollouts that are made up beforehand: generation costs nothing, and two trainers see the same rows."""

import random
import traceback
from contextlib import nullcontext
from dataclasses import dataclass
from unittest.mock import patch

import pytest
import torch
import trl
from datasets import Dataset
from packaging.version import Version
from tiny import tiny_tokenizer
from transformers import TrainerCallback
from trl import GRPOConfig
from trl.trainer import utils as trl_utils


NUM_GENERATIONS = 4
ROWS = 8  # of a micro-batch
MAX_COMPLETION_LENGTH = 12
# The share of tokens for which a sampler has no log-probability; TRL before 1.13 fails on those.
MISSING = 0.1 if Version(trl.__version__) >= Version("1.13") else 0.0


class CannedRollouts:
    """A `rollout_func`: random tokens, drawn as a sampler draws them, from torch's generator.

    With `sampler_noise` it comes with a sampler's log-probabilities: the policy's, away from them by so many nats
    (standard deviation), and some are missing. Lengths are from 1 token to the longest, or between those given.
    """

    def __init__(
        self,
        tool_masks: bool = False,
        sampler_noise: float | None = None,
        lengths: tuple[int, int] = (1, MAX_COMPLETION_LENGTH),
    ) -> None:
        self.tool_masks, self.sampler_noise, self.lengths = tool_masks, sampler_noise, lengths
        self.num_calls = 0

    def __call__(self, prompts, trainer):
        self.num_calls += 1
        numbers = random.Random(f"{torch.randint(2**62, ()).item()} {trainer.accelerator.process_index}")
        tokenizer = trainer.processing_class
        completion_ids = []
        for _ in prompts:
            length = numbers.randint(*self.lengths)
            ids = [numbers.randrange(65, 91) for _ in range(length)]
            if length < MAX_COMPLETION_LENGTH or numbers.random() < 0.5:
                ids[-1] = tokenizer.eos_token_id
            completion_ids.append(ids)
        output = {
            "prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts],
            "completion_ids": completion_ids,
            "logprobs": None,
        }
        if self.sampler_noise is not None:
            output["logprobs"] = [
                [None if numbers.random() < MISSING else logp + numbers.gauss(0, self.sampler_noise) for logp in logps]
                for logps in policy_logps(trainer.model, output["prompt_ids"], completion_ids)
            ]
        if self.tool_masks:
            output["env_mask"] = [[int(i % 3 != 1) for i in range(len(ids))] for ids in completion_ids]
        return output


def policy_logps(model, prompts, completions) -> list[list[float]]:
    """A model's log-probabilities of completions, computed row by row."""
    was_training = model.training
    model.eval()
    rows = []
    for prompt, completion in zip(prompts, completions, strict=True):
        with torch.no_grad():
            logps = model(input_ids=torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) + len(completion) - 1)
        rows.append([logps[place, token].item() for place, token in zip(places, completion, strict=True)])
    model.train(was_training)
    return rows


class NoSampler:
    """In place of TRL's `VLLMGeneration`, where a `rollout_func` makes the completions: weights go nowhere."""

    def __init__(self, **options) -> None:
        pass

    def sync_weights(self) -> None:
        pass


def canned_reward(prompts, completion_ids, **kwargs):
    return [
        1.0 if prompt.startswith("dead") else float(sum(ids) % 5)
        for prompt, ids in zip(prompts, completion_ids, strict=True)
    ]


KINDS = ("dead", "live", "also live, and longer")  # prompts whose completions are rewarded alike, and others


def give_scoring_head(model) -> None:
    """Let a model score labels, as TRL does with those that it is given; releases before 1.15 take its logits."""
    if hasattr(trl_utils, "add_fused_lm_head"):
        trl_utils.add_fused_lm_head(model, outputs=("log_probs", "entropy"))


def skip_loss_that_is_refused(loss_type="dapo", importance_sampling_level="token", beta=0.0, **options) -> None:
    """End a test whose loss TRL had wrong in the installed release."""
    counts_tokens = importance_sampling_level == "token" or beta != 0.0
    if loss_type == "luspo" and counts_tokens and Version(trl.__version__) < Version("1.10"):
        pytest.skip("TRL before 1.10 gives padding a gradient")


def canned_prompts(kinds=KINDS, num_prompts: int = 64) -> Dataset:
    return Dataset.from_dict({"prompt": [f"{kinds[n % len(kinds)]} {n}" for n in range(num_prompts)]})


def schedule_options(mu, accumulation, per_generation):
    """Passes over a batch of rollouts, and micro-batches of an optimizer step and of a generation."""
    return {
        "num_iterations": mu,
        "gradient_accumulation_steps": accumulation,
        "steps_per_generation": per_generation,
    }


def canned_config(output_dir, config_class=GRPOConfig, **options):
    """fp32, and plain SGD without a gradient clip, which hides no wrong scale."""
    return short_run_config(
        output_dir,
        config_class,
        **{
            "max_steps": 4,
            "per_device_train_batch_size": ROWS,
            "num_generations": NUM_GENERATIONS,
            "max_completion_length": MAX_COMPLETION_LENGTH,
            "optim": "sgd",
            "learning_rate": 0.2,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 1e9,
            **options,
        },
    )


def short_run_config(output_dir, config_class=GRPOConfig, **options):
    """Settings of a run of a step, one group of short completions, on a CPU."""
    return config_class(
        **{
            "output_dir": str(output_dir),
            "max_steps": 1,
            "per_device_train_batch_size": 4,
            "num_generations": 4,
            "max_completion_length": 8,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            **options,
        }
    )


@dataclass
class Forward:
    """A forward of some rows with so many tokens altogether, padding included."""

    rows: int
    tokens: int
    has_gradient: bool


@dataclass
class Run:
    """What a training run left behind."""

    trainer: object
    start: dict[str, torch.Tensor]  # weights
    weights: dict[str, torch.Tensor]
    log: list[dict[str, float]]
    forwards: list[Forward]  # through the policy
    exact_grad_norms: list[float]

    def metric(self, name: str) -> list[float]:
        return [entry[name] for entry in self.log if entry.get(name) is not None]


class ExactGradNorms(TrainerCallback):
    """The norm of the gradient at each optimizer step, in double precision; none where DeepSpeed keeps gradients."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        squares = [p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]
        if squares:
            self.values.append(torch.stack(squares).sum().sqrt().item())


class SetAttributes(TrainerCallback):
    """As a schedule of a setting does it: from some step on the trainer has another one."""

    def __init__(self, at_step, **values):
        self.at_step, self.values, self.trainer = at_step, values, None

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.at_step:
            for name, value in self.values.items():
                setattr(self.trainer, name, value)

    def of(self, trainer_class):
        """A trainer whose settings these are."""
        callback = self

        class Changing(trainer_class):
            def train(self, *args, **kwargs):
                callback.trainer = self
                return super().train(*args, **kwargs)

        return Changing


def train_canned(
    trainer_class,
    args,
    model,
    *,
    tool_masks=False,
    sampler_noise=None,
    kinds=KINDS,
    reward=canned_reward,
    resume=None,
    callbacks=(),
    lengths=(1, MAX_COMPLETION_LENGTH),
    **options,
) -> Run:
    """Train the checkpoint `model`, from the checkpoint `resume` if there is one.

    On one thread: the models are so small that a second one only waits.
    """
    forwards: list[Forward] = []
    norms = ExactGradNorms()
    with patch("trl.trainer.grpo_trainer.VLLMGeneration", NoSampler):
        trainer = trainer_class(
            model=model,
            reward_funcs=reward,
            args=args,
            train_dataset=canned_prompts(kinds),
            processing_class=tiny_tokenizer(),
            rollout_func=CannedRollouts(tool_masks, sampler_noise, lengths),
            callbacks=[norms, *callbacks],
            **options,
        )
    note_forwards(trainer, forwards)
    start = whole_weights(trainer.model)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        trainer.train(resume_from_checkpoint=resume)
    finally:
        torch.set_num_threads(threads)
    return Run(trainer, start, whole_weights(trainer.model), trainer.state.log_history, forwards, norms.values)


def note_forwards(trainer, forwards: list[Forward]) -> None:
    """Note what the policy computes for training; not the made-up rows from which trainers learn about a model."""

    def note(module, positional, named):
        callers = {frame.f_code.co_name for frame, _ in traceback.walk_stack(None)}
        if module.training and "_draws_random_numbers" not in callers:
            ids = named["input_ids"]
            forwards.append(Forward(len(ids), ids.numel(), torch.is_grad_enabled()))

    trainer.model.register_forward_pre_hook(note, with_kwargs=True)


def whole_weights(model) -> dict[str, torch.Tensor]:
    """A copy of the weights; under ZeRO-3 and FSDP2, of all processes' parts of them."""
    parameters = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
    gathered = nullcontext()
    if parameters:
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(parameters)
    with gathered:
        return {
            name: (weight.full_tensor() if hasattr(weight, "full_tensor") else weight).detach().float().clone()
            for name, weight in model.state_dict().items()
        }


def assert_same_weights(weights, expected):
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert weight.equal(expected[name]), name


def assert_same_training(actual, expected, start):
    """The same gradients at each step and the same weights, within what fp32 leaves; and gradients that are not 0."""
    assert actual.exact_grad_norms == pytest.approx(expected.exact_grad_norms, rel=1e-5, abs=1e-7)
    assert relative_difference(actual.weights, expected.weights, start) < 1e-5
    assert max(expected.exact_grad_norms) > 1e-3


def relative_difference(weights, other, start) -> float:
    """Distance of two sets of weights relative to how far training has moved them."""
    distance = sum((weights[name] - other[name]).double().square().sum() for name in weights)
    moved = sum((weights[name] - start[name]).double().square().sum() for name in weights)
    return (distance / moved).sqrt().item()
