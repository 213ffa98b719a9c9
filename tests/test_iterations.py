"""`MultiIterationMixin` against `trl.GRPOTrainer` on the same rollouts: the same gradients, with less work."""

import itertools
import math

import pytest
import torch
from canned import (
    ROWS,
    assert_same_training,
    canned_config,
    canned_prompts,
    relative_difference,
    schedule_options,
    skip_loss_that_is_refused,
    train_canned,
)
from peft import LoraConfig
from transformers import AutoModelForCausalLM, set_seed
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

from trl_grpo_ext import compat
from trl_grpo_ext.config import GRPOExtConfig
from trl_grpo_ext.iterations import MultiIterationMixin
from trl_grpo_ext.rollouts import RolloutBuffer
from trl_grpo_ext.trainer import GRPOExtTrainer


LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo")

# (num_iterations, gradient_accumulation_steps, steps_per_generation): equal to, above and below the accumulation
SCHEDULES = [
    (mu, accumulation, per_generation)
    for mu, accumulation in itertools.product((1, 2, 4), (1, 2, 8))
    for per_generation in sorted({accumulation, 2 * accumulation, max(1, accumulation // 2)})
] + [(2, 2, 3), (2, 3, 2)]  # passes and optimizer steps that do not line up
FEATURES = [
    {},
    {"epsilon_high": 0.3},
    {"delta": 1.5},
    {"scale_rewards": "none"},
    {"scale_rewards": "batch"},
    {"mask_truncated_completions": True},
    {"tool_masks": True},
    {"importance_sampling_level": "sequence"},
    {"beta": 0.04},
    {"use_bias_correction_kl": False, "beta": 0.04},
]


@pytest.fixture(scope="module")
def start(policy):
    return AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).state_dict()


def run(trainer_class, policy, output_dir, config_class=GRPOConfig, **options):
    names = ("tool_masks", "peft_config", "resume", "callbacks")
    passed = {name: options.pop(name) for name in names if name in options}
    set_seed(0)  # of adapters, which releases of TRL make before or behind a seed of their own
    return train_canned(trainer_class, canned_config(output_dir, config_class, **options), policy, **passed)


class PaddedTrainer(MultiIterationMixin, GRPOTrainer):
    """Without packing: a forward's rows are those of the micro-batch."""


def steps_of_two_generations(mu, accumulation, per_generation):
    return math.ceil(2 * mu * per_generation / accumulation) + 1


def check_parity(policy, start, tmp_path, *, theirs=GRPOTrainer, ours=GRPOExtTrainer, run=run, **options):
    skip_loss_that_is_refused(**options)
    expected = run(theirs, policy, tmp_path / "theirs", **options)
    actual = run(ours, policy, tmp_path / "ours", **options)
    assert len(actual.exact_grad_norms) == options["max_steps"]
    # not vacuous: where groups are dead or every clip binds, the gradient is 0
    assert 4 * sum(norm > 1e-3 for norm in expected.exact_grad_norms) >= len(expected.exact_grad_norms)
    assert_same_training(actual, expected, start)
    assert actual.metric("loss") == pytest.approx(expected.metric("loss"), rel=1e-4, abs=1e-6)
    assert actual.trainer.state.num_input_tokens_seen == expected.trainer.state.num_input_tokens_seen
    return expected, actual


@pytest.mark.parametrize(
    ("number", "loss_type", "level", "beta"),
    [
        pytest.param(number, *setting, marks=[] if number % 4 == number // 4 % 4 else [pytest.mark.slow])
        for number, setting in enumerate(itertools.product(LOSS_TYPES, ("token", "sequence"), (0.0, 0.04)))
    ],
)
def test_every_loss_has_trls_gradient(policy, start, tmp_path, number, loss_type, level, beta):
    schedule = ((2, 1, 1), (2, 2, 4), (4, 2, 2), (2, 4, 2))[number % 4]
    check_parity(
        policy,
        start,
        tmp_path,
        ours=(GRPOExtTrainer, PaddedTrainer)[number // 4 % 2],
        loss_type=loss_type,
        importance_sampling_level=level,
        beta=beta,
        max_steps=steps_of_two_generations(*schedule),
        **schedule_options(*schedule),
    )


@pytest.mark.parametrize(
    ("number", "schedule", "loss_type"),
    [
        # each schedule with two loss types; the features take turns
        pytest.param(number, schedule, loss_type, marks=[pytest.mark.slow] if number % 9 else [])
        for number, (schedule, loss_type) in enumerate(
            (schedule, LOSS_TYPES[(position + offset) % 8])
            for offset in (0, 4)
            for position, schedule in enumerate(SCHEDULES)
        )
    ],
    ids=str,
)
def test_every_schedule_has_trls_gradient(policy, start, tmp_path, number, schedule, loss_type):
    check_parity(
        policy,
        start,
        tmp_path,
        ours=(GRPOExtTrainer, PaddedTrainer)[number // 6 % 2],
        loss_type=loss_type,
        max_steps=steps_of_two_generations(*schedule),
        **schedule_options(*schedule),
        **FEATURES[number % len(FEATURES)],
    )


@pytest.mark.parametrize(
    ("features", "loss_type"),
    [
        pytest.param(features, loss_type, marks=[pytest.mark.slow] if (row + column) % 12 else [])
        for row, features in enumerate(FEATURES[1:])
        for column, loss_type in enumerate(LOSS_TYPES)
    ],
    ids=str,
)
def test_every_feature_has_trls_gradient(policy, start, tmp_path, loss_type, features):
    schedule = {"num_iterations": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 4}
    check_parity(policy, start, tmp_path, loss_type=loss_type, max_steps=5, **schedule, **features)


# Less work


def forwards(run, for_gradient):
    return [forward.rows for forward in run.forwards if forward.has_gradient == for_gradient]


@pytest.mark.parametrize(
    ("schedule", "extra_rows"),
    [
        ((2, 1, 1), []),  # one optimizer step a pass: nothing is missing
        ((2, 2, 4), [ROWS, ROWS]),  # two: the second's micro-batches, for each generation
        ((2, 3, 2), None),  # generations in the middle of an optimizer step: see below
    ],
)
def test_old_policy_forwards(policy, tmp_path, schedule, extra_rows):
    mu, accumulation, per_generation = schedule
    options = {
        **schedule_options(*schedule),
        "max_steps": mu * per_generation // accumulation or 1,
        "skip_zero_advantage": False,
    }
    ours = run(PaddedTrainer, policy, tmp_path / "ours", GRPOExtConfig, **options)
    without = run(PaddedTrainer, policy, tmp_path / "off", GRPOExtConfig, reuse_first_pass_logps=False, **options)
    assert len(forwards(ours, True)) == len(forwards(without, True))
    generations = ours.trainer.rollout_func.num_calls
    assert forwards(without, False) == [ROWS] * per_generation * generations  # all rows, as in TRL
    if extra_rows is not None:
        assert forwards(ours, False) == extra_rows * generations
    else:
        assert len(forwards(ours, False)) < len(forwards(without, False))
    assert ours.exact_grad_norms == pytest.approx(without.exact_grad_norms, rel=1e-6)


def test_dropout_takes_the_forward(policy, start, tmp_path):
    """With dropout a second forward is another one: the old policy's is taken for all rows, as in TRL."""
    options = {"num_iterations": 2, "max_steps": 2}
    lora = LoraConfig(r=2, lora_dropout=0.5, init_lora_weights=False)
    every_row = {"skip_zero_advantage": False}  # with other rows in a micro-batch, dropout hits other rows
    dropped = run(PaddedTrainer, policy, tmp_path / "a", GRPOExtConfig, peft_config=lora, **every_row, **options)
    assert len(forwards(dropped, False)) == dropped.trainer.rollout_func.num_calls
    expected = run(GRPOTrainer, policy, tmp_path / "b", peft_config=lora, **options)
    assert dropped.exact_grad_norms == pytest.approx(expected.exact_grad_norms, rel=1e-5)
    kept = run(PaddedTrainer, policy, tmp_path / "c", peft_config=LoraConfig(r=2, init_lora_weights=False), **options)
    assert forwards(kept, False) == []


def test_randomness_without_a_name_takes_the_forward(policy, tmp_path, monkeypatch):
    """Dropout in a function, which neither a module nor a configuration tells of."""
    plain = Qwen2MLP.forward
    monkeypatch.setattr(
        Qwen2MLP, "forward", lambda self, states: torch.nn.functional.dropout(plain(self, states), 0.5, self.training)
    )
    options = {"num_iterations": 2, "max_steps": 2}
    expected = run(GRPOTrainer, policy, tmp_path / "theirs", **options)
    ours = run(PaddedTrainer, policy, tmp_path / "ours", GRPOExtConfig, skip_zero_advantage=False, **options)
    assert ours.exact_grad_norms == pytest.approx(expected.exact_grad_norms, rel=1e-5)
    assert forwards(ours, False) == forwards(expected, False)


@pytest.mark.parametrize(
    "loss_type",
    [
        pytest.param(name, marks=[pytest.mark.slow] if number % 3 else [])
        for number, name in enumerate(name for name in LOSS_TYPES if name != "bnpo")
    ],
)
def test_rows_without_a_gradient_are_not_computed(policy, start, tmp_path, loss_type):
    options = {
        "loss_type": loss_type,
        "num_iterations": 2,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
        "max_steps": 8,
        "mask_truncated_completions": True,
    }
    expected, ours = check_parity(policy, start, tmp_path, ours=PaddedTrainer, **options)
    assert len(forwards(ours, True)) == len(forwards(expected, True))
    assert sum(forwards(ours, True)) < 0.8 * sum(forwards(expected, True))
    # spread evenly: the two micro-batches of an optimizer step differ by one row at most
    pairs = zip(forwards(ours, True)[::2], forwards(ours, True)[1::2], strict=True)
    assert all(abs(first - second) <= 1 for first, second in pairs)


@pytest.mark.parametrize("options", [{"loss_type": "bnpo"}, {"beta": 0.04}, {"entropy_coef": 0.01}], ids=str)
def test_rows_that_something_else_needs_are_computed(policy, tmp_path, options):
    ours = run(PaddedTrainer, policy, tmp_path, num_iterations=2, max_steps=6, **options)
    assert set(forwards(ours, True)) == {ROWS}


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("beta", [pytest.param(0.0, marks=pytest.mark.slow), 0.04])
def test_metrics_are_trls(policy, tmp_path, beta, level):
    """TRL's over the whole optimizer step in one micro-batch, from unequal micro-batches without dead rows."""
    options = {"num_iterations": 2, "beta": beta, "importance_sampling_level": level, "epsilon": 0.01, "delta": 1.5}
    one, two = (
        {"per_device_train_batch_size": 2 * ROWS // parts, "gradient_accumulation_steps": parts} for parts in (1, 2)
    )
    expected = run(GRPOTrainer, policy, tmp_path / "theirs", steps_per_generation=1, **one, **options)
    ours = run(GRPOExtTrainer, policy, tmp_path / "ours", steps_per_generation=2, **two, **options)
    # the entropy of rows that are left out is not known
    excluded = {"step_time"} if beta else {"step_time", "entropy"}
    for theirs, mine in zip(expected.log, ours.log, strict=True):
        for name in theirs.keys() - excluded:
            if not name.startswith("train_"):
                assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
    assert sum(expected.metric("clip_ratio/region_mean")) > 0
    assert (sum(ours.metric("update/rows_skipped")) > 0) == (beta == 0.0)
    first, second = ours.log[0], ours.log[1]
    assert first["iteration/1/approx_kl"] == 0.0
    assert first["iteration/1/clip_ratio"] == 0.0
    assert first["iteration/1/ratio_max"] == 1.0
    assert second["iteration/2/approx_kl"] > 0
    assert second["iteration/2/ratio_max"] > 1.0
    assert second["rollouts/iterations_used"] == 2
    assert "iteration/2/approx_kl" not in first


def test_a_forward_for_the_old_policy_that_fails(policy, tmp_path, monkeypatch):
    """Rows without it are not gone on with: whoever trains on gets it anew."""

    def run_out_of_memory(*args):
        raise MemoryError

    args = canned_config(tmp_path, **schedule_options(2, 2, 4))
    seen = {}

    class Keeping(GRPOExtTrainer):
        def train(self, *args, **kwargs):
            seen["trainer"] = self
            return super().train(*args, **kwargs)

    monkeypatch.setattr(MultiIterationMixin, "_keep_old_logps", run_out_of_memory)
    with pytest.raises(MemoryError):
        train_canned(Keeping, args, policy)
    left = compat.buffered_micro_batches(seen["trainer"])
    assert len(left) == 4
    assert not isinstance(left, RolloutBuffer)


def test_zeros_are_explained_once(policy, tmp_path, caplog):
    run(GRPOExtTrainer, policy, tmp_path, num_iterations=2, max_steps=6)
    assert sum("clip_ratio is 0" in record.message for record in caplog.records) == 1


# KL stop


def test_kl_stop(policy, tmp_path):
    """Passes are made until the KL exceeds the target; then the same prompts get fresh completions."""
    options = {"num_iterations": 4, "max_steps": 8, "loss_type": "dr_grpo", "skip_zero_advantage": False}
    free = run(GRPOExtTrainer, policy, tmp_path / "free", GRPOExtConfig, **options)
    kl = [value for entry in free.log for name, value in entry.items() if name == "iteration/2/approx_kl"]
    assert free.trainer.rollout_func.num_calls == 2
    stopped = run(GRPOExtTrainer, policy, tmp_path / "stopped", GRPOExtConfig, target_kl=max(kl) / 2, **options)
    assert stopped.trainer.rollout_func.num_calls > 2
    assert stopped.trainer.state.global_step == 8
    assert min(stopped.metric("rollouts/iterations_used")) == 2.0
    # until the first stop the two runs are the same
    assert stopped.exact_grad_norms[:2] == free.exact_grad_norms[:2]
    assert stopped.exact_grad_norms != free.exact_grad_norms


def test_without_a_stop_the_trajectory_is_trls(policy, start, tmp_path):
    options = {"num_iterations": 4, "max_steps": 8}
    expected = run(GRPOTrainer, policy, tmp_path / "theirs", **options)
    ours = run(GRPOExtTrainer, policy, tmp_path / "ours", GRPOExtConfig, target_kl=1e6, **options)
    assert ours.exact_grad_norms == pytest.approx(expected.exact_grad_norms, rel=1e-5, abs=1e-7)
    assert relative_difference(ours.weights, expected.weights, start) < 1e-5


def test_reshuffle(policy, start, tmp_path):
    options = {"num_iterations": 3, "steps_per_generation": 4, "max_steps": 12, "skip_zero_advantage": False}
    plain = run(GRPOExtTrainer, policy, tmp_path / "plain", GRPOExtConfig, **options)
    shuffled = run(GRPOExtTrainer, policy, tmp_path / "shuffled", GRPOExtConfig, reshuffle_iterations=True, **options)
    assert shuffled.exact_grad_norms[:4] == plain.exact_grad_norms[:4]  # the first pass is as it was
    assert shuffled.exact_grad_norms[4:] != pytest.approx(plain.exact_grad_norms[4:], rel=1e-3)
    # where a pass is one optimizer step, the order within it says nothing
    options |= {"gradient_accumulation_steps": 4, "max_steps": 3}
    plain = run(GRPOExtTrainer, policy, tmp_path / "plain", GRPOExtConfig, **options)
    shuffled = run(GRPOExtTrainer, policy, tmp_path / "shuffled", GRPOExtConfig, reshuffle_iterations=True, **options)
    assert shuffled.exact_grad_norms == pytest.approx(plain.exact_grad_norms, rel=1e-5)


# In other people's trainers


def test_a_users_subclass(policy, start, tmp_path):
    class UserTrainer(GRPOTrainer):
        calls = 0

        def _calculate_rewards(self, *args):
            UserTrainer.calls += 1
            return 2 * super()._calculate_rewards(*args)

        def log(self, logs, start_time=None):
            super().log({**logs, "mine": 1.0}, start_time)

    class Both(MultiIterationMixin, UserTrainer):
        pass

    options = {"num_iterations": 2, "scale_rewards": "none", "max_steps": 6}
    _, ours = check_parity(policy, start, tmp_path, theirs=UserTrainer, ours=Both, **options)
    assert UserTrainer.calls == 6
    assert ours.metric("mine")
    assert ours.metric("iteration/2/approx_kl")
    assert forwards(ours, False) == []


def test_a_loss_of_their_own(policy, start, tmp_path):
    """TRL's GMPO trainer has another loss: it stays, with the forwards that it may rely on, and the report."""

    class Both(MultiIterationMixin, GMPOTrainer):
        pass

    options = {"num_iterations": 2, "steps_per_generation": 2, "max_steps": 8}
    expected = run(GMPOTrainer, policy, tmp_path / "theirs", GMPOConfig, **options)
    ours = run(Both, policy, tmp_path / "ours", GMPOConfig, **options)
    assert ours.exact_grad_norms == pytest.approx(expected.exact_grad_norms, rel=1e-5, abs=1e-7)
    assert relative_difference(ours.weights, expected.weights, start) < 1e-5
    assert ours.metric("iteration/2/approx_kl")
    assert forwards(ours, False) == forwards(expected, False)


def test_evaluation_in_between(policy, start, tmp_path):
    class Evaluated(GRPOExtTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, eval_dataset=canned_prompts(num_prompts=4), **kwargs)

    options = {"num_iterations": 2, "max_steps": 4}
    ours = run(
        Evaluated, policy, tmp_path, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=ROWS, **options
    )
    assert [entry["eval_reward"] for entry in ours.log if "eval_reward" in entry]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_kl": 0.0, "num_iterations": 2}, "target_kl must be a positive number of nats, .* got 0.0"),
        ({"target_kl": -1.0, "num_iterations": 2}, "target_kl must be a positive number"),
        ({"target_kl": float("nan"), "num_iterations": 2}, "target_kl must be a positive number"),
        ({"target_kl": 0.1}, "num_iterations=1 makes a single one: set num_iterations to 2 or more"),
        ({"reshuffle_iterations": True}, "num_iterations=1 makes a single one"),
        ({"num_iterations": 0}, "num_iterations must be at least 1, got 0"),
    ],
)
def test_bad_settings(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        canned_config(tmp_path, GRPOExtConfig, **options)
