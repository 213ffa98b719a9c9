"""vLLM's importance sampling correction, from made-up log-probabilities of a sampler: TRL's gradient, with less work.

Tokens without a log-probability are among them, and bounds of the weights that bite. A real vLLM is in
`tests/real_vllm`.
"""

import itertools

import pytest
from canned import (
    MISSING,
    ROWS,
    SetAttributes,
    assert_same_training,
    canned_config,
    schedule_options,
    train_canned,
)
from safetensors.torch import load_file
from test_iterations import PaddedTrainer, start  # noqa: F401 (a fixture)
from test_iterations import check_parity as check_parity_of_runs
from trl import GRPOConfig, GRPOTrainer

from trl_grpo_ext.config import GRPOExtConfig
from trl_grpo_ext.rollouts import FOLDER, rollout_files
from trl_grpo_ext.trainer import GRPOExtTrainer


MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
FACTORS = {
    "vllm_importance_sampling_mode": MODES,
    "loss_type": ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"),
    "importance_sampling_level": ("token", "sequence"),
    "schedule": (
        (1, 1, 1),
        (1, 2, 2),
        (2, 2, 4),
        (4, 2, 2),
        (4, 1, 2),
    ),  # num_iterations, accumulation, per generation
    "beta": (0.0, 0.04),
    "trainer": (GRPOExtTrainer, PaddedTrainer),
    "off_policy_mask_threshold": (None, 0.02),
    "tool_masks": (False, True),
}


def is_possible(row) -> bool:
    """TRL refuses VESPO with a weight for a sequence."""
    return row.get("loss_type") != "vespo" or not row.get("vllm_importance_sampling_mode", "").startswith("sequence")


def pairs_of(row):
    return set(itertools.combinations(row.items(), 2))


def all_pairs():
    pairs = set()
    for (first, values), (second, others) in itertools.combinations(FACTORS.items(), 2):
        pairs |= {((first, value), (second, other)) for value in values for other in others}
    return {pair for pair in pairs if is_possible(dict(pair))}


def pairwise_rows():
    """Settings such that any two values of two factors meet in one of them: greedily, from a pair that is missing."""
    missing, rows = all_pairs(), []
    while missing:
        row = dict(min(missing, key=repr))
        for name, values in FACTORS.items():
            if name not in row:
                candidates = [{**row, name: value} for value in values]
                candidates = [candidate for candidate in candidates if is_possible(candidate)]
                row = max(candidates, key=lambda candidate: len(pairs_of(ordered(candidate)) & missing))
        row = ordered(row)
        missing -= pairs_of(row)
        rows.append(row)
    return rows


def ordered(row):
    return {name: row[name] for name in FACTORS if name in row}


def bounds_of(mode):
    """Of a weight of a token, or of the product over a row of them."""
    names = "vllm_importance_sampling_clip_min", "vllm_importance_sampling_clip_max"
    return dict(zip(names, (0.8, 1.4) if mode.startswith("token") else (0.6, 2.0), strict=True))


def run(trainer_class, policy, output_dir, config_class=GRPOConfig, noise=0.3, resume=None, **options):
    names = ("tool_masks", "kinds", "callbacks")
    passed = {name: options.pop(name) for name in names if name in options}
    options = {
        "use_vllm": True,
        **bounds_of(options.get("vllm_importance_sampling_mode", "sequence_mask")),
        **options,
    }
    args = canned_config(output_dir, config_class, **options)
    return train_canned(trainer_class, args, policy, sampler_noise=noise, resume=resume, **passed)


def check_parity(policy, start, tmp_path, ours, **options):  # noqa: F811
    return check_parity_of_runs(policy, start, tmp_path, ours=ours, run=run, **options)


def test_all_pairs_are_among_the_rows():
    met = set().union(*(pairs_of(row) for row in pairwise_rows()))
    assert met == all_pairs()
    assert all(is_possible(row) for row in pairwise_rows())


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, marks=[pytest.mark.slow] if number % 6 else [], id="-".join(str(v) for v in row.values()))
        for number, row in enumerate(pairwise_rows())
    ],
)
def test_trls_gradient(policy, start, tmp_path, row):  # noqa: F811
    row = dict(row)
    mu, accumulation, per_generation = row.pop("schedule")
    expected, ours = check_parity(
        policy,
        start,
        tmp_path,
        row.pop("trainer"),
        max_steps=2 * mu * per_generation // accumulation,
        **schedule_options(mu, accumulation, per_generation),
        **row,
    )
    mode = row["vllm_importance_sampling_mode"]
    lowest, _ = bounds_of(mode).values()
    smallest = min(expected.metric("sampling/importance_sampling_ratio/min"))
    assert smallest == (0.0 if mode.endswith("mask") else pytest.approx(lowest))  # the bounds bite
    if mu == 1 and accumulation == per_generation:
        assert not [forward for forward in ours.forwards if not forward.has_gradient]


# Less work


def tokens(run, for_gradient=True):
    return sum(forward.tokens for forward in run.forwards if forward.has_gradient == for_gradient)


def rows_without_gradient(run):
    return [forward.rows for forward in run.forwards if not forward.has_gradient]


@pytest.mark.parametrize(
    ("schedule", "extra_rows"),
    [
        ((1, 1, 1), []),  # one pass, aligned: TRL takes the forward, for the weights
        ((4, 2, 2), []),  # one optimizer step a pass
        ((4, 1, 2), [ROWS]),  # two: the second's micro-batch, for each generation
    ],
)
def test_old_policy_forwards(policy, tmp_path, schedule, extra_rows):
    mu, accumulation, per_generation = schedule
    options = {
        **schedule_options(*schedule),
        "max_steps": 2 * mu * per_generation // accumulation,
    }
    ours = run(PaddedTrainer, policy, tmp_path / "ours", GRPOExtConfig, skip_zero_advantage=False, **options)
    assert rows_without_gradient(ours) == 2 * extra_rows
    theirs = run(GRPOTrainer, policy, tmp_path / "theirs", **options)
    assert rows_without_gradient(theirs) == 2 * per_generation * [ROWS]
    assert ours.exact_grad_norms == pytest.approx(theirs.exact_grad_norms, rel=1e-5, abs=1e-7)


@pytest.mark.slow
def test_the_correction_costs_no_tokens(policy, tmp_path):
    """Rows are left out and dealt out by prompt as without it; the weights are truncated, so that none is 0."""
    options = {"num_iterations": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 4, "max_steps": 16}
    options["vllm_importance_sampling_mode"] = "token_truncate"
    corrected, plain = (
        run(
            GRPOExtTrainer,
            policy,
            tmp_path / str(corrects),
            GRPOExtConfig,
            vllm_importance_sampling_correction=corrects,
            kinds=("dead", "live"),
            shared_prefix="on",
            **options,
        )
        for corrects in (True, False)
    )
    assert corrected.exact_grad_norms != pytest.approx(plain.exact_grad_norms, rel=1e-3)
    for for_gradient in (True, False):
        assert tokens(corrected, for_gradient) == tokens(plain, for_gradient)
    theirs = run(GRPOTrainer, policy, tmp_path / "theirs", kinds=("dead", "live"), **options)
    assert corrected.exact_grad_norms == pytest.approx(theirs.exact_grad_norms, rel=1e-5, abs=1e-7)
    assert tokens(corrected) < 0.35 * tokens(theirs)


@pytest.mark.parametrize("accumulation", [4, pytest.param(2, marks=pytest.mark.slow)])
def test_rows_without_weight_are_left_out_once_they_are_known(policy, start, tmp_path, accumulation):  # noqa: F811
    """Of the first optimizer step after the first pass, of the others before it."""
    options = {
        "num_iterations": 2,
        "gradient_accumulation_steps": accumulation,
        "steps_per_generation": 4,
        "max_steps": 8 // accumulation,
        "kinds": ("live",),
    }
    _, ours = check_parity(policy, start, tmp_path, PaddedTrainer, **options)
    first, second = (sum(f.rows for f in half) for half in halves(f for f in ours.forwards if f.has_gradient))
    has_advantage, has_weight = what_rollouts_have(policy, tmp_path, options)
    known, live = int((has_advantage & has_weight).sum()), int(has_advantage.sum())
    assert 4 <= known <= live - 4  # not vacuous
    assert second == known
    assert ours.metric("update/rows_without_weight") == [live - known]
    assert first == live if accumulation == 4 else known < first < live


def halves(forwards):
    forwards = list(forwards)
    return forwards[: len(forwards) // 2], forwards[len(forwards) // 2 :]


def what_rollouts_have(policy, tmp_path, options):
    """Which rows of the first batch of rollouts have an advantage, and which a weight, as TRL has it."""
    seen = []

    class Noting(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            rows = super()._generate_and_score_completions(inputs)
            weights = rows["importance_sampling_ratio"] * rows["completion_mask"]
            seen.append((rows["advantages"] != 0, weights.any(dim=1)))
            return rows

    run(Noting, policy, tmp_path / "noting", **{**options, "max_steps": 1})
    return seen[0]


@pytest.mark.skipif(not MISSING, reason="each token's weight is 0, and there is no gradient")
def test_vespo_bounds_weights_of_0(policy, start, tmp_path):  # noqa: F811
    """There they leave a gradient, so that no row is left out for them."""
    options = {
        "loss_type": "vespo",
        "vllm_importance_sampling_mode": "token_mask",
        "vllm_importance_sampling_clip_min": 0.99,
        "vllm_importance_sampling_clip_max": 1.01,
        "num_iterations": 2,
        "kinds": ("live",),
        "max_steps": 4,
    }
    _, ours = check_parity(policy, start, tmp_path, PaddedTrainer, **options)
    assert {forward.rows for forward in ours.forwards} == {ROWS}


def test_a_loss_that_wants_rows_without_weight_gets_fresh_ones(policy, tmp_path, caplog):
    change = SetAttributes(2, loss_type="vespo")
    options = {"num_iterations": 4, "max_steps": 4, "kinds": ("live",), "vllm_importance_sampling_mode": "token_mask"}
    options |= {"vllm_importance_sampling_clip_min": 0.99, "vllm_importance_sampling_clip_max": 1.01}
    changed = run(change.of(PaddedTrainer), policy, tmp_path, callbacks=[change], **options)
    assert caplog.text.count("going on with fresh ones") == 1
    assert changed.trainer.rollout_func.num_calls == 2


# What is reported, kept and refused


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("schedule", [(1, 2, 2), pytest.param((2, 2, 4), marks=pytest.mark.slow)])
def test_metrics_are_trls(policy, tmp_path, mode, schedule):
    mu, accumulation, per_generation = schedule
    options = {
        **schedule_options(*schedule),
        "vllm_importance_sampling_mode": mode,
        "kinds": ("live",),
        "max_steps": 2 * mu * per_generation // accumulation,
    }
    expected = run(GRPOTrainer, policy, tmp_path / "theirs", **options)
    ours = run(GRPOExtTrainer, policy, tmp_path / "ours", GRPOExtConfig, skip_zero_advantage=False, **options)
    names = [name for name in expected.log[0] if name.startswith("sampling/")]
    assert len(names) == 5
    for theirs, mine in zip(expected.log, ours.log, strict=True):
        for name in names:
            assert (name in mine) == (name in theirs)
            if name in theirs:
                assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("cut", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_resume_between_passes(policy, tmp_path, cut):
    options = {
        "num_iterations": 4,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 2,
        "max_steps": 5,
        "optim": "adamw_torch",
        "save_strategy": "steps",
        "save_steps": 1,
    }
    whole = run(GRPOExtTrainer, policy, tmp_path / "whole", **options)
    checkpoint = tmp_path / "whole" / f"checkpoint-{cut}"
    kept = load_file(rollout_files(checkpoint / FOLDER, 0, 1)[0])
    for name in ("old_per_token_logps", "importance_sampling_ratio", "sampling_per_token_logps"):
        assert {f"{index}.{name}" for index in range(2)} <= kept.keys()
    rest = run(GRPOExtTrainer, policy, tmp_path / "rest", resume=str(checkpoint), **options)
    assert rest.exact_grad_norms == whole.exact_grad_norms[cut:]
    for name, weight in whole.weights.items():
        assert rest.weights[name].equal(weight), name


def test_completions_without_log_probabilities(policy, tmp_path):
    with pytest.raises(ValueError, match="let rollout_func return them as 'logprobs'"):
        run(GRPOExtTrainer, policy, tmp_path, noise=None)
    run(GRPOExtTrainer, policy, tmp_path, noise=None, vllm_importance_sampling_correction=False, max_steps=1)


@pytest.mark.parametrize("at_step", [1, 2])
def test_a_correction_that_is_turned_off(policy, start, tmp_path, at_step):  # noqa: F811
    """Where weights are truncated no row is missing for it."""
    change = SetAttributes(at_step, vllm_importance_sampling_correction=False)
    options = {"num_iterations": 2, "steps_per_generation": 2, "max_steps": 4, "kinds": ("live",)}
    options |= {"vllm_importance_sampling_mode": "token_truncate", "callbacks": [change]}
    expected = run(change.of(GRPOTrainer), policy, tmp_path / "theirs", **options)
    ours = run(change.of(PaddedTrainer), policy, tmp_path / "ours", **options)
    assert_same_training(ours, expected, start)


def without_old_policy(rows):
    del rows["old_per_token_logps"], rows["sampling_per_token_logps"]


def with_halved_weights(rows):
    del rows["old_per_token_logps"]
    rows["importance_sampling_ratio"] = rows["importance_sampling_ratio"] / 2


@pytest.mark.parametrize("change", [without_old_policy, with_halved_weights])
def test_weights_that_a_subclass_leaves_or_makes_stay(policy, start, tmp_path, change):  # noqa: F811
    def changing(base):
        class Changing(base):
            def _generate_and_score_completions(self, inputs):
                rows = super()._generate_and_score_completions(inputs)
                change(rows)
                return rows

        return Changing

    options = {"gradient_accumulation_steps": 2, "steps_per_generation": 2, "max_steps": 3}
    expected = run(changing(GRPOTrainer), policy, tmp_path / "theirs", **options)
    ours = run(changing(PaddedTrainer), policy, tmp_path / "ours", **options)
    assert_same_training(ours, expected, start)


# Losses that are not computed here


@pytest.mark.parametrize("options", [{"entropy_coef": 0.01}, {"top_entropy_quantile": 0.5}], ids=str)
def test_what_trl_computes_gets_trls_forward(policy, start, tmp_path, options):  # noqa: F811
    schedule = {"num_iterations": 2, "steps_per_generation": 2, "max_steps": 4}
    expected, ours = check_parity(policy, start, tmp_path, PaddedTrainer, **schedule, **options)
    assert rows_without_gradient(ours) == rows_without_gradient(expected) == 2 * [ROWS]


def test_rows_that_only_trl_knows_get_their_weights(policy, start, tmp_path, monkeypatch):  # noqa: F811
    """As where there are images: that TRL computes the loss shows once the rows are there."""

    class NotText(PaddedTrainer):
        def _computes_own_loss(self, rollouts):
            return False

    schedule = {"num_iterations": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 4, "max_steps": 4}
    expected, ours = check_parity(policy, start, tmp_path, NotText, **schedule)
    assert rows_without_gradient(ours) == rows_without_gradient(expected)
    names = ("sampling/importance_sampling_ratio/mean", "sampling/sampling_logp_difference/max")
    for name in names:
        assert ours.metric(name) == pytest.approx(expected.metric(name), rel=1e-4)


def test_kl_stop(policy, tmp_path):
    options = {"num_iterations": 4, "max_steps": 8, "kinds": ("live",)}
    free = run(GRPOExtTrainer, policy, tmp_path / "free", GRPOExtConfig, **options)
    assert free.trainer.rollout_func.num_calls == 2
    target = max(free.metric("iteration/2/approx_kl")) / 2
    stopped = run(GRPOExtTrainer, policy, tmp_path / "stopped", GRPOExtConfig, target_kl=target, **options)
    assert stopped.trainer.rollout_func.num_calls > 2
    assert stopped.metric("rollouts/iterations_used")[0] == 2.0
