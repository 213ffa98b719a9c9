"""The objective against the textbook's numbers, and against loops over single tokens."""

import itertools
import math

import oracle
import pytest
import torch
from oracle import grpo_objective

from trl_grpo_ext.objective import (
    LOSS_TYPES,
    SAMPLING_MODES,
    ClippedObjective,
    aggregate,
    clip_binds,
    clipped_surrogate,
    gradient_coefficient,
    group_advantages,
    importance_ratio,
    k3_kl,
    off_policy_mask,
    sampling_weights,
)


REWARDS = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0]


def random_inputs(rows, columns, seed=0, spread=0.6):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    lengths = torch.randint(0, columns + 1, (rows,), generator=generator)
    lengths[0] = columns
    mask = (torch.arange(columns) < lengths.unsqueeze(1)).long()
    old = -random(rows, columns).abs()
    logps = (old + spread * random(rows, columns)).requires_grad_()
    return logps, old, old + spread * random(rows, columns), random(rows), mask


def test_textbook_advantages():
    advantages = group_advantages(torch.tensor(REWARDS), 8, std_epsilon=0.0)
    assert torch.tensor(REWARDS).std().item() == pytest.approx(0.5345, abs=5e-5)
    assert advantages.tolist() == pytest.approx([0.9354 if reward else -0.9354 for reward in REWARDS], abs=5e-5)
    without_division = group_advantages(torch.tensor([1.0, 0.0, 2.0]), 3, scale=False)
    assert without_division.tolist() == [0.0, -1.0, 1.0]
    # two groups do not know of each other, and one whose rewards are equal has no signal
    two = group_advantages(torch.tensor([1.0, 0.0, 7.0, 7.0]), 2)
    assert two.tolist() == pytest.approx([0.7070, -0.7070, 0.0, 0.0], abs=1e-4)


@pytest.mark.parametrize(("shape", "num_generations"), [((6,), 4), ((4,), 1), ((2, 2), 2)])
def test_advantages_of_no_groups(shape, num_generations):
    with pytest.raises(ValueError, match="must be of shape"):
        group_advantages(torch.zeros(shape), num_generations)


def test_textbook_ratio():
    logps, old, mask = torch.tensor([[0.7]]).log(), torch.tensor([[0.5]]).log(), torch.ones(1, 1)
    ratio = importance_ratio(logps, old, mask)
    assert ratio.item() == pytest.approx(1.4)
    assert clipped_surrogate(ratio, torch.tensor([[1.0]]), 0.2, 0.2).item() == pytest.approx(1.2)
    assert clipped_surrogate(ratio, torch.tensor([[-1.0]]), 0.2, 0.2).item() == pytest.approx(-1.4)  # pessimistic
    assert clipped_surrogate(ratio, torch.tensor([[-1.0]]), 0.2, 0.2, delta=1.3).item() == pytest.approx(-1.3)


def test_sequence_ratio_is_the_geometric_mean():
    ratio = importance_ratio(
        torch.tensor([[2.0, 8.0, 99.0]]).log(), torch.zeros(1, 3), torch.tensor([[1, 1, 0]]), "sequence"
    )
    assert ratio.tolist() == [[pytest.approx(4.0)]]
    with pytest.raises(ValueError, match="must be 'token' or 'sequence', got 'word'"):
        importance_ratio(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1), "word")


def test_k3():
    assert k3_kl(torch.tensor([0.5]).log(), torch.tensor([0.25]).log()).item() == pytest.approx(0.5 + math.log(2) - 1)
    # unbiased: its mean under the policy is the KL
    policy, reference = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.2, 0.5, 0.3])
    kl = (policy * (policy / reference).log()).sum()
    assert (policy * k3_kl(policy.log(), reference.log())).sum().item() == pytest.approx(kl.item(), rel=1e-5)
    assert (k3_kl(torch.randn(100), torch.randn(100)) >= 0).all()


def num_tokens_of(loss_type):
    return 11.0 if loss_type in ("dapo", "cispo", "vespo") else None


def assert_same_loss_and_gradient(loss, expected, logps):
    (gradient,) = torch.autograd.grad(loss, logps)
    (expected_gradient,) = torch.autograd.grad(expected, logps)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10, abs=1e-14)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    ("loss_type", "level", "beta", "correct_kl", "delta"),
    list(itertools.product(tuple(LOSS_TYPES), ("token", "sequence"), (0.0, 0.04), (False, True), (None, 1.35))),
)
@pytest.mark.parametrize(("rows", "columns"), [(5, 7), (1, 1), (3, 1)])
def test_against_loops(rows, columns, loss_type, level, beta, correct_kl, delta):
    settings = {"epsilon_low": 0.2, "epsilon_high": 0.3, "delta": delta, "beta": beta, "correct_kl": correct_kl}
    for seed in range(3):
        logps, old, reference, advantages, mask = random_inputs(rows, columns, seed)
        objective = ClippedObjective(**settings, level=level, loss_type=loss_type, max_completion_length=columns + 2)
        output = objective(logps, old, advantages, mask, reference, num_tokens=num_tokens_of(loss_type))
        expected = grpo_objective(
            logps,
            old,
            reference,
            advantages,
            mask,
            **settings,
            level=level,
            loss_type=loss_type,
            max_completion_length=columns + 2,
            num_tokens=11.0,
        )
        assert_same_loss_and_gradient(output.loss, expected, logps)


def test_first_pass():
    """Ratio 1: the loss of a normalized group is beta times the KL, and the gradient is not 0."""
    logps, _, reference, _, _ = random_inputs(8, 4)
    mask = torch.ones(8, 4, dtype=torch.long)
    advantages = group_advantages(torch.tensor(REWARDS, dtype=torch.float64), 8)
    output = ClippedObjective(0.2, 0.2, beta=0.04)(logps, logps.detach(), advantages, mask, reference)
    assert output.loss.item() == pytest.approx(0.04 * k3_kl(logps, reference).mean().item())
    assert output.metrics["clip_ratio/region_mean"].item() == 0.0
    (gradient,) = torch.autograd.grad(output.loss, logps)
    coefficient = advantages.unsqueeze(1) + 0.04 * (torch.exp(reference - logps.detach()) - 1)
    torch.testing.assert_close(-gradient * mask.numel(), coefficient)


@pytest.mark.parametrize("delta", [None, 1.35])
@pytest.mark.parametrize("correct_kl", [False, True])
def test_gradient_coefficient_is_the_gradient(delta, correct_kl):
    logps, old, reference, advantages, _ = random_inputs(6, 9)
    mask = torch.ones(6, 9, dtype=torch.long)
    objective = ClippedObjective(0.2, 0.3, delta=delta, beta=0.04, correct_kl=correct_kl, loss_type="bnpo")
    (gradient,) = torch.autograd.grad(objective(logps, old, advantages, mask, reference).loss, logps)
    coefficient = gradient_coefficient(
        importance_ratio(logps, old, mask).detach(),
        advantages.unsqueeze(1),
        0.2,
        0.3,
        delta,
        beta=0.04,
        correct_kl=correct_kl,
        per_token_logps=logps.detach(),
        ref_per_token_logps=reference,
    )
    torch.testing.assert_close(-gradient * mask.numel(), coefficient)
    assert (coefficient == 0).sum() == 0  # the KL's part is never off
    for given in ({}, {"per_token_logps": torch.zeros(1, 1)}, {"ref_per_token_logps": torch.zeros(1, 1)}):
        with pytest.raises(ValueError, match=r"^with beta != 0, .* are needed$"):
            gradient_coefficient(torch.ones(1, 1), torch.ones(1, 1), 0.2, 0.2, beta=0.1, **given)


# The sampler


def sampled_inputs(rows, columns, seed):
    """As `random_inputs`, and a sampler's log-probabilities near the old policy's, of which some are missing."""
    logps, old, reference, advantages, mask = random_inputs(rows, columns, seed)
    generator = torch.Generator().manual_seed(seed)
    sampled = old + 0.4 * torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    sampled[torch.rand(rows, columns, generator=generator) < 0.15] = torch.nan
    return logps, old, reference, advantages, mask, sampled


BOUNDS = [(0.8, 1.3), (None, 1.3), (0.8, None), (None, None)]


@pytest.mark.parametrize("mode", SAMPLING_MODES)
@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize(("rows", "columns"), [(7, 6), (1, 1), (3, 1)])
def test_sampling_weights(mode, bounds, rows, columns):
    for seed in range(3):
        _, old, _, _, mask, sampled = sampled_inputs(rows, columns, seed)
        weights = sampling_weights(old, sampled, mask, mode, *bounds)
        assert weights.shape == ((rows, columns) if mode.startswith("token") else (rows, 1))
        expected = oracle.sampling_weights(old, sampled, mask, mode, *bounds)
        counts = mask.bool()
        torch.testing.assert_close(weights.expand(rows, columns)[counts], expected[counts], rtol=1e-12, atol=0.0)
    if rows > 3 and bounds == (0.8, 1.3):  # they bite
        assert (weights == 0.0).any() == mode.endswith("mask")
        assert (weights == 1.3).any() == mode.endswith("truncate")


def test_a_token_without_log_probability_weighs_1():
    old = torch.tensor([[-1.0, -2.0, -3.0]])
    sampled = torch.tensor([[-1.0 - math.log(2), torch.nan, torch.nan]])
    mask = torch.tensor([[1, 1, 0]])
    assert sampling_weights(old, sampled, mask, "token_truncate", None, 3.0).tolist() == [pytest.approx([2, 1, 1])]
    assert sampling_weights(old, sampled, mask, "sequence_mask", None, 3.0).tolist() == [pytest.approx([2])]
    assert sampling_weights(old, sampled, mask, "sequence_mask", None, 1.9).tolist() == [[0.0]]
    # a weight at a bound is not beyond it
    assert sampling_weights(old, old, mask, "token_mask", 1.0, 1.0).tolist() == [[1.0, 1.0, 1.0]]
    nothing = torch.full_like(old, torch.nan)
    assert sampling_weights(old, nothing, mask, "token_mask", 0.5, 2.0).tolist() == [[1.0, 1.0, 1.0]]


def test_off_policy_mask():
    """Only bad completions, and only those whose log-probability has fallen by more than the threshold."""
    logps = torch.tensor([[-1.5, -1.5], [-1.5, -1.5], [-1.5, -1.5], [-1.0, -1.0], [-1.5, -9.0]])
    sampled = torch.tensor([[-1.0, -1.0], [-1.0, -1.0], [-1.0, torch.nan], [-1.5, -1.5], [-1.0, -1.0]])
    advantages = torch.tensor([[-1.0], [1.0], [-1.0], [-1.0], [-1.0]])
    mask = torch.tensor([[1, 1], [1, 1], [1, 1], [1, 1], [1, 0]])
    assert off_policy_mask(logps, sampled, advantages, mask, 0.4).flatten().tolist() == [0, 1, 1, 1, 0]
    assert off_policy_mask(logps, sampled, advantages, mask, 0.2).flatten().tolist() == [0, 1, 0, 1, 0]
    assert off_policy_mask(logps, sampled, advantages, mask, 0.5).flatten().tolist() == [1, 1, 1, 1, 1]
    none = torch.zeros(1, 1)  # not a bad one
    assert off_policy_mask(logps[:1], sampled[:1], none, mask[:1], 0.4).item() == 1
    of_tokens = torch.tensor([[-1.0, 1.0]])
    assert off_policy_mask(logps[:1], sampled[:1], of_tokens, mask[:1], 0.4).tolist() == [[0, 1]]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("mode", SAMPLING_MODES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_sampler_against_loops(loss_type, mode, level):
    if loss_type == "vespo" and mode.startswith("sequence"):
        return  # has weights of tokens alone
    settings = {"epsilon_low": 0.2, "epsilon_high": 0.3, "beta": 0.04, "correct_kl": True, "off_policy_threshold": 0.1}
    settings |= {"loss_type": loss_type, "level": level, "max_completion_length": 9}
    num_dropped = 0
    for seed in range(3):
        logps, old, reference, advantages, mask, sampled = sampled_inputs(7, 6, seed)
        weights = sampling_weights(old, sampled, mask, mode, 0.7, 1.5)
        output = ClippedObjective(**settings)(
            logps,
            old,
            advantages,
            mask,
            reference,
            weights=weights,
            sampling_per_token_logps=sampled,
            num_tokens=num_tokens_of(loss_type),
        )
        expected = grpo_objective(
            logps,
            old,
            reference,
            advantages,
            mask,
            **settings,
            delta=None,
            num_tokens=11.0,
            weights=oracle.sampling_weights(old, sampled, mask, mode, 0.7, 1.5),
            sampled=sampled,
        )
        assert_same_loss_and_gradient(output.loss, expected, logps)
        num_dropped += int((off_policy_mask(logps, sampled, advantages.unsqueeze(1), mask, 0.1) == 0).sum())
    assert 0 < num_dropped < 21


def test_where_a_ratio_counts_as_clipped():
    ratio, up, down = torch.tensor([[0.5, 1.0, 1.5]]), torch.ones(1, 1), -torch.ones(1, 1)
    cispo = ClippedObjective(0.2, 1.2, loss_type="cispo")  # whose bound is epsilon_high itself
    for advantages, high in ((up, [False, False, True]), (down, [False] * 3)):
        output = cispo(ratio.log(), torch.zeros(1, 3), advantages.flatten(), torch.ones(1, 3), num_tokens=3)
        assert output.is_high_clipped.tolist() == [high]
        assert not output.is_low_clipped.any()
    # on the sequence level a token can still have an advantage of its own
    cispo = ClippedObjective(0.2, 1.2, loss_type="cispo", level="sequence")
    output = cispo(
        torch.full((1, 2), 0.5), torch.zeros(1, 2), torch.tensor([[1.0, -1.0]]), torch.ones(1, 2), num_tokens=2
    )
    assert output.is_high_clipped.tolist() == [[True, False]]
    assert output.is_low_clipped.tolist() == [[False, False]]
    for loss_type in ("sapo", "vespo"):
        objective = ClippedObjective(0.2, 0.2, loss_type=loss_type)
        output = objective(ratio.log(), torch.zeros(1, 3), up.flatten(), torch.ones(1, 3), num_tokens=3)
        assert not (output.is_low_clipped | output.is_high_clipped).any()
        assert (output.gamma is None) == (loss_type == "sapo")


def test_gamma_of_a_policy_that_has_not_moved_is_1():
    """And it falls where a completion has become more likely or less; the largest weights give 0, not NaN."""
    logps, mask = torch.full((3, 4), -1.0), torch.ones(3, 4)
    advantages = torch.tensor([1.0, -1.0, 0.0])
    objective = ClippedObjective(0.2, 0.2, loss_type="vespo")

    def gamma(shift):
        return objective(logps, logps - shift, advantages, mask, num_tokens=1).gamma.flatten().tolist()

    assert gamma(0.0) == [1.0, 1.0, 1.0]
    assert all(value < 1.0 for value in gamma(0.2)[:1] + gamma(-0.5)[:2])
    assert gamma(1e4) == [0.0, 0.0, 0.0]
    assert all(0.0 <= value < 1e-6 for value in gamma(-1e4))


# Normalizers


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_aggregate(loss_type):
    loss, mask = torch.rand(4, 6), (torch.rand(4, 6) < 0.7).long()
    options = {"num_rows": 4, "num_tokens": 20.0, "max_completion_length": 6}
    whole = aggregate(loss, mask, loss_type, **options)
    # 1 x 4 rows are 4 x 1 rows
    parts = [aggregate(loss[i : i + 1], mask[i : i + 1], loss_type, **options) for i in range(4)]
    torch.testing.assert_close(sum(parts), whole)
    # twice the normalizer, half the loss
    twice = {"num_rows": 8, "num_tokens": 40.0, "max_completion_length": 6}
    torch.testing.assert_close(aggregate(loss, mask, loss_type, **twice) * 2, whole)
    # no token: a zero with a backward
    loss.requires_grad_()
    nothing = aggregate(loss, torch.zeros_like(mask), loss_type, **options)
    nothing.backward()
    assert nothing.item() == 0.0
    assert not loss.grad.any()


def test_what_is_missing_is_named():
    tensors = (torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1), torch.ones(1, 1))
    with pytest.raises(ValueError, match=r"^loss_type='dr_grpo' needs max_completion_length"):
        ClippedObjective(0.2, 0.2, loss_type="dr_grpo")(*tensors)
    with pytest.raises(ValueError, match=r"^loss_type='dapo' needs num_tokens"):
        ClippedObjective(0.2, 0.2, loss_type="dapo")(*tensors)
    with pytest.raises(ValueError, match=r"must be one of grpo, bnpo, .*, vespo, got 'ppo'"):
        ClippedObjective(0.2, 0.2, loss_type="ppo")
    with pytest.raises(ValueError, match=r"must be one of grpo, .*, got 'ppo'"):
        aggregate(torch.zeros(1, 1), torch.ones(1, 1), "ppo")
    with pytest.raises(ValueError, match=r"mode must be one of token_truncate, .*, got 'mask'"):
        sampling_weights(*tensors[:2], tensors[3], "mask", None, 3.0)
    with pytest.raises(ValueError, match=r"beta=0.1 needs ref_per_token_logps"):
        ClippedObjective(0.2, 0.2, beta=0.1)(*tensors)


def test_the_clip_binds_beyond_its_bounds():
    """At a bound it does not bind yet, and without an advantage there is nothing to bind: as TRL counts."""
    ratio = torch.tensor([[0.5, 0.75, 1.0, 1.25, 1.5]])
    low, high = clip_binds(ratio, torch.tensor([[-1.0], [0.0], [1.0]]), 0.25, 0.25)
    assert low.tolist() == [[True, False, False, False, False], [False] * 5, [False] * 5]
    assert high.tolist() == [[False] * 5, [False] * 5, [False, False, False, False, True]]
    # and the gradient is what it is just before: 0 beyond the bound, the ratio times the advantage at it
    coefficient = gradient_coefficient(ratio, torch.tensor([[-1.0], [1.0]]), 0.25, 0.25)
    assert coefficient.tolist() == [[0.0, -0.75, -1.0, -1.25, -1.5], [0.5, 0.75, 1.0, 1.25, 0.0]]
    bounded = gradient_coefficient(ratio, torch.tensor([[-1.0]]), 0.25, 0.25, delta=1.25)
    assert bounded.tolist() == [[0.0, -0.75, -1.0, -1.25, 0.0]]


def test_the_correction_of_the_kl_is_asked_for():
    """Without `correct_kl` the coefficient of the KL is `pi_ref / pi - 1`, whatever the ratio is."""
    logps, reference = torch.tensor([[0.5]]).log(), torch.tensor([[0.25]]).log()
    settings = {"beta": 0.1, "per_token_logps": logps, "ref_per_token_logps": reference}
    coefficient = gradient_coefficient(torch.tensor([[1.1]]), torch.tensor([[2.0]]), 0.2, 0.2, **settings)
    assert coefficient.item() == pytest.approx(2.2 + 0.1 * (0.25 / 0.5 - 1))


def test_rows_that_are_left_out_are_counted():
    logps, old, _, advantages, mask = random_inputs(3, 4)
    for loss_type in ("grpo", "dr_grpo"):
        objective = ClippedObjective(0.2, 0.2, loss_type=loss_type, max_completion_length=4)
        loss = objective(logps, old, advantages, mask).loss
        assert objective(logps, old, advantages, mask, num_rows=6).loss.item() == pytest.approx(loss.item() / 2)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_what_there_is_to_say_about_the_loss(level, beta):
    logps, old, reference, advantages, mask = random_inputs(24, 7)
    output = ClippedObjective(0.2, 0.3, beta=beta, level=level)(logps, old, advantages, mask, reference)
    ratio = importance_ratio(logps, old, mask, level)
    assert torch.equal(output.ratio, ratio)
    assert not output.ratio.requires_grad
    low, high = (ratio < 0.8) & (advantages[:, None] < 0), (ratio > 1.3) & (advantages[:, None] > 0)
    assert low.any()
    assert high.any()
    assert torch.equal(output.is_low_clipped, low)
    assert torch.equal(output.is_high_clipped, high)
    counts = mask.bool() if level == "token" else torch.ones(24, 1, dtype=torch.bool)
    expected = {
        "clip_ratio/low_mean": low[counts].double().mean().item(),
        "clip_ratio/high_mean": high[counts].double().mean().item(),
        "clip_ratio/region_mean": (low | high)[counts].double().mean().item(),
    }
    if beta:
        kl = k3_kl(logps, reference)
        assert torch.equal(output.per_token_kl, kl)
        assert not output.per_token_kl.requires_grad
        expected["kl"] = kl[mask.bool()].mean().item()
    else:
        assert output.per_token_kl is None
    assert {name: value.item() for name, value in output.metrics.items()} == pytest.approx(expected)
