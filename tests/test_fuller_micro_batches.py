"""`tokens_per_micro_batch`: TRL's gradient from fewer and fuller micro-batches."""

import pytest
import torch
from canned import ROWS, assert_same_weights, canned_config, train_canned
from test_iterations import PaddedTrainer, check_parity, start  # noqa: F401 (a fixture)
from trl import GRPOConfig, GRPOTrainer, ModelConfig, TrlParser

from trl_grpo_ext.arguments import OneLineParser
from trl_grpo_ext.config import GRPOExtConfig, rollout_settings
from trl_grpo_ext.trainer import GRPOExtTrainer


# Two optimizer steps of four micro-batches in a pass
SCHEDULE = {"num_iterations": 2, "gradient_accumulation_steps": 4, "steps_per_generation": 8, "max_steps": 6}
OURS = ("tokens_per_micro_batch", "reshuffle_iterations", "skip_zero_advantage")


def run(trainer_class, policy, output_dir, **options):
    is_trls = trainer_class is GRPOTrainer
    passed = {
        name: options.pop(name) for name in ("sampler_noise", "tool_masks", "resume", "kinds") if name in options
    }
    options = {name: value for name, value in options.items() if not (is_trls and name in OURS)}
    args = canned_config(output_dir, GRPOConfig if is_trls else GRPOExtConfig, **options)
    return train_canned(trainer_class, args, policy, **passed)


def check_fullness(ours, most_tokens=None, window=4):
    """What is reported is what was computed, and each micro-batch was."""
    tokens = [forward.tokens for forward in ours.forwards if forward.has_gradient]
    steps = [tokens[first : first + window] for first in range(0, len(tokens), window)]
    assert len(tokens) == window * len(ours.exact_grad_norms)
    assert ours.metric("update/tokens_of_fullest") == [max(step) for step in steps]
    used = ours.metric("update/micro_batches_used")
    assert len(used) == len(steps)
    # a placeholder has a token of each kind, of which a packed row needs one
    assert used == [sum(tokens > 2 for tokens in step) for step in steps]
    if most_tokens is not None:
        assert max(tokens) <= most_tokens
    return used


CASES = [
    ({}, GRPOExtTrainer),
    ({"loss_type": "dapo", "beta": 0.04}, GRPOExtTrainer),
    ({"loss_type": "dr_grpo", "importance_sampling_level": "sequence"}, GRPOExtTrainer),
    ({"loss_type": "luspo", "tool_masks": True}, GRPOExtTrainer),
    ({"loss_type": "sapo", "num_iterations": 4, "max_steps": 9}, GRPOExtTrainer),
    ({"loss_type": "vespo", "num_iterations": 1}, GRPOExtTrainer),
    ({"loss_type": "cispo", "skip_zero_advantage": False}, GRPOExtTrainer),
    ({"use_vllm": True, "sampler_noise": 0.3, "vllm_importance_sampling_clip_max": 1.5}, GRPOExtTrainer),
    ({"use_vllm": True, "sampler_noise": 0.3, "beta": 0.04, "loss_type": "cispo"}, GRPOExtTrainer),
    ({}, PaddedTrainer),
    ({"beta": 0.04, "loss_type": "dr_grpo", "mask_truncated_completions": True}, PaddedTrainer),
    # passes of one optimizer step, and several in one
    ({"steps_per_generation": 4, "max_steps": 4}, GRPOExtTrainer),
    ({"steps_per_generation": 2, "max_steps": 3}, GRPOExtTrainer),
]


@pytest.mark.parametrize(
    ("options", "trainer_class"),
    [pytest.param(*case, marks=[pytest.mark.slow] if number % 3 else []) for number, case in enumerate(CASES)],
    ids=str,
)
def test_the_gradient_is_trls(policy, start, tmp_path, options, trainer_class):  # noqa: F811
    settings = {**SCHEDULE, "tokens_per_micro_batch": "auto", **options}
    theirs, ours = check_parity(policy, start, tmp_path, ours=trainer_class, run=run, **settings)
    window = min(settings["steps_per_generation"], 4)
    if window == 4:
        # so few because a prompt is there once, and rows are not padded; or only because some are left out
        most_tokens = max(forward.tokens for forward in theirs.forwards)
        used = check_fullness(ours, most_tokens)
        assert max(used) <= (2 if trainer_class is GRPOExtTrainer else 4)
        assert sum(used) < 4 * len(used) or trainer_class is PaddedTrainer
    assert len([forward for forward in ours.forwards if forward.has_gradient]) == 4 * settings["max_steps"]


@pytest.mark.parametrize("tokens", [60, "110", 10_000])
def test_a_number_of_tokens(policy, start, tmp_path, tokens, caplog):  # noqa: F811
    options = {**SCHEDULE, "tokens_per_micro_batch": tokens}
    _, ours = check_parity(policy, start, tmp_path, run=run, **options)
    used = check_fullness(ours, None if tokens == 60 else int(tokens))
    assert (set(used) == {1.0}) == (tokens == 10_000)
    # with 60 they do not fit, so that they are dealt out evenly, and that is said
    assert caplog.text.count("tokens_per_micro_batch=60 cannot be kept: a micro-batch has") == (tokens == 60)
    assert caplog.text.count("cannot be kept") == (tokens == 60)


def test_a_row_that_is_longer_than_the_number(policy, start, tmp_path, caplog):  # noqa: F811
    """It has a micro-batch to itself, the others keep to the number, and that is said once."""
    kinds = [*("live",) * 63, "live, and with a prompt of " + "very " * 40 + "many tokens"]
    options = {**SCHEDULE, "tokens_per_micro_batch": 240, "num_generations": 2, "kinds": kinds, "max_steps": 4}
    _, ours = check_parity(policy, start, tmp_path, run=run, **options)
    tokens = [forward.tokens for forward in ours.forwards if forward.has_gradient]
    too_long = [number for number in tokens if number > 240]
    assert too_long
    assert max(too_long) <= len(kinds[-1]) + 3 + 12  # its number, and a completion
    assert caplog.text.count("cannot be kept") == 1
    assert "because its only row is as long" in caplog.text


def test_rows_are_dealt_out_anew_between_passes(policy, start, tmp_path):  # noqa: F811
    """Where a pass is one optimizer step, the order within it says nothing. A single generation, because it draws."""
    options = {**SCHEDULE, "steps_per_generation": 4, "num_iterations": 3, "max_steps": 3}
    fuller = {"tokens_per_micro_batch": "auto", "reshuffle_iterations": True}
    _, ours = check_parity(policy, start, tmp_path, run=run, **options, **fuller)
    assert max(check_fullness(ours)) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"use_vllm": True, "sampler_noise": 0.3}], ids=str)
def test_resuming_is_exact(policy, tmp_path, options):
    """From checkpoints within passes and between them, with rows where they were."""
    settings = {**SCHEDULE, "tokens_per_micro_batch": "auto", "save_strategy": "steps", "save_steps": 1, **options}
    straight = run(GRPOExtTrainer, policy, tmp_path / "straight", **settings)
    for step in (1, 2, 3):
        checkpoint = str(tmp_path / "straight" / f"checkpoint-{step}")
        resumed = run(GRPOExtTrainer, policy, tmp_path / "resumed", resume=checkpoint, **settings)
        assert_same_weights(resumed.weights, straight.weights)
        assert resumed.exact_grad_norms == straight.exact_grad_norms[step:]
        for name in ("update/micro_batches_used", "update/tokens_of_fullest"):
            assert resumed.metric(name) == straight.metric(name)


def test_resuming_with_another_number(policy, tmp_path, caplog):
    settings = {**SCHEDULE, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    run(GRPOExtTrainer, policy, tmp_path / "straight", tokens_per_micro_batch="auto", **settings)
    checkpoint = str(tmp_path / "straight" / "checkpoint-1")
    for tokens, is_another in (("auto", False), (200, True), (None, True)):
        caplog.clear()
        run(GRPOExtTrainer, policy, tmp_path / "other", tokens_per_micro_batch=tokens, resume=checkpoint, **settings)
        assert ("tokens_per_micro_batch: 'auto' to" in caplog.text) == is_another
    as_text, as_number = (
        canned_config(tmp_path, GRPOExtConfig, tokens_per_micro_batch=tokens, gradient_accumulation_steps=2)
        for tokens in ("200", 200)
    )
    assert rollout_settings(as_text) == rollout_settings(as_number)


@pytest.mark.parametrize(
    "options", [{"entropy_coef": 0.01}, {"top_entropy_quantile": 0.5}, {"loss_type": "grpo", "own": True}], ids=str
)
def test_where_rows_stay_it_does_nothing(policy, tmp_path, caplog, options):
    options = dict(options)

    class OwnLoss(GRPOExtTrainer):
        def _compute_loss(self, model, inputs):
            return super()._compute_loss(model, inputs)

    trainer_class = OwnLoss if options.pop("own", False) else GRPOExtTrainer
    ours = run(trainer_class, policy, tmp_path, **{**SCHEDULE, **options, "tokens_per_micro_batch": "auto"})
    assert caplog.text.count("tokens_per_micro_batch='auto' does nothing") == 1
    assert not ours.metric("update/micro_batches_used")


# Settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens_per_micro_batch": 0}, "positive number of tokens, 'auto', or None for off; got 0"),
        ({"tokens_per_micro_batch": -5}, "got -5"),
        ({"tokens_per_micro_batch": 100.0}, "got 100.0"),
        ({"tokens_per_micro_batch": True}, "got True"),
        ({"tokens_per_micro_batch": "all"}, "got 'all'"),
        ({"tokens_per_micro_batch": "0"}, "got 0"),
        ({"tokens_per_micro_batch": "auto", "loss_type": "bnpo"}, "loss_type='bnpo' is a mean over each of them"),
        ({"tokens_per_micro_batch": "auto", "steps_per_generation": 3}, "begin in the middle of passes"),
        ({"tokens_per_micro_batch": "auto", "gradient_accumulation_steps": 1}, "only one in a pass"),
        ({"tokens_per_micro_batch": "auto", "steps_per_generation": 1}, "only one in a pass"),
    ],
    ids=str,
)
def test_bad_settings(tmp_path, options, message):
    with pytest.raises(ValueError, match=message) as error:
        canned_config(tmp_path, GRPOExtConfig, **{"gradient_accumulation_steps": 2, **options})
    assert "tokens_per_micro_batch" in str(error.value)
    assert "\n" not in str(error.value)


def test_plain_arguments(policy, tmp_path):
    """Of a trainer whose arguments are TRL's own, where nobody looks before the trainer is made."""
    args = canned_config(tmp_path, GRPOConfig, gradient_accumulation_steps=2)
    args.tokens_per_micro_batch = "many"
    with pytest.raises(ValueError, match="got 'many'"):
        train_canned(GRPOExtTrainer, args, policy)


@pytest.mark.parametrize("parser_class", [TrlParser, OneLineParser])
@pytest.mark.parametrize(("value", "expected"), [("4096", 4096), ("auto", "auto")])
def test_command_line_and_file(tmp_path, parser_class, value, expected):
    common = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false", "--gradient_accumulation_steps", "2"]
    file = tmp_path / "run.yaml"
    file.write_text(f"tokens_per_micro_batch: {value}\n")
    for arguments in (["--tokens_per_micro_batch", value], ["--config", str(file)]):
        parser = parser_class([GRPOExtConfig, ModelConfig])
        parsed = parser.parse_args_and_config([*common, *arguments])[0]
        assert parsed.tokens_per_micro_batch == expected
        if parser_class is OneLineParser:  # what a run's settings are compared by
            assert parser.given["tokens_per_micro_batch"] == expected


def test_a_micro_batch_of_trl_is_the_measure(policy, tmp_path):
    """`auto` allows as many tokens as TRL's micro-batch has, and the longest rows need them."""
    ours = run(GRPOExtTrainer, policy, tmp_path, **{**SCHEDULE, "tokens_per_micro_batch": "auto"})
    padded = [tokens / SCHEDULE["gradient_accumulation_steps"] for tokens in ours.metric("update/tokens_padded")]
    assert all(fullest <= most for fullest, most in zip(ours.metric("update/tokens_of_fullest"), padded, strict=True))
    assert all(most % ROWS == 0 for most in padded)
    assert torch.tensor(padded).min() > 0
