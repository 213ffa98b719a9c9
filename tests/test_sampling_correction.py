"""vLLM's importance sampling correction, from made-up log-probabilities of a sampler: TRL's gradient, with less work.

Tokens without a log-probability are among them, and bounds of the weights that bite. A real vLLM is in `tests/vllm`.
"""

import itertools

import pytest
import torch
from canned import canned_config, relative_difference, train_canned
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from trl_grpo_ext.iterations import MultiIterationMixin
from trl_grpo_ext.trainer import GRPOExtTrainer


class PaddedTrainer(MultiIterationMixin, GRPOTrainer):
    """Without packing: a forward's rows are those of the micro-batch."""


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
    names = ("tool_masks", "kinds")
    passed = {name: options.pop(name) for name in names if name in options}
    options = {
        "use_vllm": True,
        **bounds_of(options.get("vllm_importance_sampling_mode", "sequence_mask")),
        **options,
    }
    args = canned_config(output_dir, config_class, **options)
    return train_canned(trainer_class, args, policy, sampler_noise=noise, resume=resume, **passed)


@pytest.fixture(scope="module")
def start(policy):
    return AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).state_dict()


def check_parity(policy, start, tmp_path, ours, **options):
    expected = run(GRPOTrainer, policy, tmp_path / "theirs", **options)
    actual = run(ours, policy, tmp_path / "ours", **options)
    assert len(actual.exact_grad_norms) == options["max_steps"]
    assert 4 * sum(norm > 1e-3 for norm in expected.exact_grad_norms) >= len(expected.exact_grad_norms)
    assert actual.exact_grad_norms == pytest.approx(expected.exact_grad_norms, rel=1e-5, abs=1e-7)
    assert relative_difference(actual.weights, expected.weights, start) < 1e-5
    return expected, actual


def test_all_pairs_are_among_the_rows():
    met = set().union(*(pairs_of(row) for row in pairwise_rows()))
    assert met == all_pairs()
    assert all(is_possible(row) for row in pairwise_rows())


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, marks=[pytest.mark.slow] if number % 3 else [], id="-".join(str(v) for v in row.values()))
        for number, row in enumerate(pairwise_rows())
    ],
)
def test_trls_gradient(policy, start, tmp_path, row):
    row = dict(row)
    mu, accumulation, per_generation = row.pop("schedule")
    expected, ours = check_parity(
        policy,
        start,
        tmp_path,
        row.pop("trainer"),
        num_iterations=mu,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=per_generation,
        max_steps=2 * mu * per_generation // accumulation,
        **row,
    )
    mode = row["vllm_importance_sampling_mode"]
    lowest, _ = bounds_of(mode).values()
    smallest = min(expected.metric("sampling/importance_sampling_ratio/min"))
    assert smallest == (0.0 if mode.endswith("mask") else pytest.approx(lowest))  # the bounds bite
    if mu == 1 and accumulation == per_generation:
        assert not [forward for forward in ours.forwards if not forward.has_gradient]
